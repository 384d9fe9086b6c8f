"""Finds the EMA and the attention among plain ONNX nodes: `Search`.

A value of shape [B, T, width] is a *sequence*; behind each lies a *part*: the nodes up to the
sequences that it is made of. A part with one entry may be an EMA, one with two or three an
attention; `onnx_identify` says which, by what the part computes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .onnx_evaluate import Array, evaluate_nodes, to_float64
from .onnx_file import clip, model_input, subgraphs
from .onnx_identify import identify_attention, identify_ema

KERNEL_DOMAIN = "mega_tvm.kernel"
_LARGEST_PART = 200  # nodes; the exporter's own EMA has 80

Shape = tuple[int, ...]


@dataclasses.dataclass
class Part:
    """The nodes behind a sequence, in the graph's order, and the sequences they are made of."""

    nodes: list[onnx.NodeProto]
    entries: list[str]
    constants: set[str]


class Search:
    """One pass over a graph in its order, which replaces parts as it finds them."""

    def __init__(self, model: onnx.ModelProto, values: dict[str, Array], probe: Shape) -> None:
        self.model = model
        self.wide = to_float64(model)
        self.values = values
        self.probe = probe
        self.producers = {out: node for node in self.wide.graph.node for out in node.output if out}
        self.order = {id(node): i for i, node in enumerate(self.wide.graph.node)}
        self.dynamic = self._dynamic()
        self.uses = Counter(name for node in self.wide.graph.node for name in reads(node))
        self.uses.update(output.name for output in self.wide.graph.output)
        self.unknown: dict[str, Part] = {}  # sequences that mix frames in a way not recognised
        self.explained: set[str] = set()
        self.found: dict[str, list[onnx.NodeProto]] = {}
        self.constants: list[onnx.TensorProto] = []

    def run(self, notes: list[str]) -> None:
        """Replace what is recognised in the model; append a note for what is not."""
        for node in self.wide.graph.node:
            for output in node.output:
                if output in self.dynamic and self._is_sequence(output) and node.domain == "":
                    self._look(output)
        self._replace()
        for name, part in self.unknown.items():
            if name not in self.explained:
                ops = Counter(node.op_type for node in part.nodes)
                listed = ", ".join(f"{clip(op)} x {n}" for op, n in ops.most_common(6))
                notes.append(
                    f"the value {clip(name)} mixes frames in a way that is neither Mega's EMA nor "
                    f"its attention: compiled as plain operators ({listed})"
                )

    def _dynamic(self) -> set[str]:
        """Return the values that depend on the input's data, not only on its shape."""
        dynamic = {model_input(self.wide).name}
        for node in self.wide.graph.node:
            if node.op_type not in ("Shape", "Size") and dynamic & reads(node):
                dynamic.update(node.output)
        return dynamic

    def _is_sequence(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, np.ndarray) or value.ndim != 3 or value.dtype.kind != "f":
            return False
        # [B, T, T] are scores, [B, T, 1] sums of rows.
        return value.shape[:2] == self.probe[:2] and value.shape[2] not in (1, self.probe[1])

    def _part(self, output: str, through: set[str]) -> Part | None:
        """Return what lies behind a sequence, walking through the sequences in ``through``."""
        nodes: dict[int, onnx.NodeProto] = {}
        entries: dict[str, None] = {}
        constants: set[str] = set()
        todo = [output]
        while todo:
            name = todo.pop()
            node = self.producers.get(name)
            if name not in self.dynamic:
                constants.add(name)
            elif node is None or (
                name != output and self._is_sequence(name) and name not in through
            ):
                entries[name] = None
            elif id(node) not in nodes:
                if node.domain or len(nodes) >= _LARGEST_PART:
                    return None  # a kernel's output is a sequence, or too large to be one operator
                nodes[id(node)] = node
                todo.extend(sorted(reads(node)))
        ordered = sorted(nodes.values(), key=lambda node: self.order[id(node)])
        if any(not self._is_sequence(entry) for entry in entries):
            return None
        return Part(ordered, list(entries), constants)

    def _run(self, part: Part, output: str, entries: Sequence[Array]) -> Array:
        feeds = {name: self.values[name] for name in part.constants if name in self.values}
        feeds.update({t.name: numpy_helper.to_array(t) for t in self._weights(part.constants)})
        feeds.update(zip(part.entries, entries, strict=True))
        return evaluate_nodes(part.nodes, feeds, output, self.wide)

    def _weights(self, names: Iterable[str]) -> list[onnx.TensorProto]:
        wanted = set(names) - self.values.keys()
        return [t for t in self.wide.graph.initializer if t.name in wanted]

    def _look(self, output: str) -> None:
        part = self._part(output, set())
        if part is None or not self._mixes_frames(part, output):
            return
        # A part may end where another begins that was not recognised by itself: the sum of rows
        # behind a division, for one.
        behind = {entry for entry in part.entries if entry in self.unknown}
        candidates: list[tuple[Part, set[str]]] = [(part, set())]
        if behind and (longer := self._part(output, behind)) is not None:
            candidates.append((longer, behind))
        for candidate, inner in candidates:
            if self._identify(candidate, output):
                self.explained |= inner
                return
        self.unknown[output] = part

    def _mixes_frames(self, part: Part, output: str) -> bool:
        """Whether a frame of the output depends on other frames of the entries."""
        if not part.entries or (len(part.nodes) == 1 and _is_row_wise(part.nodes[0], self.dynamic)):
            return False
        inputs = [self.values[name] for name in part.entries]
        middle = self.probe[1] // 2
        changed = [value.copy() for value in inputs]
        for value in changed:
            value[:, middle] += 1.0
        try:
            before, after = (self._run(part, output, values) for values in (inputs, changed))
        except Exception:  # a part that cannot be run by itself is left as it is
            return False
        others = np.arange(self.probe[1]) != middle
        return not np.array_equal(before[:, others], after[:, others])

    def _identify(self, part: Part, output: str) -> bool:
        shapes = [self.values[name].shape for name in part.entries]
        try:
            if len(part.entries) == 1:
                return self._identify_ema(part, output, shapes[0])
            if len(part.entries) in (2, 3):
                return self._identify_attention(part, output, shapes)
        except Exception:  # as above
            return False
        return False

    def _identify_ema(self, part: Part, output: str, shape: Shape) -> bool:
        if self.values[output].shape != shape:
            return False
        form = identify_ema(lambda p: self._run(part, output, [p]), (shape[0], shape[1], shape[2]))
        if form is None:
            return False
        names = [f"{output}/{name}" for name in ("decay", "gain")]
        for name, value in zip(names, (form.decay, form.gain), strict=True):
            self.constants.append(numpy_helper.from_array(value, name))
        node = helper.make_node(
            "identified_ema", [part.entries[0], *names], [output], domain=KERNEL_DOMAIN
        )
        self.found[output] = [node]
        return True

    def _identify_attention(self, part: Part, output: str, shapes: Sequence[Shape]) -> bool:
        form = identify_attention(lambda entries: self._run(part, output, entries), shapes)
        if form is None:
            return False
        inputs, result = [part.entries[role] for role in form.roles], output
        gate = self._gate(output)
        if gate is not None:
            factor, result = gate
            inputs.append(factor)
        node = helper.make_node(
            "gated_attention",
            inputs,
            [result],
            domain=KERNEL_DOMAIN,
            laplace=int(form.laplace),
            scale=form.scale,
        )
        self.found[result] = [node]
        return True

    def _gate(self, output: str) -> tuple[str, str] | None:
        """Return the factor and the product, where a sequence is only multiplied by another."""
        if self.uses[output] != 1:
            return None
        for node in self.wide.graph.node:
            if output in node.input and node.op_type == "Mul" and node.domain == "":
                factor = next((str(name) for name in node.input if name != output), "")
                same = self._is_sequence(factor)
                if same and self.values[factor].shape == self.values[output].shape:
                    return factor, node.output[0]
        return None

    def _replace(self) -> None:
        """Put kernels in the place of the nodes that make their outputs; drop what is unused."""
        graph = self.model.graph
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            kernels = [kernel for out in node.output for kernel in self.found.get(out, [])]
            nodes.extend(kernels or [node])
        needed = {output.name for output in graph.output}
        live: list[onnx.NodeProto] = []
        for node in reversed(nodes):
            if needed & set(node.output):
                live.append(node)
                needed |= reads(node)
        kept = [tensor for tensor in (*graph.initializer, *self.constants) if tensor.name in needed]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(reversed(live))
        graph.initializer.extend(kept)


def reads(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node reads, those that its subgraphs capture included."""
    names = {name for name in node.input if name}
    for graph in subgraphs(node):
        inner = {value.name for value in graph.input} | {t.name for t in graph.initializer}
        captured = {output.name for output in graph.output}
        for part in graph.node:
            captured |= reads(part)
            inner.update(part.output)
        names |= captured - inner
    return names


_ROW_WISE = frozenset(
    {"Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "Identity",
     "LayerNormalization", "LeakyRelu", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Relu",
     "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh", "Where"}
)  # fmt: skip


def _is_row_wise(node: onnx.NodeProto, dynamic: set[str]) -> bool:
    """Whether a node between sequences plainly keeps frames apart."""
    if node.op_type == "MatMul":
        return node.input[1] not in dynamic
    return node.op_type in _ROW_WISE
