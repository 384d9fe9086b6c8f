"""How a tuning tells of itself: a live table of kernels, and the summary at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from .limits import Limits, ceiling, work_of
from .progress import Progress
from .record import Record


class LiveReport:
    """A bar of all trials, and for each kernel its best time beside the hand schedule's.

    Where the output is no terminal, a line a batch.
    """

    def __init__(self, out: Console, kernels: Sequence[Progress], trials: int) -> None:
        self._out, self._trials = out, trials
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}"),
            TimeElapsedColumn(),
            console=out,
            disable=not out.is_terminal,
        )
        self._all = self._bars.add_task("all kernels", total=trials, best="")
        self._rows: list[TaskID] = [
            self._bars.add_task(p.kernel.name, total=p.kernel.space.size, best="", start=False)
            for p in kernels
        ]

    def __enter__(self) -> LiveReport:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, every: Sequence[Progress], one: Progress) -> None:
        """Show the state of all kernels."""
        done = sum(progress.trials for progress in every)
        self._bars.update(self._all, completed=done)
        for row, progress in zip(self._rows, every, strict=True):
            self._bars.update(row, completed=len(progress.search.measured), best=state(progress))
        if not self._out.is_terminal:
            self._out.print(
                f"  {done}/{self._trials} {one.kernel.name}: {state(one)}", markup=False
            )


def state(progress: Progress) -> str:
    """Return a kernel's best time beside the hand schedule's, in words."""
    if progress.confirmed is not None:
        record = progress.confirmed
        return f"confirmed: {record.gain - 1:+.1%} against hand"
    best, hand = progress.search.best, progress.search.hand_seconds
    failed = f", {progress.failed} failed" if progress.failed else ""
    if best is None:
        return f"nothing ran yet{failed}"
    if hand is None:
        return f"best {best[1] * 1e6:.2f} us{failed}"
    gain = hand / best[1] - 1
    return f"hand {hand * 1e6:.2f} us, best {best[1] * 1e6:.2f} us ({gain:+.1%}){failed}"


def summary(kernels: Sequence[Progress], limits: Mapping[int, Limits]) -> Table:
    """Return the table of what was tuned: every kernel, and all of a model's calls together.

    N threads make N calls of a kernel in pieces side by side, and a run waits for one: so they
    count in the last row.

    Parameters
    ----------
    kernels : sequence of Progress
    limits : mapping of int to Limits
        By the number of threads, one among them; empty where none were measured.
    """
    table = Table(title="tuned kernels, us a call", box=box.SIMPLE_HEAD)
    table.add_column("kernel", no_wrap=True)
    for column in ("threads", "calls", "trials", "hand", "tuned", "gain", "share of ceiling"):
        table.add_column(column, justify="right", no_wrap=True)
    hand_total = tuned_total = 0.0
    for progress in kernels:
        kernel, record = progress.kernel, progress.confirmed
        row = [kernel.name, *map(str, (kernel.task.threads, kernel.calls, progress.trials))]
        if record is None or record.seconds is None or record.hand_seconds is None:
            table.add_row(*row)
            continue
        hand_total += kernel.in_a_row * record.hand_seconds
        tuned_total += kernel.in_a_row * record.seconds
        table.add_row(
            *row,
            f"{record.hand_seconds * 1e6:.2f}",
            f"{record.seconds * 1e6:.2f}" if record.decisions != kernel.space.hand else "hand",
            f"{record.gain - 1:+.1%}",
            _share(progress, record, limits),
        )
    if tuned_total:
        table.add_section()
        table.add_row(
            "all calls",
            "",
            str(sum(p.kernel.calls for p in kernels)),
            str(sum(p.trials for p in kernels)),
            f"{hand_total * 1e6:.1f}",
            f"{tuned_total * 1e6:.1f}",
            f"{hand_total / tuned_total - 1:+.1%}",
            "",
        )
    return table


def _share(progress: Progress, record: Record, limits: Mapping[int, Limits]) -> str:
    """Return the share of the kernel's ceiling, and what bounds it."""
    op, spec = progress.kernel.key.op, json.loads(progress.kernel.key.spec)
    if not limits or record.seconds is None:
        return ""
    work = work_of(op, spec, limits[1].lanes, record.decisions)
    if work is None:
        return ""
    least, what = ceiling(work, limits, progress.kernel.task.threads)
    return f"{least / record.seconds:.0%} {what}"
