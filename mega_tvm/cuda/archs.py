"""Which GPUs run which machine code. Needs no TVM, since running asks it too."""

from __future__ import annotations

from collections.abc import Sequence


def runs_on(device: int, archs: Sequence[int], ptx: int | None) -> bool:
    """Whether a GPU runs a file with machine code for these archs, and this PTX.

    Machine code runs on its own generation, from its own minor version on; PTX is compiled by the
    driver for its own version and any newer one (CUDA C++ Programming Guide, "Compute Capability").

    Parameters
    ----------
    device : int
        The GPU's compute capability: 75 is 7.5.
    archs : sequence of int
    ptx : int or None
    """
    same = any(arch // 10 == device // 10 and arch <= device for arch in archs)
    return same or (ptx is not None and ptx <= device)
