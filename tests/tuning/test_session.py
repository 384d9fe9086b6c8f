"""A tuning from start to end, interrupted and resumed, and what stands in its log."""

from __future__ import annotations

import dataclasses

import pytest

from mega_tvm.errors import TuningError
from mega_tvm.tuning import session as session_module
from mega_tvm.tuning.log import append, best_confirmed, read_log
from mega_tvm.tuning.record import TargetKey
from mega_tvm.tuning.session import Session, time_to
from mega_tvm.tuning.workers import PairedResult, Pool, Result, WorkerError
from tests.tuning.builders import (
    dense_kernel,
    install_faults,
    native,
    norm_kernel,
    record,
    target_key,
)


class FakePool:
    """Times that a formula gives, in place of workers."""

    def __init__(
        self, seconds, ratio: float = 1.5, low_ratio: float = 1.2, at_best: float | None = None
    ) -> None:
        self.seconds, self.ratio, self.low_ratio = seconds, ratio, low_ratio
        self.at_best = ratio if at_best is None else at_best
        self.measured = []
        self.pairs = []
        self.interrupt_after = None

    def measure(self, task, candidates):
        if self.interrupt_after is not None and len(self.measured) >= self.interrupt_after:
            raise KeyboardInterrupt
        self.measured += [(task.name, *sorted(c.items())) for c in candidates]
        return [self.seconds(task.name, decisions) for decisions in candidates]

    def paired(self, task, first, second):
        self.pairs.append((task.name, first, second))
        return PairedResult(1e-5, 1e-5 / self.at_best, self.ratio, self.low_ratio)


def quick_tiles(_name, decisions):
    return Result(1e-5 + 1e-6 * sum(decisions.values()))


@pytest.fixture
def kernels():
    return [dense_kernel(), norm_kernel()]


def session(kernels, directory, pool, seed: int = 0) -> Session:
    return Session(kernels, native(), 1, directory, seed, pool)


def test_a_tuning_ends_with_a_confirmed_record_of_each_kernel(kernels, tmp_path) -> None:
    pool = FakePool(quick_tiles)
    session(kernels, tmp_path, pool).run(40)
    log = read_log(tmp_path)
    assert log.problems == ()
    assert len(pool.measured) == 40  # four of them are all that layer_norm has
    assert len(log.records) == 42
    for kernel in kernels:
        best = best_confirmed(r for r in log.records if r.key == kernel.key)
        assert best.gain == pytest.approx(1.5, rel=1e-3)
        assert best.threads == 1
        assert best.decisions != kernel.space.hand
    (run,) = log.runs
    assert (run["trials"], run["seed"], run["threads"]) == (40, 0, 1)
    assert run["device"]["cpu"]


@pytest.mark.parametrize(
    ("ratio", "low_ratio", "at_best"),
    [
        pytest.param(0.9, 0.8, 0.9, id="slower"),
        pytest.param(1.004, 1.001, 1.004, id="within-noise"),
        pytest.param(1.3, 0.97, 1.3, id="not-in-every-round"),
        pytest.param(1.3, 1.1, 0.99, id="not-at-its-best"),
    ],
)
def test_the_hand_schedule_stays_where_nothing_surely_beats_it(
    kernels, tmp_path, ratio, low_ratio, at_best
) -> None:
    session(kernels, tmp_path, FakePool(quick_tiles, ratio, low_ratio, at_best)).run(40)
    for kernel in kernels:
        best = best_confirmed(r for r in read_log(tmp_path).records if r.key == kernel.key)
        assert best.decisions == kernel.space.hand
        assert best.gain == 1


def test_what_was_slower_in_the_search_is_no_finalist(kernels, tmp_path) -> None:
    hand = kernels[1].space.hand
    pool = FakePool(lambda _, d: Result(1e-5 if d == hand else 2e-5))
    session(kernels[1:], tmp_path, pool).run(4)
    assert pool.pairs == []
    assert best_confirmed(read_log(tmp_path).records).decisions == hand


def test_the_gain_is_that_of_the_shortest_times(kernels, tmp_path) -> None:
    session(kernels[:1], tmp_path, FakePool(quick_tiles, ratio=1.5, at_best=1.1)).run(20)
    assert best_confirmed(read_log(tmp_path).records).gain == pytest.approx(1.1, rel=1e-3)


def test_what_one_kernel_gained_by_is_a_finalist_of_another(tmp_path) -> None:
    one, other = dense_kernel(257, "one"), dense_kernel(40, "other")
    handed = {**other.space.hand, "prefetch": 2}
    changed = {**one.space.hand, "prefetch": 2}
    pool = FakePool(lambda name, d: Result(3e-5 if name == "one" and d != changed else 2e-5))
    tuning = session([other, one, norm_kernel()], tmp_path, pool)
    tuning.kernels[1].search.tell(changed, 2e-5)
    tuning.kernels[0].search.tell(other.space.hand, 1e-5)  # and all else is slower
    tuning.run(12)
    assert [name for name, *_ in pool.pairs] == ["one", "other"]
    assert pool.pairs[1][2] == handed
    best = best_confirmed(r for r in read_log(tmp_path).records if r.key == other.key)
    assert best.decisions == handed


