"""What a stream needs to go on, on this server or another, after its connection broke."""

from __future__ import annotations

import secrets

from grokmoe.errors import InternalError, InvalidRequest, Reason
from grokmoe.v1 import generation_pb2 as pb


class Resumption:
    """Keeps the ids received in the request itself, so that it can be sent again at any time.

    Every id is received exactly once: the server counts them, too.
    """

    def __init__(self, request: pb.GenerateRequest) -> None:
        """InvalidRequest for a request that cannot be resumed. One without a seed gets one, to be drawn the same."""
        for field, is_set in (
            ("sampling.n", request.sampling.n > 1),
            ("response.echo", request.response.echo),
            ("response.prompt_logprobs", request.response.HasField("prompt_logprobs")),
        ):
            if is_set:
                raise InvalidRequest(field, "cannot be used with resume", reason=Reason.CONFLICTING_FIELDS)
        sampling = request.sampling
        is_greedy = sampling.HasField("temperature") and sampling.temperature == 0
        if not is_greedy and not sampling.HasField("seed"):
            sampling.seed = secrets.randbits(64)
        self._request = request
        self._num_received = len(request.resumed.ids)

    def add(self, message: pb.StreamGenerateResponse) -> None:
        """Takes a message in. InternalError if its tokens do not follow those received."""
        first = message.usage.completion_tokens - len(message.token_ids)
        if first != self._num_received:
            raise InternalError(f"the server went on at token {first}, {self._num_received} were received")
        self._num_received += len(message.token_ids)
        self._request.resumed.ids.extend(message.token_ids)
