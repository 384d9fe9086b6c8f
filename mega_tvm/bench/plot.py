"""A picture of a run: bars for each workload, lines where a workload was run at several lengths."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .peers import OURS

OURS_COLOR, PEER_COLOR, PRUNED_COLOR = "#c2410c", "#64748b", "#cbd5e1"
# Bars that differ by more than this would make the short ones unreadable on a linear axis.
LINEAR_SPAN = 20.0
# So many lengths of one model and batch are a line over the length, not a panel each.
FEWEST_LENGTHS = 3

Rows = list[dict[str, Any]]
Panel = tuple[str, Rows, Callable[[Any, Rows], None]]


def plot(path: Path, data: dict[str, Any]) -> None:
    """Draw the minima of a run's `report.document`; the file's suffix chooses the format.

    Raises
    ------
    ValueError
        If no row has a time.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = _panels(data)
    if not panels:
        raise ValueError("nothing to plot: no contestant has a time")
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    tallest = max(len({_name(row) for row in rows}) for _, rows, _ in panels)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(6.2 * columns, lines * max(2.6, 0.27 * tallest + 0.9) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, rows, draw) in zip(axes.flat, panels, strict=False):
        draw(axis, rows)
        axis.set_title(title, loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    threads = data["settings"]["threads"]
    figure.suptitle(
        f"{threads} thread{'s' if threads > 1 else ''}, float32, minimum of calls "
        f"({data['hardware']['cpu']})",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panels(data: dict[str, Any]) -> list[Panel]:
    families: dict[str, list[dict[str, Any]]] = {}
    for workload in data["settings"]["workloads"]:
        key = json.dumps([workload["config"], workload["batch"]], sort_keys=True)
        families.setdefault(key, []).append(workload)
    panels: list[Panel] = []
    for family in families.values():
        lengths = {workload["name"]: workload["seq_len"] for workload in family}
        rows = [
            {**row, "seq_len": lengths[row["workload"]]}
            for row in data["rows"]
            if row["workload"] in lengths and row["warm"]
        ]
        kind = "laplace" if family[0]["config"]["laplace_attention"] else "softmax"
        if len(set(lengths.values())) >= FEWEST_LENGTHS:
            title = f"B={family[0]['batch']}, {kind}"
            panels.append((f"time of a call, {title}", rows, _time_lines))
            if any(row["memory"] for row in rows):
                panels.append((f"memory of a call, {title}", rows, _memory_lines))
            continue
        for workload in family:
            title = f"{workload['name']}: B={workload['batch']}, T={workload['seq_len']}, {kind}"
            own = [row for row in rows if row["workload"] == workload["name"]]
            panels += [(title, own, _bars)] if own else []
    return panels


def _name(row: dict[str, Any]) -> str:
    return str(row["peer"]) + (", pruned by hand" if row["pruned"] else "")


def _bars(axis: Any, rows: Rows) -> None:
    rows = sorted(rows, key=lambda row: row["warm"]["minimum_us"], reverse=True)
    values = [row["warm"]["minimum_us"] / 1e3 for row in rows]
    colors = [
        OURS_COLOR if row["peer"] == OURS else PRUNED_COLOR if row["pruned"] else PEER_COLOR
        for row in rows
    ]
    bars = axis.barh([_name(row) for row in rows], values, color=colors, height=0.72)
    axis.bar_label(bars, [f"{value:.3g} ms" for value in values], padding=3, fontsize=8)
    if max(values) > LINEAR_SPAN * min(values):
        axis.set_xscale("log")
        axis.set_xlim(min(values) / 2, max(values) * 4)
    else:
        axis.set_xlim(0, max(values) * 1.18)


def _time_lines(axis: Any, rows: Rows) -> None:
    _lines(axis, rows, lambda row: row["warm"]["minimum_us"] / 1e3, "ms")


def _memory_lines(axis: Any, rows: Rows) -> None:
    measured = [row for row in rows if row["memory"]]
    _lines(axis, measured, lambda row: row["memory"]["call_bytes"] / 2**20, "MiB")


def _lines(axis: Any, rows: Rows, value: Callable[[dict[str, Any]], float], unit: str) -> None:
    colors: dict[str, str] = {OURS: OURS_COLOR}
    for name in dict.fromkeys(_name(row) for row in rows):
        own = sorted((row for row in rows if _name(row) == name), key=lambda row: row["seq_len"])
        peer = own[0]["peer"]
        color = colors.setdefault(peer, f"C{len(colors) - 1}")  # a pruned one dashed, alike
        ours = peer == OURS
        axis.plot(
            [row["seq_len"] for row in own],
            [value(row) for row in own],
            color=color,
            linewidth=2.2 if ours else 1.1,
            linestyle="--" if own[0]["pruned"] else "-",
            marker="o",
            markersize=3,
            label=name,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths := sorted({row["seq_len"] for row in rows}), [str(n) for n in lengths])
    axis.set_yscale("log")
    axis.set_xlabel("frames T", fontsize=8)
    axis.set_ylabel(unit, fontsize=8)
    axis.legend(fontsize=7, frameon=False)
