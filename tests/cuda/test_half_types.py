"""Kernels on tensors of a half type: parity at odd shapes, in any order of threads."""

from __future__ import annotations

import numpy as np
import pytest

from schedules.common.half_types import HALF_TYPES
from schedules.dense.naive import DenseSpec
from tests.cuda.devices import on_every_device

# lead, k, n, options: up to 8 rows, and more; k a multiple of 8 (asynchronous copies) or not
DENSE = {
    "M1-K1-N1": ((1,), 1, 1, {}),
    "M3x1-K13-N26-swiglu": ((3, 1), 13, 26, {"swiglu": True}),
    "M7-K100-N13-sigmoid": ((1, 7), 100, 13, {"sigmoid_from": 4}),
    "M9-K7-N3": ((9,), 7, 3, {}),
    "M59-K40-N129-residual": ((1, 59), 40, 129, {"residual": True}),
    "M14-K13-N17-sigmoid": ((2, 7), 13, 17, {"sigmoid_from": 5}),
    "M59-K24-N112-swiglu": ((59,), 24, 112, {"swiglu": True}),
    "M32-K32-N64": ((2, 16), 32, 64, {}),  # one step, and no row or column to guard
    "M257-K168-N46-swiglu-residual": ((257,), 168, 46, {"swiglu": True, "residual": True}),
}
NORMED = {
    "M7-K40-N66-swiglu": ((1, 7), 40, 66, {"swiglu": True}),
    "M59-K40-N129-residual": ((1, 59), 40, 129, {"residual": True}),
    "M18-K13-N17-clamped": ((2, 9), 13, 17, {"sigmoid_from": 5, "clamp_variance": True}),
}
NORMS = {"M7-N40": ((1, 7), 40, {}), "M59-N257-plain": ((59,), 257, {"affine": False})}
SCANS = {"B2-T59-D16": (2, 59, 16), "B1-T257-D3": (1, 257, 3)}
SCANS_DENSE = {
    "B2-T59-D16-N40-residual": (2, 59, 16, 40, True),
    "B3-T7-D33-N65": (3, 7, 33, 65, False),
}
# batch, queries, keys, width, width of values, options
ATTENTIONS = {
    "B3-T1-W17": (3, 1, 1, 17, None, {}),
    "B1-T7-W40": (1, 7, 7, 40, None, {}),
    "B2-T59-W13": (2, 59, 59, 13, None, {"merged": True}),
    "B1-T65-W24-V72-ungated": (1, 65, 65, 24, 72, {"gate": False}),
    "B1-Q5-K70-W17-V9": (1, 5, 70, 17, 9, {}),
    "B1-Q1-K300-W40-V70": (1, 1, 300, 40, 70, {}),
    "B1-T9-W512": (1, 9, 9, 512, None, {}),
}
# queries, keys, width, width of values; block_q, columns: several tiles of keys, blocks of columns
TILES = {
    "Q150-W72-V200-16x256": (150, 150, 72, 200, 16, 256),
    "Q40-K203-W40-V72-32x64": (40, 203, 40, 72, 32, 64),
    "Q257-K257-W40-V24-32x64": (257, 257, 40, 24, 32, 64),
    "Q70-K130-W33-V130-64x128": (70, 130, 33, 130, 64, 128),
}


BOTH = pytest.mark.parametrize("dtype", HALF_TYPES)


def rng(dtype: str):
    """Return a generator whose normal numbers are of a half type."""
    import ml_dtypes  # noqa: F401 (tells NumPy of bfloat16)

    half = np.dtype(dtype)

    class Rounded:
        def __init__(self) -> None:
            self.rng = np.random.default_rng(0)

        def standard_normal(self, size, dtype=np.float32):
            return self.rng.standard_normal(size, dtype).astype(half).astype(dtype)

    return Rounded()


@BOTH
@on_every_device
def test_rounding_is_to_nearest_even(dtype: str) -> None:
    """Both ways of rounding, one by one and in pairs, as ml_dtypes and NumPy round."""
    import ml_dtypes  # noqa: F401 (tells NumPy of bfloat16)
    from tvm.script import tirx as T

    from schedules.common.kernel import ScheduledKernel
    from schedules.common.storage import stored_as
    from tests.cuda.harness import Kernel

    largest = np.finfo(np.float16).max
    ends = [largest, 65519, 65520, 3.3961776e38, 3.39e38, 6e-8, 2e-40, np.inf, np.nan, 0]
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100, np.uint32)
    # Halfway between two halves, and a little to each side of it.
    ties = (bits >> 16 << 16 | 0x8000) + np.array([[0], [1], [-1]], np.int64)
    found = np.concatenate([bits, ties.ravel().astype(np.uint32)]).view(np.float32)
    steps = 1 + np.arange(64, dtype=np.float32) * np.float32(2**-11)  # ties of float16
    x = np.concatenate([found, steps, -steps, np.array([*ends, *(-v for v in ends)], np.float32)])
    count = x.size // 2 * 2
    x = x[:count]

    @T.prim_func(s_tir=True, private=True)
    def rounds(x: T.Buffer((count,), "float32"), y: T.Buffer((2, count), "float32")):
        for i in T.thread_binding(count // 2, thread="blockIdx.x"):
            for t in T.thread_binding(2, thread="threadIdx.x"):
                y[0, i * 2 + t] = x[i * 2 + t]
                if t == 0:
                    T.call_extern(
                        "void", "mega_store_pair", y.data, count + i * 2, x[i * 2], x[i * 2 + 1]
                    )

    kernel = Kernel(ScheduledKernel(stored_as(rounds, ["float32", dtype])))
    out, reports = kernel([x], (2, count))
    assert not reports, reports
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.dtype(dtype)).astype(np.float32)
    for row in out:
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("name", DENSE)
@BOTH
@on_every_device
def test_dense(dtype: str, name: str) -> None:
    from tests.cuda.harness import check, stored_in_half
    from tests.schedules.cases import dense_case

    lead, k, n, options = DENSE[name]
    check(
        stored_in_half(
            dense_case(rng(dtype), DenseSpec(lead, k, n, **options)), wide=[2], dtype=dtype
        ),
        name,
    )


