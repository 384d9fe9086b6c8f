"""The GPU that a model runs on: what must be there is checked one by one, and said plainly.

TVM's own messages tell little of it ("Library binary was created using {cuda} but a loader of that
name is not registered").
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from mega_tvm.errors import IncompatibleArtifactError, MegaError
from mega_tvm.tensor_memory import array_type

from .archs import runs_on
from .nvidia_files import CUDART, DRIVER, RUNTIME, load_shared

CUDA = 2  # kDLCUDA
# libcudart.so.13 refuses older ones. Driver 580 is the first for CUDA 13.0.
_LEAST_DRIVER, _LEAST_DRIVER_NAME = 13000, "CUDA 13.0 (driver 580)"
_EXISTS, _COMPUTE_VERSION, _NAME = 0, 4, 5  # TVM's attributes of devices


class Device:
    """The first GPU that this process may use.

    Parameters
    ----------
    name : str
        The artifact's path, for messages.
    target : mapping
        The manifest's field.
    runtime_folder : Path
        Where ``libtvm_runtime.so``, which is loaded, lies.

    Raises
    ------
    IncompatibleArtifactError
        If there is no GPU, driver or runtime library, or the artifact is for other GPUs.
    """

    def __init__(self, name: str, target: Mapping[str, Any], runtime_folder: Path) -> None:
        self._path = name
        archs = ", ".join(target["archs"])
        self._check_driver(f"{name}: is compiled for GPUs ({archs})")
        self._load_runtime(runtime_folder)
        attribute = tvm_ffi.get_global_func("runtime.GetDeviceAttr")
        if not attribute(CUDA, 0, _EXISTS):
            raise IncompatibleArtifactError(
                f"{name}: is compiled for GPUs ({archs}), and this process sees none; run it on a "
                "machine with an NVIDIA GPU (is CUDA_VISIBLE_DEVICES empty?), or compile the model "
                "with --target native"
            )
        version = str(attribute(CUDA, 0, _COMPUTE_VERSION))
        self.arch = int(version.replace(".", ""))
        self.name = str(attribute(CUDA, 0, _NAME))
        ptx = target["ptx"]
        built = [int(arch.removeprefix("sm_")) for arch in target["archs"]]
        if not runs_on(self.arch, built, ptx and int(ptx.removeprefix("compute_"))):
            newer = f" and newer than {ptx.replace('compute', 'sm')}" if ptx else ""
            raise IncompatibleArtifactError(
                f"{name}: built for {archs}{newer}; this device ({self.name}) is sm_{self.arch}: "
                f"compile the model with --target cuda-sm_{self.arch}, or cuda"
            )
        self._device = tvm_ffi.device("cuda", 0)
        self._allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._from_bytes = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        self._to_bytes = tvm_ffi.get_global_func("runtime.TVMTensorCopyToBytes")

    def _check_driver(self, subject: str) -> None:
        driver = load_shared(DRIVER)
        if driver is None:
            raise IncompatibleArtifactError(
                f"{subject}, and this machine has no NVIDIA driver ({DRIVER} is not found); run it "
                "on a machine with a GPU, or compile the model with --target native"
            )
        version = ctypes.c_int(_LEAST_DRIVER)
        if (ask := getattr(driver, "cuDriverGetVersion", None)) is not None:
            ask(ctypes.byref(version))
        if version.value < _LEAST_DRIVER:
            found = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
            raise IncompatibleArtifactError(
                f"{subject} and needs an NVIDIA driver for {_LEAST_DRIVER_NAME} or newer; this "
                f"machine's driver supports {found}: update it"
            )
        if load_shared(CUDART) is None:
            raise IncompatibleArtifactError(
                f"{subject} and needs CUDA's runtime library, {CUDART}, which is not found: "
                "pip install 'nvidia-cuda-runtime>=13,<14', or install CUDA 13"
            )

    def _load_runtime(self, folder: Path) -> None:
        if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
            return
        try:
            ctypes.CDLL(str(folder / RUNTIME))
        except OSError as error:
            raise IncompatibleArtifactError(
                f"{self._path}: TVM's CUDA runtime, {RUNTIME}, must lie beside libtvm_runtime.so "
                f"in {folder}, and cannot be loaded: {error}; copy it from tvm/lib of the "
                "apache-tvm 0.27 wheel"
            ) from error

    def upload(self, array: npt.NDArray[Any], dtype: str | None = None) -> tvm_ffi.Tensor:
        """Copy an array to the device; ``dtype`` says what its bits are, if not what NumPy says.

        Raises
        ------
        MegaError
            If there is no memory for it.
        """
        array = np.asarray(array, order="C")
        tensor = self.empty(array.shape, dtype or array.dtype.name)
        self._from_bytes(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return tensor

    def download(self, tensor: tvm_ffi.Tensor) -> npt.NDArray[Any]:
        """Wait for the device, and copy a tensor from it; bfloat16 is widened to float32."""
        dtype = str(tensor.dtype)
        array = np.empty(tuple(tensor.shape), array_type(dtype))
        self._to_bytes(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        if dtype == "bfloat16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array

    def empty(self, shape: tuple[int, ...], dtype: str) -> tvm_ffi.Tensor:
        """Return a tensor of undefined values."""
        try:
            return self._allocate(tvm_ffi.Shape(shape), tvm_ffi.dtype(dtype), self._device, None)
        except RuntimeError as error:
            raise self.failure(error) from error

    def failure(self, error: Exception) -> MegaError:
        """Return the error to raise for one of TVM's."""
        text = str(error)
        if "out of memory" in text.lower() or "MemoryAllocation" in text:
            return MegaError(
                f"{self._path}: out of memory on {self.name}: free some of it, or compile the "
                "model for a smaller batch or length"
            )
        return MegaError(f"{self._path}: failed on {self.name}: {text}")
