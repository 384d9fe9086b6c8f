"""What the pipeline hands on: code, packed tensors, and what they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from .aot import RUN_SUFFIX, tensor_block
from .errors import CompileError
from .passes.split_window import WindowSplit
from .symbolic_entry import BATCH, SEQ_LEN, workspace_bytes


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled module.

    Parameters
    ----------
    executable : relax.VMExecutable
        Each entry twice: ``<entry>__run``, see `mega_tvm.aot`, and ``(x, tensors)`` for the VM.
        For a GPU, only the VM's.
    tensors : list of array
        The packed constants.
    workspaces : dict of str to dict
        Bytes of workspace that ``<entry>__run`` takes, by region: see `mega_tvm.symbolic_entry`; on
        a GPU, bytes that all entries take.
    states : dict of str to list
        Of an entry that carries state, ``kind`` and ``width`` of each array, in order.
    windows : WindowSplit or None
        The functions of windows.
    kernels : list of dict
        Per kernel: ``name``, ``op``, ``spec`` (None for operators that are not Mega's),
        ``schedule`` (its source) and ``calls`` (over all entries); of an attention whose keys
        differ from one piece of rows to the next ``mean_keys``; for a GPU ``launches``, the device
        functions that a call launches, with the threads of a block.
    seconds : dict
        Wall time of each phase.
    """

    executable: Any
    tensors: list[npt.NDArray[Any]]
    workspaces: dict[str, dict[str, int]]
    states: dict[str, list[dict[str, Any]]]
    windows: WindowSplit | None
    kernels: list[dict[str, Any]]
    seconds: dict[str, float]

    def run(
        self, entry: str, x: npt.NDArray[np.float32], out_shape: tuple[int, ...]
    ) -> npt.NDArray[np.float32]:
        """Run an entry in this process, before anything is written."""
        if not self.executable.mod.implements_function(entry + RUN_SUFFIX, query_imports=True):
            return self._run_on_gpu(entry, x)
        function = self.executable.mod.get_function(entry + RUN_SUFFIX, query_imports=True)
        block = tensor_block(self.tensors)
        sizes = dict(zip((BATCH, SEQ_LEN), x.shape, strict=False))
        workspace = np.zeros(workspace_bytes(self.workspaces[entry], sizes), np.uint8)
        output = np.full(out_shape, np.nan, np.float32)
        arguments = [tvm.runtime.tensor(array) for array in (x, block, workspace, output)]
        if function(*arguments) != 0:
            raise CompileError(f"a kernel of entry {entry} failed: out of memory")
        result: npt.NDArray[np.float32] = arguments[-1].numpy()
        return result

    def _run_on_gpu(self, entry: str, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        device = tvm.cuda(0)
        machine = relax.VirtualMachine(self.executable, device)
        tensors = [tvm.runtime.tensor(array, device) for array in self.tensors]
        arguments = [tvm.runtime.tensor(x, device), *([tensors] if tensors else [])]
        result: npt.NDArray[np.float32] = machine[entry](*arguments).numpy()
        return result
