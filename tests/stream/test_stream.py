"""Streams: every split of frames over calls is the full run."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from mega_tvm.errors import InputError, MegaError, StreamFullError
from mega_tvm.tolerances import assert_parity
from mega_tvm.verify_stream import check_stream
from reference import numpy_mega
from tests.stream.conftest import T, every_output

E, H = 13, 40


@pytest.fixture
def stream(subject):
    return subject.model.stream(batch=2, max_len=T)


def test_steps_are_full_runs_on_every_prefix(subject, stream) -> None:
    outputs = np.stack([stream.step(subject.x[:, t]) for t in range(T)], axis=1)
    for t in range(T):
        assert_parity(outputs[:, t], subject.expected[:, t], name=f"step {t}")
    for n in (7, T):
        full = np.concatenate([subject.model(subject.x[b : b + 1, :n]) for b in (0, 1)])
        np.testing.assert_allclose(outputs[:, n - 1], full, rtol=0, atol=1e-5)
    assert stream.lengths.tolist() == [T, T]


@pytest.mark.parametrize("cut", [1, 2, 59, 63, 64, 65, 129, 257, 299], ids="T{}".format)
def test_prefill_then_steps(subject, stream, cut) -> None:
    """Pieces of prefill, of at most 64 frames here, end at all these cuts."""
    assert_parity(stream.prefill(subject.x[:, :cut]), subject.expected[:, cut - 1])
    for t in range(cut, min(cut + 5, T)):
        assert_parity(stream.step(subject.x[:, t]), subject.expected[:, t])


def test_prefills_of_any_lengths(subject, stream) -> None:
    done = 0
    for n in (1, 6, 59, 1, 100, 133):
        y = stream.prefill(subject.x[:, done : done + n])
        done += n
        assert_parity(y, subject.expected[:, done - 1], name=f"{done} frames")
    assert done == T


def test_restoring_at_every_cut(subject, stream) -> None:
    """What comes between snapshot and restore leaves no trace, to the bit."""
    plain = subject.model.stream(batch=2, max_len=T)
    other = subject.model.stream(batch=2, max_len=T)
    kept = stream.snapshot()
    for t in range(T):
        stream.restore(kept)
        y = stream.step(subject.x[:, t])
        np.testing.assert_array_equal(y, plain.step(subject.x[:, t]))
        kept = stream.snapshot()
        if t < T - 3:
            stream.prefill(-subject.x[:, :3])
        else:
            stream.reset()
    other.restore(kept)
    assert other.lengths.tolist() == [T, T]
    assert stream.snapshot().nbytes < kept.nbytes  # of what is in use


def test_rows_of_different_lengths(subject, stream) -> None:
    """Episodes that end at different times: each row attends to its own frames alone."""
    begin = np.zeros(2, int)
    for t in range(150):
        if t in (1, 67, 130):
            row = t % 2
            stream.reset([row])
            begin[row] = t
        frames = np.stack([subject.x[b, t - begin[b]] for b in (0, 1)])
        y = stream.step(frames)
        assert_parity(y, [subject.expected[b, t - begin[b]] for b in (0, 1)], name=f"step {t}")
    assert stream.lengths.tolist() == (150 - begin).tolist()


def test_prefill_of_some_rows(subject) -> None:
    stream = subject.model.stream(batch=5, max_len=100)
    stream.step(np.ones((5, E), np.float32))
    stream.reset([0, 1, 3])
    x = subject.x[[0, 1, 0], :90]
    y = stream.prefill(x, rows=[0, 1, 3])
    assert_parity(y, subject.expected[[0, 1, 0], 89])
    assert stream.lengths.tolist() == [90, 90, 1, 90, 1]
    frames = subject.x[[0, 1, 0, 0, 0], 90]
    assert_parity(stream.step(frames)[[0, 1, 3]], subject.expected[[0, 1, 0], 90])


def test_reorder(subject) -> None:
    """Each beam goes on from another's state, of another length."""
    stream = subject.model.stream(batch=3, max_len=200)
    stream.prefill(subject.x[:1, :70], rows=[0])
    stream.prefill(subject.x[1:, :131], rows=[2])
    stream.reorder([2, 0, 0])
    assert stream.lengths.tolist() == [131, 70, 70]
    y = stream.step(np.stack([subject.x[1, 131], subject.x[0, 70], subject.x[1, 0]]))
    assert_parity(y[:2], [subject.expected[1, 131], subject.expected[0, 70]])
    stream.reorder([0, 1, 1])
    same = stream.step(np.repeat(subject.x[:1, 71], 3, axis=0))
    np.testing.assert_array_equal(same[1], same[2])
    assert_parity(same[1], subject.expected[0, 71])


def test_full_is_an_error_that_changes_nothing(subject) -> None:
    stream = subject.model.stream(batch=2, max_len=9)
    stream.prefill(subject.x[:, :5])
    with pytest.raises(StreamFullError, match=r"5 more frame.*5 of max_len=9.*reset"):
        stream.prefill(subject.x[:, 5:10])
    for t in range(5, 9):
        assert_parity(stream.step(subject.x[:, t]), subject.expected[:, t])
    with pytest.raises(StreamFullError):
        stream.step(subject.x[:, 9])
    stream.reset([1])
    with pytest.raises(StreamFullError):
        stream.step(subject.x[:, 9])
    stream.reset()
    assert_parity(stream.prefill(subject.x[:, :9]), subject.expected[:, 8])


