"""Run a long sequence some rows at a time.

Rows that go through many kernels at once stay in L2, need memory of their own for themselves
alone, and are one thread's: threads meet once for all of these kernels, not in each.

A moving average, and keys and values, need all rows before them. Between two such places lies a
*piece function* on ``rows`` rows, which stands for a loop over all of them:

    f(x [1, T, E]):  x0, e = pieces(x);  s = ema_scan(e);  x1, y = pieces(s, x0);  pieces(y, x1) ..

- Each operator stands in the last piece function that may hold it, which leaves the least to be
  kept for all rows: of a layer its residual stream ``x1`` and normed rows ``y``. Keys and values
  are the latter, since ``reassociate_values`` projects values after the attention here.
- Causal attention sees the keys up to a piece's last row, ``keys`` of them, another number in each
  piece. An L1-Laplace attention sees all of them.
- What is of the last timestep alone comes after all pieces.

The loop is a call ``call_pure_packed("mega.pieces", name, arguments...)``, which `mega_tvm.aot`
writes out. Arguments of ``T`` rows are cut where the piece function's parameter has fewer.
"""

from __future__ import annotations

import tvm
from tvm import relax, tirx

from ..errors import UnsupportedModelError
from ..relax_ops import is_op, shape_of
from .rewrite import Graph, variables
from .row_stages import Stages, Use

NAME = "split_rows"
CALL = "mega.pieces"
KEYS = "keys"
# Frames from which on a sequence is split whatever the number of threads: whole, the default model
# needs 6.2 KB a frame beside its weights, split 2.2 (4096 frames take as long).
LONG = 2048
LONG_ROWS = 256
# A dense kernel of fewer rows waits for its weights.
LEAST_ROWS = 24
# Of a function that is to be split, and of a piece function: rows of a piece, and how many pieces.
ROWS_ATTR, COUNT_ATTR = "mega.rows_of_a_piece", "mega.pieces"


def mark(func: relax.Function, rows: int) -> relax.Function:
    """Mark a function ``f(x [1, T, E])`` for `split_rows`; ``rows`` divides T."""
    return func.with_attr(ROWS_ATTR, rows)


def mark_splittable(threads: int) -> tvm.transform.Pass:
    """Return the pass that marks the functions for which `split_rows` pays.

    It has the same name: both are switched off together.

    Parameters
    ----------
    threads : int
        The thread count that the library will mostly run with.
    """

    def transform(mod: tvm.IRModule, _ctx: object) -> tvm.IRModule:
        mod = mod.clone()
        for gvar, func in mod.functions_items():
            shape = shape_of(func.params[0]) if isinstance(func, relax.Function) else ()
            if len(shape) == 3 and shape[0] == 1 and isinstance(shape[1], int):
                rows = rows_for(shape[1], threads)
                if rows is not None:
                    mod.update_func(gvar, mark(func, rows))
        return mod

    return tvm.transform.module_pass(transform, opt_level=0, name=NAME)


