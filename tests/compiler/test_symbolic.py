"""Any batch and length through the symbolic entry of one file."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

import mega_tvm
from mega_tvm import entries
from mega_tvm.compiler import compile_model
from mega_tvm.errors import CompileError, InputError
from mega_tvm.targets import machine_runs, resolve_target
from mega_tvm.tolerances import assert_parity
from mega_tvm.verification import verify_artifact
from reference import numpy_mega
from tests.compiler.models import float64, mega
from tests.passes.harness import constant

SIZES = {"hidden_size": 40, "embed_dim": 13, "ema_dim": 5, "num_layers": 2}
SHAPES = [(1, 1), (1, 7), (3, 1), (3, 7), (5, 16), (1, 59), (3, 59), (1, 257), (5, 257)]
FORMS = pytest.mark.parametrize("form", ["softmax", "laplace"])
# A symbolic entry takes half a minute to compile: one target a form. What native makes of softmax
# is in test_pair_products.
TARGETS = {"softmax": "x86-64-v3", "laplace": "x86-64-v4"}


@pytest.fixture(scope="module")
def built(compile_once):
    """A model with one specialised entry and limits, by form."""

    def make(form):
        target = TARGETS[form]
        if not machine_runs(resolve_target(target)):
            pytest.skip(f"this machine cannot run {target} code")
        source = mega(**SIZES, laplace_attention=form == "laplace")
        path = compile_once(
            f"symbolic_{form}", source, target=target, batch=3, seq_len=59,
            symbolic=True, max_batch=5, max_seq_len=257,
        )  # fmt: skip
        return source, path

    return make


@FORMS
def test_agrees_with_the_oracle(built, rng, form) -> None:
    source, path = built(form)
    model = mega_tvm.load(path)
    for batch, length in SHAPES:
        x = rng.standard_normal((batch, length, 13), dtype=np.float32)
        expected = numpy_mega.forward(source.config, source.to_params(), x)
        assert_parity(model(x), expected, name=f"B{batch}-T{length}")


@FORMS
def test_agrees_with_the_specialised_entry(built, rng, form) -> None:
    _, path = built(form)
    model = mega_tvm.load(path)
    x = rng.standard_normal((3, 59, 13), dtype=np.float32)
    specialised = model(x)
    assert model.entry_at(x.shape).name == "main"
    del model._runners[x.shape]
    assert model.entry_at(x.shape).name == "main_symbolic"
    assert_parity(model(x), specialised)


def test_weights_are_stored_once(built, compile_once) -> None:
    source, path = built("softmax")
    alone = compile_once("symbolic_none", source, target="x86-64-v3", batch=3, seq_len=59)
    sizes = [mega_tvm.load(p).metadata["tensors"]["bytes"] for p in (path, alone)]
    assert sizes[0] == sizes[1]


def test_the_manifest_lists_it(built) -> None:
    _, path = built("softmax")
    (entry,) = mega_tvm.load(path).metadata["symbolic_entries"]
    assert entry["input"] == {"shape": ["batch", "seq_len", 13], "dtype": "float32"}
    assert entry["output"] == {"shape": ["batch", 40], "dtype": "float32"}
    assert entry["limits"] == {"batch": [1, 5], "seq_len": [1, 257]}


@pytest.mark.parametrize("shape", [(6, 7), (1, 258), (0, 7), (1, 0)], ids=str)
def test_a_shape_beyond_the_limits_is_refused_with_the_list(built, shape) -> None:
    _, path = built("softmax")
    words = (
        r"shape \[3, 59, 13\] or \[batch, seq_len, 13\], batch 1 to 5, "
        r"seq_len 1 to 257, found"
    )
    with pytest.raises(InputError, match=words):
        mega_tvm.load(path)(np.zeros((*shape, 13), np.float32))


def test_another_width_is_refused(built) -> None:
    _, path = built("softmax")
    with pytest.raises(InputError, match=r"found \[1, 7, 12\]"):
        mega_tvm.load(path)(np.zeros((1, 7, 12), np.float32))


def test_parity_was_checked_when_compiled(built) -> None:
    _, path = built("softmax")
    found = mega_tvm.load(path).metadata["parity"]["entries"]["main_symbolic"]
    assert found["checked"] and 0 < found["max_abs"] < 1e-4


def test_verify_runs_it_at_odd_shapes(compile_once) -> None:
    source = compile_once("symbolic_seed", mega().config, seq_len=5, symbolic=True)
    report = verify_artifact(source)
    assert report.ok
    entries = {check.entry for check in report.checks}
    assert {"main_symbolic [1, 1]", "main_symbolic [2, 13]", "main_symbolic [3, 59]"} < entries


def test_scratch_grows_to_the_largest_shape_and_stays(built, rng, monkeypatch) -> None:
    """One frame for calls in turn, whatever the number of shapes; small shapes reuse it."""
    _, path = built("softmax")
    model = mega_tvm.load(path)
    made = []
    original = entries.aligned_empty

    def counted(shape):
        array = original(shape)
        made.append(array.nbytes)
        return array

    monkeypatch.setattr(entries, "aligned_empty", counted)
    for length in [*range(1, 59), *range(58, 0, -1), 33]:
        model(np.zeros((1, length, 13), np.float32))
    assert len(made) <= 3 * 13, "workspace, input and output grow by half at least"
    assert max(made) <= 1.5 * model.entry_at((1, 58, 13)).workspace


def test_from_many_threads_with_mixed_shapes(built, rng) -> None:
    _, path = built("softmax")
    model = mega_tvm.load(path)
    inputs = [rng.standard_normal((1 + n % 3, 1 + n, 13), dtype=np.float32) for n in range(40)]
    expected = [model(x) for x in inputs]
    wrong = []

    def run(start):
        for i in range(len(inputs)):
            x = (start * 7 + i) % len(inputs)
            if not np.array_equal(model(inputs[x]), expected[x]):
                wrong.append(x)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_inputs(built, rng, offset) -> None:
    _, path = built("softmax")
    model = mega_tvm.load(path)
    x = rng.standard_normal((2, 9, 13), dtype=np.float32)
    raw = np.empty(x.size + 16, np.float32)[offset : offset + x.size].reshape(x.shape)
    raw[...] = x
    np.testing.assert_array_equal(model(raw), model(x))
    np.testing.assert_array_equal(model(x.transpose(0, 2, 1).copy().transpose(0, 2, 1)), model(x))


def test_two_threads_a_call_agree(built, rng) -> None:
    _, path = built("softmax")
    x = rng.standard_normal((5, 257, 13), dtype=np.float32)
    one, two = (mega_tvm.load(path, num_threads=n)(x) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_a_workspace_too_small_is_refused(built) -> None:
    """By the library itself, should the runtime be wrong."""
    _, path = built("softmax")
    model = mega_tvm.load(path)
    entry = model.entry_at((2, 9, 13))
    arrays = [np.zeros(s, np.float32) for s in ((2, 9, 13), (2, 40))]
    x, y = (entries.as_argument(_aligned(a)) for a in arrays)
    run = model.function("main_symbolic")
    for missing in (0, 64):
        workspace = _aligned(np.zeros((entry.workspace - missing) // 4, np.float32)).view(np.uint8)
        status = run(x, model._tensors.block, entries.as_argument(workspace), y)
        assert (status == 0) == (missing == 0)


def _aligned(array):
    copy = entries.aligned_empty(array.shape)
    copy[...] = array
    return copy


# Modules around a Mega


class Positions(nn.Module):
    """Adds positions: the length is fixed, the batch is open."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = constant(5, 13)
        self.mega = mega()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mega(x + self.positions)


