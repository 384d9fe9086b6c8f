"""Threads and processes: how many run, forks, and that callers do not disturb each other."""

from __future__ import annotations

import ast
import asyncio
import ctypes
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

import mega_tvm
from mega_tvm import load
from mega_tvm.errors import IncompatibleArtifactError
from mega_tvm.import_slots import import_slots, replaced
from mega_tvm.runtime_library import installed_runtime
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


FORK = """
def fork(work):
    child = os.fork()
    if child == 0:
        work()
        sys.exit(3)  # and not os._exit: destructors run
    end = time.monotonic() + 20
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs"
one, two = (mega_tvm.load(sys.argv[1], num_threads=n) for n in (1, 2))
"""


@two_cpus
def test_a_fork_after_loading(artifact, run_python):
    script = """
def child():
    run(two); run(one); run(two)
    assert os.sched_getaffinity(0) == cpus
two.warmup()
for _ in range(100):  # its thread ends, and the workers of that; on a busy machine not at once
    if tasks() <= before:
        break
    time.sleep(0.1)
print(len(tasks() - before), fork(child))
one(x)
print(fork(child))
# Another thread's pool does not matter.
called, end = threading.Event(), threading.Event()
def other():
    run(two); called.set(); end.wait()
thread = threading.Thread(target=other)
thread.start(); called.wait(); time.sleep(0.1)
print(fork(child))
end.set(); thread.join()
run(two)
"""
    assert run_python(COUNT + FORK + script, artifact).split() == ["0", "3", "3", "3"]


@two_cpus
def test_a_fork_of_a_thread_with_workers(artifact, run_python):
    """The child's calls work, on as many threads, and so do its threads' and its child's."""
    script = """
import atexit
def child():
    atexit.register(print, "handlers run", flush=True)
    new = sorted(tasks() - {str(os.getpid())})
    def others():  # before any call: they must not take what the parent's workers had
        threads = [threading.Thread(target=run, args=(two,)) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    others()
    run(one)
    end = time.monotonic() + 10
    while time.monotonic() < end and sum(ticks(t) >= 5 for t in new) < len(new):
        run(two)
    print(len(new), sum(ticks(t) >= 5 for t in new), flush=True)
    run(one); run(two); others()
    print(fork(lambda: run(two)), flush=True)
def refused():
    try:
        two(np.ones((7, 7), np.float32))
    except mega_tvm.errors.InputError:
        os._exit(5)
run(two)
workers = len(tasks() - before)
print(fork(refused), flush=True)
print(fork(child))
run(two)
print(len(tasks() - before) == workers)
"""
    lines = run_python(COUNT + FORK + script, artifact).splitlines()
    assert lines[0] == "5"
    workers, busy = map(int, lines[1].split())
    assert workers == len(os.sched_getaffinity(0)) - 1 and busy >= 1
    # The grandchild inherits the child's handler.
    assert lines[2:] == ["handlers run", "3", "handlers run", "3", "True"]


ENDS = {
    "sys.exit()": ("sys.exit()", 0, ""),
    "sys.exit(0)": ("sys.exit(0)", 0, ""),
    "sys.exit(3)": ("sys.exit(3)", 3, ""),
    "raise SystemExit(4)": ("raise SystemExit(4)", 4, ""),
    "sys.exit(words)": ("sys.exit('words')", 1, "words\n"),
    "exception": ("raise KeyError('key')", 1, "Traceback (most recent call last):"),
    "end": ("pass", 0, ""),
    "killed": ("os.kill(os.getpid(), 15)", -15, ""),
}


@two_cpus
@pytest.mark.parametrize("called", [True, False], ids=["calls", "no call"])
def test_a_child_ends_with_its_own_status(artifact, run_python, called):
    """A child of a thread with workers, whether it runs the model or not."""
    script = """
def child(end, called):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.dup2(writing, 2)
        try:
            exec(("run(two);" if called else "") + end)
        except BaseException as error:
            raise error from None
        return None  # on to the end of the main module
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.wait()[1]), said
two = mega_tvm.load(sys.argv[1], num_threads=2)
run(two)
for end in sys.argv[3:]:
    result = child(end, sys.argv[2] == "True")
    if result is None:
        break
    print(result, flush=True)
    run(two)
"""
    out = run_python(COUNT + script, artifact, called, *(end for end, _, _ in ENDS.values()))
    lines = out.splitlines()
    assert len(lines) == len(ENDS)
    for (name, (_, status, words)), line in zip(ENDS.items(), lines, strict=True):
        found, said = ast.literal_eval(line)
        assert found == status, f"{name}: {line}"
        assert said.startswith(words) if words else said == "", f"{name}: {line}"
        assert name != "exception" or said.endswith("KeyError: 'key'\n")


