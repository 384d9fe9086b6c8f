"""Targets that this machine can run, and random numbers."""

from __future__ import annotations

import numpy as np
import pytest
from tvm.target import Target

from tests.schedules.harness import LEVELS, cpu_target, require


@pytest.fixture(params=list(LEVELS))
def target(request: pytest.FixtureRequest) -> Target:
    """Each x86 target that this machine can run."""
    require(request.param)
    return cpu_target(request.param)


@pytest.fixture
def baseline() -> Target:
    """The target for what depends on no vector unit."""
    require("x86-64-v3")
    return cpu_target("x86-64-v3")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
