"""Mega as a trainable PyTorch module, with Axon's parameter names.

State-dict keys are Axon's names with ``/`` replaced by ``.`` (``mega_block_1_gattn_q.kernel``),
which is also how Edifice's safetensors export spells them. Dense kernels are ``[in, out]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MegaConfig, recommended_defaults
from .numpy_mega import LAYER_NORM_EPS
from .ops import axon_layer_norm, ema_scan, gated_attention

__all__ = [
    "Mega",
    "MegaBlock",
    "build",
    "build_mega_block",
    "output_size",
    "recommended_defaults",
]

Init = Literal["torch", "axon"]

# In a training state of Axon, the random keys of the dropout layers stand among the parameters.
_DROPOUT_KEY_SUFFIXES = ("_drop/key", "_dropout/key")


def build(config: MegaConfig, *, init: Init = "torch", seed: int | None = None) -> Mega:
    """Return a freshly initialized model, in training mode.

    Parameters
    ----------
    config : MegaConfig
    init : {"torch", "axon"}, default "torch"
        Both draw the kernels Glorot uniform and set biases, betas and alphas to zero. They differ
        in the gammas of the layer norms: ``"torch"`` sets ones, so that a norm starts as plain
        normalization, as PyTorch users and the paper expect. ``"axon"`` draws them from
        U(-sqrt(3), sqrt(3)), as Edifice does because Axon's general default reaches gamma too;
        it mutes and flips features at random, so it is for reproducing Edifice's own runs.
    seed : int, optional
        Draws from a generator of its own: reproducible, and the global one is untouched. Without
        a seed the global generator is used, so ``torch.manual_seed`` governs.
    """
    return Mega(config, init=init, seed=seed)


def build_mega_block(
    config: MegaConfig, index: int, *, init: Init = "torch", seed: int | None = None
) -> MegaBlock:
    """Return one freshly initialized block, ``mega_block_{index}``; see `build`.

    Parameters
    ----------
    config : MegaConfig
    index : int
        The block's number in its parameters' names, from 1.
    init, seed
        As for `build`.
    """
    return MegaBlock(config, index, init=init, seed=seed)


def output_size(config: MegaConfig) -> int:
    """Return the width of the model's output, which is ``hidden_size``."""
    return config.output_size


class Dense(nn.Module):
    """``x @ kernel + bias``: [..., N] to [..., M], kernel [N, M]."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(in_size, out_size))
        self.bias = nn.Parameter(torch.empty(out_size))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., N] to [..., M]."""
        return x @ self.kernel + self.bias


class LayerNorm(nn.Module):
    """Layer norm over the last axis, in one of the forms of `MegaConfig.layer_norm`."""

    def __init__(self, size: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.gamma = nn.Parameter(torch.empty(size))
        self.beta = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H] to [..., H]."""
        if self.form == "axon-0.8.0":
            return axon_layer_norm(x, self.gamma, self.beta)
        return F.layer_norm(x, self.gamma.shape, self.gamma, self.beta, LAYER_NORM_EPS)


class Ema(nn.Module):
    """H to D, moving average over time, D to H. Parameter names repeat the layer's, as Axon's."""

    def __init__(self, config: MegaConfig, name: str) -> None:
        super().__init__()
        self.prefix = name
        hidden, channels = config.hidden_size, config.ema_dim
        shapes = {
            "proj_w": (hidden, channels),
            "proj_b": (channels,),
            "alpha": (channels,),
            "out_w": (channels, hidden),
            "out_b": (hidden,),
        }
        for part, shape in shapes.items():
            self.register_parameter(f"{name}_{part}", nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, H] to [B, T, H]."""
        proj_w, proj_b, alpha, out_w, out_b = (
            self.get_parameter(f"{self.prefix}_{part}")
            for part in ("proj_w", "proj_b", "alpha", "out_w", "out_b")
        )
        return ema_scan(x @ proj_w + proj_b, alpha) @ out_w + out_b


class Dropout(nn.Dropout):
    """Dropout that leaves no node behind in a graph exported in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x``, of any shape, while training."""
        return super().forward(x) if self.training and self.p > 0 else x


