"""What this router tells gateways of itself: model, server and load, in vLLM's messages."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

import grokmoe
from grokmoe.checkpoint import read_config
from router.engine import Engine
from router.worker_state import WorkerState

SERVER_TYPE = "grokmoe"


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What is served, and what its config.json says beyond what this project reads of it."""

    name: str
    dtype: str
    directory: Path
    model_type: str = ""
    architectures: tuple[str, ...] = ()
    pad_token_id: int = 0

    @classmethod
    def read(cls, name: str, dtype: str, directory: Path) -> ServedModel:
        """From a checkpoint's directory, which has been loaded: its config.json is known to be good."""
        raw, _ = read_config(directory)
        return cls(
            name,
            dtype,
            directory.resolve(),
            str(raw.get("model_type", "")),
            tuple(map(str, raw.get("architectures") or ())),
            raw.get("pad_token_id") or 0,
        )


def model_info(model: ServedModel, engine: Engine) -> Any:
    """A GetModelInfoResponse. Its numbers cannot be absent: an id that the model does not have is 0."""
    config = engine.config
    return vllm.GetModelInfoResponse(
        model_path=str(model.directory),
        is_generation=True,
        max_context_length=config.context_length,
        vocab_size=config.vocab_size,
        served_model_name=model.name,
        tokenizer_path=str(model.directory),
        model_type=model.model_type,
        architectures=model.architectures,
        eos_token_ids=config.eos_token_ids,
        pad_token_id=model.pad_token_id,
        bos_token_id=config.bos_token_id or 0,
        max_req_input_len=config.context_length - 1,
    )


def server_info(model: ServedModel, engine: Engine, uptime: float, last_received: float) -> Any:
    """A GetServerInfoResponse. uptime: seconds; last_received: time of the last request, 0 before the first."""
    joined = [cell for cell in engine.cells if cell.info is not None]
    return vllm.GetServerInfoResponse(
        active_requests=engine.num_running + engine.num_waiting,
        last_receive_timestamp=last_received,
        uptime_seconds=uptime,
        server_type=SERVER_TYPE,
        data_parallel_size=1,
        kv_cache_dtype="auto",
        block_size=joined[0].scheduler.ledger.page_size if joined else 0,
        model_dtype=f"torch.{model.dtype}",
        max_num_seqs=_max_running(engine),
        constrained_decoding_start="first_token",
    )


def loads(engine: Engine) -> Any:
    """A GetLoadsResponse: all attention workers together, as one rank."""
    ledgers = [cell.scheduler.ledger for cell in engine.cells if cell.info is not None]
    num_pages = sum(ledger.num_pages for ledger in ledgers)
    max_running = _max_running(engine)
    load = vllm.SchedulerLoad(
        num_running_reqs=engine.num_running,
        num_waiting_reqs=engine.num_waiting,
        num_total_reqs=engine.num_running + engine.num_waiting,
        num_used_tokens=sum(ledger.num_used * ledger.page_size for ledger in ledgers),
        max_total_num_tokens=sum(ledger.num_pages * ledger.page_size for ledger in ledgers),
        token_usage=sum(ledger.num_used for ledger in ledgers) / max(1, num_pages),
        utilization=engine.num_running / max(1, max_running),
        max_running_requests=max_running,
    )
    now = datetime.datetime.now(datetime.UTC).isoformat()
    return vllm.GetLoadsResponse(timestamp=now, version=grokmoe.__version__, dp_rank_count=1, loads=[load])


def health(engine: Engine) -> Any:
    """A HealthCheckResponse: healthy while an attention worker can be given work."""
    ready = sum(cell.state is WorkerState.READY for cell in engine.cells)
    return vllm.HealthCheckResponse(
        healthy=ready > 0, message=f"{ready} of {len(engine.cells)} attention workers are ready"
    )


def _max_running(engine: Engine) -> int:
    return sum(cell.scheduler.settings.max_running for cell in engine.cells if cell.info is not None)
