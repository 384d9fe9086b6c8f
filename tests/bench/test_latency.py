"""``python -m mega_tvm.bench.latency``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mega_tvm.bench.latency import Latency, main, measure, paced


def test_percentiles() -> None:
    found = Latency.of([1000 * (i + 1) for i in range(1001)])
    assert (found.calls, found.minimum, found.p50, found.maximum) == (1001, 1.0, 501.0, 1001.0)
    assert (found.p99, found.p999) == pytest.approx((991.0, 1000.0))


@pytest.mark.parametrize("rate", [None, 500.0], ids=["flat out", "paced"])
def test_each_model_gets_as_many_calls(rate: float | None) -> None:
    x = np.zeros(1, np.float32)
    called = {"a": 0, "b": 0}

    def model(name: str):
        def call(given: np.ndarray) -> np.ndarray:
            called[name] += 1
            return given

        return call

    found = measure({name: model(name) for name in called}, x, 130, rate)
    assert [timing.calls for timing in found.values()] == [130, 130]
    assert called["a"] == called["b"] > 130


def test_paced_calls_keep_their_rate_after_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    starts = []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.perf_counter_ns", lambda: int(now[0] * 1e9))
    monkeypatch.setattr("time.sleep", lambda s: now.__setitem__(0, now[0] + s))

    def call(x: np.ndarray) -> np.ndarray:
        starts.append(now[0])
        now[0] += 0.35 if len(starts) == 2 else 0.01
        return x

    times = paced(call, np.zeros(1), 4, 10.0)
    np.testing.assert_allclose(starts, [0.1, 0.2, 0.55, 0.65])
    np.testing.assert_allclose(times, [1e7, 3.5e8, 1e7, 1e7], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "jax"], "jax: cannot be loaded from a file here"),
        (["--workload", "all"], "names one workload"),
        (["--calls", "0"], "must be positive"),
        (["--rate", "-1"], "must be positive"),
        (["--threads", "4096"], "--threads must be 1 to"),
        (["--json", "/nonexistent/run.json"], "no such directory"),
    ],
    ids=["peer", "workloads", "calls", "rate", "threads", "folder"],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="extra: bench")
    pytest.importorskip("openvino", reason="extra: bench")
    path = tmp_path / "run.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mega_tvm.bench.latency", "--workload=small"),
            *("--calls=20", "--rate=200", "--processes=1", f"--json={path}"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(path.read_text())
    names = {"mega_tvm", "openvino", "onnxruntime"}
    assert data["fresh_ms"].keys() == data["forms"].keys() == names
    for found in data["latency_us"].values():
        assert found.keys() == names
        for timing in found.values():
            assert timing["calls"] == 20
            assert 0 < timing["minimum"] <= timing["p50"] <= timing["p99"] <= timing["maximum"]
    assert all(value > 0 for fresh in data["fresh_ms"].values() for value in fresh.values())
    assert "fresh process, ms" in done.stdout