class MegaBlock(nn.Module):
    """EMA, gated attention and SwiGLU FFN, each with a pre-norm and a residual; see `build`.

    Its layers carry Axon's full names (``mega_block_1_gattn_q``), as they do in a whole `Mega`.
    """

    def __init__(
        self, config: MegaConfig, index: int, *, init: Init = "torch", seed: int | None = None
    ) -> None:
        super().__init__()
        if index < 1:
            raise ValueError(f"blocks are numbered from 1; got index={index}")
        self.config = config
        self.index = index
        _add_block_layers(self, config, index)
        _initialize(self, init, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, H] to [B, T, H]."""
        return _run_block(self, self.config, self.index, x)


class Mega(nn.Module):
    """The whole model: [B, T, embed_dim] to [B, hidden_size], any T >= 1; see `build`.

    The layers of all blocks are direct children, so that parameters, state-dict keys and the
    names in an exported graph are Axon's.
    """

    def __init__(
        self, config: MegaConfig, *, init: Init = "torch", seed: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        if config.has_input_projection:
            self.input_projection = Dense(config.embed_dim, config.hidden_size)
        for index in range(1, config.num_layers + 1):
            _add_block_layers(self, config, index)
        self.final_norm = LayerNorm(config.hidden_size, config.layer_norm)
        _initialize(self, init, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Map frames [B, T, embed_dim] to the state after the last one, [B, hidden_size].

        Raises
        ------
        ValueError
            If ``x`` has not the shape [B, T >= 1, embed_dim].
        """
        if x.dim() != 3 or x.shape[2] != self.config.embed_dim or x.shape[1] < 1:
            raise ValueError(
                f"x must be [B, T >= 1, embed_dim={self.config.embed_dim}]; got {list(x.shape)}"
            )
        if self.config.has_input_projection:
            x = self.input_projection(x)
        for index in range(1, self.config.num_layers + 1):
            x = _run_block(self, self.config, index, x)
        return self.final_norm(x)[:, -1]

    @classmethod
    def from_params(cls, config: MegaConfig, params: Mapping[str, npt.NDArray[Any]]) -> Mega:
        """Return a model with the given parameters, bit for bit, in eval mode.

        Parameters
        ----------
        config : MegaConfig
        params : mapping of str to array
            Every parameter under its Axon name (``layer/param``), all float16, float32 or
            float64, which becomes the model's type. Axon's dropout keys are ignored.

        Raises
        ------
        ValueError
            If a parameter is missing, unknown, or not of the shape or type asked for.
        """
        model = cls(config, seed=0)  # a seed, because loading must not advance the global generator
        arrays = {
            name.replace("/", "."): np.asarray(value)
            for name, value in params.items()
            if not name.endswith(_DROPOUT_KEY_SUFFIXES)
        }
        _check_params(model.state_dict(), arrays)
        # Copies, so that the model does not change with the caller's arrays; by the type's name, so
        # that a foreign byte order becomes the native one, which torch asks for.
        state = {
            name: torch.from_numpy(np.array(value, dtype=value.dtype.name, order="C"))
            for name, value in arrays.items()
        }
        model.load_state_dict(state, assign=True)
        return model.eval()

    def to_params(self) -> dict[str, npt.NDArray[Any]]:
        """Return a copy of every parameter under its Axon name, bit for bit."""
        return {
            name.replace(".", "/"): value.detach().cpu().numpy().copy()
            for name, value in self.state_dict().items()
        }


def _add_block_layers(parent: nn.Module, config: MegaConfig, index: int) -> None:
    """Register the layers of block ``index`` as children of ``parent``, by Axon's names."""
    hidden, inner = config.hidden_size, config.ffn_size
    name = f"mega_block_{index}"

    def add(part: str, layer: nn.Module) -> None:
        parent.add_module(f"{name}_{part}", layer)

    add("ema_norm", LayerNorm(hidden, config.layer_norm))
    add("ema", Ema(config, f"{name}_ema"))
    add("ema_drop", Dropout(config.dropout))
    add("attn_norm", LayerNorm(hidden, config.layer_norm))
    for part in ("q", "k", "v", "gate", "out"):
        add(f"gattn_{part}", Dense(hidden, hidden))
    add("attn_drop", Dropout(config.dropout))
    add("ffn_norm", LayerNorm(hidden, config.layer_norm))
    add("ffn_gate", Dense(hidden, inner))
    add("ffn_up", Dense(hidden, inner))
    add("ffn_down", Dense(inner, hidden))
    add("ffn_dropout", Dropout(config.dropout))


def _run_block(parent: nn.Module, config: MegaConfig, index: int, x: Tensor) -> Tensor:
    """Run the layers that `_add_block_layers` registered: [B, T, H] to [B, T, H]."""

    def layer(part: str, y: Tensor) -> Tensor:
        return parent.get_submodule(f"mega_block_{index}_{part}")(y)

    x = x + layer("ema_drop", layer("ema", layer("ema_norm", x)))

    y = layer("attn_norm", x)
    q, k, v, gate = (layer(f"gattn_{part}", y) for part in ("q", "k", "v", "gate"))
    y = gated_attention(q, k, v, torch.sigmoid(gate), config.laplace_attention)
    x = x + layer("attn_drop", layer("gattn_out", y))

    y = layer("ffn_norm", x)
    y = F.silu(layer("ffn_gate", y)) * layer("ffn_up", y)
    return x + layer("ffn_dropout", layer("ffn_down", y))


def _initialize(module: nn.Module, init: Init, seed: int | None) -> None:
    """Fill every parameter, in place; see `build`."""
    if init not in ("torch", "axon"):
        raise ValueError(f"init must be 'torch' or 'axon'; got {init!r}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def draw(param: Tensor, bound: float) -> None:
        # Drawn on the CPU whatever the default device, where the generator lives.
        values = torch.empty(param.shape, dtype=param.dtype, device="cpu")
        param.copy_(values.uniform_(-bound, bound, generator=generator))

    with torch.no_grad():
        for name, param in module.named_parameters():
            if param.dim() == 2:
                draw(param, math.sqrt(6 / sum(param.shape)))
            elif not name.endswith(".gamma"):
                param.zero_()
            elif init == "torch":
                param.fill_(1.0)
            else:  # Glorot with a fan of 1 both ways
                draw(param, math.sqrt(3))


def _check_params(expected: Mapping[str, Tensor], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Refuse parameters that do not fit the model, all names of one fault in one message."""
    for fault, names in (
        ("missing", expected.keys() - arrays.keys()),
        ("unknown", arrays.keys() - expected.keys()),
    ):
        if names:
            listed = ", ".join(sorted(name.replace(".", "/") for name in names))
            raise ValueError(f"{fault} parameters: {listed}")
    for name, value in arrays.items():
        shape = tuple(expected[name].shape)
        if value.shape != shape:
            raise ValueError(
                f"parameter {name.replace('.', '/')} must be {list(shape)}; got {list(value.shape)}"
            )
    dtypes = sorted({value.dtype.name for value in arrays.values()})
    if len(dtypes) != 1 or dtypes[0] not in ("float16", "float32", "float64"):
        raise ValueError(
            f"parameters must all be float16, float32 or float64; got {', '.join(dtypes)}"
        )
