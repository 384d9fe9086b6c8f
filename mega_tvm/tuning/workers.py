"""Warm processes that build and measure candidates, so that a bad one harms nobody else.

TVM's `PopenWorker` is the process: it starts once (2 s, TVM's import), takes calls over a pipe, and
starts again after a death. The time limit is kept here, by the process id: a candidate that hangs
may hold the interpreter's lock of its worker.

A batch is built by all workers at a time. On this machine its candidates are then measured one
after the other, with nothing else of ours running; on a fleet each worker asks for a device of its
own, and they measure side by side. What runs inside a worker is `mega_tvm.tuning.worker_main`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from tvm.support.popen_pool import PopenWorker

from ..cuda.target import CudaTarget
from . import worker_main
from .limits import Limits
from .space import Decisions
from .trial import Task
from .worker_main import PairedResult, Result, Tracker

__all__ = ["PairedResult", "Pool", "Result", "Tracker", "Worker", "WorkerError"]

# Building takes 0.1 to 0.3 s, measuring 0.1 s; a first call starts the process.
BUILD_LIMIT_S = 30.0
RUN_LIMIT_S = 10.0
START_LIMIT_S = 120.0
# A remote run waits for a device that others hold.
REMOTE_LIMIT_S = 60.0


class WorkerError(Exception):
    """A worker died, or was killed since it took too long."""


class Worker:
    """A process for one call at a time; it starts at its first one."""

    def __init__(
        self, threads: int, tracker: Tracker | None, on_start: Callable[[], None] | None
    ) -> None:
        self._process = PopenWorker(
            worker_main.start,
            (threads, tracker, on_start),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._pid: int | None = None
        self._stopped = False

    def call(self, function: Callable[..., Any], *arguments: object, limit_s: float) -> Any:
        """Run ``function(*arguments)`` there and return its result.

        Raises
        ------
        WorkerError
            If the process dies, or takes longer than ``limit_s`` and is killed.
        """
        if self._stopped:
            raise WorkerError("stopped")
        if not self._process.is_alive():
            self._process.kill()
            with _told(START_LIMIT_S):
                self._process.send(os.getpid)
                self._pid = int(self._process.recv())
        late = threading.Event()

        def kill() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(limit_s, kill)
        timer.start()
        try:
            with _told(limit_s, late):
                self._process.send(function, arguments)
                return self._process.recv()
        finally:
            timer.cancel()

    def kill(self) -> None:
        """End the process at once; a call that waits for it raises WorkerError."""
        pid, self._pid = self._pid, None
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the process at once, and let no later call start it again."""
        self._stopped = True
        self.kill()

    def close(self) -> None:
        """Free what is left of the process, and end its children."""
        self._process.kill()


@contextlib.contextmanager
def _told(limit_s: float, late: threading.Event | None = None) -> Iterator[None]:
    try:
        yield
    except (ChildProcessError, EOFError, OSError) as error:
        if late is not None and late.is_set():
            raise WorkerError(f"took longer than {limit_s:g} s") from error
        raise WorkerError("crashed") from error


class Pool:
    """Workers that measure candidates.

    Parameters
    ----------
    threads : int
        Most threads that a kernel runs with: each task has its number.
    workers : int, optional
        Processes that build side by side; by default one a core.
    tracker : Tracker, optional
        Measure on a fleet in place of this machine; ``workers`` is then how many devices measure
        at a time.
    on_start : callable, optional
        Called in each worker as it starts.
    build_limit_s, run_limit_s : float
        A candidate that takes longer has failed.
    """

    def __init__(
        self,
        threads: int,
        *,
        workers: int | None = None,
        tracker: Tracker | None = None,
        on_start: Callable[[], None] | None = None,
        build_limit_s: float = BUILD_LIMIT_S,
        run_limit_s: float | None = None,
    ) -> None:
        count = workers or len(os.sched_getaffinity(0))
        self._limits = (build_limit_s, run_limit_s or (REMOTE_LIMIT_S if tracker else RUN_LIMIT_S))
        self._workers = [Worker(threads, tracker, on_start) for _ in range(count)]
        self._side_by_side = ThreadPoolExecutor(count)
        self._remote = tracker is not None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.stop()
        self._side_by_side.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def measure(self, task: Task, candidates: Sequence[Decisions]) -> list[Result]:
        """Measure candidates; one that crashes, hangs or is wrong gets a result that says so."""
        shares = [
            list(range(first, len(candidates), len(self._workers)))
            for first in range(len(self._workers))
        ]
        results: dict[int, Result] = {}
        jobs = list(zip(self._workers, shares, strict=True))
        self._all(lambda job: self._build(job[0], job[1], task, candidates, results), jobs)
        if self._remote:
            self._all(lambda job: self._run(job[0], job[1], task, candidates, results), jobs)
        else:
            for job in jobs:
                self._run(job[0], job[1], task, candidates, results)
        return [results[index] for index in range(len(candidates))]

    def paired(self, task: Task, first: Decisions, second: Decisions) -> PairedResult:
        """Measure two candidates turn by turn.

        Raises
        ------
        WorkerError
            If one of them fails.
        """
        limit = sum(self._limits) * 2
        found = self._workers[0].call(worker_main.paired, task, first, second, limit_s=limit)
        if isinstance(found, Result):
            if isinstance(task.target, CudaTarget):
                self._workers[0].kill()  # the second may run for the first time, and have a fault
            raise WorkerError(found.error)
        assert isinstance(found, PairedResult)
        return found

    def limits(self, threads: int) -> Limits:
        """Measure what this machine can do at most with a number of threads."""
        found = self._workers[0].call(worker_main.limits, threads, limit_s=START_LIMIT_S)
        assert isinstance(found, Limits)
        return found

    def _all(self, function: Callable[[Any], None], jobs: Sequence[Any]) -> None:
        for _ in self._side_by_side.map(function, jobs):
            pass

    def _build(
        self,
        worker: Worker,
        share: list[int],
        task: Task,
        candidates: Sequence[Decisions],
        results: dict[int, Result],
    ) -> None:
        for index in share:
            try:
                failed = worker.call(
                    worker_main.build, task, candidates[index], limit_s=self._limits[0]
                )
            except WorkerError as error:
                failed = Result(None, f"build: {error}")
            if failed is not None:
                results[index] = failed

    def _run(
        self,
        worker: Worker,
        share: list[int],
        task: Task,
        candidates: Sequence[Decisions],
        results: dict[int, Result],
    ) -> None:
        for index in itertools.filterfalse(results.__contains__, share):
            try:
                results[index] = worker.call(
                    # A worker that died since has lost what it built, and builds it again.
                    worker_main.measure,
                    task,
                    candidates[index],
                    limit_s=self._limits[1],
                )
                if isinstance(task.target, CudaTarget) and results[index].fault:
                    worker.kill()  # a GPU's fault stays with its process
            except WorkerError as error:
                # A fleet's device that no one gives is not the candidate's fault.
                results[index] = Result(None, f"run: {error}", lost=self._remote)
                if self._remote:  # the rest of the batch would wait for it as long
                    results.update({left: results[index] for left in share if left not in results})
                    return
