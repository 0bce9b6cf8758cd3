"""The experts held and the forward through them, against the plain twin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expert_worker import weights
from expert_worker.experts import ExpertSet
from expert_worker.kernels import cpu, reference
from expert_worker.stacked_layers import StackedLayer
from grokmoe import packed_linear
from grokmoe.checkpoint import Checkpoint
from grokmoe.errors import Cancelled, InvalidRequest
from grokmoe.expert_ranges import ranges_of
from grokmoe.model_config import TINY, Gelu
from grokmoe.packed_linear import PackedLinear, can_pack
from tests.expert_worker.expert_mlp_cases import DTYPES, ROUTINGS, Case
from tests.expert_worker.small_model import CPU, HELD, assert_near, draw, load, twin, write


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def experts(request: pytest.FixtureRequest, directory: Path) -> ExpertSet:
    return load(directory, request.param)


def packed(case: Case) -> list[cpu.PackedExpert]:
    experts = []
    for gate_FD, up_FD, down_DF in zip(case.gate, case.up, case.down, strict=True):
        expert = cpu.PackedExpert()
        expert.gate, expert.up, expert.down = PackedLinear(gate_FD), PackedLinear(up_FD), PackedLinear(down_DF)
        experts.append(expert)
    return experts


def test_weights_are_packed_here() -> None:
    """Else the numbers in this file speak of the fallback only."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU may have no bfloat16 in oneDNN")
    assert can_pack(torch.float32)
    assert can_pack(torch.bfloat16)
    assert not can_pack(torch.float16)


