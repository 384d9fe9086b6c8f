"""Finds the layer where a compiled model leaves its reference.

The Relax virtual machine calls a hook before and after each kernel (``set_instrument``). The hook
copies what each kernel wrote, and outputs that are a named layer's are compared with the oracle's.
Needs the runtime library alone, as running does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from mega_tvm.errors import MegaError
from mega_tvm.inputs import aligned_empty
from mega_tvm.runtime import Model
from mega_tvm.tolerances import Parity, compare
from reference import MegaConfig, numpy_mega

_ATTENTIONS = ("gated_attention", "laplace_attention")
_RESIDUALS = ("ema_residual", "attn_residual", "ffn_residual")


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """One kernel's run.

    Parameters
    ----------
    kernel : dict
        Its description in the manifest.
    output : array
        A copy of what it wrote.
    """

    kernel: Mapping[str, Any]
    output: npt.NDArray[Any]

    def is_a(self, *ops: str, **fields: object) -> bool:
        """Whether the kernel is of one of these operators, and its specification has the fields."""
        spec = self.kernel["spec"] or {}
        return self.kernel["op"] in ops and all(spec.get(k) == v for k, v in fields.items())


@dataclasses.dataclass(frozen=True)
class Layer:
    """A named layer's comparison.

    Parameters
    ----------
    name : str
        As Axon names it.
    kernel : str
        The kernel that computes it.
    parity : Parity
    """

    name: str
    kernel: str
    parity: Parity


@dataclasses.dataclass(frozen=True)
class Localization:
    """Where a model leaves its reference.

    Parameters
    ----------
    case, entry : str
        What was run.
    layers : tuple of Layer
        In the order of computation; empty if kernels could not be told apart.
    message : str
        The conclusion, for people.
    """

    case: str
    entry: str
    layers: tuple[Layer, ...]
    message: str

    @property
    def first_wrong(self) -> str | None:
        """The first layer outside tolerance."""
        return next((layer.name for layer in self.layers if not layer.parity.ok), None)


def trace(model: Model, entry: str, x: npt.NDArray[np.float32]) -> list[KernelCall]:
    """Run an entry and copy the output of every kernel.

    Parameters
    ----------
    model : Model
    entry : str
    x : array
        Of the entry's shape.

    Returns
    -------
    list of KernelCall
        In the order of execution.
    """
    known = {kernel["name"]: kernel for kernel in model.metadata["kernels"]}
    calls: list[KernelCall] = []

    def hook(_func: Any, symbol: str, before_run: bool, _result: Any, *args: Any) -> None:
        # Kernels write to their last argument, whose memory a later kernel may be given.
        if not before_run and symbol in known and args and isinstance(args[-1], tvm_ffi.Tensor):
            calls.append(KernelCall(known[symbol], model.fetch(args[-1])))

    machine = model.new_machine()
    machine["set_instrument"](tvm_ffi.convert(hook))
    buffer = aligned_empty(x.shape)
    np.copyto(buffer, x)
    model.invoke(_traced_function(model, machine, entry, x.shape), buffer)
    return calls


def _traced_function(model: Model, machine: Any, entry: str, shape: tuple[int, ...]) -> Any:
    """Return the machine's function of an entry.

    One that runs its rows in pieces has none; the symbolic entry computes the same.
    """
    symbolic = [e.name for e in model.symbolic_entries if e.sizes(shape) is not None]
    for name in (entry, *symbolic):
        try:
            return machine[name]
        except AttributeError:
            continue
    raise MegaError(
        f"entry {entry} runs its rows in pieces, which cannot be traced; compile it with a "
        "symbolic entry, or with --disable-pass split_rows"
    )


def name_layers(calls: Sequence[KernelCall], config: MegaConfig) -> dict[str, KernelCall]:
    """Return the calls that compute a layer of the reference, by its Axon name.

    The residual sums depend on each other, so that their order is the model's: three a block.
    Kinds of kernels are left out whose number is not one a block, as after a pass was switched off.

    Returns
    -------
    dict of str to KernelCall
        In the order of execution; empty if the residual sums are not three a block.
    """
    blocks = [f"mega_block_{i}" for i in range(1, config.num_layers + 1)]
    residuals = [call for call in calls if call.is_a("dense", residual=True)]
    if len(residuals) != len(_RESIDUALS) * len(blocks):
        return {}
    names = [f"{block}_{part}" for block in blocks for part in _RESIDUALS]
    named = {id(call): name for name, call in zip(names, residuals, strict=True)}
    products = [call for call in calls if call.is_a("dense", swiglu=True)]
    if len(products) == len(blocks):
        named |= {id(call): f"{b}_ffn_mul" for b, call in zip(blocks, products, strict=True)}
    attentions = [call for call in calls if call.is_a(*_ATTENTIONS)]
    if len(attentions) == len(blocks):
        named |= {
            id(call): f"{block}_gattn_compute"
            for block, call in zip(blocks, attentions, strict=True)
            # Without a gate, it is a step on the way to the layer.
            if not call.is_a(*_ATTENTIONS, gate_stride=0)
        }
    denses = [call for call in calls if call.is_a("dense")]
    if config.has_input_projection and denses[0].is_a("dense", residual=False, swiglu=False):
        named[id(denses[0])] = "input_projection"
    affine = [call for call in calls if call.is_a("layer_norm", affine=True)]
    if affine:
        named[id(affine[-1])] = "final_norm"
    return {named[id(call)]: call for call in calls if id(call) in named}


def localize(
    model: Model,
    params: numpy_mega.Params,
    case: str,
    entry: str,
    x: npt.NDArray[np.float32],
    *,
    condition: float = 1.0,
) -> Localization:
    """Compare an entry's layers with the oracle's.

    Parameters
    ----------
    model : Model
    params : mapping of str to array
        The weights that the artifact should hold.
    case : str
        What ``x`` is, for the report.
    entry : str
    x : array
        An input whose output is outside tolerance.
    condition : float
        See `mega_tvm.tolerances.compare`.
    """
    manifest = model.metadata
    config = MegaConfig.from_dict(manifest["config"])
    named = name_layers(trace(model, entry, x), config)
    if not named:
        return Localization(case, entry, (), _unknown(manifest))
    expected: dict[str, numpy_mega.Array] = {}
    numpy_mega.forward(config, params, x, intermediates=expected)
    layers = []
    for name, call in named.items():
        wanted = expected[name]
        if call.output.shape[1] == 1:  # only the last timestep of the last block leaves the model
            wanted = wanted[:, -1:]
        if call.output.shape != wanted.shape:
            return Localization(case, entry, (), _unknown(manifest))
        parity = compare(call.output, wanted, manifest["dtype"], condition=condition)
        layers.append(Layer(name, call.kernel["name"], parity))
    found = Localization(case, entry, tuple(layers), "")
    return dataclasses.replace(found, message=_conclusion(found.first_wrong))


def _conclusion(first_wrong: str | None) -> str:
    if first_wrong is None:
        return (
            "every layer that can be compared is within tolerance, and the output is not: the "
            "error is small in each layer and adds up, or it is behind the last of them"
        )
    return f"the first layer outside tolerance is {first_wrong}"


def _unknown(manifest: Mapping[str, Any]) -> str:
    off = ", ".join(manifest.get("disabled_passes", ()))
    return (
        "the first wrong layer cannot be told: the kernels of this artifact do not correspond to "
        "the model's layers"
        + (f" (compiled with these passes switched off: {off}; compile with them)" if off else "")
    )
