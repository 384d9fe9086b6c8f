"""The plan of a run function: which kernels it calls, and where their arguments lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tvm import relax
from tvm.ir import GlobalVar

from schedules.common.dims import Dim

from .c_function import CFunction
from .passes.rewrite import Graph, variables
from .passes.split_rows import CALL, piece_count
from .relax_ops import dims_of, is_op, shape_of
from .workspace_plan import Offset, Workspace

START: Offset = ((), 0)
WORKSPACE, SCRATCH = "workspace", "scratch"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a variable lies.

    Parameters
    ----------
    array : str
        A parameter (``x``, ``y``, ``tensors``, ``workspace``, a state), or a piece's ``scratch``.
    offset : (region, int)
        From which byte.
    rows : int
        Rows from one piece to the next, of an array that is cut.
    row_bytes : int
        Bytes of a row.
    """

    array: str
    offset: Offset = START
    rows: int = 0
    row_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that can be called.

    Parameters
    ----------
    gvar : GlobalVar
    function : CFunction
    overwritable : int or None
        See `mega_tvm.c_function.overwritable`.
    """

    gvar: GlobalVar
    function: CFunction
    overwritable: int | None


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """One call: the kernel, where its arguments lie, and their dimensions."""

    kernel: Kernel
    places: list[Place]
    dims: list[tuple[Dim, ...]]


@dataclasses.dataclass(frozen=True)
class PieceLoop:
    """Calls that are made for each of some pieces of rows, on a scratch memory of their own.

    Parameters
    ----------
    count, rows : int
        Number of pieces, and rows of each.
    calls : list of KernelCall
    scratch_bytes : int
    failed : Place
        A byte a piece, for whether a call failed.
    """

    count: int
    rows: int
    calls: list[KernelCall]
    scratch_bytes: int
    failed: Place


Step = KernelCall | PieceLoop


class Planner:
    """Plans run functions.

    Parameters
    ----------
    functions : mapping of str to relax.Function
        Where piece functions are found.
    kernels, serial : mapping of str to Kernel
        By name; and their forms for pieces.
    tensor_starts : sequence of int
        Where tensors start in their block.
    """

    def __init__(
        self,
        functions: Mapping[str, relax.Function],
        kernels: Mapping[str, Kernel],
        serial: Mapping[str, Kernel],
        tensor_starts: Sequence[int],
    ) -> None:
        self._functions = functions
        self._kernels, self._serial = kernels, serial
        self._tensor_starts = tensor_starts

    def plan(
        self, graph: Graph, places: dict[relax.Var, Place], workspace: Workspace
    ) -> list[Step]:
        """Return an entry's steps.

        Parameters
        ----------
        graph : Graph
        places : dict of Var to Place
            Of parameters and results; all others are added.
        workspace : Workspace
            Where they are placed.
        """
        return self._walk(graph, places, workspace, WORKSPACE, self._kernels)

    def _walk(
        self,
        graph: Graph,
        places: dict[relax.Var, Place],
        memory: Workspace,
        array: str,
        kernels: Mapping[str, Kernel],
    ) -> list[Step]:
        """Plan a function's bindings in order; what has no place yet gets one in ``array``."""
        steps: list[Step] = []
        last_use = _last_uses(graph)
        for step, (var, value) in enumerate(graph.bindings):
            if is_op(value, "call_tir"):
                if var not in places:
                    places[var] = Place(array, memory.place(var))
                steps.append(_call(graph, places, var, value, kernels))
            elif is_op(value, "call_pure_packed"):
                if value.args[0].global_symbol == CALL:
                    dying = {v for v, last in last_use.items() if last == step}
                    steps.append(self._loop(graph, var, value, places, memory, dying))
                else:
                    places[var] = self._tensor(value)
            for read in {resolve(v, graph) for v in variables(value)}:
                if last_use.get(read) == step:
                    memory.release(read)
        return steps

    def _tensor(self, fetch: relax.Call) -> Place:
        index, *byte = (int(arg.value) for arg in fetch.args[2:])
        return Place("tensors", ((), self._tensor_starts[index] + sum(byte)))

    def _loop(
        self,
        graph: Graph,
        all_rows: relax.Var,
        call: relax.Call,
        places: dict[relax.Var, Place],
        workspace: Workspace,
        dying: set[relax.Var],
    ) -> PieceLoop:
        """Plan a loop over pieces, and place its results.

        A result takes the place of rows that nothing needs any more when a piece's are written.
        """
        piece = Graph(self._functions[call.args[1].value])
        count = piece_count(piece.func)
        outer = [resolve(arg, graph) for arg in call.args[2:]]
        # Behind the arguments' parameters may come one for the tensors.
        arguments = list(zip(piece.func.params, outer, strict=False))
        results = [resolve(expr, piece) for expr in returned(piece)]
        rows = int(shape_of(results[0])[1])
        inner = {
            param: _cut(places[var], var, rows)
            if shape_of(param)[1] == rows != shape_of(var)[1]
            else places[var]
            for param, var in arguments
        }
        fields = {
            value.index: var
            for var, value in graph.bindings
            if isinstance(value, relax.TupleGetItem) and value.tuple_value == all_rows
        }
        for index, result in enumerate(results):
            var = fields[index]
            if var not in places:
                spent = self._spent_rows(piece, result)
                free = [
                    given
                    for param, given in arguments
                    if param in spent
                    and given in dying
                    and outer.count(given) == 1
                    and places[given].array == WORKSPACE  # never over the caller's input
                ]
                if free:
                    dying.remove(free[0])
                    places[var] = places[free[0]]
                    workspace.hand_over(free[0], var)
                else:
                    places[var] = Place(WORKSPACE, workspace.place(var))
            inner[result] = _cut(places[var], var, rows)
        scratch = Workspace()
        steps = self._walk(piece, inner, scratch, SCRATCH, self._serial)
        calls = [step for step in steps if isinstance(step, KernelCall)]  # pieces hold no pieces
        failed = Place(WORKSPACE, workspace.spare(count))
        return PieceLoop(count, rows, calls, sum(scratch.sizes.values()), failed)

    def _spent_rows(self, piece: Graph, result: relax.Var) -> list[relax.Var]:
        """Return the parameters whose rows nothing needs any more as a result's are written."""
        last_use = _last_uses(piece)
        step = [var for var, _ in piece.bindings].index(result)
        value = piece.values[result]
        over = self._serial[value.args[0].name_hint].overwritable
        residual = None if over is None else resolve(value.args[1].fields[over], piece)
        return [
            param
            for param in piece.func.params
            if isinstance(param.ty, relax.TensorType)
            and list(shape_of(param)) == list(shape_of(result))
            and last_use.get(param, -1) < step + (param == residual)
        ]


