"""A peer in its fastest form, where each is measured in one form alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy.typing as npt

from .measure import quick_minimum
from .oracle import TOLERANCE, expected_output, relative_error
from .peers import PEERS, Form, Model
from .workloads import Params, Workload


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A peer in its fastest form."""

    name: str
    form: Form
    pruned: bool
    model: Model


def fastest(
    name: str, workload: Workload, params: Params, threads: int, x: npt.NDArray[Any]
) -> Contestant:
    """Return a peer in the fastest of its forms whose output is right."""
    peer = PEERS[name]
    if reason := peer.available():
        raise SystemExit(f"{name}: {reason}")
    expected = expected_output(workload, params, x)
    best: tuple[float, Contestant] | None = None
    for pruned in (False, True):
        for form in peer.forms(workload, pruned):
            model = peer.prepare(workload, params, threads, pruned, form)
            if relative_error(model(x), expected) > TOLERANCE:
                continue
            seconds = quick_minimum(model, x)
            if best is None or seconds < best[0]:
                best = seconds, Contestant(name, form, pruned, model)
    if best is None:
        raise SystemExit(f"{name}: no form of it answers right")
    return best[1]
