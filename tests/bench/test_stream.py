"""The benchmark of streams: turns, arguments, and the whole command on a tiny model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mega_tvm
from mega_tvm import MegaConfig
from mega_tvm.bench import stream
from mega_tvm.bench.stream import _times, main


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(stream.time, "perf_counter", lambda: now[0])

    def call(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    times = _times({"short": call("short", 0.125), "long": call("long", 5.0)}, 0.75)
    assert {name: set(found) for name, found in times.items()} == {"short": {0.125}, "long": {5.0}}
    # Warmed up once each; the long one's first call is more than its whole time.
    assert order == ["short", "long", "short", "short", "long", *["short"] * 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "expected positive integers, N[,N..], found '0'"),
        (["--frames", "1,x"], "found '1,x'"),
        (["--peer", "jax"], "invalid choice: 'jax'"),
        (["--threads", "4096"], "--threads must be 1 to"),
    ],
    ids=["batch", "frames", "peer", "threads"],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["model.so", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="extra: bench")
    config = MegaConfig(13, hidden_size=16, ema_dim=3, num_layers=1)
    shapes = {"batch": (1, 2), "seq_len": 5, "symbolic": False}
    path = mega_tvm.compile_model(config, **shapes, output=tmp_path / "model.so")
    command = [sys.executable, "-m", "mega_tvm.bench.stream", path, "--seconds=0.02"]
    command += ["--batch=1,2", "--frames=5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = r"\d+(?:\.\d+)?"
    row = rf" *(\d+) +(\d+) +{number} +{number} +{number} +\d+%(?: +{number}){{4}}  \w+.*"
    rows = re.findall(rf"^{row}$", done.stdout, re.MULTILINE)
    assert rows == [("5", "1"), ("5", "2")]
    done = subprocess.run([*command[:3], tmp_path / "none.so"], capture_output=True, text=True)
    assert done.returncode == 2 and "no such file" in done.stderr
