"""``python -m mega_tvm.inspect FILE``: what a file holds, without running it.

`inspect_file` picks an inspector by suffix; each returns a `Report`, which prints itself or turns
into JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .errors import MegaError
from .inspect_artifact import inspect_artifact
from .weights import Checkpoint, load_checkpoint

if TYPE_CHECKING:
    from rich.console import Console


class Report(Protocol):
    """What an inspector found."""

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-like values."""

    def print(self, console: Console) -> None:
        """Print it for people."""


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint file holds.

    Parameters
    ----------
    checkpoint : Checkpoint
        As loaded from a file.
    file_size : int
        In bytes.
    """

    checkpoint: Checkpoint
    file_size: int

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-like values."""
        checkpoint = self.checkpoint
        return {
            "kind": "checkpoint",
            "file": str(checkpoint.source),
            "format": checkpoint.format,
            "file_size": self.file_size,
            "config": checkpoint.config.to_dict(),
            "option_sources": checkpoint.option_sources,
            "parameter_count": sum(array.size for array in checkpoint.params.values()),
            "digest": checkpoint.digest,
            "tensors": [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "dtype": checkpoint.stored_dtypes[name],
                    "min": float(array.min()),
                    "max": float(array.max()),
                    "mean": float(array.mean(dtype=np.float64)),
                }
                for name, array in checkpoint.params.items()
            ],
            "metadata": checkpoint.metadata,
            "warnings": list(checkpoint.warnings),
        }

    def print(self, console: Console) -> None:
        """Print it for people."""
        from rich.table import Table
        from rich.text import Text

        report = self.to_dict()
        facts = {
            "file": report["file"],
            "format": report["format"],
            "size": f"{report['file_size']:,} bytes",
            "parameters": f"{report['parameter_count']:,}",
            "digest": f"sha256:{report['digest']}",
        }
        for key, value in facts.items():
            console.print(Text(f"{key:<12}{value}"), soft_wrap=True)

        options = Table("option", "value", "from", title="config", title_justify="left")
        for name, value in report["config"].items():
            source = report["option_sources"].get(name, "default")
            options.add_row(name, Text(str(value)), Text(source))
        console.print(options)

        tensors = Table(title="tensors", title_justify="left")
        # Names tell tensors apart by their ends, so that they fold where a terminal is narrow.
        tensors.add_column("name", overflow="fold")
        for column in ("shape", "dtype", "min", "max", "mean"):
            tensors.add_column(column, justify="right", no_wrap=True)
        for row in report["tensors"]:
            shape = " x ".join(map(str, row["shape"]))
            numbers = (f"{row[column]:+.3g}" for column in ("min", "max", "mean"))
            tensors.add_row(row["name"], shape, row["dtype"], *numbers)
        console.print(tensors)

        # As JSON, which shows control characters of an untrusted file as escapes.
        if report["metadata"]:
            console.print("metadata")
            console.print(Text(json.dumps(report["metadata"], indent=2)))
        for warning in report["warnings"]:
            console.print(Text(f"warning: {warning}"))


def inspect_checkpoint(path: Path) -> CheckpointReport:
    """Load a checkpoint and describe it.

    Raises
    ------
    WeightsError
        If it does not load.
    """
    checkpoint = load_checkpoint(path)
    return CheckpointReport(checkpoint, path.stat().st_size)


# Files of any other suffix are taken for checkpoints, which are known by their content.
_INSPECTORS: dict[str, Callable[[Path], Report]] = {
    ".nx": inspect_checkpoint,
    ".safetensors": inspect_checkpoint,
    ".npz": inspect_checkpoint,
    ".pt": inspect_checkpoint,
    ".pth": inspect_checkpoint,
    ".onnx": inspect_checkpoint,
    ".so": inspect_artifact,
}


def inspect_file(path: Path) -> Report:
    """Describe a file of any kind that this package reads or writes.

    Raises
    ------
    MegaError
        If it cannot be read.
    """
    return _INSPECTORS.get(path.suffix, inspect_checkpoint)(path)


def _inspect_kernels(path: Path) -> Report:
    from .cuda.inspect_kernels import inspect_kernels  # needs the compile extra

    return inspect_kernels(path)


def _estimate(path: Path) -> Report:
    from .cuda.estimate import estimate  # needs the compile extra

    return estimate(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mega_tvm.inspect",
        description="Show what a checkpoint or a compiled model holds, without running it.",
    )
    parser.add_argument(
        "file",
        type=Path,
        help="a .nx, .safetensors, .npz, .pt, .pth or .onnx file, or a compiled .so",
        metavar="FILE",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="of a library for GPUs: registers, shared memory, spills, occupancy and instructions "
        "of each kernel, for each arch",
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="of a library for GPUs: the time that each kernel should take on an A100 and an H100",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    arguments = parser.parse_args(argv)
    if arguments.kernels and arguments.estimate:
        parser.error("--kernels and --estimate are two reports: give one")
    try:
        if arguments.kernels:
            report = _inspect_kernels(arguments.file)
        elif arguments.estimate:
            report = _estimate(arguments.file)
        else:
            report = inspect_file(arguments.file)
        if arguments.json:
            print(json.dumps(report.to_dict(), indent=2))
        else:
            report.print(_console())
    except MegaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _console() -> Console:
    try:
        from rich.console import Console
    except ImportError as error:
        raise MegaError(
            "tables need the rich package: pip install mega-tvm[compile], or use --json"
        ) from error
    # Into a pipe rich assumes 80 columns, which would break the names that one greps for.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


if __name__ == "__main__":
    sys.exit(main())