def rows_for(seq_len: int, threads: int) -> int | None:
    """Return the rows of a piece of a sequence; None where it should stay whole.

    Long sequences are split for the memory's sake, into pieces of up to `LONG_ROWS`; others where
    several threads share a call, into two pieces a thread, an early one and a late one of causal
    attention, or one a thread, where that leaves `LEAST_ROWS`.
    """
    if seq_len >= LONG:
        most = min(LONG_ROWS, seq_len // (2 * threads))
        fits = [rows for rows in range(LONG_ROWS // 4, most + 1) if seq_len % rows == 0]
        return max(fits, default=None)
    if threads > 1:
        for pieces in (2 * threads, threads):
            if seq_len % pieces == 0 and seq_len // pieces >= LEAST_ROWS:
                return seq_len // pieces
    return None


def without_pieces(mod: tvm.IRModule) -> tvm.IRModule:
    """Return a module without piece functions and what calls them: the Relax VM has no loops."""
    kept = {}
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function):
            calls = (value for _, value in Graph(func).bindings)
            if is_piece(func) or any(map(_is_pieces_call, calls)):
                continue
        kept[gvar] = func
    return tvm.IRModule(kept, attrs=mod.attrs)


def _is_pieces_call(value: relax.Expr) -> bool:
    return is_op(value, "call_pure_packed") and value.args[0].global_symbol == CALL


def rows_of_a_piece(func: relax.Function) -> int | None:
    """Return the rows that a function is to be split into; None if it is not marked."""
    return int(func.attrs[ROWS_ATTR]) if func.attrs and ROWS_ATTR in func.attrs else None


def is_piece(func: object) -> bool:
    """Whether a function of a module is a piece function."""
    return isinstance(func, relax.Function) and bool(func.attrs) and COUNT_ATTR in func.attrs


def piece_count(func: relax.Function) -> int:
    """Return how many pieces a piece function stands for."""
    return int(func.attrs[COUNT_ATTR])


class _Split:
    """Rewrites one function."""

    def __init__(self, name: str, func: relax.Function, rows: int) -> None:
        self.name = name
        self.graph = Graph(func)
        self.stages = Stages(self.graph)
        self.rows, self.keys = rows, tirx.Var(KEYS, "int64")
        self.pieces: dict[str, relax.Function] = {}

    def run(self) -> dict[str, relax.Function]:
        """Return the function and its piece functions, by name."""
        graph, stages = self.graph, self.stages
        attrs = {k: v for k, v in dict(graph.func.attrs).items() if k != ROWS_ATTR}
        with graph.builder.function(self.name, graph.func.params, attrs):
            with graph.builder.dataflow():
                for stage in range(stages.count):
                    self._emit_stage(stage)
                for var, value in graph.bindings:
                    if not stages.is_timed(var):
                        self._emit(var, value)
                result = graph.builder.emit_output(graph.renew(graph.func.body.body))
            graph.builder.emit_func_output(result)
        return {self.name: graph.builder.get()[self.name], **self.pieces}

    def _emit(self, var: relax.Var, value: relax.Expr) -> None:
        self.graph.env[var] = self.graph.builder.emit(self.graph.renew(value))

    def _emit_stage(self, stage: int) -> None:
        stages, env, builder = self.stages, self.graph.env, self.graph.builder
        mine = [
            (var, value) for var, value in self.graph.bindings if stages.stage.get(var) == stage
        ]
        for var, value in mine:
            if stages.is_scan(var):
                self._emit(var, value)
        inner = [(var, value) for var, value in mine if not stages.is_scan(var)]
        if not inner:
            return
        name = f"{self.name}_pieces_{len(self.pieces)}"
        made = {var for var, _ in inner}
        uses = (use for var, _ in inner for use in stages.uses[var])
        brought = list(dict.fromkeys(use for use in uses if use.var not in made))
        results = [var for var, _ in inner if self._leaves(var, made)]
        self.pieces[name] = self._piece_function(name, brought, inner, results)
        types = [relax.TensorType(list(shape_of(var)), str(var.ty.dtype)) for var in results]
        call = relax.call_pure_packed(
            CALL,
            tvm.ir.StringImm(name),
            *(env.get(use.var, use.var) for use in brought),
            ty_args=[relax.TupleType(types)],
        )
        all_rows = builder.emit(call)
        for index, var in enumerate(results):
            env[var] = builder.emit(relax.TupleGetItem(all_rows, index))

    def _leaves(self, var: relax.Var, made: set[relax.Var]) -> bool:
        """Whether a value is used outside of the piece function that makes it."""
        return var == self.graph.func.body.body or any(
            var in variables(value) for user, value in self.graph.bindings if user not in made
        )

    def _piece_function(
        self,
        name: str,
        brought: list[Use],
        bindings: list[tuple[relax.Var, relax.Expr]],
        results: list[relax.Var],
    ) -> relax.Function:
        builder = relax.BlockBuilder()
        length = {"piece": self.rows, "seen": self.keys, "all": self.stages.seq_len}
        params = []
        for index, use in enumerate(brought):
            shape = [1, length[use.how], *shape_of(use.var)[2:]]
            params.append(
                relax.Var(f"{use.how}_{index}", relax.TensorType(shape, str(use.var.ty.dtype)))
            )
        known = dict(zip(brought, params, strict=True))
        made: dict[relax.Var, relax.Var] = {}
        attrs = {"global_symbol": name, COUNT_ATTR: self.stages.seq_len // self.rows}
        with builder.function(name, params, attrs):
            with builder.dataflow():
                for var, value in bindings:
                    uses = self.stages.uses[var]
                    mine = [made[use.var] if use.var in made else known[use] for use in uses]
                    if isinstance(value, relax.Var):
                        made[var] = mine[0]
                        continue
                    rest = iter(mine)
                    args = [next(rest) if isinstance(a, relax.Var) else a for a in value.args]
                    made[var] = builder.emit(relax.Call(value.op, args, value.attrs))
                output = builder.emit_output(relax.Tuple([made[var] for var in results]))
            builder.emit_func_output(output)
        return builder.get()[name]


def _transform(mod: tvm.IRModule, _ctx: object) -> tvm.IRModule:
    mod = mod.clone()
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function) and (rows := rows_of_a_piece(func)):
            try:
                functions = _Split(str(gvar.name_hint), func, rows).run()
            except UnsupportedModelError:
                functions = {gvar.name_hint: func.without_attr(ROWS_ATTR)}  # it stays whole
            for name, new in functions.items():
                if name == gvar.name_hint:
                    mod.update_func(gvar, new)
                else:
                    mod[name] = new
    return mod


split_rows = tvm.transform.module_pass(_transform, opt_level=0, name=NAME)
