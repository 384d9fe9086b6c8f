"""A tuning from its start, or from where it was interrupted, to its end.

1. Search. Batch after batch goes to the kernel that takes the largest share of the model's time,
   for the batches that it had: an interrupt at any time leaves the trials where they matter. Each
   batch is in the log before the next one starts. A kernel's first batch is small, and holds what
   was best for it at another length or number of threads.
2. Confirm. The fastest candidates of each kernel are measured against its hand schedule, turn by
   turn, and so is what another kernel of its operator gained by. Only what wins there is
   confirmed, and only confirmed records are used by a compile; where none wins, the hand schedule
   is confirmed.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm

import mega_tvm

from ..bench.environment import hardware
from ..cuda.target import CudaTarget
from ..errors import TuningError
from ..targets import CpuTarget
from .log import append, best_confirmed, is_log, read_log
from .progress import LEAST_GAIN, Progress, Report
from .record import Record, TargetKey
from .search import Search
from .space import Decisions
from .tasks import Kernel
from .versions import made_by
from .workers import Pool, Result, WorkerError

BATCH = 16
FIRST_BATCH = 6
# Candidates of a kernel that are measured against the hand schedule.
FINALISTS = 3
# Candidates in a row that found no device: there is none.
LOST_IN_A_ROW = 2 * BATCH


class Session:
    """A tuning of kernels into a log.

    Parameters
    ----------
    kernels : sequence of Kernel
    target : CpuTarget or CudaTarget
    threads : int
        The thread count that the library will mostly run with. Each kernel's task has its own.
    directory : Path
        The log; what it holds of these kernels, by these versions, is built on.
    seed : int
    pool : Pool

    Attributes
    ----------
    kernels : list of Progress
    report : callable
        Called after each batch and each confirmation, with all kernels and the one that it was for.
    problems : list of str
        What was skipped in the log.
    """

    def __init__(
        self,
        kernels: Sequence[Kernel],
        target: CpuTarget | CudaTarget,
        threads: int,
        directory: Path,
        seed: int,
        pool: Pool,
    ) -> None:
        self.kernels = [
            Progress(kernel, Search(kernel.space, seed + index))
            for index, kernel in enumerate(kernels)
        ]
        self.problems: list[str] = []
        self._target = TargetKey.of(target)
        self._directory, self._pool = directory, pool
        self.report: Report = lambda every, one: None
        self._started = time.perf_counter()
        self._lost = 0
        self._confirmed: list[Record] = []
        self._run: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": _device(target),
            "code_for": target.name,
            "versions": {"mega_tvm": mega_tvm.__version__, "tvm": tvm.__version__},
            "threads": threads,
            "seed": seed,
            "trials": 0,
            "seconds": 0,
            "curve": [],
        }
        if is_log(directory):
            self._resume()
        else:  # now, not after the first batch: a directory that cannot be written to is told
            self._append([])

    def run(self, trials: int) -> None:
        """Search until there are ``trials`` in all, those in the log included; then confirm.

        Raises
        ------
        TuningError
            If the log cannot be written, or no device of a fleet answers.
        """
        while True:
            left = trials - sum(progress.trials for progress in self.kernels)
            open_ = [progress for progress in self.kernels if not progress.search.exhausted]
            if left <= 0 or not open_:
                break
            progress = max(open_, key=lambda progress: progress.urgency)
            self._batch(progress, min(BATCH if progress.batches else FIRST_BATCH, left))
        # The longest first: it had the most trials, and hands on what it found.
        for progress in sorted(self.kernels, key=lambda progress: -progress.seconds):
            if progress.confirmed is None:
                self._confirm(progress)

    @property
    def curve(self) -> list[tuple[float, int, float]]:
        """After each batch: seconds and trials so far, and the time of a model's run saved, in us.

        The time is that of the search's best candidates, before any is confirmed.
        """
        return [(float(s), int(n), float(us)) for s, n, us in self._run["curve"]]

    def _resume(self) -> None:
        log = read_log(self._directory)
        self.problems += log.problems
        if log.target != self._target:
            raise TuningError(
                f"{self._directory}: is a log of target {log.target}, not of {self._target}; give "
                "each target a directory of its own"
            )
        self._confirmed = [r for r in log.records if r.hand_seconds]
        for progress in self.kernels:
            kernel = progress.kernel
            ours = [
                record
                for record in log.records
                if record.key == kernel.key
                and record.threads == kernel.task.threads
                and record.made_by == made_by(kernel.key.op, self._target.kind)
                and kernel.space.holds(record.decisions)
            ]
            for record in ours:
                if record.hand_seconds is None:
                    progress.search.tell(record.decisions, record.seconds)
                    progress.trials += 1
                    progress.failed += record.seconds is None
            progress.batches = -(-progress.trials // BATCH)
            # A search that went on since then may have found something better.
            if ours and ours[-1].hand_seconds is not None:
                progress.confirmed = best_confirmed(ours)

    def _batch(self, progress: Progress, size: int) -> None:
        first = [] if progress.batches else self._known(progress.kernel)
        candidates = progress.search.propose(size, first)
        results = self._pool.measure(progress.kernel.task, candidates)
        lost = all(result.lost for result in results)
        self._lost = self._lost + len(results) if lost else 0
        if self._lost >= LOST_IN_A_ROW:
            raise TuningError(
                f"no device answers: {results[0].error}. What was measured is in "
                f"{self._directory}; start again to go on"
            )
        pairs = list(zip(candidates, results, strict=True))
        known = [pair for pair in pairs if not pair[1].lost]
        for decisions, result in pairs:  # one that lost its device may try again another time
            progress.search.tell(decisions, result.seconds)
        for _, result in known:
            progress.trials += 1
            progress.failed += result.seconds is None
        progress.batches += 1
        progress.confirmed = None
        self._run["curve"].append(
            [
                round(time.perf_counter() - self._started, 1),
                self._run["trials"] + len(known),
                round(self._saved() * 1e6, 2),
            ]
        )
        self._append([self._record(progress, *pair) for pair in known])
        self.report(self.kernels, progress)

    def _saved(self) -> float:
        """Return by how many seconds the best candidates shorten a run of the model."""
        saved = 0.0
        for progress in self.kernels:
            best, hand = progress.search.best, progress.search.hand_seconds
            if best is not None and hand is not None:
                saved += progress.kernel.in_a_row * (hand - best[1])
        return saved

    def _known(self, kernel: Kernel) -> list[Decisions]:
        """Return what was best for a kernel with other threads, and for the same at other lengths.

        Nothing is taken over unmeasured: these are the first candidates of its search.
        """
        found = [
            record.decisions
            for record in self._confirmed
            if record.key == kernel.key and record.threads != kernel.task.threads
        ]
        for other in self.kernels:
            best = other.search.best
            if best is not None and _but_lengths(other.kernel) == _but_lengths(kernel):
                found.append(best[0])
        return [decisions for decisions in found if kernel.space.holds(decisions)]

    def _record(self, progress: Progress, decisions: Decisions, result: Result) -> Record:
        return Record.make(
            progress.kernel.space,
            decisions,
            progress.kernel.task.target.tvm_target(),
            result.seconds,
            error=result.error,
        )

    def _confirm(self, progress: Progress) -> None:
        space, hand = progress.kernel.space, progress.kernel.space.hand
        hand_s = chosen_s = progress.search.hand_seconds
        ratio, chosen = 1.0, hand
        for decisions in self._finalists(progress):
            try:
                found = self._pool.paired(progress.kernel.task, hand, decisions)
            except WorkerError:  # the hand schedule stays
                continue
            if chosen == hand:
                hand_s = chosen_s = found.first_s
            faster = found.ratio >= LEAST_GAIN and found.second_s < found.first_s
            if found.ratio > ratio and faster and found.low_ratio >= 1:
                # Other load meets one of the two more often, and then the median says more than
                # there is to gain: it tells which is better, the shortest times by how much.
                ratio, chosen = found.ratio, decisions
                hand_s, chosen_s = found.first_s, found.second_s
        if not hand_s:  # the hand schedule itself failed: there is nothing to confirm
            return
        target = progress.kernel.task.target.tvm_target()
        progress.confirmed = Record.make(space, chosen, target, chosen_s, hand_seconds=hand_s)
        self._append([progress.confirmed])
        self.report(self.kernels, progress)

    def _finalists(self, progress: Progress) -> list[Decisions]:
        """Return what is measured against a kernel's hand schedule.

        That is the best of its search, and what the confirmed record that gained most of all
        kernels of its operator changed: few trials of a short kernel may have missed it.
        """
        space, search = progress.kernel.space, progress.search
        hand_s = search.hand_seconds
        finalists = [
            decisions
            for decisions, seconds in search.ranked(FINALISTS)
            # Else the search saw nothing in it.
            if decisions != space.hand and not (hand_s and seconds >= hand_s)
        ]
        op = progress.kernel.key.op
        others = [o for o in self.kernels if o.confirmed and o.kernel.key.op == op]
        if others:
            best = max(others, key=lambda other: other.gain)
            changed = {**space.hand, **best.changes}
            if space.holds(changed) and changed not in [space.hand, *finalists]:
                finalists.append(changed)
        return finalists

    def _append(self, records: Sequence[Record]) -> None:
        self._run["trials"] += sum(record.hand_seconds is None for record in records)
        self._run["seconds"] = round(time.perf_counter() - self._started, 1)
        append(self._directory, self._target, records, dict(self._run))


def time_to(share: float, curve: Sequence[tuple[float, int, float]]) -> tuple[float, int] | None:
    """Return the seconds and trials after which a share of the final gain was found, if any was."""
    if not curve or curve[-1][2] <= 0:
        return None
    return next((s, n) for s, n, saved in curve if saved >= share * curve[-1][2])


_LENGTHS = ("lead", "batch", "seq_len", "q_len", "k_len")


def _but_lengths(kernel: Kernel) -> tuple[Any, ...]:
    """Return what a kernel has in common with itself at another batch and length."""
    op, spec_text, storage = kernel.key
    spec = json.loads(spec_text)
    return (op, storage, *sorted((k, str(v)) for k, v in spec.items() if k not in _LENGTHS))


def _device(target: CpuTarget | CudaTarget) -> Mapping[str, Any]:
    if isinstance(target, CudaTarget):
        return {"gpu": tvm.cuda(0).device_name if tvm.cuda(0).exist else "of a fleet"}
    found = hardware()
    return {name: found[name] for name in ("cpu", "features", "cores", "l3_bytes")}
