"""What is measured: model, batch and length of each workload, and its random weights."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from mega_tvm.weights import expected_shapes
from reference import MegaConfig

Params = dict[str, npt.NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the benchmark.

    Parameters
    ----------
    name : str
    config : MegaConfig
    batch, seq_len : int
        Shape of the input, ``[batch, seq_len, config.embed_dim]``.
    """

    name: str
    config: MegaConfig
    batch: int
    seq_len: int

    def reshaped(self, batch: int | None, seq_len: int | None) -> Workload:
        """Return this workload at another batch or length, named for it."""
        changed = dataclasses.replace(
            self, batch=batch or self.batch, seq_len=seq_len or self.seq_len
        )
        if changed == self:
            return self
        return dataclasses.replace(changed, name=f"{self.name}-B{changed.batch}-T{changed.seq_len}")

    def to_dict(self) -> dict[str, Any]:
        """Return the workload as plain data, for the JSON report."""
        return dataclasses.asdict(self)


def _default(laplace: bool = False) -> MegaConfig:
    return MegaConfig(287, laplace_attention=laplace)  # the usage that Edifice documents


WORKLOADS = (
    Workload("default", _default(), 1, 60),
    Workload("default-laplace", _default(laplace=True), 1, 60),
    Workload("b32", _default(), 32, 60),
    Workload("t1024", _default(), 1, 1024),
    Workload("t1024-laplace", _default(laplace=True), 1, 1024),
    Workload("t4096", _default(), 1, 4096),
    Workload("edifice", MegaConfig(256, num_layers=2), 1, 32),
    Workload("small", MegaConfig(32, hidden_size=64, ema_dim=8, num_layers=2), 1, 16),
)
SCALING = tuple(Workload(f"scale-{T}", _default(), 1, T) for T in (64, 256, 1024, 4096, 16384))
GROUPS = {"all": WORKLOADS, "scaling": SCALING}


def select_workloads(names: str) -> list[Workload]:
    """Return the workloads of a comma-separated list of names and groups, in that order.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    known = {w.name: (w,) for w in WORKLOADS + SCALING} | GROUPS
    chosen: dict[str, Workload] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known:
            raise ValueError(f"unknown workload {name!r}; known: {', '.join(known)}")
        chosen.update({w.name: w for w in known[name]})
    if not chosen:
        raise ValueError(f"no workload named; known: {', '.join(known)}")
    return list(chosen.values())


def random_params(config: MegaConfig, seed: int = 0) -> Params:
    """Draw every parameter, so that each term of the model matters.

    Each has a generator of its own, seeded by its name: a config with more layers shares the
    parameters of one with fewer.
    """
    params = {}
    for name, shape in expected_shapes(config).items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(shape)
        if len(shape) == 2:
            values /= np.sqrt(shape[0])
        params[name] = values.astype(np.float32)
    return params


def random_input(workload: Workload, seed: int = 0) -> npt.NDArray[np.float32]:
    """Draw an input, ``[batch, seq_len, embed_dim]``, float32."""
    shape = (workload.batch, workload.seq_len, workload.config.embed_dim)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
