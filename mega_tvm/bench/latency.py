"""``python -m mega_tvm.bench.latency``: jitter, and the time from a fresh process to an answer.

A game loop calls a model 60 times a second: the caches are cold by then, pools sleep, and what
matters is the slowest frame. So each contestant is measured twice, by single calls: *paced*, at a
rate, and *flat out*. Contestants take turns of a second, so that a change of the machine's pace
meets all alike; each peer runs its fastest form, pruned by hand or not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .environment import QUIET_LOAD, hardware, pin

if TYPE_CHECKING:
    from .contestants import Contestant
    from .first_call import FirstCall
    from .peers import Model
    from .workloads import Workload

_TURN_S = 1.0
_WARMUP_CALLS = 20
PERCENTILES = (50.0, 99.0, 99.9)


@dataclasses.dataclass(frozen=True)
class Latency:
    """Times of single calls in microseconds."""

    calls: int
    minimum: float
    p50: float
    p99: float
    p999: float
    maximum: float

    @classmethod
    def of(cls, nanoseconds: Sequence[int]) -> Latency:
        """Summarize times."""
        us = np.asarray(nanoseconds, np.float64) / 1e3
        p50, p99, p999 = (float(value) for value in np.percentile(us, PERCENTILES))
        return cls(len(us), float(us.min()), p50, p99, p999, float(us.max()))


def paced(model: Model, x: npt.NDArray[Any], calls: int, rate: float) -> list[int]:
    """Return the times of calls that start at a rate, in nanoseconds."""
    times = []
    due = time.perf_counter()
    for _ in range(calls):
        due = max(due + 1 / rate, time.perf_counter())
        time.sleep(max(0.0, due - time.perf_counter()))
        start = time.perf_counter_ns()
        model(x)
        times.append(time.perf_counter_ns() - start)
    return times


def flat_out(model: Model, x: npt.NDArray[Any], calls: int) -> list[int]:
    """Return the times of calls one after the other, in nanoseconds."""
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        model(x)
        times.append(time.perf_counter_ns() - start)
    return times


def measure(
    models: Mapping[str, Model], x: npt.NDArray[Any], calls: int, rate: float | None
) -> dict[str, Latency]:
    """Measure all models, turn by turn.

    Parameters
    ----------
    models : mapping of str to callable
    x : array
    calls : int
        Of each model, in turns of about a second.
    rate : float or None
        Calls a second; None is flat out.
    """
    times: dict[str, list[int]] = {name: [] for name in models}
    names = list(models)
    for name in names:
        flat_out(models[name], x, _WARMUP_CALLS)
    turn = 0
    while any(len(found) < calls for found in times.values()):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            left = calls - len(times[name])
            if rate is None:
                # Many short calls, or a few long ones.
                spent = np.median(flat_out(models[name], x, 5)) / 1e9
                times[name] += flat_out(models[name], x, min(left, max(1, int(_TURN_S / spent))))
            else:
                flat_out(models[name], x, 1)
                times[name] += paced(models[name], x, min(left, max(1, int(_TURN_S * rate))), rate)
        turn += 1
    return {name: Latency.of(found) for name, found in times.items()}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="python -m mega_tvm.bench.latency",
        description="Measure p50 and p99 of single calls, paced and flat out, and loading and the "
        "first call in a fresh process, beside other libraries with equal threads.",
    )
    add = p.add_argument
    add("--workload", default="default", metavar="NAME", help="see mega_tvm.bench --list")
    add("--peers", default="mega_tvm,openvino,onnxruntime", metavar="LIST")
    add("--threads", type=int, default=1, metavar="N", help="threads and cores of each (1)")
    add("--calls", type=int, default=10_000, metavar="N", help="of each, a measurement (10000)")
    add("--rate", type=float, default=60.0, metavar="HZ", help="of the paced calls (60)")
    add("--processes", type=int, default=5, metavar="N", help="fresh processes of each (5)")
    add("--json", type=Path, metavar="FILE", help="write everything as JSON")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    p = parser()
    options = p.parse_args(arguments)
    if min(options.threads, options.calls, options.processes) < 1 or not options.rate > 0:
        p.error("--threads, --calls, --processes and --rate must be positive")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        p.error(f"{options.json}: no such directory: {options.json.absolute().parent}")
    from .first_call import LOADERS
    from .peers import select_peers
    from .workloads import select_workloads

    try:
        peers = [peer.name for peer in select_peers(options.peers)]
        workloads = select_workloads(options.workload)
        if unknown := set(peers) - set(LOADERS):
            raise ValueError(
                f"{', '.join(sorted(unknown))}: cannot be loaded from a file here; "
                f"peers: {', '.join(LOADERS)}"
            )
        if len(workloads) != 1:
            raise ValueError("--workload names one workload")
        pin(options.threads, arguments, "mega_tvm.bench.latency")
    except ValueError as error:
        p.error(str(error))
    return _run(options, workloads[0], peers)


def _run(options: argparse.Namespace, workload: Workload, peers: Sequence[str]) -> int:
    from .contestants import fastest
    from .first_call import measure_first_call
    from .peers import PEERS, versions
    from .peers.mega import LIBRARIES
    from .workloads import random_input, random_params

    machine = hardware()
    print(f"machine: {machine['cpu']}, cores {machine['cores_used']}, load {machine['loadavg']}")
    print("settings:", ", ".join(f"{name}={value}" for name, value in vars(options).items()))
    if machine["loadavg"][0] > QUIET_LOAD:
        print(f"warning: load {machine['loadavg'][0]} is above {QUIET_LOAD}: others take time")
    params, x = random_params(workload.config), random_input(workload)
    fresh: dict[str, FirstCall] = {}
    with tempfile.TemporaryDirectory(prefix="mega-tvm-bench-") as folder:
        os.environ[LIBRARIES] = folder
        contestants = []
        for name in peers:
            print(f"preparing {name}", flush=True)
            contestants.append(fastest(name, workload, params, options.threads, x))
        del os.environ[LIBRARIES]
        for c in contestants:
            print(f"fresh processes: {c.name}", flush=True)
            fresh[c.name] = measure_first_call(
                *(c.name, c.model, workload, params, c.form, c.pruned, options.threads, x),
                *(Path(folder), options.processes),
            )
        models = {c.name: c.model for c in contestants}
        timings: dict[str, dict[str, Latency]] = {}
        for kind, rate in (("flat out", None), (f"at {options.rate:g} a second", options.rate)):
            print(f"measuring {kind}", flush=True)
            timings[kind] = measure(models, x, options.calls, rate)
    _print(contestants, timings, fresh)
    if options.json:
        data = {
            "workload": workload.to_dict(),
            "hardware": machine,
            "versions": versions([package for name in peers for package in PEERS[name].packages]),
            "settings": {**vars(options), "json": str(options.json)},
            "forms": {c.name: {"form": c.form.name, "pruned": c.pruned} for c in contestants},
            "fresh_ms": {name: dataclasses.asdict(value) for name, value in fresh.items()},
            "latency_us": {
                kind: {name: dataclasses.asdict(value) for name, value in found.items()}
                for kind, found in timings.items()
            },
        }
        text = json.dumps(data, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


def _print(
    contestants: Sequence[Contestant],
    timings: Mapping[str, Mapping[str, Latency]],
    fresh: Mapping[str, FirstCall],
) -> None:
    for kind, found in timings.items():
        print(f"\n{kind}, us: {'':14}{'min':>9}{'p50':>9}{'p99':>9}{'p99.9':>9}{'max':>9}")
        for c in contestants:
            t = found[c.name]
            label = f"{c.name}{' (pruned by hand)' if c.pruned else ''}"
            values = (t.minimum, t.p50, t.p99, t.p999, t.maximum)
            print(f"  {label:<30}{''.join(f'{value:9.1f}' for value in values)}  n={t.calls}")
    print(f"\nfresh process, ms: {'':14}{'import':>9}{'load':>9}{'first':>9}{'second':>9}")
    for c in contestants:
        f = fresh[c.name]
        cells = (f.import_ms, f.load_ms, f.first_ms, f.second_ms)
        print(f"  {c.name:<30}{''.join(f'{value:9.2f}' for value in cells)}")


if __name__ == "__main__":
    sys.exit(main())
