"""Calls of a model on a GPU: where results go, windows, and what is refused."""

from __future__ import annotations

from tests.cuda.devices import on_every_device


@on_every_device
def test_out_takes_the_result() -> None:
    import numpy as np

    import mega_tvm
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    expected = model(golden.x)
    room = np.full((expected.shape[0], 2 * expected.shape[1]), np.nan, np.float32)
    out = room[:, ::2]
    assert model(golden.x, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert np.isnan(room[:, 1::2]).all()


@on_every_device
def test_a_refused_call_leaves_out_alone() -> None:
    import numpy as np
    import pytest

    import mega_tvm
    from mega_tvm.errors import InputError
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    out = np.full(model(golden.x).shape, 3, np.float32)
    spoiled = golden.x.copy()
    spoiled[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="expected finite values"):
        model(spoiled, out=out, check_finite=True)
    with pytest.raises(InputError, match="shape"):
        model(golden.x, out=out[:, 1:])
    assert (out == 3).all()
    assert np.isnan(model(spoiled)).any()


@on_every_device
def test_out_and_checks_are_refused_for_a_tensor_on_the_device() -> None:
    import numpy as np
    import pytest
    import tvm

    import mega_tvm
    from mega_tvm.errors import InputError
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    x = tvm.runtime.tensor(golden.x, tvm.cuda(0))
    for options in ({"out": np.empty(golden.y.shape, np.float32)}, {"check_finite": True}):
        with pytest.raises(InputError, match="are for an x on the CPU"):
            model(x, **options)


@on_every_device
def test_a_window_is_a_full_run() -> None:
    import numpy as np

    import mega_tvm
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    frames = np.concatenate([golden.x, golden.x[:, ::-1]], axis=1)
    seq_len = golden.x.shape[1]
    window = model.window(batch=golden.x.shape[0])
    window.fill(frames[:, : seq_len - 1])
    for end in (seq_len, seq_len + 1):
        np.testing.assert_array_equal(
            window.push(frames[:, end - 1]), model(frames[:, end - seq_len : end])
        )


@on_every_device
def test_streams_are_refused() -> None:
    import pytest

    import mega_tvm
    from mega_tvm.errors import StreamUnsupportedError
    from tests.cuda.models import compiled

    model = mega_tvm.load(compiled("odd")[0])
    with pytest.raises(StreamUnsupportedError, match="streams run on CPUs; compile the model for"):
        model.stream()


@on_every_device
def test_calls_from_several_threads_take_turns() -> None:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    import mega_tvm
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    inputs = [golden.x * scale for scale in (1, -1, 0.5, 2)]
    expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(model, inputs * 2))
    for y, wanted in zip(found, expected * 2, strict=True):
        np.testing.assert_array_equal(y, wanted)
