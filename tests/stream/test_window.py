"""Windows: a full run on the last frames, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from mega_tvm.errors import InputError


def test_each_push_is_a_full_run(subject) -> None:
    x = subject.x[:1]
    window = subject.model.window(batch=1)
    window.fill(x[:, :6])
    for t in range(6, 40):
        y = window.push(x[:, t])
        np.testing.assert_array_equal(window.frames, x[:, t - 6 : t + 1])
        np.testing.assert_array_equal(y, subject.model(x[:, t - 6 : t + 1].copy()))
    assert len(window) == 7


@pytest.mark.parametrize("n", [1, 6, 7, 20], ids="n{}".format)
def test_missed_frames(subject, n) -> None:
    x = subject.x[:1]
    window = subject.model.window(batch=1)
    window.fill(x[:, :7])
    window.fill(x[:, 7 : 7 + n])
    np.testing.assert_array_equal(window.frames, x[:, n : n + 7])
    window.reset()
    assert len(window) == 0


def test_lengths_that_do_not_run_are_refused(subject) -> None:
    """This model has no symbolic entry: a window that is not full yet must be filled."""
    window = subject.model.window(batch=1)
    window.fill(subject.x[:1, :2])
    with pytest.raises(InputError, match=r"\[1, 7, 13\].*found \[1, 3, 13\]"):
        window.push(subject.x[:1, 2])
    assert len(window) == 2
    with pytest.raises(InputError, match=r"found \[2, 7, 13\]"):
        subject.model.window(batch=2)
    with pytest.raises(InputError, match=r"shape \[1, 13\], found \[2, 13\]"):
        window.push(subject.x[:, 0])


class _LastFrameCount:
    """Stands for a model that runs any length."""

    def __call__(self, x):
        return np.array([[x.shape[1], x[0, -1, 0]]], np.float32)


def test_before_it_is_full_the_run_is_on_the_frames_so_far() -> None:
    from mega_tvm.window import Window

    window = Window(_LastFrameCount(), np.zeros((1, 3, 2), np.float32))
    found = [window.push(np.full((1, 2), t, np.float32))[0].tolist() for t in range(5)]
    assert found == [[1, 0], [2, 1], [3, 2], [3, 3], [3, 4]]
