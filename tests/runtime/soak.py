"""``python -m tests.runtime.soak MODEL.so``: a model in use for long; its memory and its results.

1. Calls, one after the other: with a result of their own and with ``out``, of all compiled shapes
   and of another, where there is a symbolic entry; and threads that come and go.
2. Resets of a stream between its steps, and pushes of a window.
3. Many threads at once, with calls of mixed shapes, steps and pushes: each result that of a serial
   run, to the bit.

What the process holds is read before and after each part, behind a first round of it. The exit
status is 1 if a part grew by more than 1 MiB, or a result differed.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mega_tvm import load
from mega_tvm.runtime import Model

ALLOWED = 1 << 20
OTHER = (2, 11)  # batch and length of no compiled shape, most likely


def resident() -> int:
    """Return the bytes of memory that this process has in use."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def inputs_of(model: Model) -> list[np.ndarray]:
    """Return an input of each shape to call."""
    shapes = [entry.input_shape for entry in model.entries]
    if model.symbolic_entries:
        shapes.append((*OTHER, shapes[0][2]))
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def calls(model: Model, count: int) -> None:
    """Call the model so many times, each 5000th in a thread of its own."""
    given = [(x, np.empty_like(model(x))) for x in inputs_of(model)]
    done = 0
    while done < count:
        for x, out in given:
            model(x)
            model(x, out=out)
        done += 2 * len(given)
        if done % 5000 < 2 * len(given):
            thread = threading.Thread(target=model, args=(given[0][0],))
            thread.start()
            thread.join()


def resets(model: Model, count: int) -> None:
    """Reset a stream, and push frames to a window, so many times."""
    stream, window = streamed(model), model.window()
    x_t = np.ones((2, window.entry.input_shape[2]), np.float32)
    for i in range(count):
        if stream is not None:
            stream.step(x_t)
            stream.reset([i % 2] if i % 3 else None)
        window.push(x_t[:1])


def streamed(model: Model):
    """Return a stream of two rows, or None."""
    stream = model.metadata.get("stream") or {}
    return model.stream(2, max_len=50) if "name" in stream else None


def outputs(model: Model, seed: int, count: int, xs: list[np.ndarray]) -> Iterator[bytes]:
    """Yield the results of a thread's calls, steps and pushes."""
    rng = np.random.default_rng(seed)
    stream, window = streamed(model), model.window()
    for call, i in enumerate(rng.integers(len(xs), size=count)):
        if call % 4 == 0:
            x_t = rng.standard_normal((2, xs[0].shape[2]), dtype=np.float32)
            yield window.push(x_t[:1]).tobytes()
            if stream is not None:
                if stream.lengths[0] == 50:
                    stream.reset()
                yield stream.step(x_t).tobytes()
        else:
            yield model(xs[i] * np.float32(1 + call % 3)).tobytes()


def threads(model: Model, number: int, count: int) -> int:
    """Return how many results of so many threads differ from those of serial runs."""
    xs = inputs_of(model)
    serial = [list(outputs(model, seed, count, xs)) for seed in range(number)]
    found: list[list[bytes]] = [[] for _ in range(number)]
    start = threading.Barrier(number)

    def work(seed: int) -> None:
        start.wait()
        found[seed].extend(outputs(model, seed, count, xs))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(number)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(
        abs(len(one) - len(other)) + sum(a != b for a, b in zip(one, other, strict=False))
        for one, other in zip(serial, found, strict=True)
    )


def growth(what: str, run: Callable[[int], None], count: int) -> bool:
    """Run a part; print by how much memory grew, and return whether that is allowed."""
    run(max(1, count // 100))
    before, started = resident(), time.perf_counter()
    run(count)
    grown, seconds = resident() - before, time.perf_counter() - started
    print(
        f"{what}: {count:,} in {seconds:.0f} s, memory {before / 2**20:.1f} MiB, "
        f"grown by {grown / 2**10:.0f} KiB",
        flush=True,
    )
    return grown <= ALLOWED


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.runtime.soak", description=__doc__)
    parser.add_argument("artifact", type=Path, metavar="MODEL.so")
    parser.add_argument("--calls", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--resets", type=int, default=100_000, metavar="N")
    parser.add_argument("--threads", type=int, default=16, metavar="N")
    parser.add_argument("--thread-calls", type=int, default=1000, metavar="N")
    parser.add_argument("--num-threads", type=int, default=1, metavar="N", help="of a call")
    options = parser.parse_args(argv)
    model = load(options.artifact, num_threads=options.num_threads)
    flat = growth("calls", lambda count: calls(model, count), options.calls)
    flat &= growth("resets and pushes", lambda count: resets(model, count), options.resets)
    wrong = threads(model, options.threads, options.thread_calls)
    print(f"threads: {options.threads} x {options.thread_calls:,}, {wrong} results differ")
    return 0 if flat and wrong == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
