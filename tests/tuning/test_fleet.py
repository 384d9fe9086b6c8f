"""A fleet on loopback: a tracker and two servers, one of which dies during the tuning."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest
from tvm.rpc import connect_tracker

from mega_tvm.tuning import session as session_module
from mega_tvm.tuning.log import best_confirmed, read_log
from mega_tvm.tuning.session import Session
from mega_tvm.tuning.workers import Pool, Tracker
from tests.tuning.builders import dense_kernel, native, norm_kernel, short_budget

KEY = "cpu-test"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(module: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, "--host", "127.0.0.1", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TVM_NUM_THREADS": "2"},
    )


def kill(process: subprocess.Popen) -> None:
    """End a process and its children: a server serves from one of them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


@pytest.fixture
def fleet():
    """A tracker's address, and the processes of two servers."""
    port = free_port()
    processes = [start("tvm.exec.rpc_tracker", "--port", str(port), "--port-end", str(port + 1))]
    wait_for(lambda: socket.create_connection(("127.0.0.1", port), 1).close() or True)
    for _ in range(2):
        low = free_port()
        processes.append(
            start(
                "tvm.exec.rpc_server", "--port", str(low), "--port-end", str(low + 20),
                "--tracker", f"127.0.0.1:{port}", "--key", KEY,
            )
        )  # fmt: skip
    try:
        wait_for(lambda: len(connect_tracker("127.0.0.1", port).summary()["server_info"]) == 2)
        yield Tracker("127.0.0.1", port, KEY), processes[1:]
    finally:
        for process in processes:
            kill(process)


def wait_for(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError, OSError):
            if ready():
                return
        time.sleep(0.2)
    pytest.fail("the tracker or a server did not come up")


def test_a_server_dies_and_the_tuning_ends_with_a_valid_log(fleet, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(session_module, "FINALISTS", 1)
    tracker, servers = fleet
    kernels = [dense_kernel(name="whole", threads=2), dense_kernel(name="pieces"), norm_kernel()]
    killed = []

    def report(_every, _one) -> None:
        if not killed:  # after the first batch
            kill(servers[0])
            killed.append(servers[0])

    monkeypatch.setattr(session_module, "BATCH", 4)
    with Pool(2, workers=2, tracker=tracker, on_start=short_budget) as pool:
        session = Session(kernels, native(), 2, tmp_path, 0, pool)
        session.report = report
        session.run(16)
    assert killed
    log = read_log(tmp_path)
    assert log.problems == ()
    trials = [r for r in log.records if r.hand_seconds is None]
    assert len(trials) == 16
    assert all(r.error is None and r.seconds for r in trials)
    for kernel in kernels:
        case = (kernel.key, kernel.task.threads)
        assert best_confirmed(r for r in log.records if (r.key, r.threads) == case) is not None


def test_no_tracker_is_told(tmp_path) -> None:
    with Pool(1, workers=1, tracker=Tracker("127.0.0.1", free_port(), KEY), run_limit_s=2) as pool:
        (result,) = pool.measure(norm_kernel().task, [{"unroll": 1}])
    assert result.seconds is None
    assert result.lost
