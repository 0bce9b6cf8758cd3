"""A worker whose experts are float8_e4m3fn: the twin's values wherever it computes, quantised on the way in."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_worker import weights
from expert_worker.config import ExpertWorkerSettings
from expert_worker.cpu_layers import Fp8Layer
from expert_worker.engine import ExpertEngine
from expert_worker.expert_dtype import FP8, FP8_DTYPES, FP8_ROWS, SAME
from expert_worker.experts import ExpertSet
from expert_worker.kernels import reference
from expert_worker.kernels.reference import ChannelScales
from expert_worker.layer import LayerWeights
from expert_worker.layers import new_layer
from expert_worker.loader import ExpertLoader
from expert_worker.matrix import Matrix, Piece
from expert_worker.service import ExpertService
from expert_worker.stacked_layers import StackedFp8Layer
from grokmoe.checkpoint import Checkpoint
from grokmoe.errors import ConfigError
from grokmoe.expert_units import units_of
from grokmoe.model_config import TINY, Gelu, ModelConfig
from grokmoe.tensor_names import EXPERT_LINEARS, expert
from grokmoe.v1 import expert_pb2
from tests.expert_worker.expert_mlp_cases import DTYPES, ROUTINGS, Case
from tests.expert_worker.small_model import CPU, HELD, assert_near, device_thread, draw, new_metrics, write

WIDE = dataclasses.replace(TINY, hidden_size=64, intermediate_size=128)
"""Sizes that each kernel of a CPU takes."""


def quantised(weights_: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], ChannelScales]:
    """Stacks of matrices in eight bits by the definition, with their scales."""
    pairs = [reference.quantise_rows(weight.flatten(0, 1)) for weight in weights_]
    stacks = [q.view(weight.shape) for (q, _), weight in zip(pairs, weights_, strict=True)]
    return stacks, ChannelScales(*(s.view(w.shape[:2]) for (_, s), w in zip(pairs, weights_, strict=True)))


def twin(case: Case, rows_in_8_bits: bool) -> torch.Tensor:
    stacks, scales = quantised([weight.nan_to_num() for weight in case.tensors[1:]])
    return reference.expert_mlp(case.rows, case.counts, *stacks, case.gelu, scales, rows_in_8_bits)


def filled(layer: LayerWeights, case: Case) -> LayerWeights:
    layer = layer.resized(range(len(case.counts)))
    for linear, stack in zip(EXPERT_LINEARS, case.tensors[1:], strict=True):
        for index, matrix in enumerate(stack):
            layer.put(index, linear, matrix.nan_to_num())
    return layer


def near(actual: torch.Tensor, wanted: torch.Tensor, rows_in_8_bits: bool) -> None:
    """With rows in eight bits, too: a number of h that is rounded to its other neighbour moves results by its step."""
    assert actual.dtype == wanted.dtype
    error = (actual.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt()
    limit = 4e-3 if rows_in_8_bits else 1e-5 if wanted.dtype is torch.float32 else 6e-3
    assert not wanted.numel() or error < limit, error


@pytest.mark.parametrize("rows_in_8_bits", [False, True])
@pytest.mark.parametrize("gelu", Gelu)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts_E", ROUTINGS.values(), ids=ROUTINGS)
def test_a_cpu_computes_the_twins_values(
    counts_E: Sequence[int], dtype: torch.dtype, gelu: Gelu, rows_in_8_bits: bool
) -> None:
    case = Case.random(counts_E, WIDE.hidden_size, WIDE.intermediate_size, dtype, gelu)
    expert_dtype = FP8_ROWS if rows_in_8_bits else FP8
    layer = filled(new_layer(dataclasses.replace(WIDE, gelu=gelu), dtype, CPU, expert_dtype=expert_dtype), case)
    assert isinstance(layer, Fp8Layer)
    near(layer.forward(range(len(counts_E)), counts_E, case.rows), twin(case, rows_in_8_bits), rows_in_8_bits)


def stacked(config: ModelConfig, dtype: torch.dtype, rows_in_8_bits: bool = False) -> StackedFp8Layer:
    """As on a GPU, but with the plain kernel."""
    return StackedFp8Layer(config, dtype, CPU, reference.expert_mlp, reference.quantise_rows, rows_in_8_bits)


@pytest.mark.parametrize("rows_in_8_bits", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stacked_weights_are_the_twins_bit_for_bit(dtype: torch.dtype, rows_in_8_bits: bool) -> None:
    case = Case.random([3, 0, 9], WIDE.hidden_size, WIDE.intermediate_size, dtype, Gelu.ERF)
    layer = filled(stacked(WIDE, dtype, rows_in_8_bits), case)
    assert torch.equal(layer.forward(range(3), case.counts, case.rows), twin(case, rows_in_8_bits))
    fewer = layer.resized((2,))
    assert torch.equal(fewer.forward((2,), (9,), case.rows[3:]), twin(case, rows_in_8_bits)[3:])


@pytest.mark.parametrize("rows_in_8_bits", [False, True])
def test_stacked_weights_on_the_kernels_of_gpus(monkeypatch: pytest.MonkeyPatch, rows_in_8_bits: bool) -> None:
    """Interpreted, wired as on a GPU, quantisation included."""
    pytest.importorskip("triton")
    from expert_worker.kernels import grouped_fp8, grouped_gemm
    from tests.triton_interpreter import interpreted

    device = grouped_gemm.describe(CPU)._replace(family="sm_90")
    monkeypatch.setattr(grouped_gemm, "describe", lambda _: device)
    case = Case.random([3, 0, 9], WIDE.hidden_size, WIDE.intermediate_size, torch.bfloat16, Gelu.ERF)
    with interpreted():
        kernel = functools.partial(grouped_gemm.expert_mlp, fixed_tiles=True)
        empty = StackedFp8Layer(WIDE, torch.bfloat16, CPU, kernel, grouped_fp8.quantise_rows, rows_in_8_bits)
        out_ND = filled(empty, case).forward(range(3), case.counts, case.rows)
    near(out_ND, twin(case, rows_in_8_bits), rows_in_8_bits)


@pytest.mark.parametrize("layer_of", [stacked, lambda *args: Fp8Layer(*args, False)], ids=["stacked", "cpu"])
def test_pieces_of_any_size_give_the_same(layer_of: Any) -> None:
    """Also pieces that are in eight bits already, with scales of their own, of one kind or the other."""
    case = Case.random([5], WIDE.hidden_size, WIDE.intermediate_size, torch.bfloat16, Gelu.ERF)
    expected = filled(layer_of(WIDE, torch.bfloat16), case).forward((0,), (5,), case.rows)
    stacks, scales = quantised(case.tensors[1:])

    def pieces(number: int, step: int, is_quantised: bool) -> Any:
        for begin in range(0, len(case.tensors[number + 1][0]), step):
            rows = slice(begin, begin + step)
            if is_quantised:
                yield Piece(begin, stacks[number][0, rows], scales[number][0, rows])
            else:
                yield Piece(begin, case.tensors[number + 1][0, rows])

    for step, is_quantised in ((1, False), (7, True), (1000, True), (7, False)):
        layer = layer_of(WIDE, torch.bfloat16).resized((0,))
        assert layer.takes_fp8
        for number, linear in enumerate(EXPERT_LINEARS):
            shape = case.tensors[number + 1][0].shape
            dtype = torch.float8_e4m3fn if is_quantised else torch.bfloat16
            matrix = Matrix(*shape, dtype, functools.partial(pieces, number, step, is_quantised))
            layer.fill(0, linear, matrix.in_memory() if step == 7 else matrix)
        assert torch.equal(layer.forward((0,), (5,), case.rows), expected), (step, is_quantised)


def test_a_matrix_that_is_read_whole() -> None:
    weight_OI = draw(10, 4)
    matrix = Matrix(
        10, 4, torch.float32, lambda: (Piece(begin, weight_OI[begin : begin + 3]) for begin in (0, 3, 6, 9))
    )
    assert torch.equal(matrix.whole(), weight_OI)
    assert torch.equal(matrix.in_memory().whole(), weight_OI)
    assert Matrix.of(weight_OI).whole() is weight_OI


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"))


def load(directory: Path, held: dict[int, tuple[int, ...]], **options: Any) -> ExpertSet:
    with Checkpoint.open(directory) as checkpoint:
        experts = ExpertSet(checkpoint.config, held, torch.float32, CPU, **({"expert_dtype": FP8} | options))
        weights.load(experts, checkpoint)
    return experts


def model_twin(directory: Path, layer: int, expert_id: int, rows_ND: torch.Tensor) -> torch.Tensor:
    with Checkpoint.open(directory) as checkpoint:
        matrices = [checkpoint.read(expert(layer, expert_id, linear), torch.float32) for linear in EXPERT_LINEARS]
    stacks, scales = quantised([matrix[None] for matrix in matrices])
    return reference.expert_mlp(rows_ND, [len(rows_ND)], *stacks, Gelu.ERF, scales)


def test_from_a_checkpoint(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each matrix lands where it belongs, in a few pieces."""
    monkeypatch.setattr(weights, "PIECE_BYTES", 3000)
    experts, rows_ND = load(directory, {1: (2, 5)}), draw(7)
    for expert_id in (2, 5):
        wanted = model_twin(directory, 1, expert_id, rows_ND)
        assert_near(experts.forward(1, (expert_id,), (7,), rows_ND), wanted)