class Pairs(nn.Module):
    """Joins pairs of frames: a term of the length."""

    def __init__(self) -> None:
        super().__init__()
        self.mega = mega(embed_dim=26)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mega(x.reshape(x.shape[0], -1, 26))


def test_a_head_keeps_both_open(compile_once, rng) -> None:
    module = nn.Sequential(mega(), nn.Linear(16, 6), nn.Tanh())
    model = mega_tvm.load(compile_once("symbolic_head", module, symbolic=True))
    for shape in [(1, 1, 13), (3, 7, 13), (1, 59, 13)]:
        x = rng.standard_normal(shape, dtype=np.float32)
        assert_parity(model(x), float64(module, x))


def test_a_fixed_length_leaves_the_batch_open(compile_once, rng) -> None:
    module = Positions()
    model = mega_tvm.load(compile_once("symbolic_positions", module, seq_len=5, symbolic=True))
    (entry,) = model.symbolic_entries
    assert entry.input_shape == ("batch", 5, 13)
    x = rng.standard_normal((4, 5, 13), dtype=np.float32)
    assert_parity(model(x), float64(module, x))
    with pytest.raises(InputError, match=r"\[batch, 5, 13\], batch 1 to 256, found \[1, 6, 13\]"):
        model(np.zeros((1, 6, 13), np.float32))


def test_a_module_that_leaves_none_is_told(tmp_path) -> None:
    with pytest.warns(UserWarning, match="no symbolic entry, only the given shapes will run: "):
        path = compile_model(Pairs(), input_shape=(2, 6, 13), output=tmp_path / "m.so")
    assert mega_tvm.load(path).symbolic_entries == ()


@pytest.mark.parametrize("name", ["max_batch", "max_seq_len"])
@pytest.mark.parametrize("value", [0, True, "3"], ids=str)
def test_wrong_limits(tmp_path, small, name, value) -> None:
    with pytest.raises(CompileError, match=f"{name} must be a positive integer; got"):
        compile_model(small, output=tmp_path / "m.so", **{name: value})
    assert not list(tmp_path.iterdir())
