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


def test_growth_shows(capsys, monkeypatch):
    sizes, counts = iter([50 << 20, 53 << 20, 7 << 20, 8 << 20]), []
    monkeypatch.setattr(soak, "resident", lambda: next(sizes))
    assert not soak.growth("grows", counts.append, 500)
    assert soak.growth("flat", counts.append, 10)
    assert counts == [5, 500, 1, 10]  # a first round, then what is measured
    assert "memory 50.0 MiB, grown by 3072 KiB" in capsys.readouterr().out


def test_memory_is_read():
    """An array larger than any free memory of this process shows, and only while it is there."""
    before = soak.resident()
    array = np.ones(1 << 27, np.uint8)
    assert soak.resident() - before > 100 << 20
    del array
    assert soak.resident() - before < 100 << 20


def test_other_results_show(many_shapes, monkeypatch):
    model = load(many_shapes)
    right, calls = soak.outputs, []

    def outputs(*arguments):
        calls.append(arguments)
        for i, y in enumerate(right(*arguments)):
            yield b"" if len(calls) > 2 and i == 5 else y

    monkeypatch.setattr(soak, "outputs", outputs)
    assert soak.threads(model, 2, 10) == 2
