"""Continuous batching, chunked prefill, preemption, prefix reuse: who computes what next on one attention worker.

scheduler: steps, out and back; turns: whose step it is, while somebody may be what kills workers; filling: what a step
holds; roster: who waits, who runs and with which pages; promises: pages that are being computed; queue: by age.
"""

from router.scheduler.scheduler import Scheduler

__all__ = ["Scheduler"]