@pytest.mark.parametrize("name", NORMED)
@BOTH
@on_every_device
def test_normed_dense(dtype: str, name: str) -> None:
    from schedules.normed_dense.naive import NormedDenseSpec
    from tests.cuda.fused_cases import normed_case
    from tests.cuda.harness import check, stored_in_half

    lead, k, n, options = NORMED[name]
    case = normed_case(rng(dtype), NormedDenseSpec(lead, k, n, **options))
    check(stored_in_half(case, wide=[2], dtype=dtype), name)


@pytest.mark.parametrize("name", NORMS)
@BOTH
@on_every_device
def test_layer_norm(dtype: str, name: str) -> None:
    from schedules.layer_norm.naive import LayerNormSpec
    from tests.cuda.harness import check, stored_in_half
    from tests.schedules.cases import layer_norm_case

    lead, n, options = NORMS[name]
    x = rng(dtype).standard_normal((*lead, n))
    case = layer_norm_case(LayerNormSpec(lead, n, 1e-5, **options), x, rng(dtype))
    check(stored_in_half(case, wide=[1, 2] if len(case.inputs) > 1 else [], dtype=dtype), name)


@pytest.mark.parametrize("name", SCANS)
@BOTH
@on_every_device
def test_ema_scan(dtype: str, name: str) -> None:
    from schedules.ema_scan.naive import EmaScanSpec
    from tests.cuda.harness import check, stored_in_half
    from tests.schedules.cases import ema_case

    check(
        stored_in_half(ema_case(rng(dtype), EmaScanSpec(*SCANS[name])), wide=[1], dtype=dtype), name
    )


@pytest.mark.parametrize("name", SCANS_DENSE)
@BOTH
@on_every_device
def test_ema_scan_dense(dtype: str, name: str) -> None:
    from schedules.ema_scan_dense.naive import EmaScanDenseSpec
    from tests.cuda.fused_cases import scan_dense_case
    from tests.cuda.harness import check, stored_in_half

    case = scan_dense_case(rng(dtype), EmaScanDenseSpec(*SCANS_DENSE[name]))
    check(stored_in_half(case, wide=[1, 3], dtype=dtype), name)


@pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
@pytest.mark.parametrize("name", ATTENTIONS)
@BOTH
@on_every_device
def test_attention(dtype: str, name: str, laplace: bool) -> None:
    from tests.cuda.harness import check, stored_in_half
    from tests.schedules.cases import attention_case, attention_spec

    *sizes, options = ATTENTIONS[name]
    check(
        stored_in_half(
            attention_case(rng(dtype), attention_spec(laplace, *sizes, **options)), dtype=dtype
        ),
        name,
    )


@pytest.mark.parametrize("name", TILES)
@BOTH
@on_every_device
def test_attention_in_tiles(dtype: str, name: str) -> None:
    from tests.cuda.harness import check, stored_in_half
    from tests.schedules.cases import attention_case, attention_spec

    *sizes, block_q, columns = TILES[name]
    case = stored_in_half(attention_case(rng(dtype), attention_spec(False, 1, *sizes)), dtype=dtype)
    check(case, name, orders=(1, 2), block_q=block_q, columns=columns)


@pytest.mark.parametrize("tile", [0, 7, -1], ids=["smallest", "middle", "largest"])
@BOTH
@on_every_device
def test_dense_in_tiles(dtype: str, tile: int) -> None:
    from schedules.dense.cuda_mma import mma_tiles
    from tests.cuda.harness import check, stored_in_half
    from tests.schedules.cases import dense_case

    index = tile % len(mma_tiles())
    case = stored_in_half(
        dense_case(rng(dtype), DenseSpec((130,), 104, 70, residual=True)), wide=[2], dtype=dtype
    )
    check(case, str(mma_tiles()[index]), orders=(2,), tile=index)
