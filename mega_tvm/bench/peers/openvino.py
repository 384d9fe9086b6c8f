"""OpenVINO, CPU plugin, float32, latency hint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from ..workloads import Workload
from .base import Model, missing
from .plain import Form, Plan, forms


def _from_torch(plan: Plan, params: Mapping[str, npt.NDArray[Any]]) -> Any:
    """Convert the plain module as `openvino.convert_model` does, but without its telemetry."""
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    from .plain_torch import PlainMega

    x = torch.zeros(plan.batch, plan.seq_len, plan.config.embed_dim)
    decoder = TorchScriptPythonDecoder(PlainMega(plan, params).eval(), example_input=x)
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    model.reshape(list(x.shape))
    return model


def build_model(plan: Plan, params: Mapping[str, npt.NDArray[Any]]) -> Any:
    """Return a plan as an ``openvino.Model``."""
    if plan.form.attention == "fused":
        return _from_torch(plan, params)
    import openvino as ov

    from .plain_onnx import build

    return ov.Core().read_model(build(plan, params).SerializeToString())


def settings(threads: int) -> dict[str, Any]:
    """Return the settings to compile with."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # On a CPU with AMX or BF16 the default would be bfloat16.
        "INFERENCE_PRECISION_HINT": "f32",
    }


def _attention_forms(workload: Workload) -> Sequence[str]:
    from .plain_onnx import attention_forms

    # "fused" is its own causal attention operator, which its PyTorch frontend emits.
    fused = [] if workload.config.laplace_attention else ["fused"]
    return [*fused, *attention_forms(workload)]


class OpenVino:
    """The plain ONNX graph, or the plain module where attention is fused, compiled for the CPU."""

    name = "openvino"
    packages = ("openvino",)

    def available(self) -> str | None:
        """Return why the peer cannot run here, or None if it can."""
        return missing("openvino", "onnx", "torch")

    def forms(self, workload: Workload, pruned: bool) -> list[Form]:
        """Return the forms of the model worth trying."""
        return forms(workload, pruned, _attention_forms)

    def prepare(
        self,
        workload: Workload,
        params: Mapping[str, npt.NDArray[Any]],
        threads: int,
        pruned: bool,
        form: Form,
    ) -> Model:
        """Return the model, ready to call."""
        import openvino as ov

        model = build_model(Plan.of(workload, form, pruned), params)
        compiled = ov.Core().compile_model(model, "CPU", settings(threads))
        request = compiled.create_infer_request()

        def call(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
            request.set_input_tensor(ov.Tensor(x, shared_memory=True))
            request.infer()
            return request.get_output_tensor().data.copy()

        return call