def test_slices_sum_to_the_whole(directory: Path) -> None:
    """Of gate and up a slice has the scales of its outputs; down is quantised by the part of its inputs that a slice
    has: by other scales than the whole, and as well."""
    rows_ND = draw(7)
    units = units_of(3, 2)
    cut = load(directory, {0: units})
    whole = load(directory, {0: (3,)})
    parts = [cut.forward(0, (unit,), (7,), rows_ND) for unit in units]
    exact = load(directory, {0: (3,)}, expert_dtype=SAME).forward(0, (3,), (7,), rows_ND)
    errors = [(out - exact).square().mean() for out in (sum(parts), whole.forward(0, (3,), (7,), rows_ND))]
    assert 0.5 * errors[1] < errors[0] < 1.5 * errors[1]
    assert errors[1] < 0.06**2 * exact.square().mean()


def test_experts_that_come_and_go(directory: Path) -> None:
    whole, rows_ND = load(directory, HELD), draw(5)
    for options in ({}, {"deterministic": True}):
        experts = load(directory, {0: (3,)}, **options)

        async def scenario(experts: ExpertSet = experts) -> None:
            with Checkpoint.open(directory) as checkpoint, device_thread() as device:
                loader = ExpertLoader(experts, checkpoint, device)
                try:
                    loaded = await loader.load(frozenset({(0, 1), (0, 6)}))
                    assert loaded.num_bytes == 2 * experts.expert_bytes
                finally:
                    loader.close()

        asyncio.run(scenario())
        for expert_id in (1, 3, 6):
            assert_near(experts.forward(0, (expert_id,), (5,), rows_ND), whole.forward(0, (expert_id,), (5,), rows_ND))
        experts.warm_up()


