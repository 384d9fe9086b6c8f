"""The 16-bit types, half of float32, that tensors may be of. Needs no TVM, nor ml_dtypes."""

from __future__ import annotations

HALF_TYPES = ("float16", "bfloat16")
