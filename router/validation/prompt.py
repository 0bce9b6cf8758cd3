"""Prompts: text or token ids, and how text becomes ids."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from grokmoe.errors import FailedPrecondition, InvalidRequest, Reason
from grokmoe.model_config import ModelConfig
from grokmoe.tokenizer import Tokenizer
from grokmoe.v1 import generation_pb2 as pb
from router.request import PromptEmbeds
from router.validation.embeds import read_embeds

MAX_TEXT_BYTES = 256 * 1024
"""8192 tokens, the largest context, are some 30 KiB of English."""

INLINE_TEXT_BYTES = 4 * 1024
"""Longer text is tokenised on another thread: it takes longer than the event loop should be held."""


def _choices(proto: Any) -> str:
    *others, last = (field.name for field in proto.DESCRIPTOR.oneofs_by_name["prompt"].fields)
    return f"{', '.join(others)} or {last}"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids, and the text they came from if it was text.

    embeds: what stands in their place; they are zeros then, one for each row.
    """

    ids: tuple[int, ...]
    text: str | None = None
    embeds: PromptEmbeds | None = None


class PromptReader:
    """The rules of one model. tokenizer: None when it has none; refuses_control_symbols: unless a request says."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None, refuses_control_symbols: bool = False) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._refuses_control_symbols = refuses_control_symbols

    async def read(self, proto: Any) -> Prompt:
        """The prompt of a GenerateRequest or ScoreRequest. Raises InvalidRequest, FailedPrecondition."""
        kind = proto.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequest("prompt", f"is missing: set {_choices(proto)}")
        if kind == "text":
            ids = await self.tokenize("text", proto.text, "tokenize", proto.tokenize)
            if not ids:
                raise InvalidRequest("text", "is empty")
            self._check_length("text", ids)
            return Prompt(ids, proto.text)
        if proto.HasField("tokenize"):
            raise InvalidRequest("tokenize", f"is set beside {kind}", reason=Reason.CONFLICTING_FIELDS)
        if kind == "inputs_embeds":
            embeds = await read_embeds(proto.inputs_embeds, self._config)
            return Prompt((0,) * len(embeds.rows_TD), embeds=embeds)
        ids = tuple(proto.token_ids.ids)
        if not ids:
            raise InvalidRequest("token_ids.ids", "is empty")
        self.check_ids("token_ids.ids", ids)
        self._check_length("token_ids.ids", ids)
        return Prompt(ids)

    async def tokenize(self, field: str, text: str, options_field: str, options: pb.TokenizeOptions) -> tuple[int, ...]:
        """Token ids of a text as the options say; there may be none."""
        tokenizer = self.need_tokenizer(field)
        size = len(text.encode())
        if size > MAX_TEXT_BYTES:
            raise InvalidRequest(field, f"has {size} bytes, limit is {MAX_TEXT_BYTES}")
        refuses = self._refuses_control_symbols
        if options.HasField("refuse_control_symbols"):
            refuses = options.refuse_control_symbols
        if refuses and (symbol := tokenizer.find_control_symbol(text)) is not None:
            raise InvalidRequest(field, f"spells the control symbol {symbol}", reason=Reason.CONTROL_SYMBOL)
        begin: tuple[int, ...] = ()
        if options.add_bos:
            if self._config.bos_token_id is None:
                raise InvalidRequest(f"{options_field}.add_bos", "is set, but the model has no begin-of-sequence id")
            begin = (self._config.bos_token_id,)
        if size > INLINE_TEXT_BYTES:
            return (*begin, *await asyncio.to_thread(tokenizer.encode, text))
        return (*begin, *tokenizer.encode(text))

    def need_tokenizer(self, field: str) -> Tokenizer:
        """The tokenizer. Raises FailedPrecondition, naming the field that needs it, when the model has none."""
        if self._tokenizer is None:
            message = f"{field}: this model has no tokenizer, only token ids can be used"
            raise FailedPrecondition(message, reason=Reason.NO_TOKENIZER)
        return self._tokenizer

    def check_ids(self, field: str, ids: Sequence[int]) -> None:
        """Raises InvalidRequest unless all are below the vocabulary size."""
        if ids and max(ids) >= self._config.vocab_size:
            raise InvalidRequest(
                field, f"holds {max(ids)}, must be below the vocabulary size {self._config.vocab_size}"
            )

    def _check_length(self, field: str, ids: Sequence[int]) -> None:
        limit = self._config.context_length - 1
        if len(ids) > limit:
            message = f"has {len(ids)} tokens, the context of {limit + 1} allows {limit}"
            raise InvalidRequest(field, message, reason=Reason.PROMPT_TOO_LONG)
