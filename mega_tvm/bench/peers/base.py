"""What the benchmark asks of a contestant."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt

from ..workloads import Workload
from .plain import Form

Model = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


class Peer(Protocol):
    """A library that runs the model. Its packages are imported by `prepare`, not before."""

    @property
    def name(self) -> str:
        """Its name on the command line."""

    @property
    def packages(self) -> Sequence[str]:
        """The distributions whose versions the report names."""

    def available(self) -> str | None:
        """Return why the peer cannot run here, or None if it can."""

    def forms(self, workload: Workload, pruned: bool) -> list[Form]:
        """Return the forms of the model worth trying; the fastest is measured."""

    def prepare(
        self,
        workload: Workload,
        params: Mapping[str, npt.NDArray[Any]],
        threads: int,
        pruned: bool,
        form: Form,
    ) -> Model:
        """Return the model, ready: a callable of ``x`` [B, T, embed_dim], float32.

        ``pruned`` asks for the graph that a skilled user would prune by hand: in the last block
        only keys and values are computed for all rows.
        """


def missing(*modules: str) -> str | None:
    """Return a reason if one of the modules is not installed."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (extra: bench)" if absent else None


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed versions of the distributions that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
