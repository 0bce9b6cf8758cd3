"""The engine's state as the messages of GetModel and Control."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from grokmoe.adapter_codec import adapter_to_proto
from grokmoe.v1 import control_pb2 as pb
from grokmoe.v1 import generation_pb2
from grokmoe.v1.expert_pb2 import ExpertRange
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


def model(engine: Engine, name: str, dtype: str, has_tokenizer: bool) -> generation_pb2.GetModelResponse:
    """What is served."""
    config = engine.config
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
        adapters=[adapter.name for adapter in engine.adapters.table.served],
    )


def adapters(engine: Engine) -> pb.ListAdaptersResponse:
    """Those that requests can name, and those on their way out."""
    table, answer = engine.adapters.table, pb.ListAdaptersResponse()
    for info in sorted([*table.served, *table.leaving], key=lambda info: (info.name, table.is_leaving(info.id))):
        answer.adapters.add(
            adapter=adapter_to_proto(info),
            sequences=table.num_sequences(info.id),
            workers=engine.adapters.workers_with(info.id),
            leaving=table.is_leaving(info.id),
        )
    return answer


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
        device=info.device,
        incarnation=info.incarnation,
    )


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
    pool = engine.pool
    pool.rebalancer.look()
    traffic = pool.rebalancer.traffic
    for member in pool.members:
        worker = answer.workers.add(
            role=pb.WORKER_ROLE_EXPERT, index=member.index, address=member.link.address, state=_STATE[member.state]
        )
        if member.info is not None:
            worker.incarnation, worker.device = member.info.incarnation, member.info.device
            worker.experts.extend(sorted({expert for expert, _, _ in member.held}))
            worker.held.extend(ranges(member.held))
            worker.loading.extend(ranges(_loading(pool, member)))
            worker.rows_per_second = traffic.rows_per_second(member)
    if pool.placement is not None:
        for expert, workers in enumerate(pool.placement.holders[0]):
            answer.placement.add(expert=expert, workers=workers, rows=rows[expert])
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


def ranges(experts: Iterable[ExpertLayers]) -> list[ExpertRange]:
    """Experts and their layers as messages."""
    return [ExpertRange(expert=expert, layer_begin=begin, layer_end=end) for expert, begin, end in experts]


def move(experts: Iterable[ExpertLayers], source: str, target: str, phase: str = "") -> pb.ExpertMove:
    """A move as a message. `from` is a word of Python, so it cannot be named like the others."""
    return pb.ExpertMove(experts=ranges(experts), to=target, phase=phase, **{"from": source})
