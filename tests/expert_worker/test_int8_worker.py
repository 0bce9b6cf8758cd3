"""A worker whose experts are int8: chosen by a setting, held in half the memory, loaded and given up as others are."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
import torch

from expert_worker import weights
from expert_worker.config import ExpertWorkerSettings
from expert_worker.cpu_layers import QuantisedLayer
from expert_worker.engine import ExpertEngine
from expert_worker.expert_dtype import EXPERT_DTYPES, INT8, MAX_INT8_INPUTS, SAME
from expert_worker.experts import ExpertSet
from expert_worker.kernels import cpu_int8, reference_int8
from expert_worker.layers import new_layer
from expert_worker.loader import ExpertLoader
from expert_worker.service import ExpertService
from grokmoe.checkpoint import Checkpoint
from grokmoe.errors import ConfigError, Reason, ResourceExhausted
from grokmoe.model_config import TINY, Gelu
from grokmoe.tensor_names import expert
from grokmoe.v1 import expert_pb2
from grokmoe.v1.tensor_pb2 import DATA_TYPE_BFLOAT16
from tests.expert_worker.small_model import CPU, HELD, device_thread, draw, new_metrics, write


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"))


def load(directory: Path, held: dict[int, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> ExpertSet:
    with Checkpoint.open(directory) as checkpoint:
        experts = ExpertSet(checkpoint.config, held, dtype, CPU, expert_dtype=INT8)
        weights.load(experts, checkpoint)
    return experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_a_checkpoint(directory: Path, dtype: torch.dtype) -> None:
    """Each matrix lands where it belongs."""
    experts = load(directory, {1: (2, 5)}, dtype)
    rows_ND = draw(7, dtype=dtype)
    with Checkpoint.open(directory) as checkpoint:
        stacks = [
            torch.stack([checkpoint.read(expert(1, e, linear), dtype) for e in (2, 5)])
            for linear in ("linear", "linear_v", "linear_1")
        ]
    wanted_ND = reference_int8.expert_mlp(rows_ND, [3, 4], *stacks, Gelu.ERF)
    out_ND = experts.forward(1, (2, 5), (3, 4), rows_ND)
    assert out_ND.dtype is dtype
    error = (out_ND.double() - wanted_ND.double()).square().mean() / wanted_ND.double().square().mean()
    assert error.sqrt() < 2e-3


def test_experts_that_come_and_go_leave_the_others_as_they_are(directory: Path) -> None:
    whole = load(directory, HELD)
    experts = load(directory, {0: (3,)})
    rows_ND = draw(5, dtype=torch.bfloat16)
    expected = whole.forward(0, (3,), (5,), rows_ND)
    assert torch.equal(experts.forward(0, (3,), (5,), rows_ND), expected)
    with Checkpoint.open(directory) as checkpoint:
        weights.load_layer(experts, checkpoint, 0, (1, 6))
    assert experts.layers[0].expert_ids == (1, 3, 6)
    assert torch.equal(experts.forward(0, (3,), (5,), rows_ND), expected)
    assert torch.equal(experts.forward(0, (6,), (5,), rows_ND), whole.forward(0, (6,), (5,), rows_ND))
    experts.remove(0, (3,))
    assert torch.equal(experts.forward(0, (1,), (5,), rows_ND), whole.forward(0, (1,), (5,), rows_ND))


def test_its_bytes_are_counted() -> None:
    """By what there is of tensors, and near half of what bfloat16 takes where the model is not tiny."""
    quantised = cpu_int8.QuantisedExpert(TINY.hidden_size, TINY.intermediate_size)
    parts = (quantised.gate_up, quantised.down)
    experts = ExpertSet(TINY, {}, torch.bfloat16, CPU, expert_dtype=INT8)
    assert experts.expert_bytes == sum(each.bytes_PSOI.nbytes + each.scales_PO.nbytes for each in parts)
    wide = dataclasses.replace(TINY, hidden_size=1024, intermediate_size=4096)
    ratio = ExpertSet(wide, {}, torch.bfloat16, CPU, expert_dtype=INT8).expert_bytes / (2 * 3 * 1024 * 4096)
    assert 0.5 < ratio < 0.502


def test_warm_up(directory: Path) -> None:
    load(directory, {0: (1,)}).warm_up()
    ExpertSet(TINY, {}, torch.bfloat16, CPU, expert_dtype=INT8).warm_up()


def test_room_while_loading(directory: Path) -> None:
    """A float32 matrix takes more than the whole expert does in int8."""

    async def scenario() -> None:
        with Checkpoint.open(directory) as checkpoint, device_thread() as device:
            experts = ExpertSet(TINY, {}, torch.float32, CPU, expert_dtype=INT8)
            size, matrix = experts.expert_bytes, TINY.hidden_size * TINY.intermediate_size * 4
            assert matrix > size
            room = size + matrix - 1
            loader = ExpertLoader(experts, checkpoint, device, room=lambda _: room)
            try:
                with pytest.raises(ResourceExhausted) as raised:
                    await loader.load(frozenset({(0, 1)}))
                assert raised.value.reason is Reason.NO_ROOM
                room += 1
                assert (await loader.load(frozenset({(0, 1)}))).num_bytes == size
            finally:
                loader.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(("expert_dtype", "described"), [(SAME, ""), (INT8, "int8")])
def test_it_says_so(expert_dtype: str, described: str) -> None:
    async def scenario() -> expert_pb2.ExpertDescribeResponse:
        experts = ExpertSet(TINY, {}, torch.bfloat16, CPU, expert_dtype=expert_dtype)
        metrics, _ = new_metrics()
        with device_thread() as device:
            service = ExpertService(ExpertEngine(experts, metrics, device), metrics, 64)
            return await service.Describe(expert_pb2.ExpertDescribeRequest(), None)

    answer = asyncio.run(scenario())
    assert answer.expert_dtype == described
    assert answer.dtype == DATA_TYPE_BFLOAT16


def test_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match="on a CPU only"):
        ExpertWorkerSettings(expert_dtype=INT8, device="cuda:1")
    with pytest.raises(ConfigError, match="on a CPU only"):
        new_layer(TINY, torch.bfloat16, torch.device("cuda"), expert_dtype=INT8)
    wide = dataclasses.replace(TINY, intermediate_size=MAX_INT8_INPUTS + 4)
    with pytest.raises(ConfigError, match=f"{MAX_INT8_INPUTS} at most"):
        new_layer(wide, torch.bfloat16, CPU, expert_dtype=INT8)
    with pytest.raises(ConfigError, match=f"must be one of {', '.join(EXPERT_DTYPES)}"):
        new_layer(TINY, torch.bfloat16, CPU, expert_dtype="int4")


def test_the_layer_that_is_chosen() -> None:
    assert isinstance(new_layer(TINY, torch.bfloat16, CPU, expert_dtype=INT8), QuantisedLayer)
    assert not isinstance(new_layer(TINY, torch.bfloat16, CPU), QuantisedLayer)
