"""Which of the messages that come from an attention worker are the ones its step waits for.

The network, or a worker that has lost its mind, may repeat a message, or send one that cannot be. What belongs to
another step, or to a layer that has been answered, is passed over; what cannot be is the worker's end.

Letters: T tokens of the step, D hidden.
"""

from __future__ import annotations

import torch

from grokmoe import tensors
from grokmoe.errors import InvalidRequest, Unavailable
from grokmoe.step_plan import StepPlan
from grokmoe.v1 import attention_pb2
from router.transport.base import AttentionInfo
from router.transport.grpc_stream import ANY_ROWS

Answer = tuple[attention_pb2.StepResponse, torch.Tensor | None]


class StepAnswers:
    """The messages of one step, in order."""

    def __init__(self, step_id: int, plan: StepPlan, info: AttentionInfo | None) -> None:
        """info: what the worker has said of itself; None: nothing yet, so sizes cannot be checked."""
        self._step_id, self._info = step_id, info
        self._num_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks)
        self._layer = info.layer_begin if info else 0
        self._rows: tensors.RowAssembler[attention_pb2.StepResponse] = tensors.RowAssembler(
            attention_pb2.StepResponse, "step_id", ANY_ROWS
        )

    def take(self, data: bytes) -> Answer | None:
        """The next MoE input, result or failure of the step, whole; None if this was not it, or not the last of it.

        Raises Unavailable for what no sound worker sends.
        """
        try:
            whole = self._rows.add(data)
        except InvalidRequest as error:
            raise Unavailable(f"the worker sent a message that cannot be: {error.message}") from error
        if whole is None or whole[0].step_id != self._step_id:
            return None
        header, payload = whole
        if header.HasField("failure"):
            return whole
        if header.HasField("result"):
            self._check_end(header.result.is_hidden_state, payload)
            return whole
        if header.layer < self._layer:
            return None
        self._check_input(header.layer, payload)
        self._layer += 1
        return whole

    def _check_end(self, is_hidden_state: bool, payload: torch.Tensor | None) -> None:
        """A hidden state is the residual, float32 whatever the worker computes in."""
        if self._info is not None and self._layer != self._info.layer_end:
            raise Unavailable(f"the worker sent a result before layer {self._layer}")
        if is_hidden_state:
            self._check_rows("hidden state", payload, torch.float32)

    def _check_input(self, layer: int, x_TD: torch.Tensor | None) -> None:
        if layer != self._layer:
            raise Unavailable(f"the worker sent layer {layer}, layer {self._layer} is due")
        self._check_rows("MoE input", x_TD, self._info.dtype if self._info else None)

    def _check_rows(self, what: str, x_TD: torch.Tensor | None, dtype: torch.dtype | None) -> None:
        """A row for each of the step's tokens, of the width and type that all have. dtype: None: not known."""
        if x_TD is None or x_TD.dim() != 2 or x_TD.shape[0] != self._num_tokens:
            shape = None if x_TD is None else list(x_TD.shape)
            raise Unavailable(f"the worker sent a {what} of shape {shape} for {self._num_tokens} tokens")
        expected = self._info.hidden_size if self._info else x_TD.shape[1]
        if (x_TD.shape[1], x_TD.dtype) != (expected, dtype or x_TD.dtype):
            raise Unavailable(f"the worker sent a {what} of width {x_TD.shape[1]} and type {x_TD.dtype}")
