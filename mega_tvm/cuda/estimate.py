"""``python -m mega_tvm.inspect OUT.so --estimate``: what a library's calls should take on a GPU.

Not a measurement: a prediction for the first run on a GPU to confirm or refute. A launch takes the
longest of

- its bytes, each read or written once, at the device's bandwidth;
- its FLOPs at the device's peak: that of fp32, or where tensor cores multiply theirs;
- the cycles that its schedule counts (`schedules/*/cuda.py`) at the A100's clock: what blocks,
  their occupancy and waits for L2, shared memory and barriers let it reach. On another GPU the part
  of it that is arithmetic goes with the peak, the rest with the clock.

and `LAUNCH_US` more from a stream, `GRAPH_US` in a CUDA graph. Caches are taken to be cold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mega_tvm.artifact_format import open_artifact, read_manifest_from
from mega_tvm.errors import MegaError
from schedules.common.attention import AttentionSpec
from schedules.common.cuda_attention import BLOCK_Q, COLUMNS, estimated_cycles
from schedules.common.cuda_attention_mma import estimated_cycles as mma_attention_cycles
from schedules.common.cuda_attention_mma import mma_tiles as mma_attention_tiles
from schedules.common.cuda_scan import AHEAD, LAUNCH_CYCLES, ROUND_CYCLES
from schedules.common.cuda_threads import MULTIPROCESSORS
from schedules.common.dims import ceil_div
from schedules.common.half_types import HALF_TYPES
from schedules.dense import cuda as dense_cuda
from schedules.dense import cuda_mma
from schedules.dense.cuda_rows import MAX_ROWS, THREADS
from schedules.dense.naive import DenseSpec
from schedules.ema_scan import cuda as scan_cuda
from schedules.ema_scan.naive import EmaScanSpec
from schedules.ema_scan_dense import cuda as scan_dense_cuda
from schedules.ema_scan_dense.naive import EmaScanDenseSpec
from schedules.gated_attention.naive import GatedAttentionSpec
from schedules.laplace_attention.naive import LaplaceAttentionSpec
from schedules.normed_dense.naive import NormedDenseSpec

from ..bench.flops import kernel_flops

if TYPE_CHECKING:
    from rich.console import Console

LAUNCH_US, GRAPH_US = 2.5, 1.0
NORM_CYCLES = 1400  # three passes over a row and 10 shuffles, see `schedules/layer_norm/cuda.py`
GENERIC_CYCLES = 700  # a load, a store: one wave of blocks


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A device: boost clock in GHz, peaks in TFLOP/s, bandwidth in GB/s."""

    name: str
    clock: float
    tflops: float
    tensor_tflops: float  # of float16 and bfloat16, dense
    bandwidth: float


# NVIDIA's data sheets: A100 80GB SXM (June 2021), H100 SXM (2023); clocks from the peaks, which are
# 2 FLOP x 64 or 128 lanes x 108 or 132 multiprocessors.
GPUS = (
    Gpu("A100 SXM 80 GB", 1.41, 19.5, 312.0, 2039),
    Gpu("H100 SXM", 1.98, 67.0, 989.4, 3350),
)


@dataclasses.dataclass(frozen=True)
class KernelEstimate:
    """A kernel's work a call, and its time in us on each of `GPUS`, launches left out."""

    name: str
    calls: int
    launches: int
    flops: int
    bytes: int
    us: tuple[float, ...]


def kernel_estimate(kernel: Mapping[str, Any], dtype: str) -> KernelEstimate:
    """Estimate one kernel of a manifest whose ``dtype`` is given."""
    op, fields = kernel["op"], dict(kernel["spec"] or {})
    if "lead" in fields:
        fields["lead"] = tuple(fields["lead"])
    half = dtype in HALF_TYPES
    flops, elements, cycles = _work(op, fields, half)
    moved = elements * (2 if half else 4)
    peaks = [g.tensor_tflops if half and _on_tensor_cores(op, fields) else g.tflops for g in GPUS]
    reference, peak = GPUS[0], peaks[0]
    base = max(cycles / reference.clock / 1e3, flops / peak / 1e6)
    share = flops / peak / 1e6 / base  # of it that is arithmetic
    us = tuple(
        max(
            base * (share * peak / own + (1 - share) * reference.clock / g.clock),
            moved / g.bandwidth / 1e3,
        )
        for g, own in zip(GPUS, peaks, strict=True)
    )
    return KernelEstimate(
        kernel["name"], kernel["calls"], len(kernel["launches"]), flops, moved, us
    )


