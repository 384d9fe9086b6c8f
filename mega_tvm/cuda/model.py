"""A model that runs on a GPU."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from mega_tvm.entries import Entry
from mega_tvm.errors import DamagedArtifactError, InputError
from mega_tvm.inputs import CPU, as_array, as_output, check_values
from mega_tvm.model import POOLED, Model
from mega_tvm.runtime_library import RuntimeLibrary
from mega_tvm.tensor_memory import Tensors

from .device import CUDA, Device
from .graph_names import SUFFIX


class CudaModel(Model):
    """A loaded model for a GPU. Make one with `mega_tvm.load`.

    Weights are on the device from the start. The first call of an entry captures its kernels, but
    for the first and the last, in a CUDA graph that later calls launch. Calls take turns: one Relax
    virtual machine runs them.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        module: tvm_ffi.Module,
        tensors: Tensors,
        library: RuntimeLibrary,
        num_threads: int,
        device: Device,
        cuda_graph: bool = True,
    ) -> None:
        self._device = device
        self._turn = threading.Lock()
        self._machine = _machine(module)
        items = manifest["tensors"]["items"]
        uploaded = [
            device.upload(np.from_dlpack(view), item["dtype"])
            for view, item in zip(tensors.views, items, strict=True)
        ]
        on_device = Tensors(tensors.block, tvm_ffi.Array(uploaded))
        super().__init__(path, manifest, module, on_device, library, num_threads)
        self._cuda_graph = cuda_graph and bool(manifest["target"].get("cuda_graph"))
        self._functions = {
            entry.name: self.function(entry.name + (SUFFIX if self._cuda_graph else ""))
            for entry in self.entries
        }

    def __call__(self, x: Any, *, out: Any = None, check_finite: bool = False) -> Any:
        """Run the model.

        Parameters
        ----------
        x : array
            float32, of one of the shapes in `entries`: a NumPy array or anything on the CPU that
            exports DLPack, which is copied to the device; or a tensor on the device that exports
            DLPack, C-contiguous, which is read in place.
        out : array, optional
            Takes the result, as in `Model`. For ``x`` on the CPU only.
        check_finite : bool, default False
            Refuse NaN and infinity. For ``x`` on the CPU only.

        Returns
        -------
        ndarray or tvm_ffi.Tensor
            float32, where ``x`` was, or the memory of ``out``: on the device it exports DLPack too,
            and is finished.

        Raises
        ------
        InputError
            If ``x`` or ``out`` has another shape or dtype, or is not where it can be.
        MegaError
            If the device has no memory left, or fails.
        """
        device, index = (None, 0) if isinstance(x, np.ndarray) else _device_of(x)
        if device == CUDA:
            if index != 0:
                raise InputError(
                    f"expected a tensor on cuda:0, where the model is, found one on cuda:{index}; "
                    "copy it there, or choose the GPU by CUDA_VISIBLE_DEVICES"
                )
            if out is not None or check_finite:
                raise InputError(
                    "out and check_finite are for an x on the CPU; take what the call returns, and "
                    "check before it"
                )
            return self._run_on_device(x)
        array = as_array(x)
        entry = self.entry_at(array.shape)
        check_values(array, check_finite)
        target = None if out is None else as_output(out, entry.output_shape)
        with self._turn:
            output = self._compute(entry, self._device.upload(array))
            result: npt.NDArray[np.float32] = self._device.download(output)
        if target is None:
            return result
        target[...] = result
        return target

    @property
    def cuda_graph(self) -> bool:
        """Whether calls launch captured graphs, where kernels stand at fixed addresses."""
        return self._cuda_graph

    def new_machine(self) -> Any:
        """Return a Relax virtual machine of its own, for tracing."""
        return _machine(self._module)

    def invoke(self, function: Any, x: npt.NDArray[np.float32]) -> Any:
        """Call a machine's function with an array on the CPU."""
        return function(self._device.upload(x), *self._machine_tensors())

    def fetch(self, tensor: tvm_ffi.Tensor) -> npt.NDArray[Any]:
        """Copy a tensor from the device."""
        return self._device.download(tensor)

    def _run_on_device(self, x: Any) -> tvm_ffi.Tensor:
        tensor = tvm_ffi.from_dlpack(x)
        if str(tensor.dtype) != "float32":
            raise InputError(f"expected float32, found {tensor.dtype}")
        entry = self.entry_at(tuple(tensor.shape))
        if not tensor.is_contiguous():
            raise InputError("expected a C-contiguous tensor; torch: x.contiguous()")
        with self._turn:
            output = self._compute(entry, tensor)
            tvm_ffi.get_global_func("runtime.Device_StreamSync")(tensor.device, 0)
        return output

    def _compute(self, entry: Entry, x: tvm_ffi.Tensor) -> Any:
        try:
            tensors = self.tensors if self._cuda_graph else self._machine_tensors()
            return self._functions[entry.name](x, *tensors)
        except (TypeError, ValueError) as error:  # the library's own checks
            raise DamagedArtifactError(
                f"{self._path}: the library does not take what its manifest says: {error}"
            ) from error
        except RuntimeError as error:
            raise self._device.failure(error) from error

    def function(self, name: str) -> Any:
        """Return an entry of the model's own virtual machine."""
        try:
            return self._machine[name]
        except (AttributeError, ValueError) as error:
            raise self._missing(name) from error


def _machine(module: tvm_ffi.Module) -> Any:
    machine = module["vm_load_executable"]()
    machine["vm_initialization"](CUDA, 0, POOLED, CPU, 0, POOLED)
    return machine


def _device_of(x: Any) -> tuple[int | None, int]:
    try:
        kind, index = x.__dlpack_device__()
        return int(kind), int(index)
    except Exception:  # `as_array` says what is wrong with it
        return None, 0
