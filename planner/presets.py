"""Devices by name, from their makers' data sheets: dense figures, without sparsity.

Prices are examples, of the order of what clouds asked per hour in 2025; a plan for money needs one's own.
"""

from __future__ import annotations

from planner.device import Device

_TERA = 1e12


def _card(name: str, memory: float, bandwidth: float, bf16: float, fp8: float, price: float, label: str) -> Device:
    """bandwidth: TB/s. bf16, fp8: TFLOP/s; fp8 of 0: not there. float32 is not planned for on cards."""
    flops = {"bfloat16": bf16 * _TERA} | ({"float8": fp8 * _TERA} if fp8 else {})
    return Device(
        name=name, kind="cuda", memory=memory, bandwidth=bandwidth * _TERA, flops=flops, price=price, label=label
    )


_CARDS = (
    _card("a100", 79.3, 2.04, 312, 0, 1.8, "NVIDIA-A100-SXM4-80GB"),
    _card("h100", 79.6, 3.35, 989, 1979, 3.0, "NVIDIA-H100-80GB-HBM3"),
    _card("h200", 140.4, 4.8, 989, 1979, 3.8, "NVIDIA-H200"),
    _card("b200", 178.0, 8.0, 2250, 4500, 5.5, "NVIDIA-B200"),
    _card("l40s", 45.0, 0.864, 362, 733, 1.0, "NVIDIA-L40S"),
    _card("mi300x", 191.5, 5.3, 1307, 2615, 2.6, ""),
)

_HOSTS = (
    # Two sockets of twelve DDR5-4800 channels; products with AVX-512's bfloat16 instructions.
    Device(
        name="cpu",
        kind="cpu",
        memory=700.0,
        bandwidth=0.92 * _TERA,
        flops={"float32": 14 * _TERA, "bfloat16": 28 * _TERA},
        price=4.0,
        cores=192,
    ),
    # One socket of the same with half of its memory banks filled.
    Device(
        name="cpu-small",
        kind="cpu",
        memory=180.0,
        bandwidth=0.23 * _TERA,
        flops={"float32": 4 * _TERA, "bfloat16": 8 * _TERA},
        price=1.0,
        cores=48,
    ),
)

PRESETS = {device.name: device for device in (*_CARDS, *_HOSTS)}
"""All of them."""
