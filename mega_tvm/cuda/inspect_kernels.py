"""``python -m mega_tvm.inspect OUT.so --kernels``: what the machine code of each kernel uses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mega_tvm.artifact_format import open_artifact, read_library, read_manifest_from
from mega_tvm.errors import MegaError

from .machine_code import KernelCode, read_kernels

if TYPE_CHECKING:
    from rich.console import Console

# Columns of the table, and the instructions that they count.
WIDE_LOADS = r"LDG\S*\.128"
LOADS = r"LDG"
FMA = r"FFMA"
TENSOR_CORE = r"HMMA"


@dataclasses.dataclass(frozen=True)
class KernelsReport:
    """What a library's kernels are, on each arch that it holds.

    Parameters
    ----------
    path : Path
    kernels : list of KernelCode
    """

    path: Path
    kernels: list[KernelCode]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-like values."""
        return {
            "kind": "kernels",
            "file": str(self.path),
            "kernels": [
                {
                    "name": kernel.name,
                    "arch": f"sm_{kernel.arch}",
                    "threads": kernel.threads,
                    "registers": kernel.registers,
                    "shared_memory": kernel.shared,
                    "local_memory_instructions": kernel.local,
                    "occupancy": kernel.occupancy,
                    "loads": kernel.count(LOADS),
                    "loads_of_16_bytes": kernel.count(WIDE_LOADS),
                    "ffma": kernel.count(FMA),
                    "tensor_core": kernel.count(TENSOR_CORE),
                    "ffma_share_of_loop": round(kernel.loop_share(FMA), 3),
                    "instructions": sum(kernel.instructions.values()),
                }
                for kernel in self.kernels
            ],
        }

    def print(self, console: Console) -> None:
        """Print it for people."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="machine code of the kernels", title_justify="left")
        table.add_column("kernel", overflow="fold")
        columns = (
            "arch", "threads", "registers", "shared", "spills", "occupancy", "loads", "16-byte",
            "FFMA", "of loop", "HMMA", "all",
        )  # fmt: skip
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for kernel in self.to_dict()["kernels"]:
            occupancy = kernel["occupancy"]
            table.add_row(
                Text(kernel["name"]),
                kernel["arch"],
                str(kernel["threads"] or ""),
                str(kernel["registers"]),
                str(kernel["shared_memory"]),
                str(kernel["local_memory_instructions"] or "none"),
                "" if occupancy is None else f"{occupancy:.0%}",
                *(str(kernel[name]) for name in ("loads", "loads_of_16_bytes", "ffma")),
                f"{kernel['ffma_share_of_loop']:.0%}" if kernel["ffma_share_of_loop"] else "",
                *(str(kernel[name]) for name in ("tensor_core", "instructions")),
            )
        console.print(table)


def inspect_kernels(path: Path) -> KernelsReport:
    """Read the machine code of a library's kernels, without loading it.

    Raises
    ------
    ArtifactError
        If it is not a compiled model, or damaged.
    MegaError
        If it is not for GPUs, or NVIDIA's tools are missing.
    """
    with open_artifact(path) as file:
        manifest = read_manifest_from(file, str(path))
        library = read_library(file, str(path), manifest)
    if manifest["target"]["kind"] != "cuda":
        raise MegaError(
            f"{path}: --kernels reads machine code for GPUs; this library is for "
            f"{manifest['target']['name']}: see 5_lower.s of --debug-dump"
        )
    launches = [launch for k in manifest["kernels"] for launch in k.get("launches", ())]
    return KernelsReport(path, read_kernels(library, {k["name"]: k["threads"] for k in launches}))
