"""Expert MLPs on a CPU with int8 weights: half the memory of bfloat16, which is what a decode step waits for.

Weights are quantised when they are put (`int8_weights`), rows when they come (`int8_loops`). The same loops serve one
row and thousands, and sums are integers, so a row's bits depend neither on the rows beside it, nor on the number of
threads, nor on whether this CPU has an instruction for it.

Shapes: N rows, E experts, D hidden, F ffn.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch

from expert_worker.kernels import int8_loops
from expert_worker.kernels.int8_weights import Panels, num_of, panel_bytes
from grokmoe.model_config import Gelu
from grokmoe.native.int8_dots import PANEL_OUTPUTS, STEP_INPUTS

CHUNK_ROWS = 256
"""Rows that go through the three loops together. More are no faster, and of each there are F numbers in between."""

GRAIN_BYTES = 1 << 17
"""Weights that a thread reads in about ten microseconds."""

GATE, UP = 0, 1
"""Their places in the panels that they share."""

WARM_ROWS = 32
"""Rows for which there is room from the first call on."""


class QuantisedExpert:
    """The three matrices of one expert, in the layout of the loops."""

    __slots__ = ("down", "gate_up")

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        self.gate_up = Panels(ffn_size, hidden_size, num_matrices=2)
        self.down = Panels(hidden_size, ffn_size)


def expert_bytes(hidden_size: int, ffn_size: int) -> int:
    """Memory that a QuantisedExpert takes."""
    return panel_bytes(ffn_size, hidden_size, num_matrices=2) + panel_bytes(hidden_size, ffn_size)


class QuantisedRoom(NamedTuple):
    """Room for the integers of rows, their scales and what their sums start from."""

    q: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor


def new_rows(num_rows: int, num_inputs: int) -> QuantisedRoom:
    """Room for so many."""
    stride = num_of(STEP_INPUTS, num_inputs) * STEP_INPUTS
    q = torch.empty(num_rows, stride, dtype=torch.int8)
    return QuantisedRoom(q, torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int32))


class _Room(threading.local):
    """What lies between the loops, kept by each thread from call to call."""

    def __init__(self) -> None:
        self._sizes = (0, 0, 0)

    def for_rows(self, num_rows: int, D: int, F: int) -> tuple[QuantisedRoom, torch.Tensor, QuantisedRoom]:
        """x as integers, h, h as integers."""
        if self._sizes[1:] != (D, F) or num_rows > self._sizes[0]:
            self._sizes = (max(num_rows, WARM_ROWS), D, F)
            self._x, self._h = new_rows(self._sizes[0], D), new_rows(self._sizes[0], F)
            self._h_NF = torch.empty(self._sizes[0], F)
        return self._x, self._h_NF, self._h


_room = _Room()


class Tables(NamedTuple):
    """All experts of a layer as the loops find them: addresses of panels and scales, and panels as an example."""

    gate_up_E2: torch.Tensor
    down_E2: torch.Tensor
    gate_up: Panels
    down: Panels


def tables_of(experts_E: Sequence[QuantisedExpert]) -> Tables | None:
    """Of these experts, which must stay alive; None: of none."""
    if not experts_E:
        return None
    gate_up = torch.tensor([expert.gate_up.addresses for expert in experts_E])
    down = torch.tensor([expert.down.addresses for expert in experts_E])
    return Tables(gate_up, down, experts_E[0].gate_up, experts_E[0].down)


def expert_mlp(
    rows_ND: torch.Tensor, counts_E: torch.Tensor, tables: Tables | None, ffn_size: int, gelu: Gelu
) -> torch.Tensor:
    """Passes each row through the MLP of its expert: `reference_int8.expert_mlp` on panels.

    rows_ND: sorted by expert, float32 or bfloat16. counts_E: int64, rows of each expert, zero allowed, as many as there
    are rows in all; read when the loops run, so they may be a loop's result. tables: None if there are no rows.
    Returns: out_ND, new, of the rows' type.
    """
    rows_ND = rows_ND.contiguous()
    out_ND = torch.empty_like(rows_ND)
    for begin in range(0, len(rows_ND), CHUNK_ROWS):
        assert tables is not None, "rows for experts that are not here"
        end = min(begin + CHUNK_ROWS, len(rows_ND))
        _compute(rows_ND[begin:end], begin, counts_E, tables, out_ND[begin:end], ffn_size, gelu)
    return out_ND


def _compute(
    rows_ND: torch.Tensor, begin: int, counts_E: torch.Tensor, tables: Tables, out_ND: torch.Tensor, F: int, gelu: Gelu
) -> None:
    """Rows from the one at `begin` on."""
    (N, D), E, dtype = rows_ND.shape, len(counts_E), rows_ND.dtype
    x, h_NF, h = _room.for_rows(N, D, F)
    gate_up, down = tables.gate_up, tables.down
    mean = -(-N // E)
    int8_loops.quantise(dtype, N, D, x.q.shape[1], rows_ND, *x)
    int8_loops.gate_up(
        torch.float32, min(N, E) * gate_up.num_panels, 0, N, gate_up.num_panels, gate_up.num_steps, *x, h_NF, F,
        int(gelu is Gelu.TANH), E, counts_E, tables.gate_up_E2, begin, grain=_grain(gate_up, mean),
    )  # fmt: skip
    int8_loops.quantise(torch.float32, N, F, h.q.shape[1], h_NF, *h)
    int8_loops.down(
        dtype, min(N, E) * down.num_panels, 0, N, down.num_panels, down.num_steps, *h, out_ND, D,
        E, counts_E, tables.down_E2, begin, grain=_grain(down, mean),
    )  # fmt: skip


def _grain(panels: Panels, num_rows: int) -> int:
    """Panels with so many rows that are worth a thread. Eight rows more cost about as much as reading the panel."""
    cost = panels.num_steps * STEP_INPUTS * PANEL_OUTPUTS * (1 + num_rows // 8)
    return max(1, GRAIN_BYTES // cost)
