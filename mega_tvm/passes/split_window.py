"""Split a function over a window of frames into what each frame keeps, and the rest.

``f(x [B, T, E])`` stays, and two functions come to it:

- ``frame_rows(x [batch, seq_len, E])`` gives, for each frame, the rows that the rest of ``f``
  needs of it alone: the input projection, and the first block's projection of the moving average
  behind its layer norm. One function serves all entries.
- ``f_window(rows...)`` computes ``f`` from the rows of all frames (and from the frames themselves,
  where those are needed, as without an input projection).

An operator belongs to the first if it treats rows alone and reads nothing else. The second has
the operators of ``f``, in order, and so its kernels: nothing is compiled twice, and the result is
that of ``f`` to the bit wherever a row does not depend on how many others there are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir.expr import GenericConst
from tvm.relax.utils import copy_with_new_vars

from ..relax_ops import shape_of
from ..symbolic_entry import BATCH, SEQ_LEN
from .prune_last_timestep import argument_roles
from .rewrite import Graph, variables

FRAME_ROWS = "frame_rows"
_WANTED, _PART = "mega.wants_window", "mega.window_part"


@dataclasses.dataclass(frozen=True)
class WindowSplit:
    """The functions that a pass has split off.

    Parameters
    ----------
    widths : tuple of int
        Of the rows that `FRAME_ROWS` gives for a frame.
    reads_frames : bool
        Whether the entries' functions take the frames too, ahead of the rows.
    entries : dict of str to str
        The function of each entry.
    """

    widths: tuple[int, ...]
    reads_frames: bool
    entries: dict[str, str]


def mark(func: relax.Function) -> relax.Function:
    """Mark an entry for `split_window`."""
    return func.with_attr(_WANTED, True)


def split_of(mod: tvm.IRModule) -> WindowSplit | None:
    """Return what `split_window` has made of a module's entries; None if nothing."""
    functions = {str(gvar.name_hint): func for gvar, func in mod.functions_items()}
    if FRAME_ROWS not in functions:
        return None
    rows = functions[FRAME_ROWS].ret_ty.fields
    parts = {
        str(func.attrs[_PART]): name
        for name, func in functions.items()
        if _is_part(func) and name != FRAME_ROWS
    }
    takes = len(functions[next(iter(parts.values()))].params)
    widths = tuple(int(row.shape[2]) for row in rows)
    return WindowSplit(widths, takes > len(widths), parts)


def without_windows(mod: tvm.IRModule) -> tvm.IRModule:
    """Return a module without the functions that were split off: no one traces them."""
    kept = {gvar: func for gvar, func in mod.functions_items() if not _is_part(func)}
    return tvm.IRModule(kept, attrs=mod.attrs)


def _is_part(func: Any) -> bool:
    return isinstance(func, relax.Function) and bool(func.attrs) and _PART in func.attrs


@dataclasses.dataclass(frozen=True)
class _Split:
    """A function, its variables that hold a row a frame by itself, and which others read."""

    func: relax.Function
    alone: frozenset[relax.Var]
    read: tuple[relax.Var, ...]

    @property
    def rows(self) -> list[relax.Var]:
        """Those that are read, but for the frames."""
        return [var for var in self.read if var != self.func.params[0]]

    def frame_rows(self) -> relax.Function:
        """Return the function that computes them, for any number of frames."""
        graph = Graph(self.func)
        x = self.func.params[0]
        dims = [tirx.Var(name, "int64") for name in (BATCH, SEQ_LEN)]
        graph.env[x] = relax.Var("x", relax.TensorType([*dims, shape_of(x)[2]], "float32"))
        with graph.builder.function(FRAME_ROWS, [graph.env[x]], {_PART: FRAME_ROWS}):
            with graph.builder.dataflow():
                for var, value in graph.bindings:
                    if var in self.alone:
                        graph.env[var] = graph.builder.emit(graph.renew(value))
                rows = relax.Tuple([graph.env[var] for var in self.rows])
                result = graph.builder.emit_output(rows)
            graph.builder.emit_func_output(result)
        func = graph.builder.get()[FRAME_ROWS]
        return relax.transform.DeadCodeElimination()(tvm.IRModule({FRAME_ROWS: func}))[FRAME_ROWS]

    def rest(self, entry: str) -> relax.Function:
        """Return the function from them to the output."""
        graph = Graph(self.func)
        params = [relax.Var(f"rows_{i}", var.ty) for i, var in enumerate(self.read)]
        graph.env.update(zip(self.read, params, strict=True))
        name = rest_name(entry)
        with graph.builder.function(name, params, {_PART: entry}):
            with graph.builder.dataflow():
                for var, value in graph.bindings:
                    if var not in self.alone:
                        graph.env[var] = graph.builder.emit(graph.renew(value))
                result = graph.builder.emit_output(graph.renew(self.func.body.body))
            graph.builder.emit_func_output(result)
        # With variables of its own, as every function must have.
        return copy_with_new_vars(graph.builder.get()[name]).with_attr("global_symbol", name)


def rest_name(entry: str) -> str:
    """Return the name of the function of an entry's rest."""
    return f"{entry}_window"


def _split(func: relax.Function) -> _Split | None:
    """Split a function; None if frames keep nothing."""
    graph = Graph(func)
    x = func.params[0]
    if len(shape_of(x)) != 3:
        return None
    alone, derived = {x}, {x}
    read: dict[relax.Var, None] = {}
    for var, value in graph.bindings:
        if not derived.intersection(variables(value)):
            continue
        derived.add(var)
        if _treats_rows_alone(value, alone, derived) and len(shape_of(var)) == 3:
            alone.add(var)
        else:
            read.update(dict.fromkeys(alone.intersection(variables(value))))
    read.update(dict.fromkeys(alone.intersection(variables(func.body.body))))
    order = [x, *(var for var, _ in graph.bindings)]
    ordered = tuple(sorted(read, key=order.index))
    split = _Split(func, frozenset(alone), ordered)
    return split if split.rows else None


def _treats_rows_alone(value: relax.Expr, alone: set[relax.Var], derived: set[relax.Var]) -> bool:
    roles = argument_roles(value)
    if roles is None:
        return False
    for arg, role in zip(value.args, roles, strict=True):
        read = derived.intersection(variables(arg))
        if read and not (role == "last" and read <= alone):
            return False
        if isinstance(arg, GenericConst) and len(shape_of(arg)) > 2 and shape_of(arg)[0] != 1:
            return False  # it varies over the batch
    return True


def _transform(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
    wanted = {
        str(gvar.name_hint): func
        for gvar, func in mod.functions_items()
        if isinstance(func, relax.Function) and func.attrs and _WANTED in func.attrs
    }
    if not wanted:
        return mod
    mod = mod.clone()
    shared: tuple[relax.Function, bool] | None = None
    for name, func in wanted.items():
        mod.update_func(mod.get_global_var(name), func.without_attr(_WANTED))
        if (split := _split(func)) is None:
            continue
        rows, reads_frames = split.frame_rows(), func.params[0] in split.read
        if shared is None:
            shared = rows, reads_frames
            mod[FRAME_ROWS] = rows.with_attr("global_symbol", FRAME_ROWS)
        # Entries of a user's module may differ in more than their shapes.
        elif reads_frames != shared[1] or not tvm_ffi.structural_equal(rows, shared[0]):
            continue
        mod[rest_name(name)] = split.rest(name)
    return mod


split_window = tvm.transform.module_pass(_transform, opt_level=0, name="split_window")
