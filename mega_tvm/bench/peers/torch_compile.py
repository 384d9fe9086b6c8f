"""PyTorch, compiled by Inductor: frozen weights, max-autotune, C++ wrapper."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from ..workloads import Workload
from .base import Model, missing
from .plain import Form, Plan

OPTIONS = {"freezing": True, "max_autotune": True, "cpp_wrapper": True}


class TorchCompile:
    """The plain module through ``torch.compile`` with `OPTIONS`."""

    name = "torch-compile"
    packages = ("torch",)

    def available(self) -> str | None:
        """Return why the peer cannot run here, or None if it can."""
        if shutil.which("g++") is None:
            return "Inductor needs g++, which is not on the PATH"
        return missing("torch")

    def forms(self, workload: Workload, pruned: bool) -> list[Form]:
        """Return the forms of the model worth trying: few, as each compiles for a minute."""
        # Written out, the distance fuses into one loop; cdist stays a call.
        names = ["cdist", "broadcast"] if workload.config.laplace_attention else ["fused"]
        return [Form(name, merged=pruned) for name in names]

    def prepare(
        self,
        workload: Workload,
        params: Mapping[str, npt.NDArray[Any]],
        threads: int,
        pruned: bool,
        form: Form,
    ) -> Model:
        """Return the model, compiled by a first call."""
        import torch
        from torch._inductor import select_algorithm

        from .plain_torch import PlainMega

        # Its tables of every candidate would drown the report.
        select_algorithm.PRINT_AUTOTUNE = False
        torch.set_num_threads(threads)
        module = PlainMega(Plan.of(workload, form, pruned), params).eval()
        # Each contestant compiles its own module: without this the second would count as a
        # recompilation of the first, with symbolic sizes.
        torch._dynamo.reset()
        compiled = torch.compile(module, dynamic=False, options=dict(OPTIONS))

        def call(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
            # Freezing asks for no_grad; inference_mode would make every buffer a new kind.
            with torch.no_grad():
                return compiled(torch.from_numpy(x)).numpy()

        shape = (workload.batch, workload.seq_len, workload.config.embed_dim)
        call(torch.zeros(shape).numpy())
        return call
