"""Timing: interleaved rounds, so that a change of the machine's pace meets all alike."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .environment import last_level_cache
from .peers import Model

MOST_CALLS_A_TURN = 200
WARMUP_CALLS = 2
# Pools of threads spin for about a millisecond after a call; the next contestant starts after that.
SETTLE_S = 0.01


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one contestant in microseconds, over all calls of all rounds."""

    minimum_us: float
    median_us: float
    calls: int

    @classmethod
    def of(cls, nanoseconds: Sequence[int]) -> Timing:
        """Summarize the times of single calls."""
        return cls(min(nanoseconds) / 1e3, statistics.median(nanoseconds) / 1e3, len(nanoseconds))


class CacheEvictor:
    """Puts everything out of the caches by streaming a buffer larger than the last level.

    Each core streams a buffer of its own, on a thread bound to it: a core's private cache is only
    emptied from that core.
    """

    def __init__(self) -> None:
        cores = sorted(os.sched_getaffinity(0))
        size = max(64 << 20, 2 * last_level_cache())
        self._buffers = {core: np.zeros(size // 4, dtype=np.float32) for core in cores}
        self._pool = concurrent.futures.ThreadPoolExecutor(len(cores))

    def __call__(self) -> None:
        """Evict."""
        list(self._pool.map(self._stream, self._buffers))

    def _stream(self, core: int) -> None:
        os.sched_setaffinity(0, {core})  # of this thread alone
        np.add(self._buffers[core], 1, out=self._buffers[core])


def time_calls(
    model: Model, x: npt.NDArray[Any], calls: int, before: Callable[[], None] | None = None
) -> list[int]:
    """Return the time of each call in nanoseconds; ``before`` runs ahead of each, untimed."""
    times = []
    for _ in range(calls):
        if before is not None:
            before()
        start = time.perf_counter_ns()
        model(x)
        times.append(time.perf_counter_ns() - start)
    return times


def quick_minimum(model: Model, x: npt.NDArray[Any], seconds: float = 0.25) -> float:
    """Return the shortest of a few calls in seconds: enough to choose between forms."""
    best = min(time_calls(model, x, 2)) / 1e9
    calls = min(MOST_CALLS_A_TURN, int(seconds / best))
    return min(best, min(time_calls(model, x, calls), default=10**18) / 1e9)


def interleaved(
    models: Mapping[str, Model],
    x: npt.NDArray[Any],
    *,
    rounds: int,
    turn_s: float,
    limit_s: float,
    before: Callable[[], None] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Measure all models, turn by turn.

    Parameters
    ----------
    models : mapping of str to callable
    x : array
    rounds : int
        In each round every model gets one turn; each round starts with another model.
    turn_s : float
        A turn lasts about so long, at least one call.
    limit_s : float
        Fewer rounds, at least three, where they would take longer than this.
    before : callable, optional
        Runs ahead of every timed call, untimed.
    progress : callable
        Called after each round.

    Returns
    -------
    dict of str to Timing
    """
    names = list(models)
    expected = {name: quick_minimum(models[name], x, 0.05) for name in names}
    before_s = _duration(before) if before is not None else 0.0
    calls = {
        name: max(1, min(MOST_CALLS_A_TURN, int(turn_s / (seconds + before_s))))
        for name, seconds in expected.items()
    }
    round_s = sum(
        WARMUP_CALLS * expected[name] + calls[name] * (expected[name] + before_s) for name in names
    )
    rounds = min(rounds, max(3, int(limit_s / round_s)))
    times: dict[str, list[int]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE_S)
            # A model much slower than its turn is not disturbed by the one before.
            if expected[name] < turn_s:
                time_calls(models[name], x, WARMUP_CALLS)
            times[name] += time_calls(models[name], x, calls[name], before)
        progress()
    return {name: Timing.of(values) for name, values in times.items()}


def _duration(function: Callable[[], None]) -> float:
    function()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