def _on_tensor_cores(op: str, fields: Mapping[str, Any]) -> bool:
    """Whether tensor cores multiply a half type."""
    if op in ("dense", "normed_dense"):
        return math.prod(fields["lead"]) > MAX_ROWS
    return op == "gated_attention" and fields["q_len"] > 1


def _work(op: str, fields: dict[str, Any], half: bool) -> tuple[int, int, float]:
    """Return FLOPs, elements moved and cycles of a call."""
    if op in ("dense", "normed_dense"):
        spec = (NormedDenseSpec if op == "normed_dense" else DenseSpec)(**fields)
        rows = math.prod(fields["lead"])
        moved = rows * spec.k + spec.k * spec.n + rows * spec.out_n * (1 + spec.residual)
        norm = NORM_CYCLES / 2 if op == "normed_dense" else 0
        return kernel_flops("dense", fields), moved, _dense_cycles(spec, rows, half) + norm
    if op == "ema_scan_dense":
        scan = EmaScanDenseSpec(**fields)
        steps = scan.batch * scan.seq_len
        flops = 2 * steps * scan.channels * (scan.n + 1)
        moved = steps * (scan.channels + scan.n * (1 + scan.residual)) + scan.channels * scan.n
        return flops, moved, _scan_dense_cycles(scan)
    if op == "ema_scan":
        plain = EmaScanSpec(**fields)
        segments = scan_cuda.SEGMENTS
        cycles = [scan_cuda.estimated_cycles(plain, s, scan_cuda.DEFAULT_THREADS) for s in segments]
        best = min(range(len(segments)), key=cycles.__getitem__)
        launch = LAUNCH_CYCLES if 0 < segments[best] < int(plain.seq_len) else 0
        moved = 2 * int(plain.batch) * int(plain.seq_len) * plain.channels
        return kernel_flops(op, fields), moved, cycles[best] - launch
    if op in ("gated_attention", "laplace_attention"):
        laplace = op == "laplace_attention"
        attention = (LaplaceAttentionSpec if laplace else GatedAttentionSpec)(**fields)
        batch, q_len, k_len = fields["batch"], fields["q_len"], fields["k_len"]
        values = attention.value_width * (q_len * (1 + attention.has_gate) + k_len)
        moved = batch * (attention.width * (q_len + k_len) + values)
        if half and _on_tensor_cores(op, fields):
            tiles = mma_attention_tiles(attention)
            cycles_ = min(mma_attention_cycles(attention, *tile) for tile in tiles)
        else:
            cycles_ = _attention_cycles(attention, q_len, k_len, 2 if laplace else 1)
        return kernel_flops(op, fields), moved, cycles_
    if op == "layer_norm":
        return 0, 2 * math.prod(fields["lead"]) * int(fields["n"]), NORM_CYCLES
    return 0, 0, GENERIC_CYCLES


