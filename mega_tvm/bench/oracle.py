"""What every contestant must answer, and how near it must come."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from reference import numpy_mega

from .peers.plain import Form, Plan
from .workloads import Params, Workload

# The oracle holds several [T, T] float64 matrices: 128 MiB each at this length.
LONGEST_WHOLE = 4096
# Float32 sums of a few hundred to a few thousand terms, over some tens of layers.
TOLERANCE = 2e-5


def expected_output(workload: Workload, params: Params, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the float64 output, [B, H].

    The NumPy oracle answers; past `LONGEST_WHOLE`, where it would need gigabytes, the plain model
    in float64 with blocked attention, which the tests hold to the oracle at shorter lengths.
    """
    if workload.seq_len <= LONGEST_WHOLE:
        return numpy_mega.forward(workload.config, params, x)
    import torch

    from .peers.plain_torch import PlainMega

    form = Form("cdist" if workload.config.laplace_attention else "blocked")
    module = PlainMega(Plan.of(workload, form, pruned=True), params, torch.float64)
    with torch.inference_mode():
        return module(torch.from_numpy(x.astype(np.float64))).numpy()


def relative_error(output: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return max |output - expected| over max(1, max |expected|); infinite for a wrong shape."""
    if output.shape != expected.shape or not np.all(np.isfinite(output)):
        return float("inf")
    scale = max(1.0, float(np.abs(expected).max()))
    return float(np.abs(output - expected).max()) / scale