def test_its_bytes_are_counted() -> None:
    case = Case.random([1], TINY.hidden_size, TINY.intermediate_size, torch.bfloat16, Gelu.ERF)
    layer = filled(stacked(TINY, torch.bfloat16), case)
    assert isinstance(layer, StackedFp8Layer)
    held = sum(each.nbytes for each in (*layer._stacks.values(), *layer._scales.values()))
    experts = ExpertSet(TINY, {}, torch.bfloat16, CPU, expert_dtype=FP8)
    experts.device = torch.device("cuda")
    assert experts.expert_bytes == held


@pytest.mark.parametrize("expert_dtype", FP8_DTYPES)
def test_it_says_so(expert_dtype: str) -> None:
    async def scenario() -> expert_pb2.ExpertDescribeResponse:
        experts = ExpertSet(TINY, {}, torch.bfloat16, CPU, expert_dtype=expert_dtype)
        metrics, _ = new_metrics()
        with device_thread() as device:
            service = ExpertService(ExpertEngine(experts, metrics, device), metrics, 64)
            return await service.Describe(expert_pb2.ExpertDescribeRequest(), None)

    assert asyncio.run(scenario()).expert_dtype == expert_dtype


class TestOnAGpu:
    """Which layer, and which is refused, without one."""

    @pytest.fixture(autouse=True)
    def _needs_triton(self) -> None:
        pytest.importorskip("triton")

    @pytest.mark.parametrize(
        ("family", "has_fp8", "dtype", "expert_dtype"),
        [
            ("sm_80", False, torch.float32, FP8),
            ("sm_80", False, torch.bfloat16, FP8_ROWS),
            ("sm_80", True, torch.bfloat16, FP8_ROWS),
            ("gfx942", False, torch.bfloat16, FP8_ROWS),
        ],
    )
    def test_there_is_no_kernel(
        self, monkeypatch: pytest.MonkeyPatch, family: str, has_fp8: bool, dtype: torch.dtype, expert_dtype: str
    ) -> None:
        self.pretend(monkeypatch, family, has_fp8)
        with pytest.raises(ConfigError, match=f"expert_dtype is {expert_dtype}: cuda has no kernel for that"):
            new_layer(TINY, dtype, torch.device("cuda"), expert_dtype=expert_dtype)

    @pytest.mark.parametrize(
        ("family", "has_fp8", "expert_dtype"),
        [("sm_80", False, FP8), ("sm_90", True, FP8), ("sm_90", True, FP8_ROWS), ("gfx942", False, FP8)],
    )
    def test_there_is(self, monkeypatch: pytest.MonkeyPatch, family: str, has_fp8: bool, expert_dtype: str) -> None:
        self.pretend(monkeypatch, family, has_fp8)
        monkeypatch.setattr(torch, "empty", functools.partial(_on_meta, torch.empty))
        layer = new_layer(TINY, torch.bfloat16, torch.device("cuda"), expert_dtype=expert_dtype)
        assert isinstance(layer, StackedFp8Layer)

    @staticmethod
    def pretend(monkeypatch: pytest.MonkeyPatch, family: str, has_fp8: bool) -> None:
        from expert_worker.kernels import grouped_gemm

        device = grouped_gemm.Device("pretended", family, 1, has_tma=False, has_fp8=has_fp8)
        monkeypatch.setattr(grouped_gemm, "describe", lambda _: device)


def _on_meta(empty: Any, *shape: Any, **options: Any) -> torch.Tensor:
    return empty(*shape, **(options | {"device": "meta"}))


@pytest.mark.parametrize("expert_dtype", FP8_DTYPES)
def test_settings(expert_dtype: str) -> None:
    assert ExpertWorkerSettings(expert_dtype=expert_dtype, device="cuda:1").expert_dtype == expert_dtype
