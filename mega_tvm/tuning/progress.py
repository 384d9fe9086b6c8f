"""A kernel's state within a tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from .record import Record
from .search import Search
from .space import Decisions
from .tasks import Kernel

# A candidate must be faster in the median by more than what two runs of one differ by, in three
# rounds of four, and at its best.
LEAST_GAIN = 1.01
# A kernel that no candidate has improved yet waits longer for its next batch.
NO_GAIN_YET = 0.25


@dataclasses.dataclass
class Progress:
    """A kernel's state of tuning.

    Parameters
    ----------
    kernel : Kernel
    search : Search
    batches : int
        Batches that it got.
    trials, failed : int
        Candidates measured, those of earlier tunings included, and how many of them failed.
    confirmed : Record or None
        What a compile will use.
    """

    kernel: Kernel
    search: Search
    batches: int = 0
    trials: int = 0
    failed: int = 0
    confirmed: Record | None = None

    @property
    def urgency(self) -> float:
        """Share of the model's time, less with each batch: trials go as the root of the share."""
        best = self.search.best
        if best is None:
            return float("inf") if self.batches == 0 else 0.0
        hand = self.search.hand_seconds
        promise = 1.0 if hand is None or hand > LEAST_GAIN * best[1] else NO_GAIN_YET
        return promise * self.seconds / (1 + self.batches) ** 2

    @property
    def seconds(self) -> float:
        """Time that its calls take of a model's run, by its best candidate; 0 if none ran."""
        best = self.search.best
        return self.kernel.in_a_row * best[1] if best else 0.0

    @property
    def gain(self) -> float:
        """Time of the hand schedule over that of the confirmed one; 1 before."""
        return self.confirmed.gain if self.confirmed else 1.0

    @property
    def changes(self) -> Decisions:
        """What the confirmed record decides otherwise than the hand schedule."""
        hand = self.kernel.space.hand
        made = self.confirmed.decisions if self.confirmed else hand
        return {name: value for name, value in made.items() if value != hand[name]}


Report = Callable[[Sequence[Progress], Progress], None]
