"""The hot paths: each is a function that can be called again and again and does the same each time.

A model of two layers and random weights, one thread: what is counted is what the program does, not what the products
do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from attention_worker.engine import AttentionEngine, AttentionEngineSettings, MoeInput
from attention_worker.weights import load_weights
from expert_worker import weights as expert_weights
from expert_worker.experts import ExpertSet
from grokmoe import tensor_names, tensors
from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.device_thread import DeviceThread
from grokmoe.model_config import ModelConfig
from grokmoe.plan_codec import plan_from_proto, plan_to_proto
from grokmoe.step_plan import SequenceChunk, StepPlan, TokenSampling
from grokmoe.telemetry import AttentionMetrics, new_registry
from grokmoe.v1 import attention_pb2, expert_pb2
from router import dispatch, row_loops
from router.gating import gate
from router.legs import Legs
from router.moe import Gates, LocalMoe, RowCounter
from router.pages import PageLedger
from router.plan_writer import write_plan
from router.request import Request, SamplingSettings
from router.scheduler import Scheduler
from router.sequence import Sequence
from router.step import SchedulerSettings, Step

HotPath = Callable[[], object]

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    num_experts=8,
    experts_per_token=2,
    context_length=4096,
)
DTYPE = torch.bfloat16

WORKERS = {expert: expert // 2 for expert in range(CONFIG.num_experts)}
"""Who computes which expert."""

MANY, SOME = 256, 8
"""Sequences of a step where only the router counts, and where a model computes."""

PAGE_SIZE = 16
"""Positions; of every path, so that in as many steps each sequence needs a new page once."""


class Scheduling:
    """Sequences that decode for ever, and one step of them after another."""

    def __init__(self, count: int) -> None:
        settings = SchedulerSettings(context_length=1 << 20, max_step_tokens=count, max_running=count)
        self._scheduler = Scheduler(settings, PageLedger(count * 64, PAGE_SIZE))
        for number in range(count):
            greedy = SamplingSettings(temperature=0)
            request = Request(request_id=str(number), prompt_ids=(4,), sampling=greedy, max_tokens=60 * PAGE_SIZE)
            self._scheduler.add(Sequence(request, (0.0, number)))
        self.run()

    def run(self) -> Step:
        """A whole step: who, and then their tokens."""
        step = self._scheduler.schedule()
        assert step is not None
        self._scheduler.complete(step, [5] * len(step.chunks))
        return step

    def run_page(self) -> None:
        """As many steps as a page has positions: every sequence begins a new one once."""
        for _ in range(PAGE_SIZE):
            self.run()


def plan_of(count: int, incarnation: str = "one", position: int = 100) -> StepPlan:
    """A step of sequences that decode at a position."""
    num_pages = position // PAGE_SIZE + 1
    chunks = [
        SequenceChunk((4 + n,), position, tuple(range(n * num_pages, (n + 1) * num_pages)), TokenSampling())
        for n in range(count)
    ]
    return StepPlan(incarnation, tuple(chunks))


def plan_there_and_back() -> StepPlan:
    """A step's plan as the router writes it and the attention worker reads it."""
    data = tensors.encode(attention_pb2.StepRequest(step_id=1, plan=plan_to_proto(plan_of(MANY))))
    return plan_from_proto(tensors.decode(attention_pb2.StepRequest, data)[0].plan)


def rows_messages(num_rows: int, width: int) -> list[bytes]:
    """A call of an expert worker, as messages."""
    request = expert_pb2.ForwardRequest(request_id=1, layer=0, expert_ids=[0], counts=[num_rows])
    return list(tensors.encode_rows(request, torch.zeros(num_rows, width, dtype=DTYPE), "request_id"))


def rows_there_and_back(num_rows: int, width: int) -> object:
    """The same, written and read."""
    reader = tensors.RowAssembler(expert_pb2.ForwardRequest, "request_id", num_rows, width)
    return [reader.add(message) for message in rows_messages(num_rows, width)][-1]


class Model:
    """The fused model, on the caller's thread."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        row_loops.compile_all(DTYPE)
        with tempfile.TemporaryDirectory() as folder:
            random_checkpoint(Path(folder) / "model", CONFIG, dtype=DTYPE)
            with Checkpoint.open(Path(folder) / "model") as checkpoint:
                held = dict.fromkeys(range(CONFIG.num_layers), tuple(range(CONFIG.num_experts)))
                self.experts = ExpertSet(CONFIG, held, DTYPE, torch.device("cpu"))
                expert_weights.load(self.experts, checkpoint)
                gates = [checkpoint.read(tensor_names.gate(n), torch.float32) for n in range(CONFIG.num_layers)]
                weights = load_weights(checkpoint, DTYPE, torch.device("cpu"))
        self.gates = Gates.from_weights(gates)
        self._moe = LocalMoe(CONFIG, self.gates, self.experts.forward, RowCounter(CONFIG), Legs())
        sizes = AttentionEngineSettings(MANY, PAGE_SIZE, MANY)
        device = DeviceThread("check")
        self._engine = AttentionEngine(CONFIG, weights, sizes, AttentionMetrics(new_registry()), device)
        device.stop()
        self._plan = plan_of(SOME, self._engine.incarnation)
        self._x_TD = torch.randn(MANY, CONFIG.hidden_size).to(DTYPE)

    def step(self) -> None:
        """Sequences decode one token each."""
        run = self._engine.begin(self._plan)
        at = run.advance(None)
        while isinstance(at, MoeInput):
            at = run.advance(self._moe.fill_now(at.layer, at.x_TD))

    def experts_of_one_call(self) -> None:
        """Rows of one call, spread over all experts."""
        each = MANY // CONFIG.num_experts
        self.experts.forward(0, tuple(range(CONFIG.num_experts)), (each,) * CONFIG.num_experts, self._x_TD)

    def rows_to_experts_and_back(self) -> None:
        """Gate, plan, gather, combine."""
        weights_TK, ids_TK = gate(self._x_TD, self.gates.per_layer[0], CONFIG)
        plan = dispatch.plan(ids_TK, weights_TK, WORKERS)
        dispatch.combine(plan, dispatch.gather(plan, self._x_TD))


def writing_plans() -> HotPath:
    """The plan of a step of many sequences."""
    step = Scheduling(MANY).run()
    return lambda: write_plan(step, "one")
