"""What the weights of experts can be stored in, beside the type of the rows. Pure."""

from __future__ import annotations

from grokmoe.errors import ConfigError
from grokmoe.model_config import ModelConfig

SAME, INT8, FP8, FP8_ROWS = "same", "int8", "fp8_e4m3", "fp8_e4m3_rows"

EXPERT_DTYPES = (SAME, INT8, FP8, FP8_ROWS)
"""The type of the rows; or, whatever that type is, with a scale for each output: int8; float8_e4m3fn; or the same with
rows that become float8_e4m3fn before each product, with a scale each."""

EXPERT_DTYPE_HELP = "what experts are stored in: as dtype says, int8 (CPU), fp8_e4m3, or that with rows in it too"

FP8_DTYPES = (FP8, FP8_ROWS)

MAX_INT8_INPUTS = 65536
"""Most inputs of a product in int8: the sum of more products of 255 and 127 may not fit into 32 bits."""


def check_expert_dtype(expert_dtype: str, config: ModelConfig, device: str) -> None:
    """Raises ConfigError where such weights cannot be computed with. device: as torch names its type."""
    if expert_dtype not in EXPERT_DTYPES:
        raise ConfigError(f"expert_dtype is {expert_dtype!r}, must be one of {', '.join(EXPERT_DTYPES)}")
    if expert_dtype != INT8:
        return
    if device != "cpu":
        raise ConfigError(f"expert_dtype is int8, device is {device}: int8 experts are computed on a CPU only")
    widest = max(config.hidden_size, config.intermediate_size)
    if widest > MAX_INT8_INPUTS:
        raise ConfigError(f"expert_dtype is int8: a row has {widest} inputs, {MAX_INT8_INPUTS} at most can be summed")
