"""Layer norm, EMA scan and attention on GPUs: parity at odd shapes, in any order of threads."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.devices import on_every_device

NORMS = {
    "M1-N1": ((1,), 1, {}),
    "M7-N40": ((1, 7), 40, {}),
    "M59-N257-plain": ((59,), 257, {"affine": False}),
    "M6-N100-clamped": ((2, 3), 100, {"clamp_variance": True}),
}
# batch, length, channels: one chunk and many, a group of channels and more
SCANS = {"B1-T1-D1": (1, 1, 1), "B2-T59-D16": (2, 59, 16), "B1-T257-D3": (1, 257, 3),
         "B3-T7-D33": (3, 7, 33)}  # fmt: skip
# batch, queries, keys, width, width of values, options
ATTENTIONS = {
    "B1-T7-W40": (1, 7, 7, 40, None, {}),
    "B2-T59-W13": (2, 59, 59, 13, None, {"merged": True}),
    "B1-T65-W24-V72-ungated": (1, 65, 65, 24, 72, {"gate": False}),
    "B1-Q5-K70-W17-V9": (1, 5, 70, 17, 9, {}),
    "B2-Q1-K1-W13": (2, 1, 1, 13, None, {}),
    "B1-Q1-K300-W40-V70": (1, 1, 300, 40, 70, {}),
    "B1-T9-W512": (1, 9, 9, 512, None, {}),
    "B2-Q1-K59-W33-ungated": (2, 1, 59, 33, None, {"gate": False}),
}


@pytest.mark.parametrize("name", NORMS)
@on_every_device
def test_layer_norm(name: str) -> None:
    from schedules.layer_norm.naive import LayerNormSpec
    from tests.cuda.harness import check
    from tests.schedules.cases import layer_norm_case

    lead, n, options = NORMS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*lead, n), dtype=np.float32)
    if options.get("clamp_variance"):
        x[0] *= 1e-3  # below eps, where the forms differ
    check(layer_norm_case(LayerNormSpec(lead, n, 1e-5, **options), x, rng), name)


@pytest.mark.parametrize("name", SCANS)
@on_every_device
def test_ema_scan(name: str) -> None:
    from schedules.ema_scan.naive import EmaScanSpec
    from tests.cuda.harness import check
    from tests.schedules.cases import ema_case

    check(ema_case(np.random.default_rng(0), EmaScanSpec(*SCANS[name])), name)


@pytest.mark.parametrize("length", [1, 7, 59, 257, 1000])
@on_every_device
def test_ema_scan_in_segments(length: int) -> None:
    """As long sequences are scanned: by two launches, the first of which finds segments' ends."""
    from schedules.ema_scan.naive import EmaScanSpec
    from tests.cuda.harness import check
    from tests.schedules.cases import ema_case

    for channels in (3, 33):
        case = ema_case(np.random.default_rng(0), EmaScanSpec(2, length, channels))
        check(case, f"D{channels}", orders=(0, 2), segment=64, threads=128)


@pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
@pytest.mark.parametrize("name", ATTENTIONS)
@on_every_device
def test_attention(name: str, laplace: bool) -> None:
    from tests.cuda.harness import check
    from tests.schedules.cases import attention_case, attention_spec

    *sizes, options = ATTENTIONS[name]
    spec = attention_spec(laplace, *sizes, **options)
    check(attention_case(np.random.default_rng(0), spec), name)