@pytest.mark.parametrize("can_pack", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("gelu", Gelu)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_kernel_equals_twin(
    routing: list[int], dtype: torch.dtype, gelu: Gelu, can_pack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_pack:
        monkeypatch.setattr(packed_linear, "can_pack", lambda dtype: False)
    case = Case.random(routing, 48, 80, dtype, gelu)
    untouched_ND = case.rows.clone()
    actual = cpu.expert_mlp(case.rows, case.counts, packed(case), gelu)
    assert_near(actual, reference.expert_mlp(*case.arguments))
    assert torch.equal(case.rows, untouched_ND)
    assert actual.data_ptr() != case.rows.data_ptr() or not case.num_rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not can_pack(dtype):
        pytest.skip("not promised on this CPU")
    case = Case.random([150], 256, 512, dtype, Gelu.ERF)
    experts = packed(case)
    all_ND = cpu.expert_mlp(case.rows, [150], experts, case.gelu)
    for num_rows in (*range(1, 10), 15, 16, 17, 31, 33, 64, 65, 128, 149):
        for begin in (0, 150 - num_rows):
            some_ND = cpu.expert_mlp(case.rows[begin : begin + num_rows], [num_rows], experts, case.gelu)
            assert torch.equal(some_ND, all_ND[begin : begin + num_rows]), (num_rows, begin)


def test_rows_need_not_be_aligned(experts: ExpertSet) -> None:
    """Rows that came in a message begin at any byte."""
    rows_ND = draw(3, dtype=experts.dtype)
    data = bytearray(1) + rows_ND.view(torch.uint8).numpy().tobytes()
    shifted_ND = torch.frombuffer(data, dtype=experts.dtype, offset=1).view(3, -1)
    assert torch.equal(experts.forward(0, [1], [3], shifted_ND), experts.forward(0, [1], [3], rows_ND))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layer=st.sampled_from([0, 1]), counts_of=st.dictionaries(st.integers(0, 7), st.sampled_from([0, 0, 1, 2, 9, 40]))
)
def test_forward_equals_twin(experts: ExpertSet, directory: Path, layer: int, counts_of: dict[int, int]) -> None:
    ids, counts = sorted(counts_of), [counts_of[e] for e in sorted(counts_of)]
    rows_ND = draw(sum(counts), dtype=experts.dtype)
    experts.check(layer, ids, counts, rows_ND)
    assert_near(experts.forward(layer, ids, counts, rows_ND), twin(directory, layer, ids, counts, rows_ND))


@pytest.mark.parametrize("variant", ["vllm", "xai"])
def test_the_variant_chooses_the_gelu(directory: Path, variant: str) -> None:
    rows_ND = draw(5) * 3
    out_ND = load(directory, variant=variant).forward(0, [0], [5], rows_ND)
    error = (out_ND - twin(directory, 0, [0], [5], rows_ND)).abs().max().item()
    assert (error < 1e-5) == (variant == "vllm")
    assert error < 1e-2


def test_a_part_of_the_experts(directory: Path) -> None:
    experts = load(directory, held={1: (2, 5)})
    assert ranges_of(experts.holdings.held) == ((2, 1, 2), (5, 1, 2))
    rows_ND = draw(4)
    assert_near(experts.forward(1, [5], [4], rows_ND), twin(directory, 1, [5], [4], rows_ND))
    assert_near(experts.forward(1, [2, 5], [1, 3], rows_ND), twin(directory, 1, [2, 5], [1, 3], rows_ND))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stacked_weights_give_the_same(directory: Path, dtype: torch.dtype) -> None:
    """The layout for other devices than the CPU, here with the twin as its kernel."""
    stacked = StackedLayer(TINY, dtype, CPU, reference.expert_mlp, (3, 6))
    with Checkpoint.open(directory) as checkpoint:
        for expert in (3, 6):
            for linear in weights.tensor_names.EXPERT_LINEARS:
                name = weights.tensor_names.expert(0, expert, linear)
                stacked.put(expert, linear, checkpoint.read(name, dtype))
    rows_ND = draw(7, dtype=dtype)
    assert torch.equal(stacked.forward([3, 6], [2, 5], rows_ND), twin(directory, 0, [3, 6], [2, 5], rows_ND))


def test_loading_reads_its_slice_only(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Checkpoint.read

    def record(self: Checkpoint, name: str, *args: object) -> torch.Tensor:
        read.append(name)
        return original(self, name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "read", record)
    load(directory, held={1: (2,)})
    assert sorted(read) == [
        f"model.layers.1.moe_block.experts.2.{name}.weight" for name in ("linear", "linear_1", "linear_v")
    ]


def test_loading_reads_in_slices(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a size that does not divide the rows."""
    sizes: list[int] = []
    original = Checkpoint.read

    def record(self: Checkpoint, *args: object) -> torch.Tensor:
        sliced = original(self, *args)  # type: ignore[arg-type]
        sizes.append(sliced.numel() * sliced.itemsize)
        return sliced

    expected = load(directory)
    monkeypatch.setattr(weights, "PIECE_BYTES", 7 * TINY.hidden_size * 4)
    monkeypatch.setattr(Checkpoint, "read", record)
    sliced = load(directory)
    assert max(sizes) == weights.PIECE_BYTES
    rows_ND = draw(16)
    for layer in HELD:
        assert torch.equal(*(each.forward(layer, range(8), [2] * 8, rows_ND) for each in (expected, sliced)))


def test_loading_can_be_stopped(directory: Path) -> None:
    with Checkpoint.open(directory) as checkpoint, pytest.raises(Cancelled):
        weights.load(ExpertSet(TINY, HELD, torch.float32, CPU), checkpoint, lambda: True)


def test_warm_up(experts: ExpertSet) -> None:
    experts.warm_up()


ROWS = draw(3)


@pytest.mark.parametrize(
    ("field", "layer", "ids", "counts", "rows"),
    [
        ("layer", 2, [0], [3], ROWS),
        ("layer", -1, [0], [3], ROWS),
        ("expert_ids", 0, [8], [3], ROWS),
        ("expert_ids", 0, [0, 0], [1, 2], ROWS),
        ("expert_ids", 0, [1, 0], [1, 2], ROWS),
        ("expert_ids", 0, [0, 1, 2, 3, 4, 5, 6, 7, 0], [3, 0, 0, 0, 0, 0, 0, 0, 0], ROWS),
        ("counts", 0, [0, 1], [3], ROWS),
        ("counts", 0, [0], [3, 0], ROWS),
        ("counts", 0, [0, 1], [1, 1], ROWS),
        ("counts", 0, [0, 1], [3, 1], ROWS),
        ("counts", 0, [], [], ROWS),
        ("payload", 0, [0], [3], None),
        ("payload.dtype", 0, [0], [3], ROWS.bfloat16()),
        ("payload.shape", 0, [0], [3], draw(3, TINY.hidden_size + 1)),
        ("payload.shape", 0, [0], [3], ROWS[0]),
        ("payload.shape", 0, [0], [3], ROWS[None]),
    ],
)
def test_check_names_the_field(
    field: str, layer: int, ids: list[int], counts: list[int], rows: torch.Tensor | None
) -> None:
    experts = ExpertSet(TINY, {0: (0, 1, 2, 3)}, torch.float32, CPU)
    with pytest.raises(InvalidRequest) as raised:
        experts.check(layer, ids, counts, rows)
    assert raised.value.field == field
