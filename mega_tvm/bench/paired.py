"""``python -m mega_tvm.bench.paired A.so B.so``: two libraries of one model, turn by turn.

Two runs of one library differ by more than a schedule often gains, when the machine's pace changes
between them. Turn by turn such a change meets both, and the ratio of a turn is told by its median
and quartiles.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mega_tvm.console import console, run_command
from mega_tvm.errors import MegaError
from mega_tvm.runtime import load

CALLS_A_TURN = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mega_tvm.bench.paired",
        description="Time two libraries of one model turn by turn, such as one compiled with "
        "--no-tuning and one with a tuning log.",
    )
    parser.add_argument("first", type=Path, metavar="A.so")
    parser.add_argument("second", type=Path, metavar="B.so")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=60, metavar="N", help="turns of each (60)")
    arguments = parser.parse_args(argv)
    return run_command(
        lambda: _bench(arguments.first, arguments.second, arguments.threads, arguments.rounds)
    )


def _bench(first: Path, second: Path, threads: int, rounds: int) -> int:
    if rounds < 1:
        raise MegaError(f"--rounds must be a positive integer; got {rounds}")
    models = [load(path, num_threads=threads) for path in (first, second)]
    inputs = [model.metadata["entries"][0]["input"] for model in models]
    if inputs[0] != inputs[1]:
        raise MegaError(
            f"{first} takes {inputs[0]['shape']} first, {second} {inputs[1]['shape']}: give two "
            "libraries that were compiled for the same shapes"
        )
    x = np.random.default_rng(0).standard_normal(inputs[0]["shape"], dtype=np.float32)
    times = paired_times([functools.partial(model, x) for model in models], rounds)
    out = console()
    out.print(f"threads: {models[0].num_threads}, input: {inputs[0]['shape']}", markup=False)
    for path, column in zip((first, second), times.T, strict=True):
        out.print(
            f"{path}: minimum {column.min():.1f} us, median {np.median(column):.1f} us",
            markup=False,
        )
    low, middle, high = np.quantile(times[:, 0] / times[:, 1], [0.25, 0.5, 0.75])
    out.print(f"first / second: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
    return 0


def paired_times(calls: Sequence[Callable[[], object]], rounds: int) -> npt.NDArray[np.float64]:
    """Return the shortest call of each turn in microseconds, ``[rounds, len(calls)]``.

    The order is reversed from round to round: none has another one's caches every time.
    """
    for call in calls:
        _shortest(call)
    times = np.empty((rounds, len(calls)))
    for index in range(rounds):
        order = range(len(calls)) if index % 2 == 0 else reversed(range(len(calls)))
        for place in order:
            times[index, place] = _shortest(calls[place])
    return times


def _shortest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(CALLS_A_TURN):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


if __name__ == "__main__":
    sys.exit(main())
