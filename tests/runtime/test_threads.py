"""Threads: how many run, and that callers do not disturb each other."""

from __future__ import annotations

import os
import threading
import warnings

import numpy as np
import pytest

from mega_tvm import load
from tests.runtime.builders import BIAS

two_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")

COUNT = """
import os, time, threading
def tasks():
    return set(os.listdir("/proc/self/task"))
def ticks(task):
    with open(f"/proc/self/task/{task}/stat") as file:
        return sum(map(int, file.read().rsplit(")")[1].split()[11:13]))
x = np.ones((1, 4096, 64), np.float32)
right = np.resize(np.arange(16), 64) + 4096.0
before, cpus = tasks(), os.sched_getaffinity(0)
def run(model):
    assert (model(x) == right).all()
"""


def test_one_thread_starts_none(artifact, run_python):
    script = """
model = mega_tvm.load(sys.argv[1], num_threads=1)
model.warmup()
run(model)
print(len(tasks() - before))
"""
    # Also where the environment asks for more.
    for env in ({}, {"TVM_NUM_THREADS": "8"}, {"OMP_NUM_THREADS": "8"}):
        assert run_python(COUNT + script, artifact, env=env) == "0\n"


@two_cpus
def test_two_threads_both_work(artifact, run_python):
    script = """
model = mega_tvm.load(sys.argv[1], num_threads=2)
run(model)
new = sorted(tasks() - before)
end = time.monotonic() + 10
while time.monotonic() < end and max((ticks(t) for t in new), default=0) < 5:
    run(model)
print(max(ticks(t) for t in new) >= 5)
print(os.sched_getaffinity(0) == cpus)
"""
    out = run_python(COUNT + script, artifact, env={"TVM_NUM_THREADS": "1"})
    assert out.split() == ["True", "True"]


@two_cpus
def test_models_of_different_numbers_alternate(artifact, run_python):
    script = """
one, two = (mega_tvm.load(sys.argv[1], num_threads=n) for n in (1, 2))
counts = []
for model in (one, two, one, two, two, one):
    run(model)
    counts.append(len(tasks() - before))
print(counts[0], len(set(counts[1:])), counts[1] >= 1)
# A calling thread has a pool of its own, which ends with it.
thread = threading.Thread(target=run, args=(two,))
thread.start(); thread.join()
end = time.monotonic() + 5
while len(tasks() - before) > counts[1] and time.monotonic() < end:
    time.sleep(0.01)
print(len(tasks() - before) == counts[1])
# Workers sleep soon after a call.
run(two); time.sleep(0.1)
start = sum(map(ticks, tasks())); time.sleep(0.3)
print(sum(map(ticks, tasks())) - start <= 2)
"""
    out = run_python(COUNT + script, artifact)
    assert out.splitlines() == ["0 1 True", "True", "True"]


@two_cpus
def test_after_a_fork(artifact, run_python):
    script = """
one, two = (mega_tvm.load(sys.argv[1], num_threads=n) for n in (1, 2))
run(two)
child = os.fork()
if child == 0:
    run(one)
    try:
        run(two)
    except mega_tvm.runtime_library.MegaError as error:
        code = 0 if "forked" in str(error) else 1
    thread = threading.Thread(target=run, args=(two,))
    thread.start(); thread.join()
    os._exit(code)
print(os.waitpid(child, 0)[1])
run(two)
"""
    assert run_python(COUNT + script, artifact) == "0\n"


@pytest.mark.parametrize("num_threads", [1, pytest.param(2, marks=two_cpus)])
def test_a_model_may_be_called_from_several_threads(artifact, num_threads):
    model = load(artifact, num_threads=num_threads)
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for i in range(300):
            shape = (1 + i % 2, 4, 16)
            # Every third array is one that must be copied.
            raw = rng.integers(-9, 9, shape).astype(np.float32)
            x = raw if i % 3 else np.asfortranarray(raw)
            if not np.array_equal(model(x), BIAS + raw.sum(axis=1)):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_more_threads_than_cpus(artifact):
    cpus = len(os.sched_getaffinity(0))
    with pytest.warns(RuntimeWarning, match=f"may use {cpus} CPUs: using {cpus}"):
        model = load(artifact, num_threads=cpus + 5)
    assert model.num_threads == cpus
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(artifact, num_threads=cpus).num_threads == cpus


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", None, True])
def test_other_numbers_are_refused(artifact, value):
    with pytest.raises(ValueError, match="num_threads must be a positive integer"):
        load(artifact, num_threads=value)


def test_memory_does_not_grow_with_models(artifact, run_python):
    script = """
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
x = np.ones((1, 4, 16), np.float32)
for i in range(400):
    model = mega_tvm.load(sys.argv[1])
    model(x)
    if i == 100:
        start = resident()
print(resident() - start < 4 << 20)
"""
    assert run_python(script, artifact) == "True\n"