@two_cpus
def test_forks_at_any_moment(artifact, run_python):
    """Just behind a call, when workers spin or fall asleep."""
    script = """
two = mega_tvm.load(sys.argv[1], num_threads=2)
x = np.ones((1, 4096, 64), np.float32)
for i in range(60):
    run(two)
    time.sleep(i % 12 * 1e-4)
    if os.fork() == 0:
        if i % 2:
            run(two)
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
print("done")
"""
    assert run_python(COUNT + script, artifact) == "done\n"


@two_cpus
def test_a_fork_of_another_thread_that_has_workers(artifact, run_python):
    """It is the child's only thread, and ends the child where it returns."""
    script = """
two = mega_tvm.load(sys.argv[1], num_threads=2)
def work():
    run(two)
    if os.fork() == 0:
        run(two)
        return
    print(os.waitstatus_to_exitcode(os.wait()[1]))
thread = threading.Thread(target=work)
thread.start(); thread.join()
"""
    assert run_python(COUNT + script, artifact) == "0\n"


def test_slots_of_imported_functions():
    """Replaced in one library, and put back."""
    library = ctypes.CDLL(str(installed_runtime()[0]))
    address = ctypes.cast(library.TVMBackendParallelLaunch, ctypes.c_void_p).value
    slots = import_slots(address, {"pthread_mutex_lock", "pthread_create", "no_such_function"})
    assert set(slots) == {"pthread_mutex_lock", "pthread_create"}
    before = [ctypes.c_uint64.from_address(slot).value for slot in slots.values()]
    with replaced(slots.values(), 4096):
        assert {ctypes.c_uint64.from_address(slot).value for slot in slots.values()} == {4096}
    assert [ctypes.c_uint64.from_address(slot).value for slot in slots.values()] == before
    assert import_slots(0, {"pthread_create"}) == {}


def test_a_library_without_those_slots_is_refused(artifact, monkeypatch):
    """Before a pool starts that a fork would leave without workers."""
    from mega_tvm import thread_pool

    model = load(artifact)
    pools = thread_pool.ThreadPools(model._library.path)
    monkeypatch.setattr(thread_pool, "import_slots", lambda *_: {"pthread_mutex_lock": 1})
    pools.use(1)
    with pytest.raises(IncompatibleArtifactError, match="hang in forked processes"):
        pools.use(2)