def test_the_curve_tells_when_the_gain_was_found(kernels, tmp_path) -> None:
    tuning = session(kernels, tmp_path, FakePool(quick_tiles))
    tuning.run(40)
    seconds, trials, saved = zip(*tuning.curve, strict=True)
    assert list(seconds) == sorted(seconds)
    assert list(saved) == sorted(saved)
    assert trials[-1] == 40
    expected = sum(p.search.hand_seconds - p.search.best[1] for p in tuning.kernels)
    assert saved[-1] == pytest.approx(1e6 * expected, abs=0.1)
    assert read_log(tmp_path).runs[0]["curve"] == [list(point) for point in tuning.curve]


def test_time_to_a_share_of_the_gain() -> None:
    curve = [(1.0, 8, 0.0), (2.0, 24, 96.0), (9.0, 40, 100.0)]
    assert time_to(0.95, curve) == (2.0, 24)
    assert time_to(1.0, curve) == (9.0, 40)
    assert time_to(0.95, [(1.0, 8, 0.0)]) is None
    assert time_to(0.95, []) is None


def test_what_was_best_at_another_length_is_tried_first(tmp_path) -> None:
    kernels = [dense_kernel(256, "one"), dense_kernel(257, "other")]
    pool = FakePool(lambda _, d: Result(1e-5 if d["tile_m"] == 3 else 2e-5))
    session(kernels[:1], tmp_path, pool).run(100)
    tuning = session(kernels, tmp_path, pool)
    pool.measured.clear()
    tuning.run(102)
    assert pool.measured[0] == ("other", *sorted(kernels[1].space.hand.items()))
    assert dict(pool.measured[1][1:])["tile_m"] == 3

    pool = FakePool(quick_tiles)  # and with other threads
    Session([dense_kernel(256, "one", threads=2)], native(), 2, tmp_path, 0, pool).run(2)
    assert dict(pool.measured[1][1:])["tile_m"] == 3


def test_an_interrupted_tuning_goes_on_where_it_was(kernels, tmp_path) -> None:
    first = FakePool(quick_tiles)
    first.interrupt_after = 20
    with pytest.raises(KeyboardInterrupt):
        session(kernels, tmp_path, first).run(60)
    log = read_log(tmp_path)
    assert len(log.records) == len(first.measured) >= 20
    assert best_confirmed(log.records) is None

    second = FakePool(quick_tiles)
    session(kernels, tmp_path, second).run(60)
    assert len(first.measured) + len(second.measured) == 60
    assert not set(first.measured) & set(second.measured)
    assert len(read_log(tmp_path).runs) == 2

    third = FakePool(quick_tiles)
    session(kernels, tmp_path, third).run(60)  # at its end already
    assert (third.measured, third.pairs) == ([], [])


def test_more_trials_confirm_anew(kernels, tmp_path) -> None:
    session(kernels, tmp_path, FakePool(quick_tiles)).run(20)
    pool = FakePool(quick_tiles, ratio=2.0)
    session(kernels, tmp_path, pool).run(36)
    assert {name for name, *_ in pool.pairs} == {"dense"}  # layer_norm had no new trial


