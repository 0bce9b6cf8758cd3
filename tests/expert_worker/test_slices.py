"""Slices of experts in a worker: what is read, what is computed, what is held, and what a caller is told."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expert_worker import weights
from expert_worker.cells import Cells, by_layer
from expert_worker.engine import ExpertEngine
from expert_worker.expert_dtype import INT8, SAME
from expert_worker.experts import ExpertSet
from expert_worker.kernels import reference
from expert_worker.layer import LayerWeights
from expert_worker.loader import ExpertLoader
from expert_worker.mixed_layer import MixedLayer, narrowed, resized
from expert_worker.service import ExpertService
from expert_worker.stacked_layers import StackedLayer
from grokmoe.channel import open_channel
from grokmoe.checkpoint import Checkpoint
from grokmoe.errors import ConfigError, FailedPrecondition, InvalidRequest, Reason, ResourceExhausted
from grokmoe.expert_messages import from_messages, to_messages
from grokmoe.expert_ranges import ranges_of
from grokmoe.expert_spec import parse_experts
from grokmoe.expert_units import unit_of, units_of
from grokmoe.model_config import TINY, Gelu
from grokmoe.server import RoleServer
from grokmoe.tensor_names import EXPERT_LINEARS, expert
from grokmoe.v1 import expert_pb2
from tests.expert_worker.small_model import CPU, assert_near, device_thread, draw, load, new_metrics, twin, until, write
from tests.expert_worker.test_service import NAME, Stream

CONFIG = dataclasses.replace(TINY, intermediate_size=128)
DTYPES = [torch.float32, torch.bfloat16]
MIX = "0,2+1:1-2/2+2:2/2+3:all/4+0:3/4"
"""Whole, halves, quarters, and of some experts more than one of these: whatever a worker may hold."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"), CONFIG)


def held(spec: str) -> dict[int, tuple[int, ...]]:
    return parse_experts(spec, CONFIG.num_experts, CONFIG.num_layers)


def sliced_twin(directory: Path, layer: int, unit: int, rows_ND: torch.Tensor) -> torch.Tensor:
    """A slice by the definition: of the whole matrices, the rows and columns that are not in it do not count."""
    number, index, num_slices = unit & 0xFFFF, unit >> 16 & 0xFFFF, (unit >> 32) + 1
    width = CONFIG.intermediate_size // num_slices
    mine = slice(index * width, (index + 1) * width)
    with Checkpoint.open(directory) as checkpoint:
        gate_FD, up_FD, down_DF = (
            checkpoint.read(expert(layer, number, each), rows_ND.dtype) for each in EXPERT_LINEARS
        )
    weights_ = gate_FD[None, mine], up_FD[None, mine], down_DF[None, :, mine]
    return reference.expert_mlp(rows_ND, [len(rows_ND)], *weights_, Gelu.ERF)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_slices", [2, 4])
def test_slices_are_what_they_are_by_definition(directory: Path, num_slices: int, dtype: torch.dtype) -> None:
    experts, rows_ND = load(directory, dtype, held(f"1,5:all/{num_slices}")), draw(7, dtype=dtype)
    for unit in units_of(5, num_slices):
        assert_near(experts.forward(1, [unit], [7], rows_ND), sliced_twin(directory, 1, unit, rows_ND))


@pytest.mark.parametrize("num_slices", [2, 4])
def test_slices_sum_to_the_expert(directory: Path, num_slices: int) -> None:
    experts, rows_ND = load(directory, held=held(f"all:all/{num_slices}")), draw(5)
    for layer, number in itertools.product(range(CONFIG.num_layers), range(CONFIG.num_experts)):
        parts = [experts.forward(layer, [unit], [5], rows_ND) for unit in units_of(number, num_slices)]
        assert_near(torch.stack(parts).sum(0), twin(directory, layer, [number], [5], rows_ND))


