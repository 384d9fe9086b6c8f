"""The search: it starts at the hand schedule, measures nothing twice, and finds what is fast."""

from __future__ import annotations

import itertools
import math

import pytest

from mega_tvm.tuning.search import Search
from schedules.gated_attention.naive import gated_attention
from tests.schedules.cases import attention_spec
from tests.tuning.builders import kernel_of, norm_kernel


@pytest.fixture(scope="module")
def space():
    """Some thousand candidates."""
    return kernel_of(gated_attention(attention_spec(False, 1, 59, 59, 40))).space


def slowness(space, decisions) -> float:
    """A smooth time, best at a corner that is not the hand schedule's."""
    best = {name: values[-1] for name, values in space.candidates.items()}
    return 1e-5 * (1 + sum(abs(math.log2((v + 1) / (best[n] + 1))) for n, v in decisions.items()))


def run(space, trials: int, seed: int = 0, fails=lambda decisions: False) -> Search:
    search = Search(space, seed)
    while len(search.measured) < trials and not search.exhausted:
        batch = search.propose(16)
        assert 0 < len(batch) <= 16
        for decisions in batch:
            assert space.holds(decisions)
            search.tell(decisions, None if fails(decisions) else slowness(space, decisions))
    return search


def test_the_first_candidate_is_the_hand_schedule(space) -> None:
    assert Search(space, 3).propose(4)[0] == space.hand


def test_the_next_ones_differ_from_it_in_one_decision(space) -> None:
    _, *others = Search(space, 3).propose(6)
    changed = [sum(other[name] != space.hand[name] for name in space.hand) for other in others]
    assert changed.count(1) >= 4  # one is drawn from the whole space


def test_nothing_is_proposed_twice(space) -> None:
    search = Search(space, 0)
    seen = []
    for _ in range(5):
        batch = search.propose(16)
        seen += [tuple(sorted(decisions.items())) for decisions in batch]
        for decisions in batch:
            search.tell(decisions, slowness(space, decisions))
    assert len(set(seen)) == len(seen) == 80


def test_it_beats_random_search(space) -> None:
    """After a tenth of the space it is at the best hundredth, with every seed."""
    every = sorted(
        slowness(space, dict(zip(space.candidates, values, strict=True)))
        for values in itertools.product(*space.candidates.values())
    )
    for seed in range(3):
        best = run(space, space.size // 10, seed).best
        assert best is not None
        assert best[1] <= every[len(every) // 100]


def test_a_small_space_is_measured_to_its_end() -> None:
    space = norm_kernel().space
    search = run(space, 100)
    assert search.exhausted
    assert len(search.measured) == space.size == 4
    assert search.propose(16) == []


def test_failures_are_avoided_and_never_best(space) -> None:
    search = run(space, 200, fails=lambda decisions: decisions["tile_q"] > 5)
    assert search.best is not None
    assert search.best[0]["tile_q"] <= 5
    failed = [seconds is None for seconds in search.measured.values()]
    assert sum(failed[100:]) < sum(failed[:100])


def test_only_failures(space) -> None:
    search = run(space, 40, fails=lambda decisions: True)
    assert search.best is None
    assert search.hand_seconds is None


def test_a_seed_gives_the_same_search(space) -> None:
    assert list(run(space, 64, 5).measured) == list(run(space, 64, 5).measured)
    assert list(run(space, 64, 5).measured) != list(run(space, 64, 6).measured)
