"""Runs a test on the emulated GPU, and again on a real one where there is one.

Each has a process of its own. Tests marked ``gpu`` are the second kind: ``pytest -m gpu``.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from . import device
from .emulator import worker

EMULATED, GPU = "emulated", "gpu"
_ON_GPU = pytest.param(GPU, marks=pytest.mark.gpu)

_pool: ProcessPoolExecutor | None = None


def on_every_device(test: Callable[..., None]) -> Callable[..., None]:
    """Let a test's body run in the emulator's process, and in one that has a real GPU.

    Its module is imported there; arguments must pickle. Its first parameter becomes ``device``.
    """
    return pytest.mark.parametrize("device", [EMULATED, _ON_GPU])(_in_process(test))


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Let a test's body run where there is a real GPU: what takes too long in emulation."""
    return pytest.mark.parametrize("device", [_ON_GPU])(_in_process(test))


def _in_process(test: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(device: str, *args: Any, **kwargs: Any) -> None:
        if device == GPU and (reason := why_no_gpu()):
            pytest.skip(reason)
        process = _gpu_process() if device == GPU else worker._worker()
        failure = process.submit(
            worker._call, test.__module__, test.__qualname__, args, kwargs
        ).result()
        if failure:
            raise AssertionError(f"in the process of the {device} device:\n{failure}")

    first = inspect.Parameter("device", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    others = inspect.signature(test).parameters.values()
    run.__signature__ = inspect.Signature([first, *others])
    return run


@functools.cache
def why_no_gpu() -> str | None:
    """Return why tests cannot run on a GPU here, or None if they can. Starts no context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int()
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return None if count.value else "no CUDA device here: the driver finds none"
    except (OSError, AttributeError):  # no driver, or the stand-in that compiling makes
        return "no CUDA device here: there is no NVIDIA driver"
    return "no CUDA device here: the driver does not start"


def _gpu_process() -> ProcessPoolExecutor:
    global _pool
    if _pool is None:
        context = multiprocessing.get_context("spawn")
        _pool = ProcessPoolExecutor(
            max_workers=1, mp_context=context, initializer=device.use_real_gpu
        )
    return _pool
