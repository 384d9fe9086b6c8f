"""Split a function over a window of frames into what each frame keeps, and the rest.

``f(x [B, T, E])`` stays, and two functions come to it:

- ``frame_rows(x [batch, seq_len, E])`` gives, for each frame, the rows that the rest of ``f`` needs
  of it: a Mega's input projection. One function serves all entries.
- ``f_window(rows...)`` computes ``f`` from the rows of all frames.

An operator belongs to the first if it treats rows alone and reads nothing else. The second has
the other operators of ``f``, in order, and so its kernels: nothing is compiled twice.

The result is that of ``f`` to the bit, which asks that a row does not depend on how many others
there are. A dense kernel sums over k in order, whatever its tiles. A layer norm does not: the
number of its partial sums is a decision of its schedule, which a tuned record may take otherwise
for one number of rows than for another (as the shipped one of 60 rows on Zen 4 does). So layer
norms stay in the second, and with the first block's the projection of its moving average: 6 us of
the default model's 2730, where the input projection takes 77.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir.expr import GenericConst
from tvm.relax.utils import copy_with_new_vars

from ..relax_ops import is_op, shape_of
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
    entries : dict of str to str
        The function of each entry.
    """

    widths: tuple[int, ...]
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
    return WindowSplit(tuple(int(row.shape[2]) for row in rows), parts)


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
    rows: tuple[relax.Var, ...]

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
        params = [relax.Var(f"rows_{i}", var.ty) for i, var in enumerate(self.rows)]
        graph.env.update(zip(self.rows, params, strict=True))
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
    """Split a function; None if frames keep nothing, or are read as they are anyway."""
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
    if not read or x in read:
        return None
    order = [var for var, _ in graph.bindings]
    return _Split(func, frozenset(alone), tuple(sorted(read, key=order.index)))


def _treats_rows_alone(value: relax.Expr, alone: set[relax.Var], derived: set[relax.Var]) -> bool:
    roles = argument_roles(value)
    if roles is None or is_op(value, "mega.layer_norm"):
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
    shared: relax.Function | None = None
    for name, func in wanted.items():
        mod.update_func(mod.get_global_var(name), func.without_attr(_WANTED))
        if (split := _split(func)) is None:
            continue
        rows = split.frame_rows()
        if shared is None:
            shared = rows
            mod[FRAME_ROWS] = rows.with_attr("global_symbol", FRAME_ROWS)
        # Entries of a user's module may differ in more than their shapes.
        elif not tvm_ffi.structural_equal(rows, shared):
            continue
        mod[rest_name(name)] = split.rest(name)
    return mod


split_window = tvm.transform.module_pass(_transform, opt_level=0, name="split_window")
