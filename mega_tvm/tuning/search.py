"""The search over one kernel's space: evolution, guided by a cost model.

MetaSchedule's own `EvolutionarySearch` does not fit here, though its traces, records and database
do. Its cost model sees a candidate's loops, which ours has only after it was generated; its
mutators know tile splits, unrolling and thread binding, not a plain choice; and it gives up where
it cannot sample 50 candidates that were never measured, when many of our spaces are smaller than
that. Here a candidate is its decisions, so that the model's features are the decisions themselves,
thousands of candidates are ranked in milliseconds, and a small space is measured to its end.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from .space import Decisions, Space

Point = tuple[int, ...]

# Candidates that the model ranks, generations that lead to them, and the best that have children.
POPULATION = 256
GENERATIONS = 4
ELITE = 32
MUTATION = 0.3
# Part of a batch that is chosen at random, so that the model learns of what it does not know.
EXPLORED = 0.15
# Measured candidates from which on the model is better than chance.
LEAST_SAMPLES = 16
# To the model a failed candidate is so many times as slow as the best.
FAILED_RATIO = 8.0


class Search:
    """Chooses which candidates of a kernel are measured next.

    Parameters
    ----------
    space : Space
    seed : int

    Attributes
    ----------
    measured : dict of Point to float or None
        Seconds of each candidate; None if it failed.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space = space
        self._names = list(space.candidates)
        self._values = [space.candidates[name] for name in self._names]
        self._random = random.Random(seed)
        self._seed = seed
        self.measured: dict[Point, float | None] = {}

    @property
    def exhausted(self) -> bool:
        """Whether every candidate was measured."""
        return len(self.measured) >= self.space.size

    @property
    def best(self) -> tuple[Decisions, float] | None:
        """The fastest candidate and its seconds, or None if none ran."""
        ranked = self.ranked(1)
        return ranked[0] if ranked else None

    @property
    def hand_seconds(self) -> float | None:
        """The hand schedule's time, once measured."""
        return self.measured.get(self._point(self.space.hand))

    def ranked(self, count: int) -> list[tuple[Decisions, float]]:
        """Return the fastest candidates, the fastest first."""
        ran = [(s, point) for point, s in self.measured.items() if s is not None]
        return [(self._decisions(point), seconds) for seconds, point in sorted(ran)[:count]]

    def tell(self, decisions: Decisions, seconds: float | None) -> None:
        """Note a measurement; of several of one candidate, the shortest counts."""
        point = self._point(decisions)
        known = self.measured.get(point)
        times = [s for s in (known, seconds) if s is not None]
        self.measured[point] = min(times, default=None)

    def propose(self, count: int, first: Sequence[Decisions] = ()) -> list[Decisions]:
        """Return up to ``count`` candidates that were not measured; fewer where the space ends.

        The hand schedule stands before all others, then ``first``: what is worth a try. Until the
        model knows enough, candidates are the hand schedule with one decision changed: it is good,
        and most of a space is far from it.
        """
        chosen: dict[Point, None] = {}
        for decisions in [self.space.hand, *first][:count]:
            point = self._point(decisions)
            if point not in self.measured:
                chosen[point] = None
        promising = math.ceil(count * (1 - EXPLORED)) - len(chosen)
        if sum(s is not None for s in self.measured.values()) >= LEAST_SAMPLES:
            points = self._evolve()
        else:
            points = self._neighbours()
        for point in points[: max(promising, 0)]:
            chosen[point] = None
        count = min(count, self.space.size - len(self.measured))
        while len(chosen) < count:
            point = self._any()
            if point not in self.measured:
                chosen[point] = None
        return [self._decisions(point) for point in chosen]

    def _neighbours(self) -> list[Point]:
        """Return candidates one decision away from the hand schedule that were not measured."""
        hand = self._point(self.space.hand)
        points = [
            (*hand[:at], value, *hand[at + 1 :])
            for at, values in enumerate(self._values)
            for value in range(len(values))
        ]
        fresh = [point for point in points if point != hand and point not in self.measured]
        self._random.shuffle(fresh)
        return fresh

    def _evolve(self) -> list[Point]:
        """Return candidates that were not measured, the most promising first."""
        model = _CostModel(self._values, self.measured, self._seed)
        elite = [self._point(decisions) for decisions, _ in self.ranked(ELITE)]
        seen: dict[Point, float] = {}
        for _ in range(GENERATIONS):
            children = {self._child(elite) for _ in range(POPULATION)} - seen.keys()
            fresh = sorted(children - self.measured.keys())
            seen.update(zip(fresh, model.predict(fresh), strict=True))
            elite = sorted(seen, key=seen.__getitem__)[:ELITE] or elite
        return sorted(seen, key=seen.__getitem__)

    def _child(self, parents: Sequence[Point]) -> Point:
        a, b = self._random.choice(parents), self._random.choice(parents)
        child = [self._random.choice(pair) for pair in zip(a, b, strict=True)]
        for index, values in enumerate(self._values):
            if self._random.random() < MUTATION:
                child[index] = self._random.randrange(len(values))
        return tuple(child)

    def _any(self) -> Point:
        return tuple(self._random.randrange(len(values)) for values in self._values)

    def _point(self, decisions: Decisions) -> Point:
        pairs = zip(self._names, self._values, strict=True)
        return tuple(values.index(decisions[name]) for name, values in pairs)

    def _decisions(self, point: Point) -> Decisions:
        choices = zip(self._names, self._values, point, strict=True)
        return {name: values[index] for name, values, index in choices}


class _CostModel:
    """Gradient-boosted trees that predict the logarithm of a candidate's time.

    Features of a decision: each of its values, as 0 or 1, and the logarithm of the value.
    """

    def __init__(
        self, values: Sequence[Sequence[int]], measured: dict[Point, float | None], seed: int
    ) -> None:
        import xgboost  # heavy (it loads SciPy), and only tuning needs it

        self._xgboost = xgboost
        self._values = values
        best = min(seconds for seconds in measured.values() if seconds is not None)
        slowness = [
            math.log2(FAILED_RATIO if s is None else min(s / best, FAILED_RATIO))
            for s in measured.values()
        ]
        data = xgboost.DMatrix(self._features(measured), label=np.array(slowness))
        options = {
            "max_depth": 6,
            "eta": 0.2,
            "min_child_weight": 0,
            "objective": "reg:squarederror",
            "nthread": 1,
            "seed": seed,
            "verbosity": 0,
        }
        self._model = xgboost.train(options, data, num_boost_round=60)

    def predict(self, points: Sequence[Point]) -> list[float]:
        """Return the predicted slowness of each point; lower is better."""
        if not points:
            return []
        data = self._xgboost.DMatrix(self._features(points))
        return [float(value) for value in self._model.predict(data)]

    def _features(self, points: Iterable[Point]) -> npt.NDArray[np.float32]:
        indices = np.array(list(points))
        columns = []
        for column, values in zip(indices.T, self._values, strict=True):
            columns.append(np.eye(len(values))[column])
            columns.append(np.log2(1 + np.array(values))[column, None])
        return np.concatenate(columns, axis=1).astype(np.float32)
