"""What does it cost in exactness that slices of an expert send their parts of its output in bfloat16?

    python -m benchmarks.slices [--help]

Prints a table and, as the last line, one JSON object. The error is the RMS of an expert's output, added up in float32
over its slices as the router does it, relative to float64's over the same weights and rows:

    worker      what workers send: each part is rounded to bfloat16
    plain       plain torch that rounds as they do: h once, then each part
    float32     the same with parts that are not rounded, which would be twice the bytes

Of `bench` and `grok1` weights and rows are drawn at random; of `demo` both are real: rows that its experts got while it
read a text.

Letters: N rows, D hidden, F ffn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence

from grokmoe.process_tuning import tune_process

tune_process()  # before torch is loaded

import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from expert_worker.layers import new_layer  # noqa: E402
from expert_worker.mixed_layer import narrowed  # noqa: E402
from grokmoe import tensor_names  # noqa: E402
from grokmoe.checkpoint import Checkpoint  # noqa: E402
from grokmoe.expert_units import slicing_fault, units_of  # noqa: E402
from grokmoe.model_config import BENCH, GROK1, Gelu, ModelConfig  # noqa: E402
from grokmoe.reference import Reference  # noqa: E402
from grokmoe.tensor_names import EXPERT_LINEARS  # noqa: E402
from grokmoe.tokenizer import Tokenizer  # noqa: E402
from launcher.paths import DEMO_MODEL  # noqa: E402

DTYPE = torch.bfloat16
CHUNK = 4096
"""Columns of F that float64 computes at a time: a copy of more would not fit."""

TEXT = """HAMLET.
To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles,
And by opposing end them. To die: to sleep;
No more; and by a sleep to say we end
The heart-ache and the thousand natural shocks
That flesh is heir to, 'tis a consummation
Devoutly to be wish'd.
"""

Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""gate [F, D], up [F, D], down [D, F]."""


class Recording(Reference):
    """The oracle, and what its experts were given."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.given: list[tuple[int, int, torch.Tensor]] = []

    def _expert(self, layer: int, expert_id: int, x_NH: torch.Tensor) -> torch.Tensor:
        self.given.append((layer, expert_id, x_NH))
        return super()._expert(layer, expert_id, x_NH)


def of_demo() -> Iterator[tuple[ModelConfig, Expert, torch.Tensor]]:
    """Every expert of every layer of the embedded model that a text needs, and its rows."""
    tokenizer = Tokenizer.from_directory(DEMO_MODEL)
    assert tokenizer is not None
    with Checkpoint.open(DEMO_MODEL) as checkpoint:
        recording = Recording.from_checkpoint(checkpoint)
        assert isinstance(recording, Recording)
        recording.logits(tokenizer.encode(TEXT))
        for layer, expert, x_ND in recording.given:
            names = [tensor_names.expert(layer, expert, linear) for linear in EXPERT_LINEARS]
            gate_FD, up_FD, down_DF = (checkpoint.read(name, DTYPE) for name in names)
            yield checkpoint.config, (gate_FD, up_FD, down_DF), x_ND.to(DTYPE)


def drawn(config: ModelConfig, num_rows: int, num_experts: int) -> Iterator[tuple[ModelConfig, Expert, torch.Tensor]]:
    """Experts and rows at random, as `grokmoe checkpoint random` draws weights: outputs of the order of the inputs."""
    random = torch.Generator().manual_seed(0)
    D, F = config.hidden_size, config.intermediate_size
    for _ in range(num_experts):
        gate_FD, up_FD = (torch.randn(F, D, generator=random).div_(math.sqrt(D)).to(DTYPE) for _ in range(2))
        down_DF = torch.randn(D, F, generator=random).div_(math.sqrt(F)).to(DTYPE)
        yield config, (gate_FD, up_FD, down_DF), torch.randn(num_rows, D, generator=random).to(DTYPE)


def exact(expert: Expert, x_ND: torch.Tensor, gelu: Gelu) -> torch.Tensor:
    """In float64, a piece of F after the other."""
    return sum((down for _, down in _pieces(expert, x_ND, gelu, torch.float64, CHUNK)), start=torch.zeros(()))


def _pieces(
    expert: Expert, x_ND: torch.Tensor, gelu: Gelu, dtype: torch.dtype, width: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(h of a piece of F, the piece's part of the output) in a type; h is rounded to bfloat16 unless it is float64."""
    gate_FD, up_FD, down_DF = expert
    x_ND = x_ND.to(dtype)
    approximate = "tanh" if gelu is Gelu.TANH else "none"
    for begin in range(0, len(gate_FD), width):
        piece = slice(begin, begin + width)
        gate_NF, up_NF = (x_ND @ weight_FD[piece].to(dtype).T for weight_FD in (gate_FD, up_FD))
        h_NF = functional.gelu(gate_NF, approximate=approximate) * up_NF
        if dtype is not torch.float64:
            h_NF = h_NF.to(DTYPE).to(dtype)
        yield h_NF, h_NF @ down_DF[:, piece].to(dtype).T


