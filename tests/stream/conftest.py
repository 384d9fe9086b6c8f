"""One small model with its float64 outputs at every timestep."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import mega_tvm
from mega_tvm.compiler import compile_model
from mega_tvm.runtime import Model
from reference import MegaConfig, numpy_mega
from reference.torch_mega import Mega
from tests.passes.harness import random_mega

T = 300


@dataclasses.dataclass(frozen=True)
class Subject:
    """A compiled model, frames ``[2, 300, embed]``, and the output after each of them."""

    module: Mega
    model: Model
    x: np.ndarray
    expected: np.ndarray


def every_output(module: Mega, x: np.ndarray) -> np.ndarray:
    """Return the float64 output for each prefix of ``x [B, T, embed]``: ``[B, T, hidden]``."""
    seen: dict[str, np.ndarray] = {}
    numpy_mega.forward(module.config, module.to_params(), x, intermediates=seen)
    return seen["final_norm"]


@pytest.fixture(scope="session")
def subject(tmp_path_factory) -> Subject:
    module = random_mega()
    assert isinstance(module.config, MegaConfig)
    path = compile_model(
        module,
        batch=1,
        seq_len=[7, T],
        symbolic=False,
        output=tmp_path_factory.mktemp("stream") / "small.so",
    )
    width = module.config.embed_dim
    x = np.random.default_rng(0).standard_normal((2, T, width), dtype=np.float32)
    return Subject(module, mega_tvm.load(path), x, every_output(module, x))
