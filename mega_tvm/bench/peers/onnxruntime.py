"""ONNX Runtime, CPU provider, all graph optimizations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from ..workloads import Workload
from .base import Model, missing
from .plain import Form, Plan, forms


class OnnxRuntime:
    """The plain ONNX graph in an `InferenceSession`."""

    name = "onnxruntime"
    packages = ("onnxruntime", "onnx")

    def available(self) -> str | None:
        """Return why the peer cannot run here, or None if it can."""
        return missing("onnxruntime", "onnx")

    def forms(self, workload: Workload, pruned: bool) -> list[Form]:
        """Return the forms of the model worth trying."""
        from .plain_onnx import attention_forms

        return [
            dataclasses.replace(form, linear=linear)
            for form in forms(workload, pruned, attention_forms)
            for linear in ("matmul", "gemm")  # Gemm takes the bias in; MatMul saves the reshapes
        ]

    def prepare(
        self,
        workload: Workload,
        params: Mapping[str, npt.NDArray[Any]],
        threads: int,
        pruned: bool,
        form: Form,
    ) -> Model:
        """Return the model, ready to call."""
        import onnxruntime as ort

        from .plain_onnx import build

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        model = build(Plan.of(workload, form, pruned), params).SerializeToString()
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        def call(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return session.run(None, {"x": x})[0]

        return call
