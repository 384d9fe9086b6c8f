"""Kernels whose batch and length only a call brings: one compilation, many shapes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mega_tvm.tolerances import assert_parity
from schedules.dense.naive import DenseSpec, dense
from schedules.ema_scan.naive import EmaScanSpec, ema_scan
from schedules.gated_attention.naive import gated_attention
from schedules.laplace_attention.naive import laplace_attention
from schedules.layer_norm.naive import LayerNormSpec, layer_norm
from tests.schedules.cases import (
    attention_case,
    attention_spec,
    dense_case,
    ema_case,
    layer_norm_case,
)
from tests.schedules.harness import Kernel, scheduled

# Rows 1 to 14: each height of a tile, alone and beside the next one; then several row blocks.
ROWS = [(1, n) for n in range(1, 15)] + [(2, 1), (5, 1), (3, 7), (1, 59), (1, 131), (3, 257)]
LENGTHS = [(1, 1), (1, 2), (3, 7), (1, 13), (1, 59), (2, 64), (1, 97), (1, 257)]
DENSE = [
    DenseSpec(("batch", "seq_len"), 40, 129, residual=True),
    DenseSpec(("batch", "seq_len"), 17, 300, sigmoid_from=129),
    DenseSpec(("batch", "seq_len"), 40, 230, swiglu=True),
    DenseSpec(("batch", "seq_len"), 100, 3),
]


@pytest.mark.parametrize("spec", DENSE, ids=lambda spec: spec.name)
def test_dense(rng, target, spec) -> None:
    kernel = Kernel(scheduled(dense(spec), target), target)
    for lead in ROWS:
        case = dense_case(rng, dataclasses.replace(spec, lead=lead))
        assert_parity(kernel(case.inputs, case.expected.shape), case.expected, name=str(lead))


def test_dense_to_the_bit(rng, target) -> None:
    """As a kernel for one shape: the same panels, and sums in the same order."""
    spec = DenseSpec(("batch", "seq_len"), 40, 300)
    kernel = Kernel(scheduled(dense(spec), target), target)
    for lead in [(1, 1), (1, 2), (1, 5), (1, 59)]:
        case = dense_case(rng, dataclasses.replace(spec, lead=lead))
        one = Kernel(scheduled(case.func, target), target)
        shape = case.expected.shape
        np.testing.assert_array_equal(kernel(case.inputs, shape), one(case.inputs, shape))


def test_layer_norm(rng, target) -> None:
    """To the bit as a kernel for one shape."""
    spec = LayerNormSpec(("batch", "seq_len"), 45, 1e-5)
    kernel = Kernel(scheduled(layer_norm(spec), target), target)
    for lead in [(1, 1), (3, 7), (2, 800)]:  # the last is worth a second thread
        x = rng.standard_normal((*lead, 45), dtype=np.float32)
        case = layer_norm_case(dataclasses.replace(spec, lead=lead), x, rng)
        y = kernel(case.inputs, x.shape)
        assert_parity(y, case.expected, name=str(lead))
        one = Kernel(scheduled(case.func, target), target)
        np.testing.assert_array_equal(y, one(case.inputs, x.shape), err_msg=str(lead))


def test_ema_scan(rng, target) -> None:
    kernel = Kernel(scheduled(ema_scan(EmaScanSpec("batch", "seq_len", 21)), target), target)
    for batch, seq_len in [(1, 1), (3, 7), (3, 1100)]:
        case = ema_case(rng, EmaScanSpec(batch, seq_len, 21))
        assert_parity(kernel(case.inputs, case.expected.shape), case.expected)


@pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
@pytest.mark.parametrize("queries", ["all", "last"])
def test_attention(rng, target, laplace, queries) -> None:
    naive = laplace_attention if laplace else gated_attention
    q_len = "seq_len" if queries == "all" else 1
    spec = attention_spec(laplace, "batch", q_len, "seq_len", 37, 43)
    kernel = Kernel(scheduled(naive(spec), target), target)
    for batch, seq_len in LENGTHS:
        rows = seq_len if queries == "all" else 1
        case = attention_case(rng, attention_spec(laplace, batch, rows, seq_len, 37, 43))
        y = kernel(case.inputs, case.expected.shape)
        name = f"B{batch}-T{seq_len}"
        assert_parity(y, case.expected, condition=case.condition, name=name)


def test_single_rows_share_the_packed_weights(rng, target) -> None:
    spec = DenseSpec(("batch", "seq_len"), 40, 300)
    w = rng.standard_normal((40, 300), dtype=np.float32)
    packed = [
        scheduled(dense(dataclasses.replace(spec, lead=lead)), target).pack[1](w)
        for lead in [("batch", "seq_len"), (1,), (2,), (7,), (120,)]
    ]
    for other in packed[1:]:
        np.testing.assert_array_equal(packed[0], other)


@pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
@pytest.mark.parametrize("rows", [2, 7, 59])
def test_attention_of_a_piece(rng, target, laplace, rows) -> None:
    """Queries of a known number, the last among keys that a call brings."""
    naive = laplace_attention if laplace else gated_attention
    kernel = Kernel(
        scheduled(naive(attention_spec(laplace, 1, rows, "keys", 37, 43)), target), target
    )
    for keys in (rows, rows + 1, 2 * rows, 257, 321):
        case = attention_case(rng, attention_spec(laplace, 1, rows, keys, 37, 43))
        assert_parity(kernel(case.inputs, case.expected.shape), case.expected, name=str(keys))
