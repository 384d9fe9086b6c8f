"""Golden data of the real Edifice, and random parameters, for the tests of the definition."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reference import MegaConfig
from reference.torch_mega import build

REPO = Path(__file__).resolve().parents[2]
# The large case is too big to commit: it is looked up beside the checkout, and skipped if absent.
GOLDEN_DIRS = (REPO / "tests" / "golden", REPO.parent / "shared" / "golden")
GOLDEN_CASES = (
    "tiny",
    "tiny_laplace",
    "equal_dims",
    "odd",
    "seq1",
    "long",
    "default",
    "low_variance",
    "low_variance_axon081",
)


@dataclasses.dataclass(frozen=True)
class Golden:
    """One run of Edifice: float32 parameters, input, output, and inner values where kept."""

    name: str
    config: MegaConfig
    params: dict[str, np.ndarray]
    x: np.ndarray | None
    output: np.ndarray | None
    intermediates: dict[str, np.ndarray]


def _golden_file(name: str) -> Path | None:
    return next((d / name for d in GOLDEN_DIRS if (d / name).is_file()), None)


def _read_npz(path: Path | None) -> dict[str, np.ndarray]:
    if path is None:
        return {}
    with np.load(path) as file:
        return dict(file)


def _load_golden(name: str) -> Golden:
    options, arrays = _golden_file(f"{name}.json"), _golden_file(f"{name}.npz")
    if options is None or arrays is None:
        pytest.skip(f"golden case {name} is not in {' or '.join(str(d) for d in GOLDEN_DIRS)}")
    effective = json.loads(options.read_text())["effective"]
    # Edifice v0.2.0 runs on Axon 0.8.0, whose layer norm differs where the variance is tiny: that
    # is what `low_variance` pins, `low_variance_axon081` the plain form; the others cannot tell.
    form = "axon-0.8.0" if name == "low_variance" else "plain"
    params = _read_npz(arrays)
    return Golden(
        name=name,
        config=MegaConfig(**effective, layer_norm=form),
        x=params.pop("__input__", None),
        output=params.pop("__output__", None),
        params=params,
        intermediates=_read_npz(_golden_file(f"{name}_intermediates.npz")),
    )


def _random_params(
    config: MegaConfig, seed: int = 0, dtype: type = np.float64
) -> dict[str, np.ndarray]:
    """Draw every parameter, zeros included, so that each term of the model matters."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, value in build(config, seed=0).to_params().items():
        scale = 1 / np.sqrt(value.shape[0]) if value.ndim == 2 else 1.0
        params[name] = (scale * rng.standard_normal(value.shape)).astype(dtype)
    return params


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=GOLDEN_CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return _load_golden(request.param)


@pytest.fixture(scope="session")
def load_golden() -> Callable[[str], Golden]:
    return _load_golden


@pytest.fixture(scope="session")
def random_params() -> Callable[..., dict[str, np.ndarray]]:
    return _random_params
