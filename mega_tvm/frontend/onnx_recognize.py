"""Finds Mega's operators in an ONNX graph: `recognize`.

1. A call of a function of domain ``mega`` is kept as one node where the function's body computes
   what its name says; every other function is inlined.
2. In the rest the EMA and the attention are found again by what parts of the graph compute
   (`onnx_parts`), on the values of one run at a probe shape. Parts that mix frames and are neither
   stay as they are, and are told.

What is recognised becomes a node of domain `KERNEL_DOMAIN`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx.inliner
from onnx import helper

from reference import numpy_mega
from reference.onnx_functions import DOMAIN

from ..errors import ModelFileError, UnsupportedModelError
from .onnx_evaluate import (
    PROBE_BUDGET,
    Array,
    TooLongError,
    evaluate_all,
    evaluate_nodes,
    to_float64,
)
from .onnx_file import check_sizes, clip, first_line, input_dims, model_input
from .onnx_identify import same_function
from .onnx_operators import unsupported_operators
from .onnx_parts import KERNEL_DOMAIN, Search, Shape

# More than two chunks of an EMA in chunks of 64, and no multiple of anything.
_PROBE = (2, 131)


@dataclasses.dataclass(frozen=True)
class Recognized:
    """A graph with Mega's operators as nodes of `KERNEL_DOMAIN`.

    Parameters
    ----------
    model : ModelProto
        Without functions.
    notes : tuple of str
        What was not recognised, in plain words.
    """

    model: onnx.ModelProto
    notes: tuple[str, ...]


def recognize(model: onnx.ModelProto, shapes: Sequence[Shape]) -> Recognized:
    """Find Mega's operators in a checked model.

    Parameters
    ----------
    model : ModelProto
    shapes : sequence of tuple
        Input shapes that it is to be compiled for.

    Raises
    ------
    ModelFileError, UnsupportedModelError
        If the model cannot be run at any of them, or holds operators that cannot be imported.
    """
    notes: list[str] = []
    flat = _inline(model, set())
    kept = _keep_functions(model, notes)
    mixed = _inline(model, kept) if kept else flat
    refuse_unsupported(mixed, kept)  # before the run below, which one of them would stop
    for shape in shapes:
        check_sizes(flat, shape)
    try:
        probe, values = _probe(flat, mixed, shapes)
    except TooLongError:
        notes.append(
            "the model takes too long to run for a look at its parts: only functions of domain "
            f"{DOMAIN} were recognised"
        )
    else:
        if len(probe) == 3:
            search = Search(mixed, values, probe)
            search.run(notes)
            longest = max(shape[1] for shape in shapes)
            if search.found and probe[1] < longest:
                notes.append(
                    f"parts were recognised by a run over {probe[1]} frames, since one over "
                    f"{longest} takes too long: compare an output of that length with another "
                    "runtime's"
                )
    _name_kernels(mixed)
    del mixed.functions[:]
    return Recognized(mixed, tuple(notes))


def refuse_unsupported(model: onnx.ModelProto, kept: set[tuple[str, str]]) -> None:
    """Report every operator of a model that cannot be imported.

    Raises
    ------
    UnsupportedModelError
    """
    unsupported = unsupported_operators(model, kept)
    if unsupported:
        raise UnsupportedModelError(
            f"{len(unsupported)} operator(s) of this model are not supported: "
            + ", ".join(unsupported)
            + ". Rewrite them in terms of supported ones, or keep them outside the model."
        )


def _inline(model: onnx.ModelProto, kept: set[tuple[str, str]]) -> onnx.ModelProto:
    if not model.functions:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy
    try:
        inlined: onnx.ModelProto = onnx.inliner.inline_selected_functions(
            model, sorted(kept), exclude=True
        )
    except Exception as error:
        raise ModelFileError(f"its functions cannot be inlined: {first_line(error)}") from error
    return inlined


def _keep_functions(model: onnx.ModelProto, notes: list[str]) -> set[tuple[str, str]]:
    """Return the functions of domain ``mega`` that compute what their names say."""
    kept = set()
    called = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    wide = to_float64(model)
    for function in model.functions:
        if function.domain != DOMAIN or function.name not in called:
            continue
        if _form_of(wide, function.name) is None:
            notes.append(
                f"the function {DOMAIN}.{clip(function.name)} does not compute what "
                f"{DOMAIN}.{clip(function.name)} of mega_tvm does: its body is compiled instead"
            )
        else:
            kept.add((function.domain, function.name))
    return kept


def _form_of(wide: onnx.ModelProto, name: str) -> str | None:
    """Return which operator the function ``mega.<name>`` computes, by its body alone."""
    rng = np.random.default_rng(0)
    p, q, k, v = (rng.standard_normal((2, length, 5)) for length in (131, 9, 9, 9))
    gate = rng.random(q.shape)
    flat_rows = q * np.array([1e-4] * 5 + [1.0] * 4)[:, None]  # some of a variance below eps

    def run(*inputs: Array) -> Array:
        names = [f"in_{i}" for i in range(len(inputs))]
        node = helper.make_node(name, names, ["out"], domain=DOMAIN)
        feeds = dict(zip(names, inputs, strict=True))
        return evaluate_nodes([node], feeds, "out", wide)

    def axon_layer_norm(x: Array, gamma: Array, beta: Array) -> Array:
        return numpy_mega.layer_norm(x, gamma, beta, "axon-0.8.0")

    def laplace(q: Array, k: Array, v: Array, gate: Array) -> Array:
        return numpy_mega.gated_attention(q, k, v, gate, laplace=True)

    forms: dict[str, list[tuple[str, Callable[..., Array], tuple[Array, ...]]]] = {
        "ema_scan": [
            ("ema_scan", numpy_mega.ema_scan, (p, np.array([-20.0, -2.0, 0.3, 4.0, 9.0])))
        ],
        "gated_attention": [
            ("softmax", numpy_mega.gated_attention, (q, k, v, gate)),
            ("laplace", laplace, (q, k, v, gate)),
        ],
        "axon_layer_norm": [("axon_layer_norm", axon_layer_norm, (flat_rows, q[0, 0], k[0, 0]))],
    }
    for form, formula, inputs in forms.get(name, []):
        try:
            if same_function(run, formula, *inputs):
                return form
        except Exception:  # a body may raise anything; it is then not what it should be
            return None
    return None


def _probe(
    flat: onnx.ModelProto, mixed: onnx.ModelProto, shapes: Sequence[Shape]
) -> tuple[Shape, dict[str, Array]]:
    """Run the model at a shape that tells much of it; return that shape and all values."""
    tries = [*_free_shapes(flat, shapes), *shapes]
    wide, name = to_float64(mixed), model_input(mixed).name
    for i, shape in enumerate(tries):
        try:
            check_sizes(flat, shape)
            x = np.random.default_rng(0).standard_normal(shape)
            return shape, evaluate_all(wide, {name: x}, PROBE_BUDGET)
        except TooLongError:
            if i + 1 == len(tries):
                raise
        except Exception as error:  # the evaluator raises whatever NumPy does
            if i + 1 == len(tries):
                if isinstance(error, ModelFileError):
                    raise
                raise ModelFileError(
                    f"the model cannot be run at input shape {list(shape)}: {first_line(error)}"
                ) from error
    raise ModelFileError("no shape to run the model at")


def _free_shapes(flat: onnx.ModelProto, shapes: Sequence[Shape]) -> list[Shape]:
    """Return shapes to probe where the file leaves them open, the best first.

    As long as the longest that is compiled, so that a window of attention would show; and of no
    length that is also a width, which would make scores look like a sequence.
    """
    dims = input_dims(flat)
    if len(dims) != 3 or dims[2] is None:
        return []
    if dims[1] is not None:
        return [(dims[0] or _PROBE[0], dims[1], dims[2])]
    widths = {size for tensor in flat.graph.initializer for size in tensor.dims} | {dims[2]}
    found: list[Shape] = []
    for length in sorted(
        {max(_PROBE[1], *(shape[1] for shape in shapes)), _PROBE[1]}, reverse=True
    ):
        free = next(n for n in itertools.count(length) if n not in widths)
        found.append((dims[0] or _PROBE[0], free, dims[2]))
    return found


def _name_kernels(model: onnx.ModelProto) -> None:
    """Move kept calls into `KERNEL_DOMAIN`, with the form that their bodies have."""
    wide = to_float64(model)
    forms: dict[str, str | None] = {}
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        if node.op_type not in forms:
            forms[node.op_type] = _form_of(wide, node.op_type)
        form = forms[node.op_type]
        del node.attribute[:]
        if node.op_type == "gated_attention":
            node.attribute.append(helper.make_attribute("laplace", int(form == "laplace")))
        node.domain = KERNEL_DOMAIN
