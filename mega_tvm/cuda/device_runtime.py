"""Loads TVM's CUDA runtime, ``libtvm_runtime_cuda.so``, where there is no GPU too.

It links to the driver, ``libcuda.so.1``, and to ``libcudart.so.13``. To compile, all that is needed
of it is that it packs machine code into a library. Where the driver is absent a stand-in takes its
place, whose every call answers "no device".
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import subprocess
import tempfile
from pathlib import Path

from ..errors import CompileError
from .nvidia_files import CUDART, DRIVER, RUNTIME, load_shared

_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE and cudaErrorNoDevice
_DRIVER_CALLS = (
    "cuDeviceGetName", "cuFuncSetAttribute", "cuLaunchKernelEx", "cuModuleGetFunction",
    "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled",
)  # fmt: skip
_NAMING_CALLS = ("cuGetErrorName", "cuGetErrorString")
_CUDART_CALLS = (
    "cudaDeviceGetAttribute", "cudaEventCreate", "cudaEventDestroy", "cudaEventElapsedTime",
    "cudaEventRecord", "cudaEventSynchronize", "cudaFree", "cudaFreeHost", "cudaGetDevice",
    "cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaGetLastError", "cudaGraphDestroy",
    "cudaGraphExecDestroy", "cudaGraphInstantiate", "cudaGraphLaunch", "cudaMalloc",
    "cudaMallocHost", "cudaMemGetInfo", "cudaMemcpyAsync", "cudaMemcpyPeerAsync",
    "cudaPeekAtLastError", "cudaSetDevice", "cudaStreamBeginCapture", "cudaStreamCreate",
    "cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamEndCapture",
    "cudaStreamSynchronize", "cudaStreamWaitEvent",
)  # fmt: skip
_CUDART_NAMING_CALLS = ("cudaGetErrorName", "cudaGetErrorString")

_kept: list[ctypes.CDLL] = []


def load_for_compiling() -> None:
    """Load TVM's CUDA runtime into this process, which has imported tvm, unless it is there.

    Raises
    ------
    CompileError
        If it cannot be loaded.
    """
    import tvm_ffi

    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None:
        return
    for name in (DRIVER, CUDART):
        if load_shared(name) is None:
            _kept.append(_stand_in(name))
    path = importlib.metadata.distribution("apache-tvm").locate_file(f"tvm/lib/{RUNTIME}")
    try:
        _kept.append(ctypes.CDLL(str(path)))
    except OSError as error:
        raise CompileError(f"{path}: TVM's CUDA runtime cannot be loaded: {error}") from error


def _stand_in(name: str) -> ctypes.CDLL:
    calls, naming = _DRIVER_CALLS, _NAMING_CALLS
    lines = [f"int {call}(void) {{ return {_NO_DEVICE}; }}" for call in calls]
    lines += [
        f'int {call}(int e, const char **s) {{ *s = "no CUDA driver"; return 0; }}'
        for call in naming
    ]
    if name == CUDART:
        lines = [f"int {call}(void) {{ return {_NO_DEVICE}; }}" for call in _CUDART_CALLS]
        lines += [
            f'const char *{call}(int e) {{ return "no CUDA driver"; }}'
            for call in _CUDART_NAMING_CALLS
        ]
    from tvm.support import cc

    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "stand_in.c", Path(folder) / name
        versions = Path(folder) / "versions"
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        versions.write_text(f"{name} {{ global: *; }};\n", encoding="utf-8")
        # The symbols' version is the library's name, as in NVIDIA's.
        compiler = cc.get_cc() or "cc"
        command = [
            compiler, "-x", "c", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}",
            f"-Wl,--version-script={versions}", "-o", str(output), str(source),
        ]  # fmt: skip
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            raise CompileError(
                f"{name} is not on this machine, and its stand-in cannot be compiled by "
                f"{compiler}: {said}"
            ) from error
        return ctypes.CDLL(str(output), ctypes.RTLD_GLOBAL)
