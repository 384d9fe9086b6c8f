"""Imports tvm_ffi without torch, which takes a second and which a runtime has no use for.

tvm_ffi imports torch where it is installed (against a conflict of symbols that was seen on
Windows), and registers a faster exchange with old releases of it. Arrays come by DLPack here.
"""

from __future__ import annotations

import sys
import threading


class _NoTorch:
    """An importer that says torch is not installed, to one thread."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise for torch; leave all else to the other importers."""
        if name == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("torch is not imported by mega_tvm", name=name)


def import_tvm_ffi() -> None:
    """Import tvm_ffi, and not torch with it; a torch that is loaded already is used."""
    if "tvm_ffi" in sys.modules:
        return
    no_torch = _NoTorch()
    sys.meta_path.insert(0, no_torch)
    try:
        import tvm_ffi  # noqa: F401
    finally:
        sys.meta_path.remove(no_torch)
