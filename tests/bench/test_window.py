"""The benchmark of windows: the whole command on a small model, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

import mega_tvm
from mega_tvm.bench.paired import paired_times
from mega_tvm.bench.window import _push, _windows, main
from tests.compiler.models import mega


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench_window") / "model.so"
    return mega_tvm.compile_model(mega(), batch=[1, 2], seq_len=5, symbolic=False, output=path)


def test_the_command(library) -> None:
    command = [sys.executable, "-m", "mega_tvm.bench.window", library, "--batch=1,2", "--rounds=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = r"\d+\.\d+"
    row = rf" *(\d+) +(\d+)(?: +{number}){{5}} \({number} to {number}\)"
    assert re.findall(rf"^{row}$", done.stdout, re.MULTILINE) == [("1", "5"), ("2", "5")]


def test_both_windows_compute_the_same(library) -> None:
    keeping, full = _windows(mega_tvm.load(library), 2, None)
    x = np.random.default_rng(0).standard_normal((2, keeping.frames.shape[2]), np.float32)
    np.testing.assert_array_equal(keeping.push(x), full.push(x))
    times = paired_times([_push(full), _push(keeping)], 2)
    assert times.shape == (2, 2) and (times > 0).all()


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["none.so"], "none.so"), (["none.so", "--rounds", "0"], "--rounds must be")],
    ids=["no file", "rounds"],
)
def test_bad_options(argv, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr("mega_tvm.bench.window.pin", lambda *_: None)
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_keeps_nothing_is_refused(library, monkeypatch, capsys) -> None:
    model = mega_tvm.load(library)
    model.metadata["window"] = {"left_out": "of a reason"}
    monkeypatch.setattr("mega_tvm.bench.window.pin", lambda *_: None)
    monkeypatch.setattr("mega_tvm.bench.window.load", lambda *_, **__: model)
    assert main([str(library)]) == 2
    assert "frames of this model keep nothing" in capsys.readouterr().err
