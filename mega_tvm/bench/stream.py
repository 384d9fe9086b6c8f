"""``python -m mega_tvm.bench.stream MODEL.so``: a step of a stream beside a run on all its frames.

A stream whose caches are full and slide attends to the same number of frames at each step, so that
a step can be timed again and again. Bytes are those that a step must read: the weights, and the
caches' rows. With few streams weights and caches may stay in the last-level cache: more than the
ceiling, which is a copy in memory, can then be reached.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mega_tvm.console import console, run_command
from mega_tvm.runtime import Model, load

from .ceilings import measure_ceilings

BATCHES = (1, 64)
LENGTHS = (60, 256, 1024)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mega_tvm.bench.stream",
        description="Time a step of a stream, and a run of the model on all its frames.",
    )
    parser.add_argument("artifact", type=Path, metavar="MODEL.so", help="a compiled model")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure (default: 1)")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _bench(arguments.artifact, arguments.threads, arguments.seconds))


def _bench(path: Path, threads: int, seconds: float) -> int:
    out = console()
    model = load(path, num_threads=threads)
    ceiling = measure_ceilings(model.num_threads).copy_gb_per_s
    out.print(f"{path}, threads: {model.num_threads}, copy: {ceiling:.1f} GB/s", markup=False)
    out.print("batch  frames   step us: min  median   GB/s  of copy   full run us  / step")
    for batch in BATCHES:
        for length in LENGTHS:
            low, median, gb_per_s = _step(model, batch, length, seconds)
            full = _full(model, batch, length, seconds)
            share = gb_per_s / ceiling
            out.print(
                f"{batch:5}  {length:6}   {low:12.0f}  {median:6.0f}  {gb_per_s:5.1f}  {share:7.0%}"
                f"  {full:12.0f}  {full / low:6.1f}"
            )
    return 0


def _step(model: Model, batch: int, length: int, seconds: float) -> tuple[float, float, float]:
    """Return minimum and median time in us, and the rate of reading at the minimum."""
    stream = model.stream(batch, max_len=length, on_full="slide")
    width = model.metadata["stream"]["input_width"]
    rng = np.random.default_rng(0)
    stream.prefill(rng.standard_normal((batch, length, width), dtype=np.float32))
    x_t = rng.standard_normal((batch, width), dtype=np.float32)
    y = stream.step(x_t)
    times = _times(lambda: stream.step(x_t, out=y), seconds)
    read = model.metadata["tensors"]["bytes"] + stream.nbytes
    return min(times) * 1e6, float(np.median(times)) * 1e6, read / min(times) / 1e9


def _full(model: Model, batch: int, length: int, seconds: float) -> float:
    """Return the minimum time in us."""
    x = np.zeros((batch, length, model.metadata["stream"]["input_width"]), np.float32)
    return min(_times(lambda: model(x), seconds)) * 1e6


def _times(call: Callable[[], object], seconds: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    sys.exit(main())
