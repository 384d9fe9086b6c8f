"""``python -m mega_tvm.bench.window MODEL.so``: a window that keeps rows beside full runs.

Both take the same frames, turn by turn: a push runs the model on the last frames. One computes of
the newest frame alone what frames keep, the other of all of them.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mega_tvm.console import console, run_command
from mega_tvm.errors import MegaError
from mega_tvm.runtime import Model, load
from mega_tvm.window import Window

from .environment import QUIET_LOAD, hardware, pin
from .paired import paired_times
from .stream import numbers

_MODULE = "mega_tvm.bench.window"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}",
        description="Time a window that keeps what a frame keeps, and one of full runs.",
    )
    parser.add_argument("artifact", type=Path, metavar="MODEL.so", help="a compiled model")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--batch", type=numbers, default=(1, 8), metavar="N,..", help="rows (1,8)")
    parser.add_argument("--seq-len", type=int, metavar="N", help="frames (the first entry's)")
    parser.add_argument("--rounds", type=int, default=60, metavar="N", help="turns of each (60)")
    options = parser.parse_args(argv)
    try:
        pin(options.threads, argv, _MODULE)
    except ValueError as error:
        parser.error(str(error))
    return run_command(lambda: _bench(options))


def _bench(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise MegaError(f"--rounds must be a positive integer; got {options.rounds}")
    out = console()
    model = load(options.artifact, num_threads=options.threads)
    machine = hardware()
    out.print(f"{options.artifact} on {machine['cpu']}, threads: {model.num_threads}", markup=False)
    if machine["loadavg"][0] > QUIET_LOAD:
        out.print(f"warning: load {machine['loadavg'][0]}: others take time", markup=False)
    out.print("batch  frames   full run us: min  median   keeping us: min  median   full / keeping")
    for batch in options.batch:
        keeping, full = _windows(model, batch, options.seq_len)
        times = paired_times([_push(full), _push(keeping)], options.rounds)
        low, middle, high = np.quantile(times[:, 0] / times[:, 1], [0.25, 0.5, 0.75])
        (full_min, keeping_min), (full_mid, keeping_mid) = times.min(0), np.median(times, 0)
        out.print(
            f"{batch:5}  {len(keeping):6}   {full_min:16.1f} {full_mid:7.1f}   {keeping_min:15.1f} "
            f"{keeping_mid:7.1f}   {middle:.3f} ({low:.3f} to {high:.3f})"
        )
    return 0


def _windows(model: Model, batch: int, seq_len: int | None) -> tuple[Window, Window]:
    """Return a full window that keeps rows, and one that does not."""
    keeping = model.window(batch, seq_len=seq_len)
    if keeping.entry.name not in model.metadata.get("window", {}).get("entries", ()):
        raise MegaError(
            "frames of this model keep nothing; its manifest says why (window.left_out)"
        )
    windows = keeping, Window(model, keeping.entry, None)
    for window in windows:
        window.fill(np.random.default_rng(0).standard_normal(keeping.entry.input_shape, np.float32))
    return windows


def _push(window: Window) -> Callable[[], object]:
    """Return a call that pushes a frame."""
    batch, _, width = window.entry.input_shape
    x_t = np.random.default_rng(1).standard_normal((batch, width), np.float32)
    return functools.partial(window.push, x_t, out=np.empty(window.entry.output_shape, np.float32))


if __name__ == "__main__":
    sys.exit(main())
