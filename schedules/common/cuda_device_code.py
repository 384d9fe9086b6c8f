"""Puts the CUDA C that kernels for float16 and bfloat16 call ahead of them. Needs no TVM."""

from __future__ import annotations

import re
from pathlib import Path

_CALLED = re.compile(r"\bmega_\w+\(")
_FUNCTIONS = Path(__file__).with_name("half_types.cuh")


def device_code() -> str:
    """Return the functions that kernels for half types call."""
    return _FUNCTIONS.read_text(encoding="utf-8")


def add_device_code(source: str) -> str:
    """Return CUDA C with the functions that it calls ahead of it."""
    if not _CALLED.search(source):
        return source
    return device_code() + source
