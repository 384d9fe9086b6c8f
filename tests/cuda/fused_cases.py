"""Cases of the kernels that only GPUs have."""

from __future__ import annotations

import numpy as np

from reference import numpy_mega as reference
from schedules.ema_scan.naive import EmaScanSpec
from schedules.ema_scan_dense.naive import EmaScanDenseSpec, ema_scan_dense
from schedules.normed_dense.naive import NormedDenseSpec, normed_dense
from tests.schedules.cases import Case, dense_case, ema_case


def normed_case(rng: np.random.Generator, spec: NormedDenseSpec) -> Case:
    x, w, b, *residual = dense_case(rng, spec).inputs
    x = (4 * x + 1).astype(np.float16).astype(np.float32)
    if spec.clamp_variance:
        x[0] *= np.float32(2**-10)  # below eps, where the forms differ
    form = "axon-0.8.0" if spec.clamp_variance else "plain"
    normed = reference.layer_norm(x.astype(np.float64), np.ones(spec.k), np.zeros(spec.k), form)
    y = normed @ w + b
    if spec.swiglu:
        gate, up = np.split(y, 2, axis=-1)
        y = gate * reference.sigmoid(gate) * up
    elif spec.sigmoid_from >= 0:
        y[..., spec.sigmoid_from :] = reference.sigmoid(y[..., spec.sigmoid_from :])
    expected = y + residual[0] if residual else y
    return Case(normed_dense(spec), (x, w, b, *residual), expected)


def scan_dense_case(rng: np.random.Generator, spec: EmaScanDenseSpec) -> Case:
    scan = ema_case(rng, EmaScanSpec(spec.batch, spec.seq_len, spec.channels))
    w, b = (rng.standard_normal(s, dtype=np.float32) for s in ((spec.channels, spec.n), spec.n))
    expected = scan.expected @ w + b
    inputs = (*scan.inputs, w, b)
    if spec.residual:
        residual = rng.standard_normal(expected.shape, dtype=np.float32)
        inputs, expected = (*inputs, residual), expected + residual
    return Case(ema_scan_dense(spec), inputs, expected)
