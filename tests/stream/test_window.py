"""Windows: a full run on the last frames, to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mega_tvm
from mega_tvm import MegaConfig
from mega_tvm.entries import Entry
from mega_tvm.errors import InputError, MegaError
from mega_tvm.sliding_rows import SlidingRows
from mega_tvm.thread_pool import available_cpus
from mega_tvm.window import Window
from tests.passes.harness import Around, random_mega
from tests.runtime.builders import join, split


def frames(batch: int, n: int, width: int = 13) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((batch, n, width), dtype=np.float32)


@pytest.fixture(scope="module")
def every_case(tmp_path_factory):
    """Rows of whole cache lines, and any shape."""
    return mega_tvm.compile_model(
        MegaConfig(13, hidden_size=16, ema_dim=3, num_layers=1),
        seq_len=7,
        output=tmp_path_factory.mktemp("window") / "slides.so",
    )


@pytest.fixture(scope="module")
def two_projections(tmp_path_factory):
    """Frames that keep two rows; one of the two Megas is not causal."""
    both = [
        random_mega(hidden_size=16, num_layers=1, laplace_attention=form) for form in (False, True)
    ]
    return mega_tvm.compile_model(
        Around(lambda s, x: s.a(x) + s.b(x), a=both[0], b=both[1]),
        input_shape=(2, 7, 13),
        symbolic=False,
        output=tmp_path_factory.mktemp("window") / "two.so",
    )


def test_each_push_is_a_full_run(subject) -> None:
    x = subject.x[:1]
    window = subject.model.window(batch=1)
    window.fill(x[:, :6])
    for t in range(6, 40):
        y = window.push(x[:, t])
        np.testing.assert_array_equal(window.frames, x[:, t - 6 : t + 1])
        np.testing.assert_array_equal(y, subject.model(x[:, t - 6 : t + 1].copy()))
    assert len(window) == 7


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("batch", "seq_len"), [(1, 7), (1, 1), (1, 59), (3, 11), (2, 257)], ids=str
)
def test_windows_of_any_shape(every_case, batch, seq_len, num_threads) -> None:
    """From the first frame on, over several turns of their memory, with missed frames."""
    model = mega_tvm.load(every_case, num_threads=min(num_threads, available_cpus()))
    window = model.window(batch, seq_len=seq_len)
    every_miss = [*[0] * (seq_len + 9), 1, 2, 0, 0, 5, *[0] * (seq_len // 2), seq_len, 0]
    x = frames(batch, len(every_miss) + sum(every_miss))
    t = 0
    for missed in every_miss:
        window.fill(x[:, t : t + missed])
        t += missed
        y = window.push(x[:, t])
        t += 1
        held = x[:, max(0, t - seq_len) : t]
        np.testing.assert_array_equal(window.frames, held)
        np.testing.assert_array_equal(y, model(held.copy()), err_msg=f"frame {t}")
    window.reset()
    np.testing.assert_array_equal(window.push(x[:, 0]), model(x[:, :1].copy()))


def test_what_frames_keep_is_computed_once(subject, every_case) -> None:
    described = subject.model.metadata["window"]
    assert described["widths"] == [40]
    assert set(described["entries"]) == {"main_b1_t7", "main_b1_t300"}
    assert set(mega_tvm.load(every_case).metadata["window"]["entries"]) == {"main", "main_symbolic"}

    window = subject.model.window()
    window.fill(subject.x[:1, :7])
    window.push(subject.x[:1, 7])
    calls = []
    run = subject.model.run_function
    window._saving._model = type(
        "Counting",
        (),
        {
            "run_function": staticmethod(
                lambda name, function, arguments: (
                    calls.append((name, arguments[0].shape)),
                    run(name, function, arguments),
                )
            )
        },
    )
    window.push(subject.x[:1, 8])
    assert calls == [("frame_rows", (1, 1, 13)), ("main_b1_t7_window", (1, 7, 40))]


def test_frames_that_keep_two_rows(two_projections) -> None:
    model = mega_tvm.load(two_projections)
    assert model.metadata["window"]["widths"] == [16, 16]
    assert "not causal" in model.metadata["stream"]["left_out"]
    window, x = model.window(2), frames(2, 30)
    window.fill(x[:, :6])
    for t in range(6, 30):
        y = window.push(x[:, t])
        np.testing.assert_array_equal(y, model(x[:, t - 6 : t + 1].copy()))


def test_the_same_kernels_serve_windows(subject) -> None:
    """A window's functions call those of the entries: no other kernel is compiled for it."""
    kernels = subject.model.metadata["kernels"]
    dense = [k["spec"] for k in kernels if k["op"] == "dense"]
    leads = [tuple(spec["lead"]) for spec in dense if spec["k"] == 13]
    assert len(leads) == len(set(leads)) == 3  # 7 frames, 300 frames, any number


def test_out_takes_the_result(subject) -> None:
    window = subject.model.window()
    window.fill(subject.x[:1, :7])
    out = np.full((1, 40), np.nan, np.float32)
    assert np.shares_memory(window.push(subject.x[:1, 7], out=out), out)
    np.testing.assert_array_equal(out, subject.model(subject.x[:1, 1:8].copy()))
    kept = window.push(subject.x[:1, 8])
    again = kept.copy()
    window.push(subject.x[:1, 9])
    np.testing.assert_array_equal(kept, again)
    with pytest.raises(InputError, match=r"out of shape \[1, 40\], found \[1, 41\]"):
        window.push(subject.x[:1, 10], out=np.empty((1, 41), np.float32))
    np.testing.assert_array_equal(window.frames, subject.x[:1, 3:10])


