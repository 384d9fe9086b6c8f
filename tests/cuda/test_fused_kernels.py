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
    from schedules.normed_dense.naive import NormedDenseSpec
    from tests.cuda.fused_cases import normed_case
    from tests.cuda.harness import check

    lead, k, n, options = NORMED[name]
    check(normed_case(np.random.default_rng(0), NormedDenseSpec(lead, k, n, **options)), name)


@pytest.mark.parametrize("name", SCANS)
@on_every_device
def test_ema_scan_dense(name: str) -> None:
    from schedules.ema_scan_dense.naive import EmaScanDenseSpec
    from tests.cuda.fused_cases import scan_dense_case
    from tests.cuda.harness import check

    check(scan_dense_case(np.random.default_rng(0), EmaScanDenseSpec(*SCANS[name])), name)


@pytest.mark.parametrize("length", [1, 7, 59, 257, 1000])
@on_every_device
def test_ema_scan_dense_in_segments(length: int) -> None:
    """As long sequences are scanned, by two launches."""
    from schedules.ema_scan_dense.naive import EmaScanDenseSpec
    from tests.cuda.fused_cases import scan_dense_case
    from tests.cuda.harness import check

    for channels, rows in ((16, 8), (3, 32)):
        spec = EmaScanDenseSpec(2, length, channels, 36, residual=True)
        case = scan_dense_case(np.random.default_rng(0), spec)
        check(case, f"D{channels}", orders=(0, 2), rows=rows, segmented=1)


@on_every_device
def test_long_sequences_are_scanned_in_segments() -> None:
    from mega_tvm.cuda.lowering import launch_threads
    from schedules.ema_scan_dense.naive import EmaScanDenseSpec
    from tests.cuda.fused_cases import scan_dense_case
    from tests.cuda.harness import Kernel, scheduled

    for length, launches in ((60, 1), (4096, 2)):
        case = scan_dense_case(np.random.default_rng(0), EmaScanDenseSpec(1, length, 16, 8))
        kernel = Kernel(scheduled(case.func))
        assert len(launch_threads(kernel.compiled)) == launches
