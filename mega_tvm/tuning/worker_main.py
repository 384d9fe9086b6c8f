"""What runs inside a worker of `mega_tvm.tuning.workers`."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from ..cuda.target import CudaTarget
from .cuda_device import UnfitServerError, check_server
from .limits import Limits, measure_limits
from .operands import Operands
from .space import Decisions
from .trial import (
    Candidate,
    Loaded,
    Task,
    WrongResultError,
    build_candidate,
    paired_times,
    task_operands,
)

# Time spent on timing one candidate, and on a pair of them.
BUDGET_S = 0.1
PAIRED_BUDGET_S = 1.0
PAIRED_ROUNDS = 21
# A server that dies takes its trial along; a second one gets the trial. No more: it may be the
# candidate that kills them.
SERVERS_A_TRIAL = 2
# A server ends the session of a candidate that takes longer.
SESSION_LIMIT_S = 10
# What tells that a candidate, and not its device, is at fault.
_FAULTS = ("RPCSessionTimeoutError", "CUDA")
_PR_SET_PDEATHSIG = 1
_FASTEST_CORES = 1  # ThreadGroup::AffinityMode, of CPUs whose cores differ
_RUN = "run: "


@dataclasses.dataclass(frozen=True)
class Tracker:
    """Where the devices of a fleet are asked for: TVM's RPC tracker, and their key."""

    host: str
    port: int
    key: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a candidate: seconds a call, or why it has none.

    ``lost`` says that the device went away: nothing is known of the candidate.
    """

    seconds: float | None
    error: str | None = None
    lost: bool = False

    @property
    def fault(self) -> bool:
        """Whether the candidate did not run to its end."""
        return self.error is not None and self.error.startswith(_RUN)


@dataclasses.dataclass(frozen=True)
class PairedResult:
    """Two candidates measured turn by turn, see `mega_tvm.tuning.trial.paired_times`."""

    first_s: float
    second_s: float
    ratio: float
    low_ratio: float


class _State:
    """What a worker keeps from call to call."""

    tracker: Tracker | None = None
    operands: dict[str, Operands] = {}  # noqa: RUF012  (a worker has one state)
    built: dict[tuple[Any, ...], Candidate] = {}  # noqa: RUF012


def start(threads: int, tracker: Tracker | None, on_start: Callable[[], None] | None) -> None:
    """Set a worker up."""
    # It is the parent that ends workers, on an interrupt as well; without a parent, the system.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["TVM_NUM_THREADS"] = str(threads)  # read when the pool starts, at the first kernel
    _State.tracker = tracker
    if on_start is not None:
        on_start()


def build(task: Task, decisions: Decisions) -> Result | None:
    """Build a candidate and keep it; return a result only if that fails."""
    try:
        _State.built[_key(task, decisions)] = build_candidate(task, decisions, _operands(task))
    except Exception as error:
        return Result(None, f"build: {_line(error)}")
    return None


def measure(task: Task, decisions: Decisions) -> Result:
    """Measure a candidate, built before or now."""
    operands = _operands(task)
    candidate = _State.built.pop(_key(task, decisions), None)
    lost: Exception | None = None
    for _ in range(SERVERS_A_TRIAL):
        try:
            candidate = candidate or build_candidate(task, decisions, operands)
            with _loaded(task, [candidate], operands) as (loaded,):
                return Result(loaded.measure(BUDGET_S))
        except WrongResultError as error:
            return Result(None, str(error))
        except Exception as error:
            if _State.tracker is None or _is_fault(error):
                return Result(None, f"{_RUN}{_line(error)}")
            lost = error
    assert lost is not None
    return Result(None, f"device lost: {_line(lost)}", lost=True)


def paired(task: Task, first: Decisions, second: Decisions) -> PairedResult | Result:
    """Measure two candidates turn by turn, or say why that failed."""
    try:
        operands = _operands(task)
        candidates = [build_candidate(task, each, operands) for each in (first, second)]
        with _loaded(task, candidates, operands) as (a, b):
            return PairedResult(*paired_times(a, b, PAIRED_ROUNDS, PAIRED_BUDGET_S))
    except Exception as error:
        return Result(None, _line(error))


def limits(threads: int) -> Limits:
    """Measure what this machine can do at most with a number of threads."""
    _use_threads(tvm_ffi.get_global_func, threads)
    return measure_limits(threads)


def _operands(task: Task) -> Operands:
    if task.name not in _State.operands:
        _State.operands = {task.name: task_operands(task)}
    return _State.operands[task.name]


@contextlib.contextmanager
def _loaded(task: Task, candidates: list[Candidate], operands: Operands) -> Iterator[list[Loaded]]:
    tracker = _State.tracker
    if tracker is None:
        if not isinstance(task.target, CudaTarget):
            _use_threads(tvm_ffi.get_global_func, task.threads)
        yield [Loaded.here(candidate, operands) for candidate in candidates]
        return
    devices = tvm.rpc.connect_tracker(tracker.host, tracker.port)
    session = devices.request(tracker.key, session_timeout=SESSION_LIMIT_S)
    if isinstance(task.target, CudaTarget):
        check_server(session, task.target)
    else:
        _use_threads(session.get_function, task.threads)
    with tempfile.TemporaryDirectory(prefix="mega-tvm-tune-") as folder:
        yield [
            Loaded.there(candidate, operands, session, Path(folder) / f"candidate{index}.so")
            for index, candidate in enumerate(candidates)
        ]


def _is_fault(error: Exception) -> bool:
    return not isinstance(error, UnfitServerError) and any(f in str(error) for f in _FAULTS)


def _use_threads(runtime: Callable[[str], Any], threads: int) -> None:
    """Let the pool of the calling thread, here or in an RPC server, run loops on so many threads.

    Parameters
    ----------
    runtime : callable
        Returns a function of TVM's runtime there, by its name.
    """
    runtime("runtime.config_threadpool")(_FASTEST_CORES, threads)
    found = int(runtime("runtime.NumThreads")())
    if found != threads:
        raise RuntimeError(
            f"TVM's pool has {found} thread(s), not {threads}: start the RPC server with "
            f"TVM_NUM_THREADS={threads}"
        )


def _key(task: Task, decisions: Decisions) -> tuple[Any, ...]:
    return (task.name, *sorted(decisions.items()))


def _line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
