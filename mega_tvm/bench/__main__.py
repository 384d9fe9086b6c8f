"""The command ``python -m mega_tvm.bench``: parses, pins the process, runs, reports."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..dtypes import CPU_DTYPES, CUDA_DTYPES, FLOAT32
from .environment import QUIET_LOAD, hardware, pin

if TYPE_CHECKING:
    from rich.console import Console

    from .runner import Settings
    from .workloads import Workload


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="python -m mega_tvm.bench",
        description="Measure mega_tvm and other libraries on the same models, interleaved, with "
        "equal threads. Every output is checked against a float64 oracle first.",
    )
    add = p.add_argument
    add("--workloads", default="default", metavar="LIST", help="names or groups (all, scaling)")
    add("--peers", default="all", metavar="LIST", help="names, or all (default)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to measure (cpu)")
    add("--threads", type=_positive, default=1, metavar="N", help="threads and cores of each")
    add("--batch", type=_positive, metavar="N", help="another batch for all workloads")
    add("--seq-len", type=_positive, metavar="N", help="another length for all workloads")
    add(
        "--dtype",
        choices=CUDA_DTYPES,
        default=FLOAT32,
        help="type of weights and activations; another than float32 is for --device cuda",
    )
    add("--rounds", type=_positive, default=15, metavar="N", help="interleaved rounds (15)")
    add("--turn-ms", type=_positive, default=100, metavar="MS", help="a contestant's turn (100)")
    add("--limit", type=_positive, default=120, metavar="S", help="fewer rounds if longer (120)")
    add("--cold", action="store_true", help="also with emptied caches before each call")
    add("--memory", action="store_true", help="also peak memory, in a process each")
    add("--json", type=Path, metavar="FILE", help="write everything as JSON")
    add("--csv", type=Path, metavar="FILE", help="write one line a row")
    add("--plot", type=Path, metavar="FILE", help="draw bars (.png, .svg, .pdf)")
    add("--list", action="store_true", help="list workloads and peers, and stop")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    p = parser()
    options = p.parse_args(arguments)
    for path in (options.json, options.csv, options.plot):
        # Found out now, not after an hour of measuring.
        if path is not None and not path.absolute().parent.is_dir():
            p.error(f"{path}: no such directory: {path.absolute().parent}")
    if options.device == "cuda" and not options.list:
        from .cuda_command import run_on_gpu

        return run_on_gpu(p, options)
    if options.dtype not in CPU_DTYPES:
        p.error(f"--dtype {options.dtype} is for --device cuda")
    from rich.console import Console

    from .peers import select_peers
    from .workloads import select_workloads

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if options.list:
        _list(console)
        return 0
    try:
        select_peers(options.peers)
        select_workloads(options.workloads)
        pin(options.threads, arguments)
    except ValueError as error:
        p.error(str(error))
    return _run(console, _settings(options), options)


def _settings(options: argparse.Namespace) -> Settings:
    from .peers import select_peers
    from .runner import Settings
    from .workloads import select_workloads

    return Settings(
        workloads=[
            workload.reshaped(options.batch, options.seq_len)
            for workload in select_workloads(options.workloads)
        ],
        peers=[peer.name for peer in select_peers(options.peers)],
        threads=options.threads,
        rounds=options.rounds,
        turn_s=options.turn_ms / 1e3,
        limit_s=options.limit,
        cold=options.cold,
        memory=options.memory,
    )


def _run(console: Console, settings: Settings, options: argparse.Namespace) -> int:
    from . import report
    from .ceilings import measure_ceilings
    from .peers import OURS
    from .runner import run
    from .workloads import select_workloads

    # The names by which the workloads were asked for, before --batch and --seq-len changed them.
    asked = select_workloads(options.workloads)
    names = {new.name: old.name for new, old in zip(settings.workloads, asked, strict=True)}

    p = parser()

    def reproduce(workload: Workload, peer: str) -> str:
        peers = peer if peer == OURS else f"{OURS},{peer}"
        command = ["python", "-m", "mega_tvm.bench", "--workloads", names[workload.name]]
        command += ["--peers", peers, "--threads", str(settings.threads)]
        for flag in ("--batch", "--seq-len", "--rounds", "--turn-ms", "--limit"):
            value = getattr(options, flag[2:].replace("-", "_"))
            if value is not None and value != p.get_default(flag[2:].replace("-", "_")):
                command += [flag, str(value)]
        command += [flag for flag in ("--cold", "--memory") if getattr(options, flag[2:])]
        return shlex.join(command)

    machine = hardware()
    console.print(
        f"machine: {machine['cpu']} ({' '.join(machine['features'])}), cores "
        f"{machine['cores_used']} of {machine['cores']}, {machine['memory_gib']} GiB, load "
        f"{machine['loadavg']}, {machine['system']}",
        markup=False,
    )
    resolved = {
        **vars(options),
        "workloads": [workload.name for workload in settings.workloads],
        "peers": list(settings.peers),
    }
    console.print("settings:", ", ".join(f"{k}={v}" for k, v in resolved.items()), markup=False)
    if machine["loadavg"][0] > QUIET_LOAD:
        console.print(
            f"[bold red]warning:[/] load average {machine['loadavg'][0]} is above {QUIET_LOAD}: "
            "other processes take time from the measured ones"
        )
    ceilings = measure_ceilings(settings.threads)
    with console.status("starting") as status:

        def say(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                console.print(text)

        rows = run(settings, ceilings, reproduce, say)
    machine["loadavg_after"] = [round(value, 2) for value in os.getloadavg()]
    report.print_tables(console, settings, ceilings, rows)
    data = report.document(settings, machine, ceilings, rows)
    if options.json:
        report.write_json(options.json, data)
    if options.csv:
        report.write_csv(options.csv, data)
    if options.plot:
        from .plot import plot

        plot(options.plot, data)
    return 0 if any(row.warm for row in rows) else 1


def _list(console: Console) -> None:
    from .peers import PEERS
    from .workloads import GROUPS, SCALING, WORKLOADS

    for workload in WORKLOADS + SCALING:
        c = workload.config
        kind = "laplace" if c.laplace_attention else "softmax"
        console.print(
            f"{workload.name}: B={workload.batch} T={workload.seq_len} {kind}, embed {c.embed_dim},"
            f" hidden {c.hidden_size}, ema {c.ema_dim}, {c.num_layers} layers"
        )
    console.print(f"groups: {', '.join(GROUPS)}")
    for name, peer in PEERS.items():
        console.print(f"peer {name}: {peer.available() or 'available'}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
