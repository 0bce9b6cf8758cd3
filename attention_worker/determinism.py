"""What a deterministic attention worker finds out about its machine before it promises anything.

Letters: T tokens, H query heads, K KV heads, P pages, S slots of a page, d head size.
"""

from __future__ import annotations

import torch

from attention_worker.attention import select_attention
from attention_worker.step_batch import StepBatch
from attention_worker.weights import AttentionWeights
from grokmoe.errors import ConfigError
from grokmoe.model_config import ModelConfig
from grokmoe.step_plan import SequenceChunk

LENGTHS = (1, 5, 40, 150, 333, 1100)
"""Tokens of the sequences that are computed in different company."""

COMPANIES: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((0, 0, 1), (5, 1099, 1), (4, 332, 1), (3, 149, 1)),
    ((2, 39, 1),),
    ((4, 332, 1),),
    ((5, 1040, 60),),
    ((5, 160, 33), (1, 3, 2), (3, 100, 50), (4, 200, 1)),
)
"""Batches of (sequence, start, tokens), to be compared with all sequences at once."""


@torch.inference_mode()
def check_attention(config: ModelConfig, dtype: torch.dtype, page_size: int) -> None:
    """Raises ConfigError where a row's attention depends on its company, with these sizes on this machine."""
    random = torch.Generator().manual_seed(0)
    lengths = [min(length, config.context_length) for length in LENGTHS]
    num_pages = [-(-length // page_size) for length in lengths]
    ends = [sum(num_pages[: index + 1]) for index in range(len(lengths))]
    pages = [tuple(range(end - num, end)) for end, num in zip(ends, num_pages, strict=True)]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    k_KPSd, v_KPSd = (draw(config.num_kv_heads, ends[-1], page_size, config.head_dim) for _ in range(2))
    queries = [draw(length, config.num_heads, config.head_dim) for length in lengths]
    kernel = select_attention("cpu", deterministic=True)

    def attend(company: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        chunks = [SequenceChunk((0,) * num, start, pages[index]) for index, start, num in company]
        q_THd = torch.cat([queries[index][start : start + num] for index, start, num in company])
        batch = StepBatch.build(chunks, page_size)
        out_THd = kernel(q_THd, k_KPSd, v_KPSd, batch, config.attention_logit_scale, config.attention_cap)
        return list(out_THd.split([num for _, _, num in company]))

    expected = attend([(index, 0, length) for index, length in enumerate(lengths)])
    for company in COMPANIES:
        possible = [(index, start, num) for index, start, num in company if start + num <= lengths[index]]
        if not possible:
            continue
        for (index, start, num), out_THd in zip(possible, attend(possible), strict=True):
            if not torch.equal(out_THd, expected[index][start : start + num]):
                raise ConfigError(
                    f"deterministic cannot be held here: attention over {start + num} keys in {dtype} with "
                    f"{torch.get_num_threads()} threads depends on what else is in the step"
                )


def row_counts(weights: AttentionWeights) -> str:
    """The row counts that the products of this worker use, for the log."""
    layer = weights.layers[0]
    parts = {"qkv": layer.qkv, "o_proj": layer.o_proj, "head": weights.head}
    return "; ".join(f"{name} {','.join(map(str, linear.row_counts))}" for name, linear in parts.items())
