"""Finds NVIDIA's tools and compiles CUDA C with them: for several GPU generations, into one file.

TVM would compile for one arch, with ``--use_fast_math``, or not at all where there is no GPU driver
and leave the source for the user's machine to compile. Here nvcc compiles ahead, so that running
needs neither nvcc nor nvrtc, and rounds as IEEE 754 says.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tvm_ffi

from schedules.common.cuda_device_code import add_device_code

from ..errors import CompileError, TargetError
from .nvidia_files import find_tool
from .target import CudaTarget

_WHEELS = "pip install 'mega-tvm[cuda]'"
_CALLBACK = "tvm_callback_cuda_compile"
_FLAGS = ("-O3", "-std=c++17", "-diag-suppress", "177,550")  # 177, 550: variables that go unused


def find_nvcc() -> Path:
    """Return the path of nvcc.

    Raises
    ------
    TargetError
        If there is none.
    """
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise TargetError(
            "CUDA targets need nvcc, and none is in CUDA_HOME, PATH, /usr/local/cuda or this "
            f"Python environment; install CUDA 13, or its wheels: {_WHEELS}. No GPU is needed to "
            "compile"
        )
    return nvcc


@functools.cache
def nvcc_version() -> str:
    """Return the version of nvcc, such as ``13.0``.

    Raises
    ------
    TargetError
        If there is none.
    CompileError
        If it does not run.
    """
    nvcc = find_nvcc()
    said = run_tool([nvcc, "--version"], f"{nvcc} does not tell its version")
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else "unknown"


def gencode_flags(target: CudaTarget) -> list[str]:
    """Return nvcc's flags for a target's archs."""
    flags = []
    for arch in target.archs:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    if target.ptx is not None:
        flags += ["-gencode", f"arch=compute_{target.ptx},code=compute_{target.ptx}"]
    return flags


def compile_fatbin(source: str, target: CudaTarget) -> bytes:
    """Compile CUDA C into machine code for all of a target's archs.

    Parameters
    ----------
    source : str
    target : CudaTarget

    Returns
    -------
    bytes
        A fatbin.

    Raises
    ------
    TargetError
        If there is no nvcc.
    CompileError
        If nvcc refuses; its message is kept.
    """
    nvcc = find_nvcc()
    with tempfile.TemporaryDirectory() as folder:
        code, output = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        code.write_text(add_device_code(source), encoding="utf-8")
        threads = ["--threads", str(len(os.sched_getaffinity(0)))]
        flags = ["--fatbin", *_FLAGS, *threads, *gencode_flags(target)]
        run_tool(
            [nvcc, *flags, "-o", output, code],
            f"{nvcc} cannot compile the kernels for {target.name}",
        )
        return output.read_bytes()


def run_tool(command: list[str | Path], problem: str) -> str:
    """Run a tool and return what it printed.

    Raises
    ------
    CompileError
        If it fails: ``problem``, and what the tool said.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{problem}: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise CompileError(f"{problem} (exit status {done.returncode}):\n{said[-4000:]}")
    return done.stdout


@contextlib.contextmanager
def compiled_by_nvcc(target: CudaTarget) -> Iterator[None]:
    """Let TVM hand CUDA C to `compile_fatbin` within the context."""
    before = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True)

    def compile_it(source: str) -> bytes:
        return compile_fatbin(source, target)

    tvm_ffi.register_global_func(_CALLBACK, compile_it, override=True)
    try:
        yield
    finally:
        if before is not None:
            tvm_ffi.register_global_func(_CALLBACK, before, override=True)
