"""The types of weights by the names that flags have for them."""

from __future__ import annotations

from grokmoe.layouts.source import TORCH_DTYPES

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values()}
