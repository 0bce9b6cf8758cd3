"""Settings to inputs and times: which prompts, of what lengths, when."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from grokmoe.errors import ConfigError
from loadtest.arrivals import Times, constant_times, gamma_times, ramp_times, trace_times
from loadtest.datasets import CountTokens, TraceReader, cycle, read_custom, read_sharegpt, read_texts
from loadtest.inputs import check_context, prefix_inputs, random_inputs
from loadtest.lengths import Lengths, around, fixed, parse_lengths
from loadtest.planned import Input
from loadtest.settings import LoadSettings


@dataclasses.dataclass(frozen=True)
class Source:
    """Makes the inputs of a run, and of its warm-up and its sweep's steps: another seed, other prompts.

    count_tokens: asks the server.
    """

    settings: LoadSettings
    vocab_size: int
    context_length: int
    count_tokens: CountTokens

    async def inputs(self, num: int, seed: int) -> list[Input]:
        """`num` of them; of a trace at most so many. ConfigError: the file cannot be read, or nothing fits."""
        s = self.settings
        if s.dataset_name == "random":
            found = random_inputs(
                num, self._input_lengths(), self._output_lengths(), self.vocab_size, seed, s.random_prefix_len
            )
        elif s.dataset_name == "prefix_repetition":
            suffixes = parse_lengths(s.input_len) if s.input_len else fixed(s.prefix_repetition_suffix_len)
            found = prefix_inputs(
                num,
                s.prefix_repetition_num_prefixes,
                s.prefix_repetition_prefix_len,
                suffixes,
                self._output_lengths(),
                self.vocab_size,
                seed,
            )
        else:
            return await self._from_file(num, seed)
        return _all_fit(found, self.context_length)

    async def _from_file(self, num: int, seed: int) -> list[Input]:
        s = self.settings
        path = Path(s.dataset_path or "")
        if s.dataset_name == "timed_trace":
            trace = TraceReader(self.vocab_size, s.seed, s.trace_block_size).read(path)
            return check_context(trace, self.context_length)[:num]
        if s.dataset_name == "sharegpt":
            found = await read_sharegpt(path, num, s.sharegpt_output_len, self.count_tokens, seed)
        else:
            length = self._output_lengths().high
            found = (read_texts if s.dataset_name == "text" else read_custom)(path, length)
        return cycle(check_context(found, self.context_length), num, seed)

    def _input_lengths(self) -> Lengths:
        s = self.settings
        return parse_lengths(s.input_len) if s.input_len else around(s.random_input_len, s.random_range_ratio)

    def _output_lengths(self) -> Lengths:
        s = self.settings
        return parse_lengths(s.output_len) if s.output_len else around(s.random_output_len, s.random_range_ratio)


def _all_fit(inputs: Sequence[Input], context_length: int) -> list[Input]:
    """ConfigError: a made-up prompt is too long, and leaving it out would change the distribution asked for."""
    longest = max((len(each.prompt) + each.max_tokens for each in inputs), default=0)
    if longest > context_length:
        raise ConfigError(
            f"prompt and output have up to {longest} tokens, the model's context {context_length}: "
            "see --input-len and --output-len"
        )
    return list(inputs)


def times(settings: LoadSettings, inputs: Sequence[Input], seed: int, rate: float | None = None) -> Times:
    """When each is due. rate: of a sweep's step, requests/s."""
    s, num = settings, len(inputs)
    if rate is not None:
        return constant_times(num, rate) if s.arrivals == "constant" else gamma_times(num, rate, s.burstiness, seed)
    if s.is_trace:
        return trace_times([each.arrival or 0.0 for each in inputs], s.trace_speed)
    if s.ramp_up_strategy is not None:
        start, end = s.ramp_up_start_rps or 0.0, s.ramp_up_end_rps or 0.0
        return ramp_times(num, start, end, s.ramp_up_strategy, s.burstiness, seed)
    if s.arrivals == "constant" and math.isfinite(s.request_rate):
        return constant_times(num, s.request_rate)
    return gamma_times(num, s.request_rate, s.burstiness, seed)