@two_cpus
def test_a_mega_and_its_stream_after_a_fork(many_shapes, run_python):
    script = """
import os
from mega_tvm.inputs import aligned_empty
model = mega_tvm.load(sys.argv[1], num_threads=2)
x = np.random.default_rng(0).standard_normal((3, 59, 13), dtype=np.float32)
def outputs():
    stream = model.stream(3)
    found = [model(x[:1]), model(x), stream.prefill(x[:, :58]), stream.step(x[:, 58])]
    machine, one = model.new_machine(), aligned_empty(model.entries[0].input_shape)
    one[...] = x[0, 0]
    found.append(model.fetch(model.invoke(machine[model.entries[0].name], one)))
    return b"".join(y.tobytes() for y in found)
expected = outputs()
child = os.fork()
if child == 0:
    os._exit(3 if outputs() == expected else 4)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), outputs() == expected)
"""
    assert run_python(script, many_shapes) == "3 True\n"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(artifact, tmp_path, method):
    # A file: spawned processes import the main module.
    script = tmp_path / "main.py"
    script.write_text(
        """
import multiprocessing, sys
import numpy as np, mega_tvm
def work(path, threads=0):
    import os
    model = mega_tvm.load(path, num_threads=threads or min(2, len(os.sched_getaffinity(0))))
    model.warmup()
    return model(np.ones((1, 4, 16), np.float32)).tolist()
if __name__ == "__main__":
    expected = work(sys.argv[1], 1)
    with multiprocessing.get_context(sys.argv[2]).Pool(1) as pool:
        print(pool.map(work, [sys.argv[1]] * 4) == [expected] * 4)
"""
    )
    done = subprocess.run(
        [sys.executable, script, artifact, method],
        env={**os.environ, "PYTHONPATH": str(Path(mega_tvm.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


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


def test_other_threads_run_while_a_kernel_does(artifact, run_python):
    # With a switch interval of an hour, another thread gets the interpreter only if it is given up.
    # The input is read in place: NumPy gives the interpreter up while it copies a large array.
    script = """
from mega_tvm.inputs import aligned_empty
model = mega_tvm.load(sys.argv[1])
x = aligned_empty(model.entries[2].input_shape); x[...] = 1
model.warmup()
started, stop, counted = threading.Event(), [], [0]
def count():
    started.set()
    while not stop:
        counted[0] += 1
        time.sleep(0)  # gives it back
sys.setswitchinterval(3600)
thread = threading.Thread(target=count)
thread.start(); started.wait()
before, end = counted[0], time.monotonic() + 30
while counted[0] == before and time.monotonic() < end:
    model(x)
print(counted[0] > before)
stop.append(1); thread.join()
"""
    # 0: what tvm_ffi does where nobody says otherwise.
    env = {"TVM_FFI_RELEASE_GIL_BY_DEFAULT": "0"}
    assert run_python(COUNT + script, artifact, env=env) == "True\n"


def test_many_threads_and_mixed_shapes_equal_serial_runs(many_shapes):
    """16 threads x 1,000 calls of a Mega, to the bit: its entries, other shapes, and streams."""
    model = load(many_shapes)
    rng = np.random.default_rng(0)
    shapes = [entry.input_shape for entry in model.entries]
    shapes += [(3, 11, 13), (1, 58, 13), (2, 59, 13)]
    assert {model.entry_at(shape).symbolic for shape in shapes} == {False, True}
    inputs = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes for _ in range(4)]
    expected = [model(x) for x in inputs]

    def steps(seed):
        """Yield the outputs of a stream that starts anew when it is full."""
        stream = model.stream(2, max_len=50)
        frames = np.random.default_rng(seed).standard_normal((250, 2, 13), dtype=np.float32)
        for frame in frames:
            if stream.lengths[0] == 50:
                stream.reset()
            yield stream.step(frame).tobytes()

    streamed = [list(steps(seed)) for seed in range(16)]
    wrong, start = [], threading.Barrier(16)

    def work(seed):
        chosen = np.random.default_rng(seed).integers(len(inputs), size=750)
        out = {y.shape: np.empty_like(y) for y in expected}
        stream = steps(seed)
        start.wait()
        for call, i in enumerate(chosen):
            given = out[expected[i].shape] if call % 2 else None
            y = model(inputs[i], out=given)
            if y.tobytes() != expected[i].tobytes():
                wrong.append((seed, call, int(i)))
            if call % 3 == 0 and next(stream) != streamed[seed][call // 3]:
                wrong.append((seed, call, "stream"))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_a_call_within_a_call_of_the_same_thread(artifact):
    """A signal's handler may run between any two steps of a call."""
    model = load(artifact)
    x = np.ones((1, 4, 16), np.float32)
    nested = np.full((1, 4, 16), 5, np.float32)
    results = []

    def trace(frame, event, _):
        if frame.f_code.co_filename.endswith("entries.py") and event == "line":
            sys.settrace(None)
            results.append(model(nested))
            sys.settrace(trace)
        return trace

    sys.settrace(trace)
    try:
        y = model(x)
    finally:
        sys.settrace(None)
    assert len(results) > 5
    for result in results:
        np.testing.assert_array_equal(result, [BIAS + 20])
    np.testing.assert_array_equal(y, [BIAS + 4])


def test_memory_does_not_grow_with_calls(artifact, run_python):
    script = """
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
model = mega_tvm.load(sys.argv[1])
xs = [np.ones((1, 4, 16), np.float32), np.asfortranarray(np.ones((2, 4, 16), np.float32))]
out = np.empty((1, 16), np.float32)
def calls(count):
    for _ in range(count):
        model(xs[0]); model(xs[1]); model(xs[0], out=out)
calls(1000)
start = resident()
calls(int(sys.argv[2]) // 3)
# Threads come and go, as asyncio.to_thread's do.
for _ in range(200):
    thread = threading.Thread(target=calls, args=(1,))
    thread.start(); thread.join()
print(resident() - start < 1 << 20)
"""
    count = os.environ.get("MEGA_TVM_CALLS", "1000000")
    assert run_python("import threading\n" + script, artifact, count) == "True\n"


def test_asyncio(artifact):
    model = load(artifact)

    async def calls():
        xs = [np.full((1, 4, 16), i, np.float32) for i in range(50)]
        return await asyncio.gather(*(asyncio.to_thread(model, x) for x in xs))

    for i, y in enumerate(asyncio.run(calls())):
        np.testing.assert_array_equal(y, [BIAS + 4 * i])


@two_cpus
def test_a_pool_binds_nobody_to_a_cpu(artifact, run_python):
    script = """
run(mega_tvm.load(sys.argv[1], num_threads=2))
print(all(os.sched_getaffinity(int(t)) == cpus for t in tasks()))
"""
    assert run_python(COUNT + script, artifact) == "True\n"
