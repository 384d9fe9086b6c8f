"""What a compile takes from tuning logs.

Each kernel's record is looked up at the point that tuning takes kernels from: the schedule phase.

| outcome | meaning |
|---|---|
| hit | a confirmed record: its decisions are replayed |
| miss | no such record; the hand schedule |
| stale | there are records, but other versions made them; the hand schedule |
| any size | a kernel whose sizes only a call brings, which no record can be of; the hand schedule |

A kernel in pieces (`mega_tvm.passes.split_rows`) runs on one thread, whatever the compile's count,
and takes the records of one thread.

A record holds for one kernel of one size, since only there was it measured against the hand
schedule. The record of another length may well be better than the hand schedule, and may be worse:
it is not used.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import tvm_ffi
from tvm import tirx
from tvm.target import Target

import schedules
from schedules.common.kernel import ScheduledKernel
from schedules.registry import generate, hand_schedule

from ..cuda.target import CudaTarget
from ..errors import TuningError
from ..targets import CpuTarget
from .log import best_confirmed, is_log, read_log, read_target
from .record import KernelKey, Record, TargetKey, kernel_key
from .space import Space, is_of_any_size, replay
from .versions import made_by

HIT, ANY_SIZE = "hit", "any size"
FOUND = (HIT, ANY_SIZE)  # what a strict compile accepts
SHIPPED = Path(schedules.__file__).parent / "tuned"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a lookup found for a kernel.

    Parameters
    ----------
    kind : str
        ``hit``, ``miss``, ``stale`` or `ANY_SIZE`.
    source : str
        Where the schedule comes from: ``tuned`` or ``hand``.
    detail : str
        What a user may want to know; empty for a plain outcome.
    """

    kind: str
    source: str
    detail: str = ""

    def __str__(self) -> str:
        return self.kind + (f" ({self.detail})" if self.detail else "")


class TunedSchedules:
    """The records that a compile may use.

    Parameters
    ----------
    target : CpuTarget or CudaTarget
    threads : int
        The thread count that the library will mostly run with, and records must have been measured
        with, but for those of kernels in pieces; 1 for a GPU.
    directories : sequence of Path
        Logs. One of another target is named in `problems` and skipped.

    Attributes
    ----------
    problems : list of str
        What was skipped, and why.
    digest : str or None
        SHA-256 over the records of this target, and of this thread count or of one thread; None if
        there are none.
    outcomes : dict of str to Outcome
        Of every kernel that was looked up, by its name.
    """

    def __init__(
        self, target: CpuTarget | CudaTarget, threads: int, directories: Sequence[Path]
    ) -> None:
        self.target = target
        self.threads = threads
        self.problems: list[str] = []
        self.outcomes: dict[str, Outcome] = {}
        self._records: dict[tuple[KernelKey, int], list[Record]] = {}
        wanted = TargetKey.of(target)
        self._kind = wanted.kind
        digest = hashlib.sha256()
        for directory in directories:
            log = read_log(directory)
            self.problems += log.problems
            if log.target != wanted:
                self.problems.append(
                    f"{directory}: made for another target ({log.target}; this compile: {wanted})"
                )
                continue
            for record in log.records:
                if record.threads in (1, threads):
                    self._records.setdefault((record.key, record.threads), []).append(record)
                    digest.update(f"{record.workload_json}\n{record.record_json}\n".encode())
        self.digest = digest.hexdigest() if self._records else None

    @property
    def tune_options(self) -> str:
        """The options of a tuning that makes such records."""
        threads = "" if self._kind == "cuda" else f" --threads {self.threads}"
        return f"--target {self.target.name}{threads}"

    def schedule(
        self, name: str, func: tirx.PrimFunc, target: Target, *, in_pieces: bool = False
    ) -> ScheduledKernel:
        """Schedule a naive Mega kernel by its record, or by hand; notes the outcome."""
        space = Space.of(func, target)
        record, outcome = self._find(func, space, 1 if in_pieces else self.threads)
        self.outcomes[name] = outcome
        if record is None:
            return hand_schedule(func, target)
        return generate(replay(space.workload, record.load().trace).mod["main"], target)

    def _find(
        self, func: tirx.PrimFunc, space: Space, threads: int
    ) -> tuple[Record | None, Outcome]:
        key = kernel_key(func)
        if is_of_any_size(func):
            return None, Outcome(ANY_SIZE, "hand", "hand schedule")
        if space.size == 1:
            return None, Outcome(HIT, "hand", "there is nothing to decide")
        there = self._records.get((key, threads), [])
        made = made_by(key.op, self._kind) if there else None
        ours = [r for r in there if r.made_by == made and space.holds(r.decisions)]
        best = best_confirmed(ours)
        if best is None:
            if ours:
                detail = f"hand schedule; {len(ours)} trials, not confirmed: run tune to its end"
                return None, Outcome("miss", "hand", detail)
            if there:
                detail = f"made by other versions: {there[-1].made_by}; hand schedule"
                return None, Outcome("stale", "hand", detail)
            return None, Outcome("miss", "hand", "hand schedule")
        if not tvm_ffi.structural_equal(best.load().workload.mod, space.workload):
            return None, Outcome(
                "stale", "hand", "the kernel computes something else; hand schedule"
            )
        if best.decisions == space.hand:
            return None, Outcome(HIT, "hand", "nothing beat the hand schedule")
        return best, Outcome(HIT, "tuned")


def find_logs(target: CpuTarget | CudaTarget, given: Path | None) -> list[Path]:
    """Return the logs that a compile reads: the one given, or those shipped for the target.

    Raises
    ------
    TuningError
        If the directory given holds no log.
    """
    if given is not None:
        if not is_log(given):
            raise TuningError(
                f"{given}: holds no tuning log; make one with python -m mega_tvm.tune "
                f"--tuning-log {given}"
            )
        return [given]
    return [path for path in _shipped() if read_target(path) == TargetKey.of(target)]


def _shipped() -> Iterable[Path]:
    return sorted(path for path in SHIPPED.glob("*") if is_log(path))
