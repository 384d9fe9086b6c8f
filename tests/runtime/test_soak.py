"""The soak command, shortened; and that it sees what it is there for."""

from __future__ import annotations

import numpy as np

from mega_tvm import load
from tests.runtime import soak


def test_the_command(many_shapes, capsys):
    options = ["--calls=2000", "--resets=300", "--threads=4", "--thread-calls=40"]
    assert soak.main([str(many_shapes), *options]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("calls: 2,000 in ")
    assert out[1].startswith("resets and pushes: 300 in ")
    assert out[2] == "threads: 4 x 40, 0 results differ"


def test_growth_shows(capsys):
    kept = []
    grows = soak.growth("grows", lambda count: kept.append(np.ones(count * 2**17)), 10)
    assert not grows and soak.growth("flat", lambda count: None, 10)
    assert "grown by 102" in capsys.readouterr().out.splitlines()[0]  # 10 MiB, to a few KiB


def test_other_results_show(many_shapes, monkeypatch):
    model = load(many_shapes)
    right, calls = soak.outputs, []

    def outputs(*arguments):
        calls.append(arguments)
        for i, y in enumerate(right(*arguments)):
            yield b"" if len(calls) > 2 and i == 5 else y

    monkeypatch.setattr(soak, "outputs", outputs)
    assert soak.threads(model, 2, 10) == 2
