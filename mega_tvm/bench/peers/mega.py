"""mega_tvm itself, as a contestant: compiled to a library, loaded by the runtime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mega_tvm.weights import Checkpoint

from ..workloads import Workload
from .base import Model, missing
from .plain import Form

# Names the folder of libraries that a run compiled: the process that measures memory finds them
# there, and so holds nothing of the compiler.
LIBRARIES = "MEGA_TVM_BENCH_LIBRARIES"


class LoadedModel:
    """A compiled model: its call, its manifest, and where the run has no folder, its own one."""

    def __init__(self, checkpoint: Checkpoint, workload: Workload, threads: int) -> None:
        import mega_tvm

        folder = os.environ.get(LIBRARIES)
        if folder is None:
            self._own_folder = tempfile.TemporaryDirectory(prefix="mega-tvm-bench-")
            folder = self._own_folder.name
        shape = f"B{workload.batch}-T{workload.seq_len}"
        attention = "laplace" if workload.config.laplace_attention else "softmax"
        library = Path(folder) / f"{checkpoint.digest[:16]}-{attention}-{shape}-{threads}.so"
        if not library.exists():
            mega_tvm.compile_model(
                checkpoint,
                target="native",
                batch=workload.batch,
                seq_len=workload.seq_len,
                threads=threads,
                symbolic=False,  # neither this
                stream=False,  # nor that would run
                output=library,
            )
        self.library = library
        self._model = mega_tvm.load(library, num_threads=threads)
        self.metadata: dict[str, Any] = dict(self._model.metadata)

    def __call__(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Run the model."""
        return self._model(x)


class MegaTvm:
    """The compiler and runtime of this project. Pruning is its own: it has no pruned variant."""

    name = "mega_tvm"
    packages = ("mega-tvm", "apache-tvm", "apache-tvm-ffi")

    def available(self) -> str | None:
        """Return why the contestant cannot run here, or None if it can."""
        return missing("tvm", "torch")

    def forms(self, workload: Workload, pruned: bool) -> list[Form]:
        """Return the one form that it has."""
        return [] if pruned else [Form("compiled")]

    def prepare(
        self,
        workload: Workload,
        params: Mapping[str, npt.NDArray[Any]],
        threads: int,
        pruned: bool,
        form: Form,
    ) -> Model:
        """Return the model, compiled and loaded."""
        return LoadedModel(Checkpoint(workload.config, dict(params)), workload, threads)