def parts_of_workers(config: ModelConfig, expert: Expert, x_ND: torch.Tensor, num_slices: int) -> list[torch.Tensor]:
    """What holders of the slices send."""
    layer = new_layer(narrowed(config, num_slices), DTYPE, torch.device("cpu"))
    parts = []
    for index, unit in enumerate(units_of(0, num_slices)):
        holder = layer.resized((unit,))
        for linear, weight in zip(EXPERT_LINEARS, expert, strict=True):
            part = weight.chunk(num_slices, 1 if linear == "linear_1" else 0)[index]
            holder.put(unit, linear, part.contiguous())
        parts.append(holder.forward((unit,), (len(x_ND),), x_ND))
    return parts


def measure(name: str, cases: Iterator[tuple[ModelConfig, Expert, torch.Tensor]], counts: Sequence[int]) -> list[dict]:
    """One row for each number of slices."""
    squares: dict[tuple[int, str], float] = dict.fromkeys(
        itertools.product(counts, ("worker", "plain", "float32")), 0.0
    )
    total, num_rows, size = 0.0, 0, ""
    for config, expert, x_ND in cases:
        size = f"{config.hidden_size} x {config.intermediate_size}"
        wanted_ND = exact(expert, x_ND, config.gelu)
        total += wanted_ND.square().sum().item()
        num_rows += len(x_ND)
        for count in counts:
            assert not slicing_fault(count, config.intermediate_size)
            width = config.intermediate_size // count
            plain = [part for _, part in _pieces(expert, x_ND, config.gelu, torch.float32, width)]
            sent = {
                "worker": parts_of_workers(config, expert, x_ND, count),
                "plain": [part.to(DTYPE) for part in plain],
                "float32": plain,
            }
            for how, parts in sent.items():
                out_ND = torch.stack([part.float() for part in parts]).sum(0)
                squares[count, how] += (out_ND.double() - wanted_ND).square().sum().item()
    rows = []
    for count in counts:
        errors = {how: math.sqrt(squares[count, how] / total) for how in ("worker", "plain", "float32")}
        rows.append({"model": name, "size": size, "rows": num_rows, "slices": count, **errors})
        cells = " | ".join(f"{errors[how] * 1e3:.3f}" for how in ("worker", "plain", "float32"))
        print(f"| {name} | {size} | {num_rows} | {count} | {cells} |", flush=True)
    return rows


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,bench", help="of demo, bench, grok1 (default %(default)s)")
    parser.add_argument("--slices", default="1,2,4,8", help="numbers of slices (default %(default)s)")
    parser.add_argument("--rows", type=int, default=64, help="rows per expert drawn at random (default %(default)s)")
    given = parser.parse_args()
    counts = [int(each) for each in given.slices.split(",")]
    models = {
        "demo": of_demo,
        "bench": lambda: drawn(BENCH, given.rows, 4),
        "grok1": lambda: drawn(GROK1, given.rows, 1),
    }
    print("| model | D x F | rows | slices | worker, 1e-3 | plain, 1e-3 | float32, 1e-3 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = [row for name in given.models.split(",") for row in measure(name, models[name](), counts)]
    print(json.dumps({"benchmark": "slices", "rows": rows}))


if __name__ == "__main__":
    main()
