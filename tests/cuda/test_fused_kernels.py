"""The kernels that only GPUs have: layer norm into dense, EMA scan into dense."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.devices import on_every_device

# lead, k, n, options
NORMED = {
    "M7-K40-N33-swiglu-odd": ((1, 7), 40, 66, {"swiglu": True}),
    "M59-K40-N129-residual": ((1, 59), 40, 129, {"residual": True}),
    "M18-K13-N17-sigmoid": ((2, 9), 13, 17, {"sigmoid_from": 5, "clamp_variance": True}),
}
# batch, length, channels, n, residual
SCANS = {
    "B1-T1-D1-N1": (1, 1, 1, 1, False),
    "B2-T59-D16-N40-residual": (2, 59, 16, 40, True),
    "B1-T257-D3-N67-residual": (1, 257, 3, 67, True),
    "B3-T7-D33-N64": (3, 7, 33, 64, False),
}


@pytest.mark.parametrize("name", NORMED)
@on_every_device
def test_normed_dense(name: str) -> None:
    from reference import numpy_mega as reference
    from schedules.normed_dense.naive import NormedDenseSpec, normed_dense
    from tests.cuda.harness import check
    from tests.schedules.cases import Case, dense_case

    lead, k, n, options = NORMED[name]
    spec = NormedDenseSpec(lead, k, n, **options)
    rng = np.random.default_rng(0)
    plain = dense_case(rng, spec)
    x, w, b, *residual = plain.inputs
    x = (3 * x + 1).astype(np.float32)
    if spec.clamp_variance:
        x[0] *= np.float32(1e-3)  # below eps, where the forms differ
    form = "axon-0.8.0" if spec.clamp_variance else "plain"
    normed = reference.layer_norm(x.astype(np.float64), np.ones(k), np.zeros(k), form)
    y = normed @ w + b
    if spec.swiglu:
        gate, up = np.split(y, 2, axis=-1)
        y = gate * reference.sigmoid(gate) * up
    elif spec.sigmoid_from >= 0:
        y[..., spec.sigmoid_from :] = reference.sigmoid(y[..., spec.sigmoid_from :])
    expected = y + residual[0] if residual else y
    check(Case(normed_dense(spec), (x, w, b, *residual), expected), name)


@pytest.mark.parametrize("name", SCANS)
@on_every_device
def test_ema_scan_dense(name: str) -> None:
    from schedules.ema_scan.naive import EmaScanSpec
    from schedules.ema_scan_dense.naive import EmaScanDenseSpec, ema_scan_dense
    from tests.cuda.harness import check
    from tests.schedules.cases import Case, ema_case

    spec = EmaScanDenseSpec(*SCANS[name])
    rng = np.random.default_rng(0)
    scan = ema_case(rng, EmaScanSpec(spec.batch, spec.seq_len, spec.channels))
    w, b = (rng.standard_normal(s, dtype=np.float32) for s in ((spec.channels, spec.n), spec.n))
    expected = scan.expected @ w + b
    inputs = (*scan.inputs, w, b)
    if spec.residual:
        residual = rng.standard_normal(expected.shape, dtype=np.float32)
        inputs, expected = (*inputs, residual), expected + residual
    check(Case(ema_scan_dense(spec), inputs, expected), name)
