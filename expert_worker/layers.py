"""The one place that chooses a kernel for the experts of a layer, by device and by what their weights are stored in."""

from __future__ import annotations

import functools

import torch

from expert_worker.cpu_layers import Fp8Layer, PackedLayer, PanelLayer, QuantisedLayer
from expert_worker.expert_dtype import FP8, FP8_DTYPES, FP8_ROWS, INT8, SAME, check_expert_dtype
from expert_worker.kernels import cpu_panels, reference
from expert_worker.layer import LayerWeights
from expert_worker.stacked_layers import StackedFp8Layer, StackedLayer
from grokmoe.errors import ConfigError
from grokmoe.model_config import ModelConfig


def new_layer(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool = False,
    expert_dtype: str = SAME,
) -> LayerWeights:
    """A layer without experts on its device, with the kernel that suits.

    deterministic: a row's bits must not depend on the rows beside it. The plain kernel does not promise that.
    expert_dtype: what the weights are stored in, of EXPERT_DTYPES. Raises ConfigError where that cannot be.
    """
    check_expert_dtype(expert_dtype, config, device.type)
    if expert_dtype == INT8:
        return QuantisedLayer(config, dtype)
    if expert_dtype in FP8_DTYPES:
        return _new_fp8_layer(config, dtype, device, deterministic, expert_dtype == FP8_ROWS)
    if device.type == "cpu":
        if cpu_panels.can_compute(config, dtype):
            return PanelLayer(config)
        return PackedLayer(dtype, config.gelu, deterministic)
    if device.type == "cuda":
        from expert_worker.kernels import grouped_gemm  # Triton is not installed where it is not used

        kernel = grouped_gemm.expert_mlp
        if deterministic:
            kernel = functools.partial(kernel, fixed_tiles=True)
        return StackedLayer(config, dtype, device, kernel)
    return StackedLayer(config, dtype, device, reference.expert_mlp)


def _new_fp8_layer(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, deterministic: bool, rows_in_8_bits: bool
) -> LayerWeights:
    """A CPU takes the same numbers in more bits. ConfigError for a GPU that has no such products."""
    if device.type == "cpu":
        return Fp8Layer(config, dtype, rows_in_8_bits, deterministic)
    if device.type != "cuda":
        return StackedFp8Layer(config, dtype, device, reference.expert_mlp, reference.quantise_rows, rows_in_8_bits)
    from expert_worker.kernels import grouped_fp8, grouped_gemm

    if not grouped_gemm.can_compute(device, dtype, torch.float8_e4m3fn, rows_in_8_bits):
        stored, rows = FP8_ROWS if rows_in_8_bits else FP8, str(dtype).removeprefix("torch.")
        raise ConfigError(f"expert_dtype is {stored}: {device} has no kernel for that and rows in {rows}")
    kernel = functools.partial(grouped_gemm.expert_mlp, fixed_tiles=deterministic)
    return StackedFp8Layer(config, dtype, device, kernel, grouped_fp8.quantise_rows, rows_in_8_bits)
