"""JAX: XLA's CPU compiler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..workloads import Workload
from .base import Model, missing
from .plain import Form, Plan, forms


class Jax:
    """The plain function under ``jax.jit``, compiled ahead.

    The number of threads is fixed when XLA's client starts: by the process' affinity and ``NPROC``,
    which `mega_tvm.bench.environment` sets.
    """

    name = "jax"
    packages = ("jax", "jaxlib")

    def available(self) -> str | None:
        """Return why the peer cannot run here, or None if it can."""
        return missing("jax", "jaxlib")

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

        from .plain_jax import build

        shape = (workload.batch, workload.seq_len, workload.config.embed_dim)
        function = jax.jit(build(Plan.of(workload, form, pruned), params))
        compiled = function.lower(jax.ShapeDtypeStruct(shape, np.float32)).compile()

        def call(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.asarray(compiled(x))

        return call