def test_records_by_other_versions_are_not_built_on(kernels, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mega_tvm.tuning.record.made_by", lambda op, kind: "mega_tvm 0.0.0")
    session(kernels, tmp_path, FakePool(quick_tiles)).run(20)
    monkeypatch.undo()
    pool = FakePool(quick_tiles)
    session(kernels, tmp_path, pool).run(20)
    assert len(pool.measured) == 20


def test_other_thread_counts_are_other_records(kernels, tmp_path) -> None:
    session(kernels, tmp_path, FakePool(quick_tiles)).run(20)
    pool = FakePool(quick_tiles)
    Session([dense_kernel(threads=2)], native(), 2, tmp_path, 0, pool).run(5)
    assert len(pool.measured) == 5
    assert {r.threads for r in read_log(tmp_path).records} == {1, 2}


def test_a_kernel_whole_and_in_pieces_is_two(tmp_path) -> None:
    """What one thread's tuning found is taken over; two threads' is a search of its own."""
    pieces, whole = dense_kernel(name="pieces"), dense_kernel(name="whole", threads=2)
    session([pieces], tmp_path, FakePool(quick_tiles)).run(20)
    before = read_log(tmp_path).records

    first = FakePool(quick_tiles)
    first.interrupt_after = 10
    both = Session([pieces, whole], native(), 2, tmp_path, 0, first)
    assert [progress.trials for progress in both.kernels] == [20, 0]
    with pytest.raises(KeyboardInterrupt):
        both.run(60)
    second = FakePool(quick_tiles)
    resumed = Session([pieces, whole], native(), 2, tmp_path, 0, second)
    resumed.run(60)
    assert 20 + len(first.measured) + len(second.measured) == 60
    assert not set(first.measured) & set(second.measured)
    log = read_log(tmp_path)
    assert log.records[: len(before)] == before
    for progress in resumed.kernels:
        threads = progress.kernel.task.threads
        ours = [r for r in log.records if r.threads == threads]
        assert progress.trials == sum(r.hand_seconds is None for r in ours) > 10
        assert progress.confirmed in ours
    assert [run["threads"] for run in log.runs] == [1, 2, 2]


def test_calls_side_by_side_count_once(tmp_path) -> None:
    """Of two kernels as slow and as often called, the one in pieces has half the weight."""
    kernels = [
        dataclasses.replace(dense_kernel(256, "pieces"), calls=8, in_a_row=4),
        dataclasses.replace(dense_kernel(257, "whole", threads=2), calls=8, in_a_row=8),
    ]
    hands = [kernel.space.hand for kernel in kernels]
    pool = FakePool(lambda _, d: Result(3e-5 if d in hands else 1e-5))
    tuning = Session(kernels, native(), 2, tmp_path, 0, pool)
    tuning.run(160)
    names = [name for name, *_ in pool.measured]
    assert names.count("whole") > names.count("pieces") > 40
    assert tuning.curve[-1][2] == pytest.approx((4 + 8) * 20)


def test_the_slowest_kernel_gets_most_trials(tmp_path) -> None:
    kernels = [dense_kernel(256, "small"), dense_kernel(257, "large")]
    pool = FakePool(lambda name, _: Result(1e-3 if name == "large" else 1e-4))
    session(kernels, tmp_path, pool).run(160)
    names = [name for name, *_ in pool.measured]
    assert names.count("large") > 3 * names.count("small") > 0


def test_a_lost_device_is_no_fault_of_its_candidate(kernels, tmp_path) -> None:
    lost = Result(None, "device lost", lost=True)
    pool = FakePool(lambda _, d: lost if sum(d.values()) % 3 == 0 else Result(1e-5))
    session(kernels[:1], tmp_path, pool).run(30)
    log = read_log(tmp_path)
    assert all(r.error is None for r in log.records)
    assert all(r.hand_seconds or sum(r.decisions.values()) % 3 for r in log.records)


def test_no_device_at_all_ends_a_tuning(kernels, tmp_path) -> None:
    pool = FakePool(lambda *_: Result(None, "connection refused", lost=True))
    with pytest.raises(TuningError, match="no device answers: connection refused"):
        session(kernels, tmp_path, pool).run(30)
    assert read_log(tmp_path).records == ()


def test_finalists_that_fail_leave_the_hand_schedule(kernels, tmp_path, monkeypatch) -> None:
    pool = FakePool(quick_tiles)

    def fail(*_):
        raise WorkerError("crashed")

    monkeypatch.setattr(pool, "paired", fail)
    session(kernels[1:], tmp_path, pool).run(4)
    best = best_confirmed(read_log(tmp_path).records)
    assert best.decisions == kernels[1].space.hand


def test_a_log_of_another_target_is_refused(kernels, tmp_path) -> None:
    append(tmp_path, TargetKey("llvm", "x86-64-v3", ("+foreign",)), [], {"id": "x"})
    with pytest.raises(TuningError, match="is a log of target"):
        session(kernels, tmp_path, FakePool(quick_tiles))


def test_a_damaged_line_is_told_and_the_tuning_goes_on(kernels, tmp_path) -> None:
    append(tmp_path, target_key(), [record(kernels[1], 1e-5)] * 2, {"id": "x"})
    path = tmp_path / "database_tuning_record.json"
    path.write_bytes(path.read_bytes()[:-30])
    resumed = session(kernels, tmp_path, FakePool(quick_tiles))
    assert any("damaged" in problem for problem in resumed.problems)
    resumed.run(20)
    assert read_log(tmp_path).problems == ()


def test_a_tuning_over_faulty_candidates_ends_with_a_valid_log(tmp_path, monkeypatch) -> None:
    """Real workers: what crashes, hangs or is wrong is recorded as failed, and never chosen."""
    monkeypatch.setattr(session_module, "FINALISTS", 1)
    with Pool(1, workers=1, on_start=install_faults) as pool:
        session([norm_kernel()], tmp_path, pool).run(100)
    log = read_log(tmp_path)
    errors = {r.decisions["unroll"]: r.error for r in log.records if r.seconds is None}
    assert errors == {1: "run: crashed", 8: "build: ValueError: no such tile"}
    best = best_confirmed(log.records)
    assert best.decisions["unroll"] in (2, 4)
    assert len(log.records) == 5