def test_sliding_attends_to_the_last_frames(subject, monkeypatch) -> None:
    """As a full run whose attention is cut to a band, while the moving average goes on."""
    room = 59

    def banded(q, k, laplace):
        n = k.shape[1]
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        age = np.arange(n)[:, None] - np.arange(n)
        w = np.exp(np.where((age >= 0) & (age < room), scores, -np.inf))
        return w / w.sum(axis=-1, keepdims=True)

    monkeypatch.setattr(numpy_mega, "attention_weights", banded)
    expected = every_output(subject.module, subject.x[:, :200])
    stream = subject.model.stream(batch=2, max_len=room, on_full="slide")
    assert_parity(stream.prefill(subject.x[:, :150]), expected[:, 149])
    for t in range(150, 200):
        assert_parity(stream.step(subject.x[:, t]), expected[:, t], name=f"step {t}")
    assert np.abs(expected[:, -1] - subject.expected[:, 199]).max() > 1e-3
    kept = stream.snapshot()
    y = stream.step(subject.x[:, 0])
    stream.restore(kept)
    np.testing.assert_array_equal(stream.step(subject.x[:, 0]), y)


def test_inputs_of_other_kinds(subject, stream) -> None:
    x = subject.x[:, 0]
    y = stream.step(x)
    for same in (torch.from_numpy(x.copy()), x[:, ::-1].copy()[:, ::-1], np.asfortranarray(x)):
        stream.reset()
        np.testing.assert_array_equal(stream.step(same), y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x: s.step(x[:1, 0]), r"shape \[2, 13\], found \[1, 13\]"),
        (lambda s, x: s.step(x[:, 0].astype(np.float64)), "float32, found float64"),
        (lambda s, x: s.step(x[:, 0] * np.nan, check_finite=True), "finite"),
        (lambda s, x: s.step(x[:, 0], out=np.empty((2, 41), np.float32)), r"\[2, 40\]"),
        (lambda s, x: s.prefill(x[:, :0]), "at least one frame"),
        (lambda s, x: s.prefill(x[:, 0]), r"shape \[2, n, 13\]"),
        (lambda s, x: s.prefill(x[:1], rows=[2]), "rows from 0 to 1"),
        (lambda s, x: s.prefill(x, rows=[1, 0]), "ascending"),
        (lambda s, x: s.reset([-1]), "rows from 0 to 1"),
        (lambda s, x: s.reset([0.5]), "list of integers"),
        (lambda s, x: s.reorder([0]), "expected 2 rows"),
        (lambda s, x: s.restore(None), "expected a Snapshot"),
    ],
)
def test_wrong_input_changes_nothing(subject, stream, call, message) -> None:
    stream.step(subject.x[:, 0])
    with pytest.raises(InputError, match=message):
        call(stream, subject.x)
    assert stream.lengths.tolist() == [1, 1]
    assert_parity(stream.step(subject.x[:, 1]), subject.expected[:, 1])


def test_snapshots_of_other_streams_are_refused(subject, stream) -> None:
    with pytest.raises(InputError, match="same model, batch, max_len"):
        stream.restore(subject.model.stream(batch=3, max_len=T).snapshot())


@pytest.mark.parametrize(
    "arguments", [{"batch": 0}, {"batch": True}, {"max_len": -1}, {"on_full": "wrap"}], ids=str
)
def test_wrong_arguments(subject, arguments) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        subject.model.stream(**arguments)


@pytest.mark.parametrize("size", [2**36, 2**62])
def test_too_large_for_memory(subject, size) -> None:
    with pytest.raises(MegaError, match=f"batch 2 and max_len {size} keeps [0-9,]+ bytes"):
        subject.model.stream(2, max_len=size)


def test_max_len_is_the_longest_compiled_length(subject) -> None:
    assert subject.model.stream().max_len == T


def test_a_step_with_out_allocates_nothing(subject, stream) -> None:
    out = np.empty((2, H), np.float32)
    x_t = subject.x[:, 0].copy()
    stream.step(x_t, out=out)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(200):
            stream.step(x_t, out=out)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Numbers, views and argument tuples of one call; no array's data.
    assert now - before < 512
    assert peak - before < 4096


def test_memory_is_flat_after_many_resets(subject, stream) -> None:
    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096

    def episodes(n: int) -> None:
        for _ in range(n):
            stream.step(subject.x[:, 0])
            stream.reset([0])
            stream.reset()

    episodes(1000)
    before = resident()
    episodes(50_000)  # 1e5 resets
    assert resident() - before < 1 << 20


def test_threads_have_streams_of_their_own(subject) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def run(seed: int) -> np.ndarray:
        stream = subject.model.stream(batch=1, max_len=64)
        x = np.random.default_rng(seed).standard_normal((1, 64, E), dtype=np.float32)
        stream.prefill(x[:, :20])
        return np.stack([stream.step(x[:, t]) for t in range(20, 64)])

    serial = [run(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(serial, pool.map(run, range(8)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_verify_checks_streams(subject) -> None:
    check = check_stream(subject.model, subject.module.config, subject.module.to_params())
    assert check is not None and check.parity.ok
    wrong = {**subject.module.to_params()}
    name = "mega_block_2_ema/mega_block_2_ema_alpha"
    wrong[name] = wrong[name] + 0.5
    check = check_stream(subject.model, subject.module.config, wrong)
    assert check is not None and not check.parity.ok
