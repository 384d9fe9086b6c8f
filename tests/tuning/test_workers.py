"""Candidates that crash, hang or compute something else: each is told, and harms no other."""

from __future__ import annotations

import dataclasses

import pytest
import tvm_ffi

from mega_tvm.targets import resolve_target
from mega_tvm.tuning import worker_main
from mega_tvm.tuning.trial import Task
from mega_tvm.tuning.workers import Pool, WorkerError
from tests.tuning.builders import (
    FAULTS,
    dense_kernel,
    install_faults,
    norm_kernel,
    short_budget,
)

GOOD = 7


def threads_of_the_pool() -> int:
    return int(tvm_ffi.get_global_func("runtime.NumThreads")())


@pytest.fixture(scope="module")
def kernel():
    return dense_kernel()


@pytest.fixture(scope="module")
def pool():
    with Pool(1, workers=1, on_start=install_faults, build_limit_s=2, run_limit_s=1) as pool:
        yield pool


def measured(pool, kernel, *names: str):
    """Measure a faulty candidate each, and good ones around them."""
    tiles = [GOOD, *(FAULTS[name] for name in names), 8]
    return pool.measure(kernel.task, [{**kernel.space.hand, "tile_m": tile} for tile in tiles])


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("crash", "run: crashed"),
        ("hang", "run: took longer than 1 s"),
        ("wrong", "wrong result: outside tolerance"),
        ("build crash", "build: crashed"),
        ("build hang", "build: took longer than 2 s"),
        ("build error", "build: ValueError: no such tile"),
    ],
)
def test_a_faulty_candidate_fails_alone(pool, kernel, fault, error) -> None:
    before, faulty, after = measured(pool, kernel, fault)
    assert faulty.seconds is None
    assert error in faulty.error
    assert not faulty.lost
    for good in (before, after):
        assert good.error is None
        assert 1e-9 < good.seconds < 1e-2


@pytest.mark.parametrize(
    ("fault", "error"),
    [("wrong", "wrong result"), ("crash", "crashed"), ("hang", "took longer than 6 s")],
)
def test_a_pair_with_a_faulty_candidate(pool, kernel, fault, error) -> None:
    """A finalist that another kernel handed on runs there for the first time."""
    good, faulty, other = (
        {**kernel.space.hand, "tile_m": tile} for tile in (GOOD, FAULTS[fault], 8)
    )
    with pytest.raises(WorkerError, match=error):
        pool.paired(kernel.task, good, faulty)
    result = pool.paired(kernel.task, good, other)
    assert result.first_s > 0
    assert result.second_s > 0
    assert result.low_ratio <= result.ratio


@pytest.mark.parametrize(("target", "killed"), [("native", False), ("cuda-sm_90", True)])
def test_a_faulty_pair_ends_a_gpus_process(monkeypatch, target, killed) -> None:
    """What a GPU's fault leaves behind would fail every later pair."""
    kills = []
    with Pool(1, workers=1) as pool:
        worker = pool._workers[0]
        monkeypatch.setattr(worker, "call", lambda *a, **k: worker_main.Result(None, "a fault"))
        monkeypatch.setattr(worker, "kill", lambda: kills.append(1))
        task = Task("kernel", "", resolve_target(target))
        with pytest.raises(WorkerError, match="a fault"):
            pool.paired(task, {}, {})
        assert bool(kills) == killed
        monkeypatch.undo()


def test_two_workers_share_a_batch(kernel) -> None:
    other = norm_kernel()
    with Pool(1, workers=2) as pool:
        results = pool.measure(other.task, [{"unroll": n} for n in (1, 2, 4, 8, 4)])
        assert len(results) == 5
        assert all(result.seconds for result in results)
        assert pool.measure(other.task, []) == []


def test_each_task_has_its_thread_count() -> None:
    with Pool(2, workers=1, on_start=short_budget) as pool:
        for kernel in (dense_kernel(threads=2), norm_kernel(), dense_kernel(threads=2)):
            (result,) = pool.measure(kernel.task, [kernel.space.hand])
            assert result.error is None
            found = pool._workers[0].call(threads_of_the_pool, limit_s=10)
            assert found == kernel.task.threads


def test_too_few_threads_are_told() -> None:
    runtime = {"runtime.config_threadpool": lambda *_: None, "runtime.NumThreads": lambda: 1}
    with pytest.raises(RuntimeError, match="start the RPC server with TVM_NUM_THREADS=2"):
        worker_main._use_threads(runtime.__getitem__, 2)


def test_a_task_that_no_worker_can_read(pool, kernel) -> None:
    broken = dataclasses.replace(kernel.task, name="broken", workload=["0", "?"])
    (result,) = pool.measure(broken, [kernel.space.hand])
    assert result.error.startswith("build: ")
