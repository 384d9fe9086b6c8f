"""Which ONNX operators can be imported: TVM's converters know most, the importer the rest."""

from __future__ import annotations

from collections.abc import Collection

import onnx
from tvm.relax.frontend.onnx import onnx_frontend as tvm_onnx

from .onnx_file import STANDARD, all_nodes, clip

# The importer does these itself.
OWN = frozenset({"Constant", "If", "Scan", "Shape", "Size"})


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators that a checked model uses."""
    return next(int(o.version) for o in model.opset_import if o.domain in STANDARD)


def unsupported_operators(
    model: onnx.ModelProto, kept: Collection[tuple[str, str]] = ()
) -> list[str]:
    """Return the operators of a model that cannot be imported, sorted; ``kept`` functions can."""
    opset = opset_of(model)
    converters = tvm_onnx._get_convert_map()

    def is_known(node: onnx.NodeProto) -> bool:
        if (node.domain, node.op_type) in kept:
            return True
        if node.domain in STANDARD and node.op_type in OWN:
            return True
        try:
            converters[node.op_type].get_converter(opset)
        except (KeyError, NotImplementedError):
            return False
        return node.domain in STANDARD

    names = {
        f"{clip(node.domain)}.{clip(node.op_type)}" if node.domain else clip(node.op_type)
        for node in all_nodes(model.graph.node)
        if not is_known(node)
    }
    return sorted(names)
