"""PyTorch, eager."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from ..workloads import Workload
from .base import Model, missing
from .plain import Form, Plan, forms


class TorchEager:
    """The plain module under ``torch.inference_mode``."""

    name = "torch-eager"
    packages = ("torch",)

    def available(self) -> str | None:
        """Return why the peer cannot run here, or None if it can."""
        return missing("torch")

    def forms(self, workload: Workload, pruned: bool) -> list[Form]:
        """Return the forms of the model worth trying."""
        from .plain_torch import attention_forms

        return forms(workload, pruned, attention_forms)

    def prepare(
        self,
        workload: Workload,
        params: Mapping[str, npt.NDArray[Any]],
        threads: int,
        pruned: bool,
        form: Form,
    ) -> Model:
        """Return the model, ready to call."""
        import torch

        from .plain_torch import PlainMega

        torch.set_num_threads(threads)
        module = PlainMega(Plan.of(workload, form, pruned), params).eval()

        def call(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
            with torch.inference_mode():
                return module(torch.from_numpy(x)).numpy()

        return call
