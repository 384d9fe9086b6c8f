"""Initialisation: Axon's distributions, seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from reference import MegaConfig
from reference.torch_mega import build, build_mega_block

CONFIG = MegaConfig(32, hidden_size=64, ema_dim=8, num_layers=2)
INITS = pytest.mark.parametrize("init", ["torch", "axon"])


def _assert_uniform(values: np.ndarray, bound: float) -> None:
    """All within the bound, and filling it: the extremes and the spread of a uniform draw."""
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > 0.9 * bound
    assert abs(values.std() / (bound / math.sqrt(3)) - 1) < 0.1


def _assert_axon_init(params: dict[str, np.ndarray]) -> None:
    gammas = np.concatenate([v for name, v in params.items() if name.endswith("/gamma")])
    _assert_uniform(gammas, math.sqrt(3))
    _assert_common_init(params)


def _assert_common_init(params: dict[str, np.ndarray]) -> None:
    for name, value in params.items():
        if value.ndim == 2:
            _assert_uniform(value, math.sqrt(6 / sum(value.shape)))
        elif not name.endswith("/gamma"):
            assert not value.any(), name


def test_axons_own_init(load_golden) -> None:
    golden = load_golden("tiny_pristine_init")
    assert golden.config == MegaConfig(32, hidden_size=64, ema_dim=8, num_layers=2, seq_len=16)
    _assert_axon_init(golden.params)


def test_axon_init() -> None:
    _assert_axon_init(build(CONFIG, init="axon", seed=0).to_params())


def test_torch_init_is_the_default_with_unit_gammas() -> None:
    params = build(CONFIG, seed=0).to_params()
    _assert_common_init(params)
    assert all((v == 1).all() for name, v in params.items() if name.endswith("/gamma"))


@INITS
def test_a_seed_reproduces_and_leaves_the_global_generator_alone(init: str) -> None:
    state = torch.get_rng_state()
    first, same, other = (build(CONFIG, init=init, seed=seed).to_params() for seed in (1, 1, 2))
    build_mega_block(CONFIG, 1, init=init, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(first[name], same[name]) for name in first)
    kernels = [name for name in first if first[name].ndim == 2]
    assert not any(np.array_equal(first[name], other[name]) for name in kernels)


@INITS
def test_without_a_seed_the_global_generator_governs(init: str) -> None:
    params = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        params.append(build(CONFIG, init=init).to_params()["input_projection/kernel"])
    assert np.array_equal(params[0], params[1]) and not np.array_equal(params[0], params[2])


def test_a_model_can_be_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build(CONFIG, seed=0)
    assert all(p.is_meta for p in model.parameters())


def test_an_unknown_init_is_refused() -> None:
    with pytest.raises(ValueError, match="init must be 'torch' or 'axon'; got 'xavier'"):
        build(CONFIG, init="xavier")
