"""What a compiled model's manifest says, for `mega_tvm.inspect`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact_format import open_artifact, read_library, read_manifest_from, read_tensors
from .bench.flops import kernel_flops
from .symbolic_entry import SymbolicEntry

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass(frozen=True)
class ArtifactReport:
    """What a compiled model holds.

    Parameters
    ----------
    path : Path
    file_size : int
        In bytes.
    manifest : dict
        As the compiler wrote it, checked against its digest.
    """

    path: Path
    file_size: int
    manifest: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-like values."""
        return {
            "kind": "artifact",
            "file": str(self.path),
            "file_size": self.file_size,
            "flops_per_call": {k["name"]: _flops(k) for k in self.manifest["kernels"]},
            "manifest": self.manifest,
        }

    def print(self, console: Console) -> None:
        """Print it for people."""
        from rich.table import Table
        from rich.text import Text

        manifest = self.manifest
        target, versions = manifest["target"], manifest["versions"]
        tensors = manifest["tensors"]
        facts = {
            "file": str(self.path),
            "size": f"{self.file_size:,} bytes, which agree with their digests",
            "library": f"{manifest['library']['bytes']:,} bytes",
            "tensors": f"{len(tensors['items'])}, {tensors['bytes']:,} bytes",
            "target": f"{target['name']} ({target['kind']}, {target['mcpu'] or 'generic'})",
            "needs": ", ".join(target["cpu_features"]) or "no CPU features",
            "dtype": manifest["dtype"],
            "versions": ", ".join(f"{name} {value}" for name, value in versions.items() if value),
            "weights": _weights(manifest["weights"] or {}),
            "passes off": ", ".join(manifest.get("disabled_passes", ())) or "none",
            "parity": _parity(manifest["parity"]),
        }
        for key, value in facts.items():
            console.print(Text(f"{key:<12}{value}"), soft_wrap=True)

        if manifest["config"] is not None:
            options = Table("option", "value", title="config", title_justify="left")
            for name, value in manifest["config"].items():
                options.add_row(Text(name), Text(str(value)))
            console.print(options)

        entries = Table("name", "input", "output", "parity", title="entries", title_justify="left")
        found = (manifest["parity"] or {}).get("entries", {})
        for entry in (*manifest["entries"], *manifest.get("symbolic_entries", ())):
            shapes = (" x ".join(map(str, entry[side]["shape"])) for side in ("input", "output"))
            parity = _entry_parity(found.get(entry["name"]))
            entries.add_row(Text(entry["name"]), *shapes, Text(parity))
        console.print(entries)
        for symbolic in map(SymbolicEntry.of, manifest.get("symbolic_entries", ())):
            console.print(Text(f"{symbolic.name:<12} {symbolic}"), soft_wrap=True)

        kernels = Table(title="kernels", title_justify="left")
        # Names tell kernels apart by their ends, so that they fold where a terminal is narrow.
        kernels.add_column("name", overflow="fold")
        kernels.add_column("op", no_wrap=True)
        for column in ("calls", "schedule", "FLOP per call"):
            kernels.add_column(column, justify="right", no_wrap=True)
        for kernel in manifest["kernels"]:
            flops = _flops(kernel)
            columns = (kernel["name"], kernel["op"], str(kernel["calls"]), kernel["schedule"])
            kernels.add_row(*map(Text, columns), f"{flops:,}" if flops else "")
        console.print(kernels)


def inspect_artifact(path: Path) -> ArtifactReport:
    """Read a compiled model's manifest and check all other bytes against it, without loading it.

    Raises
    ------
    ArtifactError
        If it is not a compiled model, or damaged.
    """
    with open_artifact(path) as file:
        manifest = read_manifest_from(file, str(path))
        read_library(file, str(path), manifest)
        read_tensors(file, str(path), manifest, memoryview(bytearray(manifest["tensors"]["bytes"])))
    return ArtifactReport(path, path.stat().st_size, manifest)


def _flops(kernel: Mapping[str, Any]) -> int | None:
    """Return a kernel's operations a call, where its kind is counted."""
    return kernel_flops(kernel["op"], kernel["spec"] or {}) or None


def _weights(origin: Mapping[str, Any]) -> str:
    what = {
        "file": f"{origin.get('path')} ({origin.get('format')})",
        "seed": f"freshly initialized from seed {origin.get('seed')} ({origin.get('init')})",
        "memory": "from memory",
        "module": f"those of a module, {origin.get('class')}",
        "onnx": f"those of the model in {origin.get('path')}",
    }.get(origin.get("kind", ""), "of unknown origin")
    digest = origin.get("digest")
    return f"{what}; sha256:{digest}" if digest else what


def _parity(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return "not recorded"
    if not parity["checked"]:
        return f"not checked when compiled: {parity['reason']}"
    return "checked when compiled, against the float64 reference"


def _entry_parity(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return ""
    if not parity["checked"]:
        return f"not checked: {parity['reason']}"
    return f"max abs {parity['max_abs']:.2e}, relative RMS {parity['relative_rms']:.2e}"
