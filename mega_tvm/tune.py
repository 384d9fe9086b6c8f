"""``python -m mega_tvm.tune``: search the decisions of a model's schedules, keep what is faster."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reference import MegaConfig

from .console import console, print_settings, run_command
from .dtypes import FLOAT32, check_dtype
from .errors import TuningError
from .model_arguments import DEFAULT_EMBED_DIM, add_model_options, input_file, model_options

# The default model has 17 kernels with something to decide; its last gains came within 560 trials.
DEFAULT_TRIALS = 800
INTERRUPTED = 130
TABLE_WIDTH = 124  # in a pipe, too


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mega_tvm.tune",
        description="Search the decisions of a model's kernels for a target, into a tuning log "
        "that mega_tvm.compile reads. An interrupted tuning goes on when started again.",
    )
    add = parser.add_argument
    add("--tuning-log", type=Path, required=True, metavar="DIR", help="the log; made if missing")
    add_model_options(parser)
    add(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads that the library will mostly run with; a log holds records of several counts "
        "(default: 1)",
    )
    add(
        "--trials",
        type=int,
        default=DEFAULT_TRIALS,
        metavar="N",
        help="candidates to measure over all kernels, those in the log included "
        f"(default: {DEFAULT_TRIALS})",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the search (default: 0)")
    add("--workers", type=int, metavar="N", help="processes that build (default: one a core)")
    add("--tracker", metavar="HOST:PORT", help="measure on a fleet: the address of a TVM tracker")
    add("--key", metavar="K", help="the fleet's devices, by the key of their RPC servers")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="LOG",
        help="put these logs together into --tuning-log, and do nothing else",
    )
    other.add_argument(
        "--keep-best",
        action="store_true",
        help="drop all records of --tuning-log but the best of each kernel, and do nothing else",
    )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.merge or arguments.keep_best:
        return _edit(arguments)
    try:
        return _tune(arguments)
    except KeyboardInterrupt:
        print(
            f"interrupted; what was measured is in {arguments.tuning_log}, start again to go on",
            file=sys.stderr,
        )
        return INTERRUPTED


def _edit(arguments: argparse.Namespace) -> int:
    from .tuning.log import keep_best, merge_logs

    if arguments.merge:
        log = merge_logs(arguments.merge, arguments.tuning_log)
    else:
        log = keep_best(arguments.tuning_log)
    out = console()
    for problem in log.problems:
        out.print(f"warning: {problem}; dropped", markup=False)
    out.print(f"{arguments.tuning_log}: {len(log.records)} records", markup=False)
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    out = console()
    started = time.perf_counter()
    tracker = _tracker(arguments.tracker, arguments.key)
    options = model_options(arguments)
    for name in ("threads", "trials", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise TuningError(f"--{name} must be a positive integer; got {value}")
    with out.status("loading the compiler"):
        from .cuda.target import CudaTarget
        from .input_shapes import input_shapes
        from .model_source import resolve_model
        from .targets import machine_runs, resolve_target
        from .tuning.cuda_device import tuned_target
        from .tuning.record import TargetKey
        from .tuning.report import LiveReport, summary
        from .tuning.session import Session, time_to
        from .tuning.tasks import extract_kernels
        from .tuning.workers import Pool

    model: Any = input_file(arguments)
    if model is None:
        model = MegaConfig.from_dict({"embed_dim": DEFAULT_EMBED_DIM, **options})
    source = resolve_model(model, options, arguments.seed)
    config = source.config  # None: an ONNX file of other layers, whose shapes it tells itself
    target = resolve_target(arguments.target)
    check_dtype(arguments.dtype, arguments.target, on_gpu=isinstance(target, CudaTarget))
    if isinstance(target, CudaTarget):
        if arguments.threads != 1:
            raise TuningError(f"target {target.name}: --threads is for CPUs; leave it out")
        target = tuned_target(arguments.target, tracker)
    elif tracker is None and not machine_runs(target):
        raise TuningError(
            f"this machine cannot run {target.name} code; tune on a machine that can, or on a "
            "fleet with --tracker and --key"
        )
    on_gpu = isinstance(target, CudaTarget)
    lengths = arguments.seq_len or ([config.seq_len] if config else ["as the file says"])
    print_settings(
        out,
        "tune",
        {
            "target": f"{target.name} ({TargetKey.of(target)})",
            **{f"config.{k}": value for k, value in (config.to_dict() if config else {}).items()},
            "batch": ", ".join(map(str, arguments.batch)),
            "seq_len": ", ".join(map(str, lengths)),
            "dtype": arguments.dtype,
            "threads": arguments.threads,
            "trials": arguments.trials,
            "seed": arguments.seed,
            "devices": f"{arguments.key} of {arguments.tracker}" if tracker else "this machine",
            "tuning log": arguments.tuning_log,
        },
    )
    shapes = input_shapes(source, arguments.batch, arguments.seq_len, None)
    with out.status("extracting kernels"):
        kernels = extract_kernels(source.module, shapes, target, arguments.threads, arguments.dtype)
    with Pool(arguments.threads, workers=arguments.workers, tracker=tracker) as pool:
        session = Session(
            kernels,
            target,
            arguments.threads,
            arguments.tuning_log,
            arguments.seed,
            pool,
        )
        for problem in session.problems:
            out.print(f"warning: {problem}; skipped", markup=False)
        resumed = sum(progress.trials for progress in session.kernels)
        if resumed:
            out.print(f"{resumed} trials are in the log; going on from there")
        with LiveReport(out, session.kernels, arguments.trials) as report:
            session.report = report
            session.run(arguments.trials)
        counts = sorted({1, *(progress.kernel.task.threads for progress in session.kernels)})
        limits = {} if tracker or on_gpu else {count: pool.limits(count) for count in counts}
    out.width = max(out.width, TABLE_WIDTH)
    out.print(summary(session.kernels, limits))
    if reached := time_to(0.95, session.curve):
        out.print(
            f"95% of the gain was found after {reached[0]:.0f} s, {reached[1]} trials", markup=False
        )
    trials = sum(progress.trials for progress in session.kernels) - resumed
    seconds = time.perf_counter() - started
    out.print(
        f"{trials} trials in {seconds:.0f} s"
        + (f" ({seconds / trials:.2f} s a trial)" if trials else "")
        + f"; use them: python -m mega_tvm.compile --tuning-log {arguments.tuning_log} "
        + (f"--target {target.name}" if on_gpu else f"--threads {arguments.threads}")
        + ("" if arguments.dtype == FLOAT32 else f" --dtype {arguments.dtype}"),
        markup=False,
    )
    return 0


def _tracker(address: str | None, key: str | None) -> Any:
    if address is None and key is None:
        return None
    if address is None or key is None:
        raise TuningError("a fleet needs both --tracker HOST:PORT and --key K")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise TuningError(f"--tracker must be HOST:PORT, such as 127.0.0.1:9190; got {address!r}")
    from .tuning.workers import Tracker

    return Tracker(host, int(port), key)


if __name__ == "__main__":
    sys.exit(main())
