"""The entries of a compiled model for windows: which get one, and their check.

See `mega_tvm.window` for what they are for, and `mega_tvm.passes.split_window` for what they hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from .aot import RUN_SUFFIX, tensor_block
from .compiled import Compiled
from .errors import CompileError
from .passes.split_window import FRAME_ROWS, WindowSplit, mark
from .symbolic_entry import BATCH, SEQ_LEN, SymbolicEntry, probe_shapes, workspace_bytes

Array = npt.NDArray[np.float32]
Shape = tuple[int, ...]
_CHECKED_ROWS = 4096  # batch times length: a run of 0.2 s of the default model
_NOTHING = "its frames keep nothing as a window slides"
_DIFFERS = "frames that are computed one by one differ from those of a whole run in the last bits"


def with_windows(functions: Mapping[Any, relax.Function]) -> dict[Any, relax.Function]:
    """Return entries that `split_window` will split."""
    return {name: mark(func) for name, func in functions.items()}


def window_checks(
    entries: Sequence[Mapping[str, Any]], symbolic: Sequence[SymbolicEntry]
) -> dict[str, list[tuple[Shape, Shape]]]:
    """Return the input and output shapes at which windows are compared with their entries.

    Parameters
    ----------
    entries : sequence of mapping
        As the manifest describes them. The large ones are not run again.
    symbolic : sequence of SymbolicEntry
    """
    checks = {
        entry["name"]: [(tuple(entry["input"]["shape"]), tuple(entry["output"]["shape"]))]
        for entry in entries
        if entry["batch"] is not None and entry["batch"] * entry["seq_len"] <= _CHECKED_ROWS
    }
    for entry in symbolic:
        sizes = [(shape, entry.sizes(shape)) for shape in probe_shapes(entry)]
        checks[entry.name] = [(shape, entry.output_at(at)) for shape, at in sizes if at]
    return checks


def describe_windows(
    compiled: Compiled, width: int, checks: Mapping[str, Sequence[tuple[Shape, Shape]]]
) -> dict[str, Any]:
    """Return the manifest's field ``window``.

    Parameters
    ----------
    compiled : Compiled
    width : int
        Of a frame.
    checks : mapping
        See `window_checks`. An entry whose window is not the same to the bit is left out: a window
        is a full run.

    Raises
    ------
    CompileError
        If a kernel fails.
    """
    split = compiled.windows
    if split is None:
        return {"left_out": _NOTHING}
    entries = {
        name: {"name": rest, "workspace": compiled.workspaces[rest]}
        for name, rest in split.entries.items()
        if all(_is_full_run(compiled, split, name, *shapes) for shapes in checks.get(name, ()))
    }
    if not entries:
        return {"left_out": _DIFFERS}
    return {
        "name": FRAME_ROWS,
        "input_width": width,
        "widths": list(split.widths),
        "workspace": compiled.workspaces[FRAME_ROWS],
        "entries": entries,
    }


def _is_full_run(
    compiled: Compiled, split: WindowSplit, entry: str, shape: Shape, output: Shape
) -> bool:
    """Compare a window, whose last frames came one by one, with a run of its entry."""
    batch, length, _ = shape
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    cuts = sorted({0, *range(max(0, length - 3), length + 1)})
    pieces = []
    for start, end in itertools.pairwise(cuts):
        shapes = [(batch, end - start, row) for row in split.widths]
        pieces.append(_run(compiled, FRAME_ROWS, [x[:, start:end]], shapes))
    rows = [np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True)]
    (found,) = _run(compiled, split.entries[entry], rows, [output])
    return np.array_equal(found, compiled.run(entry, x, output))


def _run(
    compiled: Compiled, name: str, arrays: Sequence[Array], outputs: Sequence[Shape]
) -> list[Array]:
    function = compiled.executable.mod.get_function(name + RUN_SUFFIX, query_imports=True)
    sizes = dict(zip((BATCH, SEQ_LEN), arrays[0].shape, strict=False))
    workspace = np.zeros(workspace_bytes(compiled.workspaces[name], sizes), np.uint8)
    results = [tvm.runtime.tensor(np.full(shape, np.nan, np.float32)) for shape in outputs]
    given = [*map(np.ascontiguousarray, arrays), tensor_block(compiled.tensors), workspace]
    if function(*map(tvm.runtime.tensor, given), *results) != 0:
        raise CompileError(f"a kernel of entry {name} failed: out of memory")
    return [result.numpy() for result in results]
