"""What a call accepts, reads in place, copies and refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mega_tvm import MegaConfig
from mega_tvm.entries import Frame
from mega_tvm.errors import InputError, MegaError
from tests.runtime.builders import BIAS, LONG, PAIR
from tests.runtime.builders import SHORT as SHAPE


def integers(shape=SHAPE, seed=0):
    """Whole numbers, whose sums are exact in any order."""
    return np.random.default_rng(seed).integers(-9, 9, shape).astype(np.float32)


def sums(x):
    return np.resize(BIAS, x.shape[2]) + x.sum(axis=1)


def at_offset(shape, offset):
    """Return an array of zeros that starts so many bytes behind a multiple of 64."""
    size = math.prod(shape) * 4
    raw = np.zeros(size + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    array = np.frombuffer(raw.data, np.float32, size // 4, start).reshape(shape)
    assert array.ctypes.data % 64 == offset
    assert array.flags.aligned == (offset % 4 == 0)
    return array


# Small inputs are always copied; large ones where kernels cannot read them.
@pytest.mark.parametrize("offset", range(64))
@pytest.mark.parametrize("shape", [SHAPE, LONG], ids=["small", "large"])
def test_every_byte_offset(model, shape, offset):
    x = at_offset(shape, offset)
    x[...] = integers(shape)
    np.testing.assert_array_equal(model(x), sums(integers(shape)))


def strided(kind, shape):
    x = integers(shape)
    batch, length, width = shape
    if kind == "every second":
        big = np.full((batch, 2 * length, 2 * width), np.nan, np.float32)
        big[:, ::2, ::2] = x
        return big[:, ::2, ::2]
    if kind == "negative strides":
        return x[:, ::-1, ::-1].copy()[:, ::-1, ::-1]
    if kind == "Fortran order":
        return np.asfortranarray(x)
    if kind == "transposed":
        return x.transpose(0, 2, 1).copy().transpose(0, 2, 1)
    if kind == "broadcast":
        return np.broadcast_to(x[:, :1], shape)
    if kind == "read-only":
        aligned = at_offset(shape, 0)
        aligned[...] = x
        aligned.flags.writeable = False
        return aligned
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
@pytest.mark.parametrize("shape", [SHAPE, LONG], ids=["small", "large"])
def test_any_layout(model, shape, kind):
    x = strided(kind, shape)
    before = x.copy()
    np.testing.assert_array_equal(model(x), sums(before))
    np.testing.assert_array_equal(x, before)


def test_large_aligned_input_is_not_copied(model, monkeypatch):
    monkeypatch.setattr(Frame, "_add_input", lambda _: pytest.fail("copied"))
    np.testing.assert_array_equal(model(at_offset(LONG, 0)), [np.resize(BIAS, LONG[2])])


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


@pytest.mark.parametrize("offset", [0, 4, 7], ids=lambda offset: f"offset {offset}")
def test_out(model, offset):
    out = at_offset((1, 16), offset)
    assert model(integers(), out=out) is out
    np.testing.assert_array_equal(out, sums(integers()))
    kept = out.copy()
    model(integers(seed=1))
    np.testing.assert_array_equal(out, kept)


def test_out_of_any_strides(model):
    big = np.full((4, 32), np.nan, np.float32)
    x = integers(PAIR)
    model(x, out=big[::-2, ::2])
    np.testing.assert_array_equal(big[::-2, ::2], sums(x))
    assert np.isnan(big[0::2]).all() and np.isnan(big[:, 1::2]).all()


def test_out_may_overlap_the_input(model):
    x = integers()
    expected = sums(x)
    model(x, out=x[:, 1])
    np.testing.assert_array_equal(x[:, 1], expected)


def test_torch_tensors_out(model):
    x = torch.from_numpy(integers())
    y = torch.from_dlpack(model(x))
    np.testing.assert_array_equal(y.numpy(), sums(x.numpy()))
    result = model(x)
    assert torch.from_dlpack(result).data_ptr() == result.ctypes.data
    out = torch.zeros(1, 16)
    model(x, out=out.numpy())
    torch.testing.assert_close(out, y, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (np.zeros((1, 17), np.float32), r"out of shape \[1, 16\], found \[1, 17\]"),
        (np.zeros(16, np.float32), r"out of shape \[1, 16\], found \[16\]"),
        (np.zeros((1, 16)), "out: expected float32, found float64"),
        (np.zeros((1, 16), ">f4"), "native byte order"),
        (np.broadcast_to(np.zeros(16, np.float32), (1, 16)), "expected a writable out"),
        ([0.0] * 16, "found list"),
    ],
    ids=["width", "dimensions", "float64", "byte order", "read-only", "list"],
)
def test_other_outs_are_refused(model, out, words):
    with pytest.raises(InputError, match=words):
        model(integers(), out=out)


def test_out_is_left_alone_when_the_call_is_refused(model):
    out = np.full((1, 16), 7, np.float32)
    bad = integers()
    bad[0, 1, 2] = np.inf
    with pytest.raises(InputError):
        model(bad, out=out, check_finite=True)
    assert (out == 7).all()


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
    [
        (),
        (16,),
        (4, 16),
        (1, 4, 16, 1),
        (0, 4, 16),
        (3, 4, 16),
        (1, 5, 16),
        (1, 4, 17),
        (1, 0, 16),
        (2**40, 4, 16),
        (1, 2**40, 16),
    ],
    ids=str,
)
def test_other_shapes_are_refused(model, shape):
    with pytest.raises(InputError) as info:
        model(np.broadcast_to(np.float32(0), shape))  # of any size in 4 bytes
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
