"""Golden cases of Edifice, and small models, for the tests of the compiler."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mega_tvm.weights import Checkpoint
from reference import MegaConfig, numpy_mega
from reference.torch_mega import Mega
from tests.passes.harness import random_mega

__all__ = ["GOLDEN", "Golden", "float64", "golden", "random_mega"]

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[2].parent / "shared" / "golden"


@dataclasses.dataclass(frozen=True)
class Golden:
    """A case that the real Edifice ran."""

    config: MegaConfig
    params: dict[str, np.ndarray]
    x: np.ndarray
    y: np.ndarray

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.config, self.params)

    def oracle(self) -> np.ndarray:
        return numpy_mega.forward(self.config, self.params, self.x)


def golden(case: str, layer_norm: str = "plain", folder: Path = GOLDEN) -> Golden:
    options = json.loads((folder / f"{case}.json").read_text())["effective"]
    with np.load(folder / f"{case}.npz") as file:
        arrays = dict(file)
    x, y = arrays.pop("__input__"), arrays.pop("__output__")
    return Golden(MegaConfig.from_dict({**options, "layer_norm": layer_norm}), arrays, x, y)


def float64(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """Run a module in float64, without touching it."""
    with torch.no_grad():
        return copy.deepcopy(module).double().eval()(torch.from_numpy(x).double()).numpy()


def mega(**options: object) -> Mega:
    """Return a very small Mega, which compiles in a second or two."""
    return random_mega(**{"hidden_size": 16, "num_layers": 1, "seq_len": 5, **options})


def resident_bytes() -> int:
    """Return this process' memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
