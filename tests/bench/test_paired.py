"""python -m mega_tvm.bench.paired: two libraries turn by turn."""

from __future__ import annotations

import pytest

import mega_tvm
from mega_tvm.bench.paired import main, paired_times
from tests.compiler.models import mega


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("paired") / "model.so"
    return mega_tvm.compile_model(
        mega(), batch=1, seq_len=7, symbolic=False, stream=False, output=path
    )


def test_it_prints_the_ratio_of_turns(library, capsys) -> None:
    assert main([str(library), str(library), "--rounds", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count(": minimum ") == 2
    assert "first / second: " in out


def test_each_model_has_a_time_each_round() -> None:
    calls = []
    times = paired_times([lambda name=name: calls.append(name) for name in "ab"], 3)
    assert times.shape == (3, 2)
    assert (times > 0).all()
    assert "".join(calls[::8]) == "ab" + "ab" + "ba" + "ab"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["none.so", "none.so"], "none.so", id="no-file"),
        pytest.param(["none.so", "none.so", "--rounds", "0"], "--rounds must be", id="rounds"),
    ],
)
def test_bad_options(argv, message, capsys) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err
