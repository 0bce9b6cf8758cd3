"""One call as spans of an expert worker, under the call's span of whichever traces it names.

    expert worker      the call's last message to its answer
    +- waiting            for the device, and for other calls that were computed first
    +- grouped GEMM       with the rows of other callers beside it

Only for calls that name a trace, and where `--traces` says where to.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from expert_worker.engine import ExpertResult
from grokmoe.tracing import Attributes, Tracing


class CallTrace:
    """Written when the call has been answered."""

    def __init__(self, tracing: Tracing, traceparents: Sequence[str], layer: int, num_rows: int) -> None:
        self._tracing, self._traceparents = tracing, tuple(traceparents)
        self._begin = time.monotonic()
        self._attributes: Attributes = {"layer": layer, "rows": num_rows}

    def end(self, result: ExpertResult | None, error: str = "") -> None:
        """result: None if there is none; error: why."""
        now = time.monotonic()
        for span in self._tracing.under(self._traceparents, "expert worker", self._begin):
            if result is not None:
                began = self._begin + result.queue_ns / 1e9
                span.child("waiting", self._begin, began)
                shared: Attributes = {"batch_rows": result.batch_rows, "batch_calls": result.batch_calls}
                span.child("grouped GEMM", began, began + result.compute_ns / 1e9, shared)
            span.end(now, self._attributes, error)