@pytest.mark.parametrize("expert_dtype", [SAME, INT8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mix_of_widths_gives_each_unit_its_own_bits(
    directory: Path, dtype: torch.dtype, expert_dtype: str, data: st.DataObject
) -> None:
    """Whatever is called together, and however rows are shared out among the units, none and all to one included."""
    experts = _set(directory, MIX, dtype, expert_dtype)
    units = experts.layers[0].expert_ids
    assert isinstance(experts.layers[0], MixedLayer)
    asked = sorted(data.draw(st.sets(st.sampled_from(units))))
    counts = [data.draw(st.sampled_from([0, 0, 1, 2, 17])) for _ in asked]
    rows_ND = draw(sum(counts), dtype=dtype, seed=data.draw(st.integers(0, 99)))
    out_ND = experts.forward(0, asked, counts, rows_ND)
    assert out_ND.shape == rows_ND.shape
    assert out_ND.dtype is dtype
    begin = 0
    for unit, count in zip(asked, counts, strict=True):
        part = slice(begin, begin + count)
        alone = _set(directory, MIX, dtype, expert_dtype).forward(0, [unit], [count], rows_ND[part])
        if dtype is torch.bfloat16 or expert_dtype == INT8:
            assert torch.equal(out_ND[part], alone)
        else:
            assert_near(out_ND[part], alone)
        begin += count


_SETS: dict[tuple[object, ...], ExpertSet] = {}


def _set(directory: Path, spec: str, dtype: torch.dtype, expert_dtype: str) -> ExpertSet:
    key = (spec, dtype, expert_dtype)
    if key not in _SETS:
        with Checkpoint.open(directory) as checkpoint:
            experts = ExpertSet(checkpoint.config, held(spec), dtype, CPU, expert_dtype=expert_dtype)
            weights.load(experts, checkpoint)
        _SETS[key] = experts
    return _SETS[key]


def test_int8_slices_are_near(directory: Path) -> None:
    """Scales per output of the slice; linear_1's are those of its columns alone."""
    rows_ND = draw(64, dtype=torch.bfloat16)
    experts = _set(directory, "all:all/4", torch.bfloat16, INT8)
    wanted = twin(directory, 0, [3], [64], rows_ND.float()).double()
    out = torch.stack([experts.forward(0, [unit], [64], rows_ND).double() for unit in units_of(3, 4)]).sum(0)
    error = (out - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    whole = _set(directory, "all", torch.bfloat16, INT8).forward(0, [3], [64], rows_ND).double()
    error_whole = (whole - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error < 1.1 * error_whole < 0.03


def test_stacked_slices(directory: Path) -> None:
    """The layout for other devices than the CPU, here with the twin as its kernel."""
    rows_ND = draw(9)
    layer = resized(stacked(1), held("0+3:1/2+3:2/2+7:4/4")[0], stacked)
    for unit in layer.expert_ids:
        whole = _set(directory, "0+3:all/2+7:all/4", torch.float32, SAME)
        for linear in EXPERT_LINEARS:
            layer.put(unit, linear, _matrix(directory, unit, linear))
        assert_near(layer.forward([unit], [9], rows_ND), whole.forward(0, [unit], [9], rows_ND))


def stacked(num_slices: int) -> LayerWeights:
    return StackedLayer(narrowed(CONFIG, num_slices), torch.float32, CPU, reference.expert_mlp)


def _matrix(directory: Path, unit: int, linear: str) -> torch.Tensor:
    number, index, num_slices = unit & 0xFFFF, unit >> 16 & 0xFFFF, (unit >> 32) + 1
    with Checkpoint.open(directory) as checkpoint:
        weight = checkpoint.read(expert(0, number, linear), torch.float32)  # type: ignore[arg-type]
    return weight.chunk(num_slices, 1 if linear == "linear_1" else 0)[index]


def test_only_the_slice_is_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    original = Checkpoint.read

    def record(self: Checkpoint, *args: object) -> torch.Tensor:
        part = original(self, *args)  # type: ignore[arg-type]
        sizes.append(tuple(part.shape))
        return part

    monkeypatch.setattr(Checkpoint, "read", record)
    load(directory, held={1: (unit_of(2, 1, 4),)})
    D, F = CONFIG.hidden_size, CONFIG.intermediate_size
    assert sizes == [(F // 4, D), (F // 4, D), (D, F // 4)]
    monkeypatch.setattr(weights, "PIECE_BYTES", 7 * (F // 4) * 4)
    pieces = load(directory, held={1: (unit_of(2, 1, 4),)})
    assert (7, F // 4) in sizes, "a size that does not divide the rows"
    rows_ND = draw(3)
    assert_near(
        pieces.forward(1, [unit_of(2, 1, 4)], [3], rows_ND), sliced_twin(directory, 1, unit_of(2, 1, 4), rows_ND)
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("0:1/3", "experts: the number of slices is 3, which does not divide the ffn dimension 128"),
        ("0:1/8", "is 8: slices 16 wide of the ffn dimension 128, must be a multiple of 32"),
    ],
)
def test_slices_that_cannot_be(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ExpertSet(CONFIG, held(spec), torch.float32, CPU)


def test_a_layer_of_one_width_is_nothing_else(directory: Path) -> None:
    """So whole experts pay nothing for there being slices elsewhere."""
    experts = _set(directory, "0-3@0+4:1/2@1", torch.float32, SAME)
    assert not any(isinstance(layer, MixedLayer) for layer in experts.layers)
    mixed = load(directory, held=held("0+1:1/2+2:3/4"))
    kept = mixed.layers[0]
    assert isinstance(kept, MixedLayer)
    assert kept.expert_ids == (0, unit_of(1, 0, 2), unit_of(2, 2, 4))
    mixed.remove(0, [unit_of(1, 0, 2)])
    assert isinstance(mixed.layers[0], MixedLayer)
    assert mixed.layers[0].parts[1] is kept.parts[1], "what stays is not copied"
    mixed.remove(0, [0])
    assert mixed.layers[0] is kept.parts[4]
    mixed.remove(0, [unit_of(2, 2, 4)])
    assert mixed.layers[0].expert_ids == ()
    rows_ND = draw(2)
    out_ND = kept.forward([0, unit_of(1, 0, 2)], [1, 1], rows_ND)
    assert_near(out_ND[:1], twin(directory, 0, [0], [1], rows_ND[:1]))


def test_calls_for_slices_are_checked(directory: Path) -> None:
    experts = _set(directory, MIX, torch.float32, SAME)
    rows_ND = draw(3)
    first, second = units_of(1, 2)
    assert experts.check(0, (0, first, second), (1, 1, 1), rows_ND).weights is experts.layers[0]
    for units, words in (((1,), "expert 1 of layer 0 is not held"), ((unit_of(2, 0, 2),), "expert 2:1/2 of layer 0")):
        with pytest.raises(FailedPrecondition, match=words) as refused:
            experts.check(0, units, (3,), rows_ND)
        assert refused.value.reason is Reason.EXPERT_NOT_HELD
    assert "it holds 0,2+1:1-2/2+2:2/2+3:1-4/4+0:3/4" in refused.value.message
    for units, words in (((second, first), "strictly ascending"), ((unit_of(8, 0, 2),), "has 8, the model has")):
        with pytest.raises(InvalidRequest, match=words):
            experts.check(0, units, [1] * len(units), rows_ND)
    most = experts.layers[0].expert_ids
    assert len(most) > CONFIG.num_experts
    experts.check(0, most, [3] + [0] * (len(most) - 1), rows_ND)


def test_their_bytes_are_counted(directory: Path) -> None:
    for expert_dtype in (SAME, INT8):
        experts = ExpertSet(CONFIG, {}, torch.bfloat16, CPU, expert_dtype=expert_dtype)
        whole, quarter = experts.bytes_of([(0, 0)]), experts.bytes_of([(0, unit_of(0, 1, 4))])
        assert whole == experts.expert_bytes
        assert 4 * quarter == whole or expert_dtype == INT8
        assert whole < 4 * quarter < 1.15 * whole or expert_dtype == SAME, "a scale for every output of each slice"


def cells(spec: str) -> Cells:
    return frozenset((layer, unit) for layer, units in held(spec).items() for unit in units)


def test_load_and_unload_while_serving(directory: Path) -> None:
    """A slice more of an expert that is here whole, the same from a stranger's view, and the capacity in experts."""

    async def scenario() -> None:
        with Checkpoint.open(directory) as checkpoint, device_thread() as device:
            experts = ExpertSet(CONFIG, held("0"), torch.float32, CPU, capacity=4)
            device.call(weights.load, experts, checkpoint)
            loader = ExpertLoader(experts, checkpoint, device, linger=0.0)
            try:
                loaded = await loader.load(cells("0:2/2+5:1/4@1"))
                assert loaded.num_bytes == 5 * experts.expert_bytes // 4
                assert experts.holdings.held == cells("0+0:2/2+5:1/4@1")
                rows_ND = draw(2)
                out_ND = experts.forward(1, [0, unit_of(0, 1, 2)], [1, 1], rows_ND)
                assert_near(out_ND[1:], sliced_twin(directory, 1, unit_of(0, 1, 2), rows_ND[1:]))
                with pytest.raises(ResourceExhausted, match=r"holds 13/4 .* to load 1, capacity is 4") as raised:
                    await loader.load(cells("4@0"))
                assert raised.value.reason is Reason.NO_ROOM
                loader.unload(cells("0"))
                await until(lambda: experts.layers[0].expert_ids == (unit_of(0, 1, 2),))
                await loader.load(cells("4@0"))
                assert experts.holdings.held == cells("0:2/2+5:1/4@1+4@0")
            finally:
                loader.close()

    asyncio.run(scenario())


def test_warm_up_of_every_width(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = load(directory, held=held("0@0+1:1/2@0+2:3/4@1"))
    called: list[Sequence[int]] = []
    original = LayerWeights.forward

    def record(self: LayerWeights, units: Sequence[int], *args: object) -> torch.Tensor:
        called.append(tuple(units))
        return original(self, units, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerWeights, "forward", record)
    experts.warm_up()
    assert set(called) == {(0,), (unit_of(1, 0, 2),), (unit_of(2, 2, 4),)}


def test_over_the_wire(directory: Path, tmp_path: Path) -> None:
    """Describe, Forward, Load, Unload and the worker's metrics, of slices."""

    async def scenario() -> None:
        with Checkpoint.open(directory) as checkpoint, device_thread() as device:
            experts = ExpertSet(CONFIG, held("0+1:1/2"), torch.float32, CPU)
            device.call(weights.load, experts, checkpoint)
            metrics, registry = new_metrics()
            loader = ExpertLoader(experts, checkpoint, device)
            service = ExpertService(ExpertEngine(experts, metrics, device), metrics, 100, lambda: True, loader)
            server = RoleServer([service.as_service()])
            address = await server.start(f"unix:{tmp_path}/socket")
            try:
                async with open_channel(address) as channel:
                    await talk(channel)
            finally:
                loader.close()
                await server.stop(0)
            rows = "grokmoe_expert_worker_rows_total"
            assert registry.get_sample_value(rows, {"expert": "0"}) == 1
            assert registry.get_sample_value(rows, {"expert": "1:1/2"}) == 2

    async def talk(channel: object) -> None:
        async def ask(method: str, request: object, response: object) -> object:
            stub = channel.unary_unary(  # type: ignore[attr-defined]
                f"/{NAME}/{method}",
                request_serializer=type(request).SerializeToString,  # type: ignore[attr-defined]
                response_deserializer=response.FromString,  # type: ignore[attr-defined]
            )
            return await stub(request)

        pb = expert_pb2
        told = await ask("Describe", pb.ExpertDescribeRequest(), pb.ExpertDescribeResponse)
        assert from_messages(told.experts) == [(0, 0, 2), (unit_of(1, 0, 2), 0, 2)]  # type: ignore[attr-defined]
        stream, rows_ND = Stream(channel), draw(3)  # type: ignore[arg-type]
        call = pb.ForwardRequest(expert_ids=[0, 1], slices=[0, 0], num_slices=[1, 2], counts=[1, 2], request_id=1)
        await stream.send(call, rows_ND)
        header, out_ND = await stream.receive()
        assert not header.HasField("failure"), header.failure
        assert out_ND is not None
        assert_near(out_ND[1:], sliced_twin(directory, 0, unit_of(1, 0, 2), rows_ND[1:]))
        await stream.send(pb.ForwardRequest(expert_ids=[0, 1], counts=[1, 2], request_id=2), rows_ND)
        refused, _ = await stream.receive()
        assert refused.failure.reason == Reason.EXPERT_NOT_HELD, (
            "a caller that knows no slices gets no part for a whole"
        )
        await stream.send(
            pb.ForwardRequest(expert_ids=[1], slices=[2], num_slices=[2], counts=[3], request_id=3), rows_ND
        )
        refused, _ = await stream.receive()
        assert refused.failure.field == "slices"
        asked = to_messages(ranges_of(cells("1:2/2")))
        loaded = await ask(
            "Load", pb.ExpertLoadRequest(config_hash=CONFIG.content_hash, experts=asked), pb.ExpertLoadResponse
        )
        assert loaded.loaded_bytes == 3 * CONFIG.hidden_size * CONFIG.intermediate_size * 4  # type: ignore[attr-defined]
        asked = to_messages(ranges_of(cells("0+1:1/2")))
        await ask(
            "Unload", pb.ExpertUnloadRequest(config_hash=CONFIG.content_hash, experts=asked), pb.ExpertUnloadResponse
        )
        told = await ask("Describe", pb.ExpertDescribeRequest(), pb.ExpertDescribeResponse)
        assert from_messages(told.experts) == [(unit_of(1, 1, 2), 0, 2)]  # type: ignore[attr-defined]

    asyncio.run(scenario())


def test_layers_of_cells() -> None:
    assert by_layer(cells("3:2/2@1+0@1")) == {1: (0, unit_of(3, 1, 2))}
