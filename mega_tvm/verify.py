"""``python -m mega_tvm.verify``: whether a compiled model computes what its weights say."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mega_tvm.atomic_write import write_atomically
from mega_tvm.console import FAILURE, console, print_settings, run_command
from mega_tvm.tolerances import Parity
from mega_tvm.verification import prepare, run, verify_artifact
from mega_tvm.verify_inputs import VerificationError
from mega_tvm.verify_report import ORACLE, STORED, VerifyReport

__all__ = ["VerificationError", "VerifyReport", "main", "verify_artifact"]

_PIPE_WIDTH = 140  # a table's, where no terminal tells: enough for the longest layer and kernel


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _verify(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mega_tvm.verify",
        description="Compare a compiled model with the float64 oracle, at every entry and on "
        "several inputs; name the first layer that differs.",
        epilog="exit status: 0 all within tolerance, 1 not, 2 the check could not be made",
    )
    add = parser.add_argument
    add("artifact", type=Path, metavar="OUT.so", help="a compiled model")
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="the checkpoint that it was compiled from (default: where its manifest says)",
    )
    add(
        "--golden",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE.npz",
        help="files with __input__ and __output__, to compare with too",
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the result as JSON; with - to standard output, and all else to standard error",
    )
    add("--threads", type=_positive, default=1, metavar="N", help="threads of a call (default: 1)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer; got {text!r}")
    return int(text)


def _verify(arguments: argparse.Namespace) -> int:
    to_stdout = arguments.json == Path("-")
    out = Console(stderr=True, highlight=False, soft_wrap=True) if to_stdout else console()
    if not out.is_terminal:
        out.width = _PIPE_WIDTH
    if arguments.json and not to_stdout and not arguments.json.absolute().parent.is_dir():
        raise VerificationError(f"{arguments.json}: its directory is not there; create it first")
    subject = prepare(
        arguments.artifact,
        weights=arguments.weights,
        golden=arguments.golden,
        num_threads=arguments.threads,
    )
    settings = subject.settings().items()
    shown = {k: ", ".join(v) or "none" if isinstance(v, list) else v for k, v in settings}
    print_settings(out, "verify", shown)
    with _progress(out) as on_case:
        report = run(subject, on_case)
    print_report(out, report)
    if arguments.json:
        text = json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n"
        if to_stdout:
            sys.stdout.write(text)
        else:
            try:
                write_atomically(arguments.json, text.encode())
            except OSError as error:
                raise VerificationError(f"{arguments.json}: cannot be written: {error}") from error
    return 0 if report.ok else FAILURE


@contextlib.contextmanager
def _progress(out: Console) -> Iterator[Callable[[int, int, str], None]]:
    """Show which case runs: a bar on a terminal, else a line each."""
    if not out.is_terminal:
        yield lambda index, total, name: out.print(f"  {index + 1}/{total} {name}", markup=False)
        return
    columns = (
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("")
        yield lambda index, total, name: progress.update(
            task, completed=index, total=total, description=name
        )


def print_report(out: Console, report: VerifyReport) -> None:
    """Print what a verification found, for people."""
    table = _table("case", "entry", "against")
    for check in report.checks:
        table.add_row(Text(check.case), check.entry, check.against, *_numbers(check.parity))
    out.print(table)
    for check in report.checks:
        if check.reason:
            where = f"{check.case}, {check.entry}"
            out.print(f"bounds x {check.condition:.3g} for {where}: {check.reason}", markup=False)
    for skipped in report.skipped:
        where = ", ".join(filter(None, (skipped.case, skipped.entry)))
        out.print(f"left out: {where}: {skipped.reason}", markup=False)
    if found := report.localization:
        if found.layers:
            layers = _table("layer", "kernel")
            for layer in found.layers:
                layers.add_row(layer.name, layer.kernel, *_numbers(layer.parity))
            out.print(f"layers of {found.entry} on {found.case}, against the oracle", markup=False)
            out.print(layers)
        out.print(found.message, markup=False)
    wrong = [check for check in report.checks if not check.parity.ok]
    if wrong and all(check.against == STORED for check in wrong):
        out.print(
            f"the artifact agrees with the {ORACLE}, but not with a {STORED}: that was made by "
            "another form of the model (layer_norm, laplace_attention) or with other weights"
        )
    verdict = f"{len(wrong)} of {len(report.checks)} checks are" if wrong else "all checks are"
    out.print(f"{verdict} {'outside' if wrong else 'within'} tolerance")


def _table(*names: str) -> Table:
    """Return an empty table; where a terminal is narrow, names fold and numbers stay whole."""
    table = Table()
    for name in names:
        table.add_column(name, overflow="fold")
    for number in ("max abs", "allowed", "rel. RMS", "allowed", "ok"):
        table.add_column(number, no_wrap=True)
    return table


def _numbers(parity: Parity) -> Iterable[str]:
    pairs = (
        (parity.max_abs, parity.bounds.max_abs),
        (parity.relative_rms, parity.bounds.relative_rms),
    )
    yield from (f"{number:.2e}" for pair in pairs for number in pair)
    yield "yes" if parity.ok else "NO"


if __name__ == "__main__":
    sys.exit(main())
