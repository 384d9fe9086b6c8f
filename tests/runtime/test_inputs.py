"""What a call accepts, reads in place, copies and refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mega_tvm import MegaConfig
from mega_tvm.errors import InputError, MegaError

SHAPE = (1, 4, 16)
BYTES = 4 * 4 * 16
BIAS = np.arange(16, dtype="float32")


def integers(shape=SHAPE, seed=0):
    """Whole numbers, whose sums are exact in any order."""
    return np.random.default_rng(seed).integers(-9, 9, shape).astype(np.float32)


def sums(x):
    return np.resize(BIAS, x.shape[2]) + x.sum(axis=1)


@pytest.mark.parametrize("offset", range(64))
def test_every_byte_offset(model, offset):
    raw = np.zeros(BYTES + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    x = np.frombuffer(raw.data, np.float32, 4 * 16, start).reshape(SHAPE)
    assert x.ctypes.data % 64 == offset
    assert x.flags.aligned == (offset % 4 == 0)
    x[...] = integers()
    np.testing.assert_array_equal(model(x), sums(integers()))


def strided(kind):
    x = integers()
    if kind == "every second":
        big = np.full((1, 8, 32), np.nan, np.float32)
        big[:, ::2, ::2] = x
        return big[:, ::2, ::2]
    if kind == "negative strides":
        return x[:, ::-1, ::-1].copy()[:, ::-1, ::-1]
    if kind == "Fortran order":
        return np.asfortranarray(x)
    if kind == "transposed":
        return x.transpose(0, 2, 1).copy().transpose(0, 2, 1)
    if kind == "broadcast":
        return np.broadcast_to(x[:, :1], SHAPE)
    if kind == "read-only":
        x.flags.writeable = False
        return x
    if kind == "odd stride of a dimension of one":
        return np.concatenate([x, x, x])[::2][:1]
    return x.view(type("Sub", (np.ndarray,), {}))


@pytest.mark.parametrize(
    "kind",
    [
        "every second",
        "negative strides",
        "Fortran order",
        "transposed",
        "broadcast",
        "read-only",
        "odd stride of a dimension of one",
        "subclass",
    ],
)
def test_any_layout(model, kind):
    x = strided(kind)
    before = x.copy()
    np.testing.assert_array_equal(model(x), sums(before))
    np.testing.assert_array_equal(x, before)


def test_aligned_input_is_not_copied(model, monkeypatch):
    raw = np.zeros(BYTES + 64, np.uint8)
    start = -raw.ctypes.data % 64
    x = raw[start : start + BYTES].view(np.float32).reshape(SHAPE)
    monkeypatch.setattr("mega_tvm.runtime._Scratch.x", property(lambda _: pytest.fail("copied")))
    np.testing.assert_array_equal(model(x), [BIAS])


def test_each_entry(model):
    for entry in model.entries:
        x = integers(entry.input_shape)
        y = model(x)
        assert (y.shape, y.dtype) == (entry.output_shape, np.float32)
        np.testing.assert_array_equal(y, sums(x))


def test_output_has_memory_of_its_own(model):
    first = model(integers(seed=1))
    kept = first.copy()
    assert first.flags.writeable
    for seed in range(2, 20):
        model(integers(seed=seed))
    np.testing.assert_array_equal(first, kept)
    first[:] = np.nan
    np.testing.assert_array_equal(model(integers(seed=1)), kept)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values(model, value):
    x = integers()
    x[0, 2, 5] = value
    y = model(x)
    np.testing.assert_array_equal(y[0, 5], value)
    assert np.isfinite(np.delete(y[0], 5)).all()
    with pytest.raises(InputError, match=r"1 others, the first -?(nan|inf) at \[0, 2, 5\]"):
        model(x, check_finite=True)
    # Nothing of it is left in the buffers.
    np.testing.assert_array_equal(model(integers(), check_finite=True), sums(integers()))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(SHAPE),
        torch.ones(1, 16, 4).transpose(1, 2),
        torch.ones(1, 5, 16)[:, 1:],
        torch.ones(SHAPE[2])[None, None].expand(SHAPE),
    ],
    ids=["contiguous", "transposed", "offset", "expanded"],
)
def test_torch_tensors(model, tensor):
    np.testing.assert_array_equal(model(tensor), [BIAS + 4])


@pytest.mark.parametrize(
    "shape",
    [(), (16,), (4, 16), (1, 4, 16, 1), (0, 4, 16), (3, 4, 16), (1, 5, 16), (1, 4, 17), (1, 0, 16)],
    ids=str,
)
def test_other_shapes_are_refused(model, shape):
    with pytest.raises(InputError) as info:
        model(np.zeros(shape, np.float32))
    message = str(info.value)
    assert "[1, 4, 16] or [2, 4, 16] or [1, 4096, 64]" in message
    assert str(list(shape)) in message


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("float64", "x.astype(numpy.float32)"),
        ("float16", "found float16"),
        ("int64", "found int64"),
        ("bool", "found bool"),
        (">f4", "native byte order, found >f4"),
        ("complex64", "real numbers"),
        ("O", "found object"),
        ("U1", "real numbers"),
        ([("a", "<f4")], "found [('a', '<f4')]"),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(model, dtype, words):
    with pytest.raises(InputError) as info:
        model(np.zeros(SHAPE, dtype))
    assert "expected float32" in str(info.value)
    assert words in str(info.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "found NoneType"),
        ([[[0.0] * 16] * 4], "found list"),
        ("text", "found str"),
        (1.0, "found float"),
        (np.float32(1), "found float32"),
        (memoryview(b"text"), "found memoryview"),
        (np.ma.masked_invalid(np.zeros(SHAPE, np.float32)), "without a mask"),
        (torch.zeros(SHAPE, requires_grad=True), "detach"),
        (torch.zeros(SHAPE, dtype=torch.bfloat16), "float"),
        (torch.zeros(SHAPE, dtype=torch.float64), "found float64"),
        (torch.zeros(SHAPE, device="meta"), "device type meta"),
        (torch.zeros(SHAPE).to_sparse(), "layout other than"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_is_no_array_on_the_cpu_is_refused(model, value, words):
    with pytest.raises(InputError) as info:
        model(value)
    assert words.lower() in str(info.value).lower()


def test_another_device_is_refused(model):
    class OnGpu:
        def __dlpack__(self, **_):
            raise AssertionError("must not be asked")

        def __dlpack_device__(self):
            return (2, 0)

    with pytest.raises(InputError, match=r"on the CPU, found one on DLPack device type 2"):
        model(OnGpu())


def test_input_errors_are_value_errors():
    assert issubclass(InputError, ValueError)
    assert issubclass(InputError, MegaError)


def test_names_of_the_package():
    import mega_tvm

    assert MegaConfig(embed_dim=3).embed_dim == 3
    assert {"load", "compile_model", "MegaConfig"} <= set(dir(mega_tvm))
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = mega_tvm.nope
