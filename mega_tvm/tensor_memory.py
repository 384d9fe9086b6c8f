"""A compiled model's tensors in memory: one buffer for all, on huge pages where there are any."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import tvm_ffi

from mega_tvm.artifact_format import read_tensors
from mega_tvm.inputs import aligned_empty
from mega_tvm.manifest_schema import ALIGNMENT

_HUGE_PAGE = 2 << 20
# mmap's default is shared memory, which is seldom on huge pages.
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


@dataclasses.dataclass(frozen=True)
class Tensors:
    """A compiled model's tensors.

    Parameters
    ----------
    block : tvm_ffi.Tensor
        All bytes, as in the file, uint8.
    views : tvm_ffi.Array of tvm_ffi.Tensor
        Each tensor, bfloat16 as uint16; the block lives as long as any of them.
    """

    block: tvm_ffi.Tensor
    views: tvm_ffi.Array


def array_type(dtype: str) -> str:
    """Return NumPy's type for a tensor's elements: it has no bfloat16, whose bits are uint16."""
    return "uint16" if dtype == "bfloat16" else dtype


def load_tensors(file: BinaryIO, name: str, manifest: Mapping[str, Any]) -> Tensors:
    """Read and check a compiled model's tensors.

    Returns
    -------
    Tensors

    Raises
    ------
    DamagedArtifactError
        If the tensors' bytes are not what the compiler wrote.
    """
    blob = reserve(manifest["tensors"]["bytes"])
    read_tensors(file, name, manifest, blob)
    views = []
    for item in manifest["tensors"]["items"]:
        count = int(np.prod(item["shape"], dtype=np.int64))
        dtype = array_type(item["dtype"])
        array = np.frombuffer(blob, dtype, count, item["offset"]).reshape(item["shape"])
        views.append(tvm_ffi.from_dlpack(array, require_alignment=ALIGNMENT))
    # Without tensors, kernels read none: any byte will do, and they expect one.
    block = np.frombuffer(blob, np.uint8) if len(blob) else aligned_empty((1,)).view(np.uint8)[:1]
    return Tensors(tvm_ffi.from_dlpack(block, require_alignment=ALIGNMENT), tvm_ffi.Array(views))


def reserve(size: int) -> memoryview:
    """Return untouched memory at the start of a page."""
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(mmap.mmap(-1, max(size, 1), _FLAGS))[:size]
    # Kernels stream all weights at each call. Whole huge pages, to the end of the last one.
    memory = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE + _HUGE_PAGE, _FLAGS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % _HUGE_PAGE
    return memoryview(memory)[start : start + size]
