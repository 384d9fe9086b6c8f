"""Runs tests in a process where the emulator stands in for CUDA."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from . import activate

_pool: ProcessPoolExecutor | None = None


def in_emulator(test: Callable[..., None]) -> Callable[..., None]:
    """Let a test's body run in the emulator's process, which lives as long as this one.

    Its module is imported there, after the emulator is in place; arguments must pickle.
    """

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        failure = _worker().submit(_call, test.__module__, test.__qualname__, args, kwargs).result()
        if failure:
            raise AssertionError(f"in the emulator's process:\n{failure}")

    return run


def _worker() -> ProcessPoolExecutor:
    global _pool
    if _pool is None:
        context = multiprocessing.get_context("spawn")
        _pool = ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_start)
    return _pool


def _start() -> None:
    activate.activate()


def _call(module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    test = getattr(importlib.import_module(module), name).__wrapped__
    try:
        test(*args, **kwargs)
    except Exception:
        return traceback.format_exc()
    return None
