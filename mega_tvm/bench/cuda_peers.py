"""Who is compared on a GPU: mega_tvm, and PyTorch in four ways.

In float32 all compute in fp32, not TF32. In a half type PyTorch's module is all of that type; input
and output are float32, as ours, converted on the device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from mega_tvm.weights import Checkpoint

from .peers.plain import Form, Plan
from .peers.plain_torch import PlainMega
from .workloads import Workload

Params = Mapping[str, npt.NDArray[Any]]
# Takes a tensor on the device, and returns one that the next call may write again.
Call = Callable[[torch.Tensor], Any]
# Workload, parameters, whether pruned, device, type of weights and activations.
Prepare = Callable[[Workload, Params, bool, str, str], Call]

OURS = "mega_tvm"


class _Module(torch.nn.Module):
    """The plain module, whose input and output are float32."""

    def __init__(self, plain: PlainMega, dtype: torch.dtype) -> None:
        super().__init__()
        self.plain, self.dtype = plain, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.plain(x.to(self.dtype))
        return found.to(torch.float32)


def _module(
    workload: Workload, params: Params, pruned: bool, device: str, dtype: str
) -> torch.nn.Module:
    torch.set_float32_matmul_precision("highest")
    form = Form("cdist" if workload.config.laplace_attention else "fused", merged=pruned)
    own: torch.dtype = getattr(torch, dtype)
    plain = PlainMega(Plan.of(workload, form, pruned), params, own)
    return _Module(plain, own).eval().to(device)


def eager(workload: Workload, params: Params, pruned: bool, device: str, dtype: str) -> Call:
    """Return the plain module, run operator by operator."""
    module = _module(workload, params, pruned, device, dtype)

    def call(x: torch.Tensor) -> Any:
        with torch.inference_mode():
            return module(x)

    return call


def compiled(workload: Workload, params: Params, pruned: bool, device: str, dtype: str) -> Call:
    """Return the plain module through ``torch.compile``; on a GPU, with its own autotuning."""
    module = _module(workload, params, pruned, device, dtype)
    torch._dynamo.reset()  # or it would count as a recompilation of the module before
    mode = "max-autotune-no-cudagraphs" if device == "cuda" else "default"
    function = torch.compile(module, dynamic=False, mode=mode)

    def call(x: torch.Tensor) -> Any:
        with torch.no_grad():
            return function(x)

    return call


def captured(prepare: Prepare) -> Prepare:
    """Return a peer's model, captured in one CUDA graph: input copied in, graph launched."""

    def prepare_captured(
        workload: Workload, params: Params, pruned: bool, device: str, dtype: str
    ) -> Call:
        call = prepare(workload, params, pruned, device, dtype)
        shape = (workload.batch, workload.seq_len, workload.config.embed_dim)
        kept = torch.zeros(shape, device=device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as torch's documentation asks: warm up beside
            for _ in range(3):
                call(kept)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call(kept)

        def replay(x: torch.Tensor) -> Any:
            kept.copy_(x)
            graph.replay()
            return result

        return replay

    return prepare_captured


def ours(workload: Workload, params: Params, pruned: bool, device: str, dtype: str) -> Call:
    """Return the compiled and loaded model."""
    import mega_tvm
    from mega_tvm.cuda.lowering import device_arch
    from mega_tvm.cuda.target import target_of_arch

    target = target_of_arch(device_arch()).name if device == "cuda" else "native"
    with tempfile.TemporaryDirectory(prefix="mega-tvm-bench-") as folder:
        library = mega_tvm.compile_model(
            Checkpoint(workload.config, dict(params)),
            target=target,
            batch=workload.batch,
            seq_len=workload.seq_len,
            symbolic=False,
            stream=False,
            dtype=dtype,
            output=Path(folder) / "model.so",
        )
        model = mega_tvm.load(library)
    model.warmup()
    return _Ours(model)


class _Ours:
    def __init__(self, model: Any) -> None:
        self._model = model
        self.metadata: dict[str, Any] = dict(model.metadata)

    def __call__(self, x: torch.Tensor) -> Any:
        return self._model(x)


PEERS: dict[str, Prepare] = {
    OURS: ours,
    "torch-eager": eager,
    "torch-compile": compiled,
    "torch-eager-graph": captured(eager),
    "torch-compile-graph": captured(compiled),
}
