"""From a PyTorch module to a Relax module, through ``torch.export``.

The custom ops ``mega::ema_scan``, ``mega::gated_attention`` and ``mega::axon_layer_norm`` stay
single nodes in the exported graph and become Mega's Relax operators here. All other operators go
through TVM's importer; one scan ahead of it reports every operator that is not supported, not just
the first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import tvm
from torch.export import Dim
from tvm import relax
from tvm.relax.frontend.torch import exported_program_translator as translator

import reference.ops  # noqa: F401  (registers the custom ops)
from reference.numpy_mega import LAYER_NORM_EPS

from .. import relax_ops
from ..errors import UnsupportedModelError
from ..symbolic_entry import BATCH, SEQ_LEN


def import_module(module: torch.nn.Module, shape: Sequence[int]) -> tvm.IRModule:
    """Export a module at one input shape and import it.

    Parameters
    ----------
    module : torch.nn.Module
        Takes one float32 tensor, returns one. It is exported in eval mode; its own mode stays.
    shape : sequence of int
        The input's shape, ``[batch, seq_len, embed_dim]`` for a Mega.

    Returns
    -------
    tvm.IRModule
        One Relax function ``main`` with the parameters bound as constants.

    Raises
    ------
    UnsupportedModelError
        If the module cannot be exported, or holds operators that cannot be imported.
    """
    return _to_relax(module, _export(module, shape))


_NO_LIMIT = 2**31
Ranges = dict[str, tuple[int, int | None]]


def import_symbolic(module: torch.nn.Module, shape: Sequence[int]) -> tuple[tvm.IRModule, Ranges]:
    """Export a module for any batch and length and import it.

    Parameters
    ----------
    module : torch.nn.Module
        As for `import_module`.
    shape : sequence of int
        An input's shape, ``[batch, seq_len, width]``. ``torch.export`` finds out by it which of the
        first two dimensions the module leaves open; it wants two different numbers above 1.

    Returns
    -------
    tvm.IRModule
        One Relax function ``main``, whose open dimensions are the variables ``batch`` and
        ``seq_len``. There is at least one.
    dict of str to (int, int or None)
        The least and the greatest value that the module allows for each.

    Raises
    ------
    UnsupportedModelError
        If the module leaves none open, or cannot be exported or imported so.
    """
    program = _export(module, shape, ({0: Dim.AUTO, 1: Dim.AUTO},))
    main = _to_relax(module, program)["main"]
    found = main.params[0].ty.shape
    if any(not isinstance(dim, tvm.tirx.IntImm | tvm.tirx.Var) for dim in found):
        raise UnsupportedModelError(f"{type(module).__name__} takes inputs of shape {list(found)}")
    values: dict[tvm.tirx.Var, Any] = {}
    ranges: Ranges = {}
    for dim, symbol, name in zip(found, _input_shape(program), (BATCH, SEQ_LEN), strict=False):
        if not isinstance(dim, tvm.tirx.Var):
            continue
        if symbol.node.expr in program.range_constraints:
            values[dim] = tvm.tirx.Var(name, "int64")
            ranges[name] = _range(program, symbol)
        else:  # the module turned out to want this very number
            values[dim] = tvm.tirx.const(int(symbol.node.expr), "int64")
    if not ranges:
        raise UnsupportedModelError(
            f"{type(module).__name__} runs at input shape {list(shape)}, and at no other"
        )
    return tvm.IRModule({"main": main.bind_symbolic_vars(values)}), ranges


def _input_shape(program: torch.export.ExportedProgram) -> tuple[Any, ...]:
    (name,) = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == name)
    return tuple(node.meta["val"].shape)


def _range(program: torch.export.ExportedProgram, dim: Any) -> tuple[int, int | None]:
    found = program.range_constraints[dim.node.expr]
    # The exporter starts from "2 or more", since a size of 1 may be meant to broadcast.
    least = 1 if found.lower == 2 else int(found.lower)
    return least, None if found.upper > _NO_LIMIT else int(found.upper)


def _to_relax(module: torch.nn.Module, program: torch.export.ExportedProgram) -> tvm.IRModule:
    unsupported = unsupported_operators(program)
    if unsupported:
        raise UnsupportedModelError(
            f"{len(unsupported)} operator(s) of this module are not supported: "
            + ", ".join(unsupported)
            + ". Rewrite them in terms of supported ones, or keep them outside the compiled module."
        )
    mod = translator.from_exported_program(
        program,
        keep_params_as_input=False,
        unwrap_unit_return_tuple=True,
        custom_convert_map=dict(_CONVERTERS),
        run_ep_decomposition=False,
    )
    dtype = str(mod["main"].ret_ty.dtype)
    if dtype != "float32":
        raise UnsupportedModelError(
            f"{type(module).__name__} must return a float32 tensor; it returns {dtype}. End it "
            "with x.float(), or keep the conversion outside the compiled module."
        )
    return mod


def _export(
    module: torch.nn.Module, shape: Sequence[int], dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    was_training = {part: part.training for part in module.modules()}  # parts may be frozen
    module.eval()
    try:
        example = torch.zeros(tuple(shape), dtype=torch.float32)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its tree specs
            program = torch.export.export(
                module, (example,), dynamic_shapes=dynamic_shapes, strict=False
            ).run_decompositions()
            result = program.call_spec.out_spec
    except Exception as error:
        first_line = (
            str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        )
        raise UnsupportedModelError(
            f"torch.export cannot export {type(module).__name__} at input shape {list(shape)}: "
            f"{first_line}"
        ) from error
    finally:
        for part, mode in was_training.items():
            part.training = mode
    returns_none = program.graph_signature.user_outputs == (None,)
    if not result.is_leaf() or returns_none:
        what = "None" if returns_none else f"a {result.type.__name__} of {result.num_leaves}"
        raise UnsupportedModelError(
            f"{type(module).__name__} must return one tensor; it returns {what}"
        )
    return program


def unsupported_operators(program: torch.export.ExportedProgram) -> list[str]:
    """Return the operators of an exported program that cannot be imported, sorted by name."""
    importer = translator.ExportedProgramImporter()
    known = set(importer.create_convert_map()) | set(_CONVERTERS)
    names = {
        node.target.__name__: str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function"
    }
    return sorted(full for name, full in names.items() if name not in known)


def _ema_scan(node: torch.fx.Node, importer: Any) -> relax.Var:
    p, alpha = (importer.env[arg] for arg in node.args)
    emit = importer.block_builder.emit
    decay = emit(relax.op.sigmoid(alpha))
    gain = emit(relax.op.subtract(relax.const(1.0, "float32"), decay))
    return emit(relax_ops.ema_scan(emit(relax.op.multiply(p, gain)), decay))


def _gated_attention(node: torch.fx.Node, importer: Any) -> relax.Var:
    *tensors, laplace = node.args
    operands = [importer.env[arg] for arg in tensors]
    width = relax_ops.shape_of(operands[0])[-1]
    return importer.block_builder.emit(
        relax_ops.attention(
            operands,
            laplace=bool(laplace),
            scale=1.0 if laplace else 1.0 / math.sqrt(width),
            width=width,
            value_width=relax_ops.shape_of(operands[2])[-1],
        )
    )


def _axon_layer_norm(node: torch.fx.Node, importer: Any) -> relax.Var:
    x, gamma, beta = (importer.env[arg] for arg in node.args)
    return importer.block_builder.emit(
        relax_ops.layer_norm(x, gamma, beta, eps=LAYER_NORM_EPS, clamp_variance=True)
    )


_CONVERTERS: dict[str, Callable[[torch.fx.Node, Any], relax.Var]] = {
    "ema_scan.default": _ema_scan,
    "gated_attention.default": _gated_attention,
    "axon_layer_norm.default": _axon_layer_norm,
}
