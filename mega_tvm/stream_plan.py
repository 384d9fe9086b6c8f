"""The entry of a compiled model that streams: whether it can have one, and its check.

See `mega_tvm.stream` for what it is for, and `mega_tvm.passes.carry_state` for what it computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax
from tvm.relax.utils import copy_with_new_vars

from .aot import RUN_SUFFIX, tensor_block
from .compiled import Compiled
from .errors import CompileError, UnsupportedModelError
from .frontend.torch import import_symbolic
from .model_source import ModelSource
from .passes.canonicalize import canonicalize
from .passes.carry_state import mark, streaming_problem
from .symbolic import OTHER_ONNX, SymbolicPlan, example_shape
from .symbolic_entry import BATCH, SEQ_LEN, workspace_bytes
from .tolerances import Parity, compare

NAME = "extend"
NOT_ASKED_FOR = "it was compiled without (stream=False, --no-stream)"
# Frames that each call of the check feeds: several at once, and single ones.
_PIECES = (11, 1, 7, 1, 1)


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """A model's streaming entry, or why it has none.

    Parameters
    ----------
    function : relax.Function or None
        Marked for the pass `carry_state`.
    left_out : str or None
        Why there is none.
    """

    function: relax.Function | None = None
    left_out: str | None = None

    @property
    def functions(self) -> dict[str, relax.Function]:
        """The function, if there is one, by its name."""
        return {} if self.function is None else {NAME: self.function}

    def describe(self, compiled: Compiled, width: int, output: Sequence[int]) -> dict[str, Any]:
        """Return the manifest's field ``stream``.

        Parameters
        ----------
        compiled : Compiled
        width : int
            Of a frame.
        output : sequence of int
            Shape of a row's output.
        """
        if self.function is None:
            return {"left_out": self.left_out}
        return {
            "name": NAME,
            "input_width": width,
            "output_shape": list(output),
            "state": compiled.states[NAME],
            "workspace": compiled.workspaces[NAME],
        }


def plan_stream(source: ModelSource, shape: Sequence[int], symbolic: SymbolicPlan) -> StreamPlan:
    """Return the streaming entry of a model, or why it has none.

    Parameters
    ----------
    source : ModelSource
    shape : sequence of int
        An input shape that the model takes.
    symbolic : SymbolicPlan
        Its import for any batch and length is used where it has one.
    """
    if len(shape) != 3:
        return StreamPlan(left_out=f"inputs of shape {list(shape)} have no timesteps")
    try:
        mod, least = symbolic.mod, {name: limits[0] for name, limits in symbolic.limits.items()}
        if mod is None:
            if (module := source.torch_module()) is None:
                return StreamPlan(left_out=OTHER_ONNX)
            mod, ranges = import_symbolic(module, example_shape(shape))
            least = {name: limits[0] for name, limits in ranges.items()}
        mod = canonicalize(mod)
    except UnsupportedModelError as error:
        return StreamPlan(left_out=str(error))
    # With variables of its own: another entry may come from the same import.
    function = copy_with_new_vars(mod["main"]).with_attr("global_symbol", NAME)
    names = list(map(str, function.params[0].ty.shape))[:2]
    if names != [BATCH, SEQ_LEN]:
        return StreamPlan(left_out=f"it takes no other batch or length than {names}")
    if least[SEQ_LEN] > 1:
        return StreamPlan(left_out=f"it needs {least[SEQ_LEN]} timesteps at least")
    if problem := streaming_problem(function):
        return StreamPlan(left_out=problem)
    return StreamPlan(mark(function))


def check_stream(
    compiled: Compiled,
    stream: Mapping[str, Any],
    oracle: Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]],
    dtype: str,
) -> Parity:
    """Compare a streaming entry with the model's reference, before anything is written.

    Two streams, the second ahead of the first by the first piece's frames, are fed in pieces; all
    outputs are compared.

    Raises
    ------
    CompileError
        If an output leaves the tolerance.
    """
    run = compiled.executable.mod.get_function(NAME + RUN_SUFFIX, query_imports=True)
    tensors = tvm.runtime.tensor(tensor_block(compiled.tensors))
    width, n = stream["input_width"], sum(_PIECES)
    frames = np.random.default_rng(0).standard_normal((2, _PIECES[0] + n, width), np.float32)
    shapes = [
        (2, s["width"]) if s["kind"] == "ema" else (2, frames.shape[1], s["width"])
        for s in stream["state"]
    ]
    states = [tvm.runtime.tensor(np.zeros(shape, np.float32)) for shape in shapes]
    lengths = np.zeros(2, np.int64)

    def feed(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        sizes = {BATCH: 2, SEQ_LEN: x.shape[1]}
        y = tvm.runtime.tensor(np.full((2, *stream["output_shape"]), np.nan, np.float32))
        workspace = np.zeros(workspace_bytes(stream["workspace"], sizes), np.uint8)
        arrays = (np.ascontiguousarray(x), lengths)
        arguments = [*map(tvm.runtime.tensor, arrays), *states, tensors]
        if run(*arguments, tvm.runtime.tensor(workspace), y) != 0:
            raise CompileError(f"a kernel of entry {NAME} failed: out of memory")
        lengths[:] += x.shape[1]
        result: npt.NDArray[np.float32] = y.numpy()
        return result

    feed(frames[:, : _PIECES[0]])
    lengths[0] = 0  # the first stream starts anew
    for state in states:
        if len(state.shape) == 2:
            kept = state.numpy()
            kept[0] = 0
            state.copyfrom(kept)
    found, expected = [], []
    done = 0
    for piece in _PIECES:
        x = np.stack([frames[0, done : done + piece], frames[1, lengths[1] : lengths[1] + piece]])
        done += piece
        found.append(feed(x))
        expected += [oracle(frames[:1, :done]), oracle(frames[1:, : lengths[1]])]
    parity = compare(np.concatenate(found), np.concatenate(expected), dtype)
    if not parity.ok:
        raise CompileError(
            f"entry {NAME} (streams) differs from the float64 reference: {parity}. This is a bug "
            "of the compiler; nothing was written"
        )
    return parity
