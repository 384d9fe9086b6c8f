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
            Of parameters and result; all others are added.
        workspace : Workspace
            Where they are placed.
        """
        steps: list[Step] = []
        last_use = _last_uses(graph)
        for step, (var, value) in enumerate(graph.bindings):
            if is_op(value, "call_tir"):
                if var not in places:
                    places[var] = Place(WORKSPACE, workspace.place(var))
                steps.append(_call(graph, places, var, value, self._kernels))
            elif is_op(value, "call_pure_packed"):
                if value.args[0].global_symbol == CALL:
                    dying = {v for v, last in last_use.items() if last == step}
                    steps.append(self._loop(graph, var, value, places, workspace, dying))
                else:
                    places[var] = self._tensor(value)
            for read in {resolve(v, graph) for v in variables(value)}:
                if last_use.get(read) == step:
                    workspace.release(read)
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

        A result whose kernel may write over its residual takes the residual's place, if nothing
        needs that any more.
        """
        piece = Graph(self._functions[call.args[1].value])
        count = piece_count(piece.func)
        outer = [resolve(arg, graph) for arg in call.args[2:]]
        inner: dict[relax.Var, Place] = {}
        # The last parameter, if there are more than arguments, is the tensors'.
        rows = 0
        for param, var in zip(piece.func.params, outer, strict=False):
            own, given = shape_of(param), shape_of(var)
            cut = isinstance(own[1], int) and own[1] != given[1]
            rows = own[1] if cut else rows
            inner[param] = _cut(places[var], var, own[1]) if cut else places[var]
        fields = {
            value.index: var
            for var, value in graph.bindings
            if isinstance(value, relax.TupleGetItem) and value.tuple_value == all_rows
        }
        last_use = _last_uses(piece)
        for index, result in enumerate(_results(piece)):
            var = fields[index]
            if var not in places:
                spent = self._spent_rows(piece, result, last_use)
                free = [
                    given
                    for param, given in zip(piece.func.params, outer, strict=False)
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
            rows = shape_of(result)[1]
            inner[result] = _cut(places[var], var, rows)
        scratch = Workspace()
        calls: list[KernelCall] = []
        for step, (var, value) in enumerate(piece.bindings):
            if is_op(value, "call_tir"):
                if var not in inner:
                    inner[var] = Place(SCRATCH, scratch.place(var))
                calls.append(_call(piece, inner, var, value, self._serial))
            elif is_op(value, "call_pure_packed"):
                inner[var] = self._tensor(value)
            for read in {resolve(v, piece) for v in variables(value)}:
                if last_use.get(read) == step:
                    scratch.release(read)
        failed = Place(WORKSPACE, workspace.reserve(count))
        return PieceLoop(count, rows, calls, sum(scratch.sizes.values()), failed)

    def _spent_rows(
        self, piece: Graph, result: relax.Var, last_use: Mapping[relax.Var, int]
    ) -> list[relax.Var]:
        """Return the parameters whose rows nothing needs any more as a result's are written."""
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


def _results(graph: Graph) -> list[relax.Var]:
    """Return the variables that a piece function returns."""
    returned = graph.func.body.body
    while isinstance(returned, relax.Var):
        returned = graph.values[returned]
    return [resolve(field, graph) for field in returned.fields]


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
