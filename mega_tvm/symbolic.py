"""The symbolic entry of a model: whether it can have one, and within which limits.

``torch.export`` tells which of batch and length a module leaves open. A Mega leaves both; a module
around one may not, and is then compiled for its specialised shapes alone, with the reason told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tvm

from .errors import UnsupportedModelError
from .frontend.torch import import_symbolic
from .model_source import ModelSource, positive_option
from .relax_ops import dims_of, shape_of
from .symbolic_entry import BATCH, NAME, SEQ_LEN, SymbolicEntry

MAX_BATCH, MAX_SEQ_LEN = 256, 4096
OTHER_ONNX = "an ONNX file with other layers is compiled for the given shapes alone"


@dataclasses.dataclass(frozen=True)
class SymbolicPlan:
    """A module's symbolic entry, or why it has none.

    Parameters
    ----------
    mod : tvm.IRModule or None
        One Relax function, `NAME`.
    limits : mapping of str to (int, int)
        The least and the greatest value of each open dimension.
    left_out : str or None
        Why there is no entry, where one was asked for.
    """

    mod: tvm.IRModule | None = None
    limits: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    left_out: str | None = None

    @property
    def functions(self) -> dict[str, Any]:
        """The Relax function, if there is one, by its name."""
        return {} if self.mod is None else {NAME: self.mod["main"].with_attr("global_symbol", NAME)}

    def entries(self, workspaces: Mapping[str, Mapping[str, int]]) -> list[SymbolicEntry]:
        """Return the entry, if there is one."""
        if self.mod is None:
            return []
        main = self.mod["main"]
        shapes = dims_of(shape_of(main.params[0])), dims_of(main.ret_ty.shape)
        return [SymbolicEntry(NAME, *shapes, self.limits, workspaces[NAME])]


def plan_symbolic(
    source: ModelSource, shapes: Iterable[Sequence[int]], max_batch: int, max_seq_len: int
) -> SymbolicPlan:
    """Import a model for any batch and length.

    Parameters
    ----------
    source : ModelSource
    shapes : iterable of sequence of int
        The specialised input shapes.
    max_batch, max_seq_len : int
        What a call may bring at most.

    Raises
    ------
    CompileError
        If a limit is no positive integer.
    """
    limits_given = {BATCH: max_batch, SEQ_LEN: max_seq_len}
    most = {name: positive_option(f"max_{name}", limit) for name, limit in limits_given.items()}
    first = next(iter(shapes))
    if len(first) != 3:
        return SymbolicPlan(left_out=f"inputs of shape {list(first)} have no batch and length")
    module = source.torch_module()
    if module is None:
        return SymbolicPlan(left_out=OTHER_ONNX)
    try:
        mod, ranges = import_symbolic(module, example_shape(first))
    except UnsupportedModelError as error:
        if source.checkpoint is not None:  # a Mega leaves both open
            raise
        return SymbolicPlan(left_out=str(error))
    limits = {
        name: (least, most[name] if greatest is None else min(greatest, most[name]))
        for name, (least, greatest) in ranges.items()
    }
    for name, (least, greatest) in limits.items():
        if greatest < least:
            return SymbolicPlan(left_out=f"the module needs a {name} of {least} at least")
    return SymbolicPlan(mod, limits)


def example_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return a shape for export: it takes a 1 for a constant, and equal numbers for one."""
    batch, seq_len, width = shape
    seq_len = max(seq_len, 2)
    batch = max(batch, 2)
    return (batch + 1 if batch == seq_len else batch), seq_len, width
