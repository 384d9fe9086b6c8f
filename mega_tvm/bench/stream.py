"""``python -m mega_tvm.bench.stream MODEL.so``: a step of a stream beside runs on all its frames.

A stream whose caches are full and slide attends to the same number of frames at each step, so that
a step can be timed again and again. Beside it, in turns: a run of the model on all frames, and that
of the fastest peer, in its fastest form, with random weights of the same sizes.

Bytes are those that a step must read: the weights, and the caches' rows. With few streams weights
and caches may stay in the last-level cache: more than the ceiling, which is a copy in memory, can
then be reached.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mega_tvm.console import console, run_command
from mega_tvm.runtime import Model, load

from .environment import QUIET_LOAD, hardware, pin

if TYPE_CHECKING:
    from .peers import Model as Call

_MODULE = "mega_tvm.bench.stream"
_ROUNDS = 3
PEERS = ("openvino", "onnxruntime")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}",
        description="Time a step of a stream, a run of the model on all its frames, and a peer's.",
    )
    add = p.add_argument
    add("artifact", type=Path, metavar="MODEL.so", help="a compiled model")
    add("--peer", default=PEERS[0], choices=[*PEERS, "none"], help="whose full run (openvino)")
    add("--threads", type=int, default=1, metavar="N", help="threads and cores of each (1)")
    add("--batch", type=numbers, default=(1, 64), metavar="N,..", help="streams (1,64)")
    add("--frames", type=numbers, default=(60, 256, 1024), metavar="N,..", help="(60,256,1024)")
    add("--seconds", type=float, default=1.0, help="for each figure (1)")
    return p


def numbers(text: str) -> tuple[int, ...]:
    """Read an option's list of positive integers."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"expected positive integers, N[,N..], found {text!r}")
    return tuple(map(int, text.split(",")))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    p = parser()
    options = p.parse_args(argv)
    try:
        pin(options.threads, argv, _MODULE)
    except ValueError as error:
        p.error(str(error))
    return run_command(lambda: _bench(options))


def _bench(options: argparse.Namespace) -> int:
    from .ceilings import measure_ceilings

    out = console()
    model = load(options.artifact, num_threads=options.threads)
    model.stream()  # raises where it cannot
    machine = hardware()
    ceiling = measure_ceilings(model.num_threads).copy_gb_per_s
    out.print(
        f"{options.artifact} on {machine['cpu']}, threads: {model.num_threads}, "
        f"copy: {ceiling:.1f} GB/s, peer: {options.peer}",
        markup=False,
    )
    if machine["loadavg"][0] > QUIET_LOAD:
        out.print(f"warning: load {machine['loadavg'][0]}: others take time", markup=False)
    out.print(
        "frames  batch   step us: min     median   GB/s  of copy   full run us  / step"
        "       peer us  / step"
    )
    for length in options.frames:
        peer = None if options.peer == "none" else _Peer(options.peer, model, length)
        for batch in options.batch:
            calls: dict[str, Callable[[], object]] = {}
            calls["step"], read = _step(model, batch, length)
            x = _random((batch, length, _width(model)))
            calls["full"] = lambda x=x: model(x)  # type: ignore[misc]
            if peer is not None:
                calls["peer"] = peer.call(x)
            times = _times(calls, options.seconds)
            step, full = min(times["step"]), min(times["full"])
            rate = read / step / 1e9
            line = (
                f"{length:6}  {batch:5}   {step * 1e6:12.0f} {np.median(times['step']) * 1e6:10.0f}"
                f"  {rate:5.1f}  {rate / ceiling:7.0%}  {full * 1e6:12.0f}  {full / step:6.1f}"
            )
            if peer is not None:
                best = min(times["peer"])
                line += f"  {best * 1e6:12.0f}  {best / step:6.1f}  {peer.form}"
            out.print(line, markup=False)
    return 0


class _Peer:
    """A peer's full run: in the form that is fastest for one sequence of this length."""

    def __init__(self, name: str, model: Model, length: int) -> None:
        from mega_tvm.errors import MegaError
        from reference import MegaConfig

        from .contestants import fastest
        from .workloads import Workload, random_input, random_params

        config = model.metadata["config"]
        if config is None:
            raise MegaError("this model is no plain Mega, which peers run; use --peer none")
        self._workload = Workload("stream", MegaConfig(**config), 1, length)
        self._params = random_params(self._workload.config)
        self._threads = model.num_threads
        x = random_input(self._workload)
        self._best = fastest(name, self._workload, self._params, self._threads, x)

    @property
    def form(self) -> str:
        """Its name."""
        return self._best.form.name + (" (pruned by hand)" if self._best.pruned else "")

    def call(self, x: npt.NDArray[np.float32]) -> Callable[[], object]:
        """Return a call on an input of any batch."""
        from .peers import PEERS

        run: Call = self._best.model
        if len(x) > 1:
            workload = self._workload.reshaped(len(x), None)
            best, threads = self._best, self._threads
            peer = PEERS[best.name]
            run = peer.prepare(workload, self._params, threads, best.pruned, best.form)
        return lambda: run(x)


def _width(model: Model) -> int:
    return int(model.metadata["stream"]["input_width"])


def _random(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _step(model: Model, batch: int, length: int) -> tuple[Callable[[], object], int]:
    """Return a step of a full stream, and the bytes that it reads."""
    stream = model.stream(batch, max_len=length, on_full="slide")
    stream.prefill(_random((batch, length, _width(model))))
    x_t = _random((batch, _width(model)))
    y = stream.step(x_t)
    return lambda: stream.step(x_t, out=y), model.metadata["tensors"]["bytes"] + stream.nbytes


def _times(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Return the times of each call, in seconds; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(_ROUNDS):
        for name, call in calls.items():
            if sum(times[name]) >= seconds * (turn + 1) / _ROUNDS:
                continue  # one long call of an earlier turn
            end = time.perf_counter() + seconds / _ROUNDS
            while True:
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
                if time.perf_counter() >= end:
                    break
    return times


if __name__ == "__main__":
    sys.exit(main())
