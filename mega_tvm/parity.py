"""Runs freshly compiled code against the float64 reference, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .compiled import Compiled
from .cuda.target import CudaTarget
from .errors import CompileError
from .model_source import ModelSource
from .targets import CpuTarget, machine_runs
from .tolerances import compare

# Query-key pairs beyond which the float64 reference takes longer than the compile: 512^2 at 4
# layers.
_PARITY_PAIRS = 4 * 512 * 512


def check_parity(
    compiled: Compiled,
    source: ModelSource,
    target: CpuTarget | CudaTarget,
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    dtype: str,
) -> dict[str, Any]:
    """Run the compiled code against the float64 reference, before anything is written.

    Raises
    ------
    CompileError
        If an entry leaves the tolerance.
    """
    if not machine_runs(target):
        return {"checked": False, "reason": f"this machine cannot run {target.name} code"}
    oracle = source.oracle()
    layers = source.config.num_layers if source.config else 1
    found: dict[str, Any] = {"checked": True, "entries": {}}
    for name, several in shapes.items():
        entry: dict[str, Any] = {"checked": True, "max_abs": 0.0, "relative_rms": 0.0}
        for shape in several:
            if layers * shape[0] * (shape[1] if len(shape) == 3 else 1) ** 2 > _PARITY_PAIRS:
                entry = {"checked": False, "reason": "long; run mega_tvm.verify"}
                break
            x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
            expected = oracle(x)
            parity = compare(compiled.run(name, x, expected.shape), expected, dtype)
            if not parity.ok:
                raise CompileError(
                    f"entry {name} differs from the float64 reference at input shape "
                    f"{list(shape)}: {parity}. This is a bug of the compiler; nothing was written"
                )
            entry["max_abs"] = max(entry["max_abs"], parity.max_abs)
            entry["relative_rms"] = max(entry["relative_rms"], parity.relative_rms)
        found["entries"][name] = entry
    return found