@pytest.mark.parametrize("n", [1, 6, 7, 20], ids="n{}".format)
def test_missed_frames(subject, n) -> None:
    x = subject.x[:1]
    window = subject.model.window(batch=1)
    window.fill(x[:, :7])
    window.fill(x[:, 7 : 7 + n])
    np.testing.assert_array_equal(window.frames, x[:, n : n + 7])
    window.reset()
    assert len(window) == 0


def test_not_a_number_goes_with_its_frame(subject) -> None:
    """It spreads to what attends to its frame, as in a full run, and leaves nothing behind."""
    window = subject.model.window()
    window.fill(subject.x[:1, :6])
    assert np.isnan(window.push(np.full((1, 13), np.nan, np.float32))).all()
    with pytest.raises(InputError, match="finite"):
        window.push(np.full((1, 13), np.inf, np.float32), check_finite=True)
    for t in range(6, 13):
        y = window.push(subject.x[:1, t])
    np.testing.assert_array_equal(y, subject.model(subject.x[:1, 6:13].copy()))


def test_lengths_that_do_not_run_are_refused(subject) -> None:
    """This model has no symbolic entry: a window that is not full yet must be filled."""
    window = subject.model.window(batch=1)
    window.fill(subject.x[:1, :2])
    with pytest.raises(InputError, match=r"\[1, 7, 13\].*found \[1, 3, 13\]"):
        window.push(subject.x[:1, 2])
    assert len(window) == 2
    np.testing.assert_array_equal(window.frames, subject.x[:1, :2])
    with pytest.raises(InputError, match=r"found \[2, 7, 13\]"):
        subject.model.window(batch=2)
    with pytest.raises(InputError, match=r"shape \[1, 13\], found \[2, 13\]"):
        window.push(subject.x[:, 0])


class _LastFrameCount:
    """Stands for a model that runs any length, without entries for windows."""

    def __call__(self, x, out=None):
        return np.array([[x.shape[1], x[0, -1, 0]]], np.float32)

    def entry_at(self, shape):
        return Entry("main", shape, (1, 2), 1)


def test_before_it_is_full_the_run_is_on_the_frames_so_far() -> None:
    model = _LastFrameCount()
    window = Window(model, model.entry_at((1, 3, 2)), None)
    found = [window.push(np.full((1, 2), t, np.float32))[0].tolist() for t in range(5)]
    assert found == [[1, 0], [2, 1], [3, 2], [3, 3], [3, 4]]


@pytest.mark.parametrize("width", [16, 13], ids="width{}".format)
@pytest.mark.parametrize("batch", [1, 3], ids="batch{}".format)
def test_sliding_rows(batch, width) -> None:
    rows = SlidingRows(batch, 5, width)
    x = np.concatenate([np.zeros((batch, 5, width), np.float32), frames(batch, 60, width)], axis=1)
    end = 5
    for n in [1] * 14 + [3, 2, 5, 1, 4, 5, 5, 1]:
        rows.append(x[:, end : end + n])
        end += n
        np.testing.assert_array_equal(rows.array, x[:, end - 5 : end])
        np.testing.assert_array_equal(np.from_dlpack(rows.tensor), rows.array)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.update(widths=[41]), "does not take what its manifest says"),
        (lambda w: w.update(widths=[40, 4]), "does not take what its manifest says"),
        (lambda w: w["entries"]["main_b1_t7"].update(name="main_b1_t7"), "does not take what"),
        (lambda w: w["entries"]["main_b1_t7"].update(name="none"), "does not hold"),
        (lambda w: w["entries"]["main_b1_t7"]["workspace"].update(fixed=64), "does not take what"),
        (lambda w: w.update(widths=[1 << 50]), "memory that this process cannot have"),
        (lambda w: w.pop("widths"), "window.widths is missing"),
        (lambda w: w["workspace"].update(rows=1), "window.workspace.rows is no product"),
        (lambda w: w["entries"]["main_b1_t7"].pop("workspace"), "workspace is missing"),
    ],
)
def test_a_manifest_that_lies(subject, tmp_path, change, words) -> None:
    body, manifest = split(subject.model._path)
    change(manifest["window"])
    path = tmp_path / "changed.so"
    path.write_bytes(join(body, json.dumps(manifest).encode()))
    with pytest.raises(MegaError, match=words):
        window = mega_tvm.load(path).window()
        window.fill(subject.x[:1, :7])
        window.push(subject.x[:1, 7])


@pytest.mark.parametrize("field", [None, {"left_out": "of a reason"}], ids=["older", "left out"])
def test_without_entries_for_windows_pushes_are_full_runs(subject, tmp_path, field) -> None:
    body, manifest = split(subject.model._path)
    del manifest["window"]
    if field is not None:
        manifest["window"] = field
    path = tmp_path / "changed.so"
    path.write_bytes(join(body, json.dumps(manifest).encode()))
    model = mega_tvm.load(path)
    window = model.window()
    window.fill(subject.x[:1, :6])
    for t in range(6, 12):
        y = window.push(subject.x[:1, t])
        np.testing.assert_array_equal(y, model(subject.x[:1, t - 6 : t + 1].copy()))
