"""The check of a compiled model's streams against the float64 oracle."""

from __future__ import annotations

import numpy as np

from mega_tvm.runtime import Model
from mega_tvm.tolerances import compare
from mega_tvm.verify_inputs import ORDINARY
from mega_tvm.verify_report import ORACLE, Check
from reference import MegaConfig, numpy_mega

FRAMES, PREFILLED = 61, 37


def check_stream(model: Model, config: MegaConfig, params: numpy_mega.Params) -> Check | None:
    """Compare prefill and each step with the oracle on all frames so far.

    Two rows, the second 13 frames ahead of the first.

    Returns
    -------
    Check or None
        None for a model that cannot stream.
    """
    description = model.metadata.get("stream") or {"left_out": ""}
    if "left_out" in description:
        return None
    ahead = 13
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, FRAMES + ahead, config.embed_dim), dtype=np.float32)
    seen: dict[str, numpy_mega.Array] = {}
    numpy_mega.forward(config, params, x, intermediates=seen)
    stream = model.stream(2, max_len=FRAMES + ahead)
    stream.prefill(x[1:, :ahead], rows=[1])
    starts = (0, ahead)
    fed = np.stack([x[row, start : start + FRAMES] for row, start in enumerate(starts)])
    found = [stream.prefill(fed[:, :PREFILLED])]
    found += [stream.step(fed[:, t]) for t in range(PREFILLED, FRAMES)]
    expected = [
        seen["final_norm"][[0, 1], [t + start for start in starts]]
        for t in range(PREFILLED - 1, FRAMES)
    ]
    parity = compare(np.stack(found), np.stack(expected), model.metadata["dtype"])
    return Check(ORDINARY, "stream", ORACLE, parity)
