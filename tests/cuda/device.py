"""The GPU of a test's process, emulated or real, as what both can do.

A real one compiles with nvcc for itself, runs in the one order that it runs in, and reports
nothing: what is checked of its runs is what they compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .emulator import activate

_real = False


def use_real_gpu() -> None:
    """Let this process, where no emulator is in place, work on the real GPU."""
    global _real
    import tvm

    if not tvm.cuda(0).exist:
        raise RuntimeError("there is a GPU, and TVM's CUDA runtime does not find it")
    _real = True


def is_real() -> bool:
    return _real


def compile_kernels(source: str) -> bytes:
    """Compile generated CUDA C for the device of this process."""
    if not _real:
        return activate.compile_kernels(source)
    from mega_tvm.cuda import toolchain
    from mega_tvm.cuda.lowering import device_arch
    from mega_tvm.cuda.target import target_of_arch

    return toolchain.compile_fatbin(source, target_of_arch(device_arch()))


def set_order(order: int) -> None:
    """Set the order of threads and blocks, which a real GPU chooses itself."""
    if not _real:
        activate.set_order(order)


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Yield a list that holds, after the context, what the emulator saw kernels do wrong."""
    if _real:
        yield []
        return
    with activate.watched() as reports:
        yield reports


def launches() -> int:
    """Return how many kernels ran in the last `watched` context of the emulator."""
    return activate.launches()
