"""Turn a function over whole sequences into one that goes on from a state.

``f(x [B, T, E])`` becomes ``f(x [B, C, E], lengths [B], state...)``: C new frames of each of B
streams whose earlier ones, ``lengths[b]`` of them, are known by the state alone.

- ``ema_scan(p, decay)`` goes on from a state ``[B, D]``, D padded to whole cache lines.
- ``attention(q, k, v)`` attends to a cache ``[B, max_len, width]`` of the keys and values so far,
  to which it first appends the new ones. Where ``merge_query_key`` and ``reassociate_values`` have
  made keys and values the same rows, a cache row is that row; else the key, then the value; each
  padded.
- All else treats rows alone, and stays.

The kernels update the state in place. A softmax attention is causal and a moving average runs
forward, so the result for the last frame is that of the whole sequence, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tvm
from tvm import relax, tirx

from schedules.common.dims import Extent
from schedules.common.lines import padded

from .. import relax_ops
from ..errors import UnsupportedModelError
from ..relax_ops import OPERANDS, is_op, shape_of
from .prune_last_timestep import argument_roles
from .rewrite import Graph, Site, variables

STATE_ATTR = "mega.carries_state"
_LAPLACE = (
    "its L1-Laplace attention is not causal: each new frame changes what all earlier frames attend "
    "to, so that no state can stand for them"
)


def carries_state(func: relax.Function) -> bool:
    """Whether a function is one for `carry_state`."""
    return bool(func.attrs) and STATE_ATTR in func.attrs


def mark(func: relax.Function) -> relax.Function:
    """Mark a function for `carry_state`."""
    return func.with_attr(STATE_ATTR, True)


def streaming_problem(func: relax.Function) -> str | None:
    """Return why a function cannot be turned into one with state, or None.

    Parameters
    ----------
    func : relax.Function
        As ``canonicalize`` leaves it.
    """
    timed = _Timed(func)
    for var, value in timed.graph.bindings:
        if problem := timed.add(var, value):
            return problem
    if timed.has_time(timed.graph.func.body.body):
        return "it returns more than the last timestep"
    return None


def states_of(mod: tvm.IRModule) -> dict[str, list[dict[str, Any]]]:
    """Return kind (``ema`` or ``cache``) and width of the states, in order, by function."""
    return {
        gvar.name_hint: [
            {"kind": "ema" if len(shape) == 2 else "cache", "width": shape[-1]}
            for shape in map(shape_of, func.params[2:])
        ]
        for gvar, func in mod.functions_items()
        if isinstance(func, relax.Function) and carries_state(func)
    }


def without_state(mod: tvm.IRModule) -> tvm.IRModule:
    """Return a module without the functions that carry state: the Relax VM cannot update it."""
    kept = {
        gvar: func
        for gvar, func in mod.functions_items()
        if not (isinstance(func, relax.Function) and carries_state(func))
    }
    return tvm.IRModule(kept, attrs=mod.attrs)


class _Timed:
    """The variables of a function that hold a row for each timestep."""

    def __init__(self, func: relax.Function) -> None:
        self.graph = Graph(func)
        self._timed: set[relax.Var] = set(func.params[:1])
        self._derived: set[relax.Var] = set(func.params[:1])

    def has_time(self, expr: relax.Expr) -> bool:
        """Whether an expression is one of them."""
        return expr in self._timed

    def add(self, var: relax.Var, value: relax.Expr) -> str | None:
        """Note what a binding makes; return why no state can stand for it, or None."""
        if not self._derived.intersection(variables(value)):
            return None
        self._derived.add(var)
        if not self._timed.intersection(variables(value)):
            return None  # of the last timestep alone
        if isinstance(value, relax.Var):
            self._timed.add(var)
            return None
        if is_op(value, "mega.last_timestep"):
            return None
        if is_op(value, "mega.attention"):
            if value.attrs["laplace"]:
                return _LAPLACE
            q, k, v, *gate = map(self.has_time, value.args)
            fits = k and v and all(g == q for g in gate)
            keeps_time = q
        else:
            roles = argument_roles(value)
            fits = roles is not None or (
                is_op(value, "mega.ema_scan") and value.args[1] not in self._derived
            )
            fits = fits and all(map(self.has_time, self._derived.intersection(variables(value))))
            keeps_time = True
        if not fits:
            name = str(getattr(getattr(value, "op", None), "name", type(value).__name__))
            return f"{name.removeprefix('relax.')} does not treat timesteps alone"
        if keeps_time:
            self._timed.add(var)
        return None


def _extend(func: relax.Function) -> relax.Function:
    """Return a marked function with state."""
    timed = _Timed(func)
    for var, value in timed.graph.bindings:
        if problem := timed.add(var, value):
            raise UnsupportedModelError(f"the model cannot stream: {problem}")
    batch = shape_of(func.params[0])[0]
    max_len = tirx.Var("max_len", "int64")
    lengths = relax.Var("lengths", relax.TensorType([batch], "int64"))
    state = {
        var: relax.Var(f"state_{index}", relax.TensorType(shape, "float32"))
        for index, (var, shape) in enumerate(_state_shapes(timed, batch, max_len))
    }
    where = {timed.graph.values[var]: var for var in state}

    def rule(site: Site) -> relax.Expr | None:
        var = where.get(site.original)
        if var is None:
            return None
        if is_op(site.call, "mega.ema_scan"):
            p, decay = site.call.args
            return relax_ops.ema_scan(p, decay, state[var])
        return _cached(site, lengths, state[var])

    params = [*func.params, lengths, *state.values()]
    wider = relax.Function(params, func.body, func.ret_ty, func.is_pure, func.attrs)
    return Graph(wider).rebuild(str(func.attrs["global_symbol"]), rule)


def _state_shapes(
    timed: _Timed, batch: Extent, max_len: Extent
) -> Iterator[tuple[relax.Var, tuple[Extent, ...]]]:
    """Yield the results that need state, in order, and its shape."""
    for var, value in timed.graph.bindings:
        if is_op(value, "mega.ema_scan") and timed.has_time(value.args[0]):
            yield var, (batch, padded(shape_of(value)[2]))
        elif is_op(value, "mega.attention") and timed.has_time(value.args[1]):
            width, value_width = int(value.attrs["width"]), int(value.attrs["value_width"])
            shared = value.args[1] == value.args[2]
            yield var, (batch, max_len, padded(width) + (0 if shared else padded(value_width)))


def _cached(site: Site, lengths: relax.Var, cache: relax.Var) -> relax.Expr:
    """Return an attention over a cache, and its gate behind it."""
    q, k, v, *gate = site.call.args
    attrs = site.call.attrs
    if any(int(attrs[f"{name}_offset"]) for name in OPERANDS):
        raise AssertionError("carry_state must run before merge_projections")
    mixed = relax_ops.cached_attention(
        [q, k, *([] if k == v else [v]), lengths, cache],
        value_width=int(attrs["value_width"]),
        scale=float(attrs["scale"]),
    )
    return relax.op.multiply(gate[0], site.emit(mixed)) if gate else mixed


def _transform(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
    mod = mod.clone()
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function) and carries_state(func):
            mod.update_func(gvar, _extend(func))
    return mod


carry_state = tvm.transform.module_pass(_transform, opt_level=0, name="carry_state")
