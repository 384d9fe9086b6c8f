"""IREE: the plain JAX function as StableHLO, compiled for the host's CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..workloads import Workload
from .base import Model, missing
from .plain import Form, Plan, forms

COMPILER_FLAGS = ("--iree-llvmcpu-target-cpu=host", "--iree-opt-level=O3")


class Iree:
    """The plain function through ``iree-compile`` and IREE's runtime."""

    name = "iree"
    packages = ("iree-base-compiler", "iree-base-runtime")

    def available(self) -> str | None:
        """Return why the peer cannot run here, or None if it can."""
        return missing("jax") or missing("iree") or missing("iree.compiler", "iree.runtime")

    def forms(self, workload: Workload, pruned: bool) -> list[Form]:
        """Return the forms of the model worth trying."""
        from .plain_jax import attention_forms

        return forms(workload, pruned, attention_forms)

    def prepare(
        self,
        workload: Workload,
        params: Mapping[str, npt.NDArray[Any]],
        threads: int,
        pruned: bool,
        form: Form,
    ) -> Model:
        """Return the model, compiled."""
        import jax
        from iree import compiler, runtime

        from .plain_jax import build

        shape = (workload.batch, workload.seq_len, workload.config.embed_dim)
        function = jax.jit(build(Plan.of(workload, form, pruned), params))
        exported = jax.export.export(function)(jax.ShapeDtypeStruct(shape, np.float32))
        binary = compiler.compile_str(
            exported.mlir_module_serialized,
            input_type="stablehlo",
            target_backends=["llvm-cpu"],
            extra_args=list(COMPILER_FLAGS),
        )
        # One thread runs on the caller's; more need the task scheduler, sized by a flag that is
        # read when its device is made.
        driver = "local-sync"
        if threads > 1:
            driver = "local-task"
            runtime.flags.parse_flags(f"--task_topology_group_count={threads}")
        config = runtime.Config(driver)
        context = runtime.SystemContext(config=config)
        context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, binary))
        main = context.modules.jit_mega.main

        def call(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.asarray(main(x).to_host())

        return call
