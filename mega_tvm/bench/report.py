"""What a run leaves: a table, JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .ceilings import Ceilings
from .peers import OURS, PEERS, versions
from .runner import Row, Settings, ratios

SCHEMA = 1


def document(
    settings: Settings, hardware: dict[str, Any], ceilings: Ceilings, rows: Sequence[Row]
) -> dict[str, Any]:
    """Return the whole run as plain data.

    Returns
    -------
    dict
        ``schema``, ``time``, ``hardware``, ``versions``, ``settings``, ``ceilings``, ``rows`` and
        ``ratios``: for each workload the fastest peer and its time over ours.
    """
    packages = [p for name in (OURS, *settings.peers) for p in PEERS[name].packages]
    return {
        "schema": SCHEMA,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware,
        "versions": versions(["numpy", *dict.fromkeys(packages)]),
        "settings": {
            **dataclasses.asdict(settings),
            "workloads": [workload.to_dict() for workload in settings.workloads],
        },
        "ceilings": dataclasses.asdict(ceilings),
        "rows": [dataclasses.asdict(row) for row in rows],
        "ratios": {
            workload.name: {
                kind: {"peer": peer, "ratio": ratio}
                for kind, (peer, ratio) in ratios(rows, workload.name).items()
            }
            for workload in settings.workloads
        },
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a run's `document`."""
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, data: dict[str, Any]) -> None:
    """Write one line a row, each with the hardware, the threads and the versions."""
    rows = [_flat(row) for row in data["rows"]]
    common = {
        "time": data["time"],
        "threads": data["settings"]["threads"],
        "cpu": data["hardware"]["cpu"],
        "features": " ".join(data["hardware"]["features"]),
        "loadavg": data["hardware"]["loadavg"][0],
        **data["ceilings"],
        "versions": " ".join(f"{name}={value}" for name, value in data["versions"].items()),
    }
    columns = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *common])
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)


def print_tables(
    console: Console, settings: Settings, ceilings: Ceilings, rows: Sequence[Row]
) -> None:
    """Print a table for each workload, the ratios, and the lines that reproduce the rows."""
    for workload in settings.workloads:
        own = [row for row in rows if row.workload == workload.name]
        kind = "laplace" if workload.config.laplace_attention else "softmax"
        title = f"{workload.name}: B={workload.batch} T={workload.seq_len} {kind}"
        console.print(_table(title, [row for row in own if row.warm], settings))
        for row in own:
            if row.skipped:
                console.print(f"  {row.name} skipped: {row.skipped}", markup=False)
        for variant, (peer, ratio) in ratios(rows, workload.name).items():
            console.print(f"  fastest peer {variant}: {peer}, {ratio:.2f} times our time")
    console.print(
        f"ceilings, {settings.threads} threads: register FMA {ceilings.fma_gflops:.1f} GFLOP/s, "
        f"copy {ceilings.copy_gb_per_s:.1f} GB/s"
    )
    console.print("to measure a row again:")
    for command in dict.fromkeys(row.reproduce for row in rows):  # a peer's two rows share one
        console.print(f"  {command}", soft_wrap=True, markup=False)


def _table(title: str, rows: Sequence[Row], settings: Settings) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("contestant")
    table.add_column("form")
    names = ["min us", "median us", *(("cold min us", "cold median us") if settings.cold else ())]
    names += ["GFLOP", "GFLOP/s", "of FMA peak", "of copy", "error"]
    for name in [*names, *(["MiB of calls"] if settings.memory else [])]:
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: row.warm.minimum_us if row.warm else float("inf")):
        assert row.warm is not None
        cells = [f"{row.warm.minimum_us:.1f}", f"{row.warm.median_us:.1f}"]
        if settings.cold:
            cold = row.cold
            cells += [f"{cold.minimum_us:.1f}", f"{cold.median_us:.1f}"] if cold else ["", ""]
        cells += [
            f"{row.gflop:.3f}",
            f"{row.gflops:.1f}",
            f"{row.fma_share:.0%}",
            f"{row.copy_share:.0%}",
            f"{row.error:.1e}",
        ]
        if settings.memory:
            cells.append(f"{row.memory['call_bytes'] / 2**20:.1f}" if row.memory else "")
        table.add_row(row.name, row.form, *cells, style="bold" if row.peer == OURS else None)
    return table


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its nested fields as ``field_inner``."""
    flat: dict[str, Any] = {}
    nested = {
        "warm": ("minimum_us", "median_us", "calls"),
        "cold": ("minimum_us", "median_us", "calls"),
        "memory": ("call_bytes", "loaded_bytes"),
    }
    for name, value in row.items():
        if name in nested:
            flat.update({f"{name}_{inner}": (value or {}).get(inner) for inner in nested[name]})
        else:
            flat[name] = value
    return flat
