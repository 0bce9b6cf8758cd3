"""The engine's state as the messages of GetModel and Control."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from grokmoe.expert_messages import to_messages
from grokmoe.expert_units import expert_of, slice_of
from grokmoe.model_config import ModelConfig
from grokmoe.v1 import control_pb2 as pb
from grokmoe.v1 import generation_pb2
from router.engine import Engine
from router.experts import ExpertMember, ExpertPool, Phase
from router.placement import ExpertLayers, pairs_of, ranges_of
from router.transport.base import PipelineStage
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
            worker.incarnation, worker.device = cell.info.incarnation, cell.info.place
            worker.num_pages, worker.used_pages = ledger.num_pages, ledger.num_used
            worker.cached_pages = ledger.num_cached
            worker.stages.extend(_stage(stage) for stage in cell.info.stages)
    _add_experts(engine, answer)
    return answer


def _stage(stage: PipelineStage) -> pb.PipelineStage:
    info = stage.info
    return pb.PipelineStage(
        address=stage.address,
        layer_begin=info.layer_begin,
        layer_end=info.layer_end,
        device=info.place,
        incarnation=info.incarnation,
    )


def _add_experts(engine: Engine, answer: pb.GetStatusResponse) -> None:
    rows, layer_rows = engine.counter.by_expert(), list(zip(*engine.counter.rows_LE, strict=True))
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
            answer.placement.add(expert=expert, workers=[0], rows=rows[expert], layer_rows=layer_rows[expert])
        return
    pool = engine.pool
    pool.rebalancer.look()
    traffic = pool.rebalancer.traffic
    for member in pool.members:
        worker = answer.workers.add(
            role=pb.WORKER_ROLE_EXPERT, index=member.index, address=member.link.address, state=_STATE[member.state]
        )
        if member.info is not None:
            worker.incarnation, worker.device = member.info.incarnation, member.info.device
            worker.experts.extend(sorted({expert_of(unit) for unit, _, _ in member.held}))
            worker.held.extend(to_messages(member.held))
            worker.loading.extend(to_messages(_loading(pool, member)))
            worker.rows_per_second = traffic.rows_per_second(member)
    if pool.placement is not None:
        for unit, workers in sorted(pool.placement.holders[0].items(), key=lambda held: slice_of(held[0])):
            expert, index, num_slices = slice_of(unit)
            entry = answer.placement.add(
                expert=expert, workers=workers, rows=rows[expert], layer_rows=layer_rows[expert]
            )
            if num_slices > 1:
                entry.slice, entry.num_slices = index, num_slices
    answer.placement_version = pool.placement_version
    answer.imbalance = traffic.imbalance()
    for each in pool.moves.under_way:
        source = each.source.link.address if each.source else ""
        target = each.target.link.address if each.target else ""
        answer.moves.append(move(each.experts, source, target, each.phase))


def _loading(pool: ExpertPool, member: ExpertMember) -> Iterable[ExpertLayers]:
    """What we have it load, and what it said that others have it load."""
    assert member.info is not None
    ours = [each.experts for each in pool.moves.under_way if each.target is member and each.phase is Phase.LOADING]
    return ranges_of(pairs_of([*member.info.loading, *itertools.chain(*ours)]) - pairs_of(member.held))


def move(experts: Iterable[ExpertLayers], source: str, target: str, phase: str = "") -> pb.ExpertMove:
    """A move as a message. `from` is a word of Python, so it cannot be named like the others."""
    return pb.ExpertMove(experts=to_messages(experts), to=target, phase=phase, **{"from": source})
