"""The plain model as a PyTorch module, for eager, torch.compile and OpenVINO's converter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.numpy_mega import ATTENTION_EPS, LAYER_NORM_EPS

from ..workloads import Workload
from .plain import Plan, constants, forward, softmax_forms


class TorchOps:
    """PyTorch's operators. Matrices of dense layers are kept ``[out, in]``, as `F.linear` asks."""

    def __init__(self, attention: str) -> None:
        self.attention = attention

    def linear(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        """Return ``x @ w.T + b``."""
        return F.linear(x, w, b)

    def layer_norm(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Normalize the last axis."""
        return F.layer_norm(x, gamma.shape, gamma, beta, LAYER_NORM_EPS)

    def sigmoid(self, x: Tensor) -> Tensor:
        """Return ``sigmoid(x)``."""
        return torch.sigmoid(x)

    def silu(self, x: Tensor) -> Tensor:
        """Return ``x * sigmoid(x)``."""
        return F.silu(x)

    def softmax(self, x: Tensor) -> Tensor:
        """Softmax over the last axis."""
        return torch.softmax(x, dim=-1)

    def split(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """Split the last axis."""
        return torch.split(x, list(sizes), dim=-1)

    def rows(self, x: Tensor, begin: int, end: int, axis: int = 1) -> Tensor:
        """Return a range of one axis, as a view."""
        return x.narrow(axis, begin, end - begin)

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Join along an axis."""
        return torch.cat(list(parts), dim=axis)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Reshape."""
        return x.reshape(tuple(shape))

    def permute(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Permute the axes, as a view."""
        return x.permute(*axes)

    def pad_time(self, x: Tensor, count: int) -> Tensor:
        """Append ``count`` frames of zeros."""
        return F.pad(x, (0, 0, 0, count))

    def fused_attention(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Return `F.scaled_dot_product_attention`, one head."""
        q, k, v = (value.unsqueeze(1) for value in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).squeeze(1)

    def laplace_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """L1-Laplace attention; ``"cdist"`` or, for a compiler that fuses it, ``"broadcast"``."""
        if self.attention == "cdist":
            distance = torch.cdist(q, k, p=1.0)
        else:
            distance = (q.unsqueeze(2) - k.unsqueeze(1)).abs().sum(dim=-1)
        w = 1 / (1 + distance)
        return (w / (w.sum(dim=-1, keepdim=True) + ATTENTION_EPS)) @ v


class PlainMega(nn.Module):
    """`plain.forward` with its constants as buffers, all of one dtype."""

    def __init__(
        self,
        plan: Plan,
        params: Mapping[str, npt.NDArray[Any]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.ops = TorchOps(plan.form.attention)
        self.names: list[str] = []
        for name, value in constants(plan, params).items():
            tensor = torch.from_numpy(value).to(dtype)
            self.register_buffer(name, tensor.T.contiguous() if name.endswith("_w") else tensor)
            self.names.append(name)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, embed_dim] to [B, H]."""
        return forward(self.ops, {n: getattr(self, n) for n in self.names}, self.plan, x)


def attention_forms(workload: Workload) -> Sequence[str]:
    """Return the forms of attention that suit PyTorch."""
    if workload.config.laplace_attention:
        return ["cdist"]
    return ["fused", *softmax_forms(workload)]
