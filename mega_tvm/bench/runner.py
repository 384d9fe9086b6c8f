"""The benchmark itself: every contestant on every workload, in one process."""

from __future__ import annotations

import dataclasses
import gc
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from .ceilings import Ceilings
from .flops import executed_flops, plain_flops
from .measure import CacheEvictor, Timing, interleaved, quick_minimum
from .memory import peak_memory
from .oracle import TOLERANCE, expected_output, relative_error
from .peers import OURS, PEERS, Form, Model, Peer
from .peers.mega import LIBRARIES
from .workloads import Params, Workload, random_input, random_params


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run measures; see ``python -m mega_tvm.bench --help``."""

    workloads: Sequence[Workload]
    peers: Sequence[str]
    threads: int = 1
    rounds: int = 15
    turn_s: float = 0.1
    limit_s: float = 120.0
    cold: bool = False
    memory: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant on one workload; ``skipped`` says why it has no times, if so."""

    workload: str
    peer: str
    pruned: bool
    form: str = ""
    skipped: str = ""
    error: float | None = None
    warm: Timing | None = None
    cold: Timing | None = None
    gflop: float | None = None
    gflops: float | None = None
    fma_share: float | None = None
    weight_gb_per_s: float | None = None
    copy_share: float | None = None
    memory: dict[str, int] | None = None
    reproduce: str = ""

    @property
    def name(self) -> str:
        """The contestant's name in tables: ``"openvino, pruned"``."""
        return f"{self.peer}, pruned" if self.pruned else self.peer


@dataclasses.dataclass
class _Entrant:
    peer: Peer
    pruned: bool
    form: Form
    model: Model
    error: float


