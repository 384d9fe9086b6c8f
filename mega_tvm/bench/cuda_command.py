"""``python -m mega_tvm.bench --device cuda``: checks its options, runs, reports."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from schedules.common.half_types import HALF_TYPES

from ..dtypes import FLOAT32

if TYPE_CHECKING:
    from .cuda import CudaCeilings
    from .runner import Row
    from .workloads import Workload

_FOR_CPUS = ("csv", "plot", "memory")


def run_on_gpu(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Run the benchmark on this machine's GPU; return the exit status."""
    from .workloads import select_workloads

    for name in _FOR_CPUS:
        if getattr(options, name):
            parser.error(f"--{name} is for --device cpu; with cuda there are a table and --json")
    if options.threads != 1:
        parser.error("--threads is for --device cpu")
    from .cuda_peers import PEERS

    peers = list(PEERS) if options.peers == "all" else options.peers.split(",")
    if unknown := [name for name in peers if name not in PEERS]:
        parser.error(f"unknown peer {unknown[0]!r} of --device cuda; known: {', '.join(PEERS)}")
    try:
        asked = select_workloads(options.workloads)
    except ValueError as error:
        parser.error(str(error))
    from .cuda import measure_ceilings, run, why_no_device
    from .cuda_clock import EventClock

    if reason := why_no_device():
        parser.error(f"--device cuda: {reason}; --device cpu measures on this machine's CPU")
    workloads = [workload.reshaped(options.batch, options.seq_len) for workload in asked]
    names = {new.name: old.name for new, old in zip(workloads, asked, strict=True)}

    def reproduce(workload: Workload, peer: str) -> str:
        command = ["python", "-m", "mega_tvm.bench", "--device", "cuda", "--workloads"]
        command += [names[workload.name], "--peers", ",".join(dict.fromkeys(["mega_tvm", peer]))]
        for flag in ("--batch", "--seq-len", "--rounds"):
            value = getattr(options, flag[2:].replace("-", "_"))
            if value is not None and value != parser.get_default(flag[2:].replace("-", "_")):
                command += [flag, str(value)]
        if options.dtype != FLOAT32:
            command += ["--dtype", options.dtype]
        return shlex.join([*command, *(["--cold"] if options.cold else [])])

    out = Console(width=160, highlight=False)
    device = describe_device()
    out.print("device:", ", ".join(f"{k}={v}" for k, v in device.items()), markup=False)
    clock = EventClock()
    ceilings = measure_ceilings(clock)
    with out.status("starting") as status:
        rows = run(
            workloads, peers, clock, ceilings, reproduce,
            rounds=options.rounds, cold=options.cold, dtype=options.dtype, say=status.update,
        )  # fmt: skip
    print_rows(out, rows, ceilings, options.cold)
    if options.json:
        options.json.write_text(json.dumps(document(rows, ceilings, device), indent=1) + "\n")
    return 0 if any(row.warm for row in rows) else 1


def describe_device() -> dict[str, Any]:
    """Return the GPU's name, arch, memory and L2, and the versions that matter."""
    import torch
    import tvm

    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "arch": f"sm_{found.major}{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "l2_mib": round(found.L2_cache_size / 2**20, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tvm": tvm.__version__,
    }


def document(rows: Sequence[Row], ceilings: CudaCeilings, device: dict[str, Any]) -> dict[str, Any]:
    """Return the whole run as plain data."""
    return {
        "schema": 1,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "ceilings": dataclasses.asdict(ceilings),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def print_rows(out: Console, rows: Sequence[Row], ceilings: CudaCeilings, cold: bool) -> None:
    """Print a table for each workload, the ceilings, and the lines that reproduce the rows."""
    from .runner import ratios

    columns = ["min us", "median us", *(["cold min us", "cold median us"] if cold else [])]
    in_half = any(row.form in HALF_TYPES for row in rows)
    peak = "of fp16 peak" if in_half else "of fp32 peak"
    columns += ["GFLOP", "GFLOP/s", peak, "of copy", "error"]
    for workload in dict.fromkeys(row.workload for row in rows):
        own = [row for row in rows if row.workload == workload]
        table = Table(title=workload, title_justify="left")
        table.add_column("contestant")
        for column in columns:
            table.add_column(column, justify="right")
        timed = [(row.warm.minimum_us, row) for row in own if row.warm is not None]
        for _, row in sorted(timed, key=lambda pair: pair[0]):
            times = [row.warm, *([row.cold] if cold else [])]
            cells = [f"{us:.1f}" for t in times if t for us in (t.minimum_us, t.median_us)]
            cells += [f"{row.gflop:.3f}", f"{row.gflops:.1f}", f"{row.fma_share:.1%}"]
            table.add_row(row.name, *cells, f"{row.copy_share:.0%}", f"{row.error:.1e}")
        out.print(table)
        for row in own:
            if row.skipped:
                out.print(f"  {row.name} skipped: {row.skipped}", markup=False)
        for variant, (peer, ratio) in ratios(rows, workload).items():
            out.print(f"  fastest peer {variant}: {peer}, {ratio:.2f} times our time")
    out.print(
        f"ceilings: fp32 product {ceilings.fma_gflops:.0f} GFLOP/s, fp16 product "
        f"{ceilings.fp16_gflops:.0f} GFLOP/s, copy {ceilings.copy_gb_per_s:.0f} GB/s"
    )
    out.print("to measure a row again:")
    for command in dict.fromkeys(row.reproduce for row in rows):
        out.print(f"  {command}", soft_wrap=True, markup=False)
