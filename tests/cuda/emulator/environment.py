"""An environment in which every process finds the emulator in place of CUDA, nvcc included."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from schedules.common.cuda_device_code import device_code

from . import activate

_ROOT = Path(__file__).parents[3]
_NVCC = """#!/bin/sh
unset LD_PRELOAD
exec {python} -m tests.cuda.emulator.environment "$@"
"""
VERSION = "13.0"


def emulated(folder: Path) -> dict[str, str]:
    """Return the variables; ``folder`` becomes a CUDA_HOME.

    Libraries are preloaded, since a process loads TVM's CUDA runtime as it imports TVM.
    """
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(_NVCC.format(python=sys.executable))
    nvcc.chmod(0o755)
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "LD_PRELOAD": " ".join(map(str, activate.libraries())),
        "CUDA_HOME": str(folder),
        "PYTHONPATH": os.pathsep.join(paths),
    }


def nvcc(arguments: list[str]) -> None:
    """Do what nvcc would: tell its version, or compile a file for the emulator."""
    if arguments == ["--version"]:
        print(f"Cuda compilation tools, release {VERSION}, emulated")
        return
    output = Path(arguments[arguments.index("-o") + 1])
    source = Path(arguments[-1]).read_text(encoding="utf-8")
    # The emulator has these functions itself.
    output.write_bytes(activate.compile_kernels(source.removeprefix(device_code())))


if __name__ == "__main__":
    nvcc(sys.argv[1:])
