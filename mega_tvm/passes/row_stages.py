"""Which operators of a sequence can run on the same rows, one after the other: see `split_rows`."""

from __future__ import annotations

from typing import NamedTuple

from tvm import relax

from ..errors import UnsupportedModelError
from ..relax_ops import is_op, shape_of
from .prune_last_timestep import argument_roles
from .rewrite import Graph, variables


class Use(NamedTuple):
    """How an operator uses one argument: rows of a piece, the rows up to its last, or all rows."""

    var: relax.Var
    how: str


class Stages:
    """Which piece function holds which operator.

    Parameters
    ----------
    graph : Graph
        Of a function with one sequence.

    Attributes
    ----------
    stage : dict of Var to int
        The piece function that computes a value of T rows; of a moving average's result, which is
        computed for all rows at once, the one that it stands ahead of.
    count : int
        Number of stages.

    Raises
    ------
    UnsupportedModelError
        If an operator on all rows is none that can be cut.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.seq_len = shape_of(graph.func.params[0])[1]
        self.uses: dict[relax.Var, list[Use]] = {}
        earliest: dict[relax.Var, int] = {}
        self._timed = {graph.func.params[0]}
        for var, value in graph.bindings:
            if not self._timed.intersection(variables(value)) or not self._has_rows(var, value):
                continue
            if len(shape_of(var)) != 3:
                raise UnsupportedModelError(f"a row of shape {list(shape_of(var)[2:])}")
            self._timed.add(var)
            self.uses[var] = self._uses_of(value)
            earliest[var] = max(
                (earliest.get(use.var, 0) + (use.var in earliest and self._waits(use)))
                for use in self.uses[var]
            )
        self.count = 1 + max(earliest.values(), default=-1)
        self.stage = self._latest(earliest)

    def is_timed(self, var: relax.Var) -> bool:
        """Whether a variable holds a row for each timestep."""
        return var in self._timed

    def is_scan(self, var: relax.Var) -> bool:
        """Whether a variable is what a moving average gives, which is computed for all rows."""
        return is_op(self.graph.values.get(var), "mega.ema_scan")

    def _has_rows(self, var: relax.Var, value: relax.Expr) -> bool:
        if is_op(value, "mega.last_timestep"):
            return False
        if is_op(value, "mega.attention"):
            return value.args[0] in self._timed
        return list(shape_of(var))[:2] == [1, self.seq_len]

    def _uses_of(self, value: relax.Expr) -> list[Use]:
        if isinstance(value, relax.Var) and value in self.uses:
            return [Use(value, "piece")]
        roles = ["whole"] * 2 if is_op(value, "mega.ema_scan") else argument_roles(value)
        if roles is None or not self._timed.issuperset(variables(value)):
            name = str(getattr(getattr(value, "op", None), "name", type(value).__name__))
            raise UnsupportedModelError(f"{name.removeprefix('relax.')} does not treat rows alone")
        causal = is_op(value, "mega.attention") and not value.attrs["laplace"]
        how = {"last": "piece", "whole": "seen" if causal else "all"}
        return [
            Use(arg, how[role])
            for arg, role in zip(value.args, roles, strict=True)
            if isinstance(arg, relax.Var)
        ]

    def _waits(self, use: Use) -> int:
        """Return by how many stages a use must come after the value's own."""
        return 0 if use.how == "piece" or self.is_scan(use.var) else 1

    def _latest(self, earliest: dict[relax.Var, int]) -> dict[relax.Var, int]:
        """Return the last stage that may hold each value, by what uses it."""
        latest = dict.fromkeys(earliest, self.count - 1)
        for var in reversed(self.uses):
            for use in self.uses[var]:
                if use.var in latest:
                    latest[use.var] = min(latest[use.var], latest[var] - self._waits(use))
        for var in self.uses:
            if (value := self.graph.values[var]) in latest:  # a plain copy is no operator
                latest[var] = latest[value]
        return latest
