"""Small workloads for the tests of the benchmark."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mega_tvm.bench.workloads import Workload
from reference import MegaConfig


@pytest.fixture
def tiny() -> Callable[..., Workload]:
    """Return a maker of workloads of a tiny model with sizes that no tile divides."""

    def make(seq_len: int = 7, laplace: bool = False, batch: int = 2) -> Workload:
        config = MegaConfig(13, hidden_size=40, ema_dim=3, num_layers=2, laplace_attention=laplace)
        return Workload("tiny", config, batch, seq_len)

    return make