def _dense_cycles(spec: DenseSpec, rows: int, half: bool) -> float:
    if rows > MAX_ROWS and half:
        return min(cuda_mma.estimated_cycles(spec, tile) for tile in cuda_mma.mma_tiles())
    if rows > MAX_ROWS:
        return min(dense_cuda.estimated_cycles(spec, tile) for tile in dense_cuda.tiles())
    # Four loads under way; shuffles, shared memory and the epilogue behind them.
    steps = ceil_div(spec.k, THREADS // (dense_cuda.row_width(spec) // (8 if half else 4)))
    return (ceil_div(steps, 4) + 2) * ROUND_CYCLES


def _scan_dense_cycles(spec: EmaScanDenseSpec) -> float:
    columns = spec.batch * ceil_div(spec.n, scan_dense_cuda.COLUMNS)
    fit = [
        r for r in scan_dense_cuda.ROWS if columns * ceil_div(spec.seq_len, r) >= MULTIPROCESSORS
    ]
    rows = max(fit, default=scan_dense_cuda.ROWS[0])
    whole = scan_dense_cuda.estimated_cycles(spec, rows, False)
    segmented = scan_dense_cuda.estimated_cycles(spec, rows, True)
    before = whole if whole <= segmented else segmented - LAUNCH_CYCLES
    chain = 30 * (scan_dense_cuda.THREADS // spec.channels)
    waves = ceil_div(
        columns * ceil_div(spec.seq_len, rows), 8 * MULTIPROCESSORS
    )  # 8 blocks of a multiprocessor at the same time
    return waves * (before + chain + rows / AHEAD * ROUND_CYCLES + 10 * spec.channels)


def _attention_cycles(spec: AttentionSpec, q_len: int, k_len: int, instructions: int) -> float:
    if q_len == 1:  # a warp takes a key at a time
        return ceil_div(k_len, 8) * (spec.width / 32 * 8 + 150)
    return min(estimated_cycles(spec, q, c, instructions) for q in BLOCK_Q for c in COLUMNS)


@dataclasses.dataclass(frozen=True)
class EstimateReport:
    """Estimates of all kernels of a library's entries, as Markdown."""

    path: Path
    dtype: str
    shapes: list[list[int]]
    kernels: list[KernelEstimate]

    def totals(self, launch_us: float) -> list[float]:
        """Return us on each of `GPUS` for all calls, with what a launch costs."""
        return [
            sum(k.calls * (k.us[i] + k.launches * launch_us) for k in self.kernels)
            for i in range(len(GPUS))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-like values."""
        return {
            "kind": "estimate",
            "file": str(self.path),
            "dtype": self.dtype,
            "inputs": self.shapes,
            "gpus": [dataclasses.asdict(gpu) for gpu in GPUS],
            "launch_us": {"stream": LAUNCH_US, "graph": GRAPH_US},
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels],
            "total_us": {"stream": self.totals(LAUNCH_US), "graph": self.totals(GRAPH_US)},
        }

    def print(self, console: Console) -> None:
        """Print it for people, as a Markdown table."""
        lines = [
            f"Input {' and '.join(map(str, self.shapes))}, {self.dtype}; us a call, estimated, "
            "never measured.",
            "",
            "| kernel | calls | launches | MFLOP | MB | " + " | ".join(g.name for g in GPUS) + " |",
            "|---" * (5 + len(GPUS)) + "|",
        ]
        for k in self.kernels:
            times = " | ".join(f"{us:.1f}" for us in k.us)
            lines.append(
                f"| {k.name} | {k.calls} | {k.launches} | {k.flops / 1e6:.1f} | "
                f"{k.bytes / 1e6:.2f} | {times} |"
            )
        launches = sum(k.calls * k.launches for k in self.kernels)
        for name, cost in (("a stream", LAUNCH_US), ("a CUDA graph", GRAPH_US)):
            times = " | ".join(f"{us:.0f}" for us in self.totals(cost))
            lines.append(f"| all, launched from {name} | | {launches} | | | {times} |")
        for line in lines:
            console.print(line, soft_wrap=True, markup=False)


def estimate(path: Path) -> EstimateReport:
    """Estimate a library's kernels from its manifest.

    Raises
    ------
    ArtifactError
        If it is not a compiled model.
    MegaError
        If it is not for GPUs.
    """
    with open_artifact(path) as file:
        manifest = read_manifest_from(file, str(path))
    if manifest["target"]["kind"] != "cuda":
        raise MegaError(
            f"{path}: --estimate is for libraries for GPUs; this one is for "
            f"{manifest['target']['name']}: measure it with python -m mega_tvm.bench"
        )
    shapes, dtype = [entry["input"]["shape"] for entry in manifest["entries"]], manifest["dtype"]
    kernels = [kernel_estimate(kernel, dtype) for kernel in manifest["kernels"]]
    return EstimateReport(path, dtype, shapes, kernels)