def run(
    settings: Settings,
    ceilings: Ceilings,
    reproduce: Callable[[Workload, str], str],
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Run the benchmark.

    Parameters
    ----------
    settings : Settings
    ceilings : Ceilings
        Measured before, in this process.
    reproduce : callable
        Returns the command that measures a peer on a workload again.
    say : callable
        Takes lines of progress.

    Returns
    -------
    list of Row
        In the order of workloads and peers, a peer's pruned variant after it.
    """
    evict = CacheEvictor() if settings.cold else None
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="mega-tvm-bench-") as folder:
        os.environ[LIBRARIES] = folder
        for workload in settings.workloads:
            rows += _run_workload(settings, workload, ceilings, reproduce, say, evict)
            gc.collect()
        del os.environ[LIBRARIES]
    return rows


def _run_workload(
    settings: Settings,
    workload: Workload,
    ceilings: Ceilings,
    reproduce: Callable[[Workload, str], str],
    say: Callable[[str], None],
    evict: CacheEvictor | None,
) -> list[Row]:
    params, x = random_params(workload.config), random_input(workload)
    say(f"{workload.name}: oracle")
    expected = expected_output(workload, params, x)
    rows: dict[str, Row] = {}
    entrants: dict[str, _Entrant] = {}
    for name in settings.peers:
        peer = PEERS[name]
        for pruned in (False, True):
            row = Row(workload.name, name, pruned, reproduce=reproduce(workload, name))
            unavailable = peer.available()
            forms = [] if unavailable else peer.forms(workload, pruned)
            if not unavailable and not forms:
                continue
            say(f"{workload.name}: preparing {row.name} ({len(forms)} forms)")
            found: _Entrant | str = unavailable or ""
            if forms:
                found = _fastest_form(settings, peer, workload, params, pruned, forms, x, expected)
            if isinstance(found, str):
                say(f"{workload.name}: {row.name} skipped: {found}")
                rows[row.name] = dataclasses.replace(row, skipped=found)
            else:
                entrants[row.name] = found
                rows[row.name] = dataclasses.replace(row, form=found.form.name, error=found.error)
    if not entrants:
        return list(rows.values())

    models = {name: entrant.model for name, entrant in entrants.items()}
    timings: dict[str, dict[str, Timing]] = {}
    for kind, before in (("warm", None), ("cold", evict)):
        if kind == "cold" and before is None:
            continue
        say(f"{workload.name}: measuring {len(models)} contestants, {kind}")
        timings[kind] = interleaved(
            models,
            x,
            rounds=settings.rounds,
            turn_s=settings.turn_s,
            limit_s=settings.limit_s,
            before=before,
        )
    weight_bytes = sum(value.nbytes for value in params.values())
    for name, entrant in entrants.items():
        warm = timings["warm"][name]
        cold = timings.get("cold", {}).get(name)
        rows[name] = dataclasses.replace(
            rows[name],
            warm=warm,
            cold=cold,
        )
        rows[name] = with_rates(rows[name], workload, entrant.model, weight_bytes, ceilings)
        if settings.memory:
            say(f"{workload.name}: memory of {name}")
            rows[name] = dataclasses.replace(
                rows[name], memory=_memory(entrant, workload, settings.threads, say)
            )
    return list(rows.values())


def _fastest_form(
    settings: Settings,
    peer: Peer,
    workload: Workload,
    params: Params,
    pruned: bool,
    forms: Sequence[Form],
    x: npt.NDArray[Any],
    expected: npt.NDArray[Any],
) -> _Entrant | str:
    """Return the fastest form that answers right, or why there is none."""
    best: _Entrant | None = None
    best_s = float("inf")
    faults = []
    for form in forms:
        try:
            model = peer.prepare(workload, params, settings.threads, pruned, form)
            error = relative_error(model(x), expected)
            seconds = quick_minimum(model, x) if len(forms) > 1 else 0.0
        except Exception as fault:  # a peer's failure is a row of the report, whatever it raises
            faults.append(f"{form.name}: {type(fault).__name__}: {str(fault).strip()[:200]}")
            continue
        if error > TOLERANCE:
            faults.append(f"{form.name}: wrong output, error {error:.1e} > {TOLERANCE:.0e}")
        elif seconds < best_s:
            best, best_s = _Entrant(peer, pruned, form, model, error), seconds
    return best or "; ".join(faults)


def with_rates(
    row: Row, workload: Workload, model: object, weight_bytes: int, ceilings: Ceilings
) -> Row:
    """Add the arithmetic of a run and its rates against the ceilings.

    Ours counts what the manifest's kernels execute; a peer's, which cannot be seen, counts as the
    plain model or its pruned graph, so that its share is of useful work.
    """
    assert row.warm is not None
    kernels = getattr(model, "metadata", {}).get("kernels")
    flops = executed_flops(kernels) if kernels else plain_flops(workload, row.pruned)
    gflops = flops / row.warm.minimum_us / 1e3
    weight_gb_per_s = weight_bytes / row.warm.minimum_us / 1e3
    return dataclasses.replace(
        row,
        gflop=flops / 1e9,
        gflops=gflops,
        fma_share=gflops / ceilings.fma_gflops,
        weight_gb_per_s=weight_gb_per_s,
        copy_share=weight_gb_per_s / ceilings.copy_gb_per_s,
    )


def _memory(
    entrant: _Entrant, workload: Workload, threads: int, say: Callable[[str], None]
) -> dict[str, int] | None:
    try:
        return peak_memory(entrant.peer.name, workload, threads, entrant.pruned, entrant.form)
    except Exception as fault:  # the times of the row hold all the same
        say(f"{workload.name}: {fault}")
        return None


def ratios(rows: Sequence[Row], workload: str) -> dict[str, tuple[str, float]]:
    """Return, for peers as they are and hand-pruned, the fastest one and its time over ours."""
    timed = [row for row in rows if row.workload == workload and row.warm is not None]
    ours = next((row.warm for row in timed if row.peer == OURS), None)
    found = {}
    for kind, pruned in (("as they are", False), ("hand-pruned", True)):
        peers = [row for row in timed if row.peer != OURS and row.pruned == pruned]
        if ours is not None and peers:
            fastest = min(peers, key=lambda row: row.warm.minimum_us if row.warm else 0.0)
            assert fastest.warm is not None
            found[kind] = (fastest.peer, fastest.warm.minimum_us / ours.minimum_us)
    return found
