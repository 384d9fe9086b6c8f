"""Opens a library whose bytes were checked: those very bytes, and no file that has their name.

TVM's loader takes a path. Between a check and its ``open`` another file could take the place, and a
file that is written in place changes under a process that has mapped it (``cp new.so model.so``
kills processes that run the old one). So the checked bytes, some hundred kilobytes of code, go into
a sealed file in memory that has no name in any directory, and the loader is pointed at it. The
artifact is then free to be replaced.
"""

from __future__ import annotations

import fcntl
import itertools
import os
from typing import Any

import tvm_ffi

_NAME = "mega_tvm-model.so"  # in /proc/PID/maps, for debuggers
_loads = itertools.count()


def load_image(image: bytes) -> Any:
    """Load a shared library from memory.

    Parameters
    ----------
    image : bytes
        An ELF shared library.

    Returns
    -------
    tvm_ffi.Module

    Raises
    ------
    RuntimeError
        If the loader refuses it.
    OSError
        If there is no memory for it.
    """
    descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(image)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        # By its name, since ModuleLoadFromFile wants a path that ends in .so. The module is kept by
        # those who use it, not for the life of the process.
        loader = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")
        return loader(_fresh_spelling(descriptor), "so")
    finally:
        os.close(descriptor)


def _fresh_spelling(descriptor: int) -> str:
    """Return a path of a descriptor that was not used before in this process.

    The dynamic loader knows libraries by the path they were asked for, and hands out the loaded one
    where another stands behind the same path by now; numbers of descriptors are soon used again.
    The spelling is the count of loads in binary: ``./`` for 0 and ``.//`` for 1.
    """
    digits = f"{next(_loads):b}"
    return f"/proc/self/fd/{''.join('.//' if d == '1' else './' for d in digits)}{descriptor}"
