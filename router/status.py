"""The engine's state as the messages of GetModel and GetStatus."""

from __future__ import annotations

from grokmoe.model_config import ModelConfig
from grokmoe.v1 import control_pb2 as pb
from grokmoe.v1 import generation_pb2
from router.engine import Engine
from router.transport.local import LOCAL
from router.worker_state import WorkerState

_STATE = {
    WorkerState.JOINING: pb.WORKER_STATE_JOINING,
    WorkerState.READY: pb.WORKER_STATE_READY,
    WorkerState.SUSPECT: pb.WORKER_STATE_SUSPECT,
    WorkerState.DRAINING: pb.WORKER_STATE_DRAINING,
    WorkerState.DEAD: pb.WORKER_STATE_DEAD,
}


def model(config: ModelConfig, name: str, dtype: str, has_tokenizer: bool) -> generation_pb2.GetModelResponse:
    """What is served."""
    return generation_pb2.GetModelResponse(
        name=name,
        config_hash=config.content_hash,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        hidden_size=config.hidden_size,
        eos_token_ids=config.eos_token_ids,
        has_tokenizer=has_tokenizer,
        dtype=dtype,
        bos_token_id=config.bos_token_id,
    )


def cluster(engine: Engine) -> pb.GetStatusResponse:
    """Workers, placement, load and legs."""
    answer = pb.GetStatusResponse(
        waiting=engine.num_waiting,
        running=engine.num_running,
        steps=engine.report.num_steps,
        preemptions=engine.report.num_preemptions,
    )
    for leg, seconds in engine.report.leg_seconds.items():
        answer.legs.add(leg=leg, total_seconds=seconds, count=engine.report.num_steps)
    for cell in engine.cells:
        worker = answer.workers.add(
            role=pb.WORKER_ROLE_ATTENTION, index=cell.index, address=cell.link.address, state=_STATE[cell.state]
        )
        if cell.info is not None:
            ledger = cell.scheduler.ledger
            worker.incarnation, worker.device = cell.info.incarnation, cell.info.device
            worker.num_pages, worker.used_pages = ledger.num_pages, ledger.num_used
            worker.cached_pages = ledger.num_cached
    _add_experts(engine, answer)
    return answer


def _add_experts(engine: Engine, answer: pb.GetStatusResponse) -> None:
    rows = engine.counter.by_expert()
    if engine.pool is None:
        all_experts = range(engine.config.num_experts)
        device = engine.cells[0].info.device if engine.cells[0].info else ""
        answer.workers.add(
            role=pb.WORKER_ROLE_EXPERT,
            address=LOCAL,
            state=pb.WORKER_STATE_READY,
            device=device,
            experts=all_experts,
        )
        for expert in all_experts:
            answer.placement.add(expert=expert, workers=[0], rows=rows[expert])
        return
    for member in engine.pool.members:
        worker = answer.workers.add(
            role=pb.WORKER_ROLE_EXPERT, index=member.index, address=member.link.address, state=_STATE[member.state]
        )
        if member.info is not None:
            worker.incarnation, worker.device = member.info.incarnation, member.info.device
            worker.experts.extend(sorted({expert for expert, _, _ in member.info.experts}))
    if engine.pool.placement is not None:
        for expert, workers in enumerate(engine.pool.placement.holders[0]):
            answer.placement.add(expert=expert, workers=workers, rows=rows[expert])
