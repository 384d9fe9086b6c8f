"""Compiled models for the tests of this folder. Import only in a device's process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np

import mega_tvm
from mega_tvm.compiler import compile_model
from mega_tvm.cuda import toolchain
from mega_tvm.tolerances import assert_parity
from tests.compiler.models import GOLDEN, SHARED, Golden, golden
from tests.cuda import device

if not device.is_real():  # as nvcc would, for the emulator
    toolchain.compile_fatbin = lambda source, _target: device.compile_kernels(source)

FORMS = {"low_variance": "axon-0.8.0"}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="mega-tvm-cuda-")


@functools.cache
def compiled(
    case: str, dtype: str = "float32", target: str = "cuda"
) -> tuple[Path, Golden, list[str]]:
    """Compile a golden case; return the library, the case, and what kernels did wrong meanwhile."""
    folder = SHARED if case == "default" else GOLDEN
    found = golden(case, FORMS.get(case, "plain"), folder)
    batch, seq_len, _ = found.x.shape
    output = Path(_folder().name) / f"{case}_{dtype}.so"
    with device.watched() as reports:  # the compiler runs what it compiled
        compile_model(
            found.checkpoint,
            target=target,
            batch=batch,
            seq_len=seq_len,
            dtype=dtype,
            output=output,
        )
    return output, found, reports


def random_input(path_shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(path_shape, dtype=np.float32)


def assert_agrees(case: str, dtype: str = "float32") -> None:
    """Run a golden case in every order: right, in float32, and nothing to report."""
    path, golden, reports = compiled(case, dtype)
    assert not reports, "\n".join(reports)
    model = mega_tvm.load(path)
    for order in (1, 2):
        device.set_order(order)
        with device.watched() as reports:
            y = model(golden.x)
        assert not reports, "\n".join(reports)
        assert y.dtype == np.float32
        assert_parity(y, golden.y, dtype, name=f"against Edifice, order {order}")
        assert_parity(y, golden.oracle(), dtype, name=f"against float64, order {order}")
