"""Odd batches and lengths, several in one library."""

from __future__ import annotations

import numpy as np
import pytest

import mega_tvm
from mega_tvm.compiler import compile_model
from mega_tvm.errors import CompileError, InputError
from mega_tvm.tolerances import assert_parity
from reference import numpy_mega
from tests.compiler.models import mega

LENGTHS = [1, 7, 59, 257]
BATCHES = {"softmax": [1, 3], "laplace": [3]}
SHAPES = [(form, b, t) for form, batches in BATCHES.items() for b in batches for t in LENGTHS]


@pytest.fixture(scope="module")
def odd(compile_once):
    """Models of odd widths by form of attention, with an entry for every batch and length."""

    def make(form):
        laplace = form == "laplace"
        source = mega(hidden_size=23, embed_dim=11, ema_dim=5, laplace_attention=laplace)
        path = compile_once(
            f"odd_{form}",
            source,
            batch=BATCHES[form],
            seq_len=LENGTHS,
            symbolic=False,
            stream=False,
        )
        return source, mega_tvm.load(path)

    return make


@pytest.mark.parametrize(
    ("form", "batch", "length"), SHAPES, ids=lambda v: v if isinstance(v, str) else str(v)
)
def test_agrees_with_the_oracle(odd, rng, form, batch, length) -> None:
    source, model = odd(form)
    x = rng.standard_normal((batch, length, 11), dtype=np.float32)
    expected = numpy_mega.forward(source.config, source.to_params(), x)
    assert_parity(model(x), expected)


def test_entries_are_named_by_shape(odd) -> None:
    _, model = odd("softmax")
    found = {entry.name: entry.input_shape for entry in model.entries}
    assert found == {f"main_b{b}_t{t}": (b, t, 11) for b in (1, 3) for t in LENGTHS}
    assert {entry.output_shape for entry in model.entries} == {(1, 23), (3, 23)}


def test_streams_and_windows_are_left_out_where_they_are_not_wanted(odd) -> None:
    _, model = odd("softmax")
    for field in ("stream", "window"):
        assert "--no-stream" in model.metadata[field]["left_out"]
    names = {entry.name for entry in model.entries}
    assert not any(model._module.implements_function(f"{n}_window__run", True) for n in names)
    assert all(model._module.implements_function(f"{n}__run", True) for n in names)


def test_another_shape_is_refused(odd) -> None:
    _, model = odd("softmax")
    with pytest.raises(InputError, match=r"found \[2, 7, 11\]"):
        model(np.zeros((2, 7, 11), np.float32))
    assert model.symbolic_entries == ()


def test_every_entry_was_checked(odd) -> None:
    _, model = odd("softmax")
    entries = model.metadata["parity"]["entries"]
    assert len(entries) == 2 * len(LENGTHS)
    assert all(entry["checked"] for entry in entries.values())


def test_entries_share_their_weights(odd, compile_once) -> None:
    """To the byte, but for a length of 1, whose last block merges other weights."""
    source, model = odd("softmax")
    one = compile_once("odd_one", source, batch=3, seq_len=59)
    alone = mega_tvm.load(one).metadata["tensors"]["bytes"]
    assert model.metadata["tensors"]["bytes"] <= 1.5 * alone  # one block: the last is all


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch must be a positive integer; got 0"),
        ({"batch": True}, "batch must be a positive integer; got True"),
        ({"batch": "2"}, "batch must be a positive integer; got '2'"),
        ({"seq_len": [5, -1]}, "seq_len must be a positive integer; got -1"),
        ({"batch": 1.5}, "batch must be a positive integer; got 1.5"),
        ({"batch": [1, 1]}, "distinct shapes"),
        ({"batch": []}, "distinct shapes"),
        ({"input_shape": (1, 0, 13)}, "input_shape must be a positive integer; got 0"),
    ],
    ids=str,
)
def test_wrong_shapes(tmp_path, small, options, words) -> None:
    with pytest.raises(CompileError, match=words):
        compile_model(small, output=tmp_path / "m.so", **options)
    assert not list(tmp_path.iterdir())


def test_the_configs_length_is_the_default(small_path) -> None:
    (entry,) = mega_tvm.load(small_path).entries
    assert (entry.name, entry.input_shape) == ("main", (1, 5, 13))