def resolve(expr: relax.Expr, graph: Graph) -> relax.Var:
    """Follow reshapes and plain copies to the variable whose memory an expression names."""
    while isinstance(expr, relax.Var):
        value = graph.values.get(expr)
        if isinstance(value, relax.Var):
            expr = value
        elif value is not None and is_op(value, "reshape"):
            expr = value.args[0]
        else:
            break
    return expr


def returned(graph: Graph) -> list[relax.Expr]:
    """Return what a function returns, one expression or the fields of a tuple."""
    expr: relax.Expr = graph.func.body.body
    while isinstance(graph.values.get(expr), relax.Var | relax.Tuple):
        expr = graph.values[expr]
    return list(expr.fields) if isinstance(expr, relax.Tuple) else [expr]


def _last_uses(graph: Graph) -> dict[relax.Var, int]:
    """Return at which binding each variable is read for the last time; a result's is behind all."""
    found: dict[relax.Var, int] = {}
    for step, (_, value) in enumerate(graph.bindings):
        for var in variables(value):
            found[resolve(var, graph)] = step
    for var in variables(graph.func.body.body):
        found[resolve(var, graph)] = len(graph.bindings)
    return found


def _cut(place: Place, var: relax.Var, rows: int) -> Place:
    width = int(shape_of(var)[2]) * 4
    return dataclasses.replace(place, rows=rows, row_bytes=width)


def _call(
    graph: Graph,
    places: Mapping[relax.Var, Place],
    var: relax.Var,
    value: relax.Call,
    kernels: Mapping[str, Kernel],
) -> KernelCall:
    arguments = [*value.args[1].fields, var]
    return KernelCall(
        kernels[value.args[0].name_hint],
        [places[resolve(arg, graph)] for arg in arguments],
        [dims_of(shape_of(arg)) for arg in arguments],
    )
