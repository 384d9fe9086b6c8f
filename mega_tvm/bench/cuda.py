"""The benchmark on a GPU: every contestant on every workload, in one process, by CUDA events."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..dtypes import FLOAT32
from ..tolerances import TOLERANCES
from .ceilings import Ceilings
from .cuda_clock import Clock, L2Evictor
from .cuda_peers import OURS, PEERS, Call
from .measure import Timing
from .oracle import TOLERANCE, expected_output, relative_error
from .runner import Row, with_rates
from .workloads import Workload, random_input, random_params

WARMUP_CALLS = 3
CALLS_A_TURN = 50


@dataclasses.dataclass(frozen=True)
class CudaCeilings(Ceilings):
    """What the GPU does at most, measured: fp32 and fp16 by PyTorch's own large products."""

    fp16_gflops: float


def why_no_device() -> str | None:
    """Return why nothing can be measured on a GPU here, or None if it can."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA; install one that is, as pytorch.org says"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU or driver on this machine"
    from mega_tvm.cuda.lowering import device_present

    if not device_present():
        return "TVM's CUDA runtime finds no GPU: it needs a driver for CUDA 13 and libcudart.so.13"
    return None


def measure_ceilings(
    clock: Clock, device: str = "cuda", size: int = 8192, bytes_: int = 1 << 30, repeats: int = 10
) -> CudaCeilings:
    """Measure products of ``size`` by ``size`` matrices, and a copy of ``bytes_``: the best."""
    torch.set_float32_matmul_precision("highest")

    def best_s(call: Callable[[], object]) -> float:
        call()
        return min(clock.times(call, repeats)) / 1e9

    def product_gflops(dtype: torch.dtype) -> float:
        a, b = (torch.ones((size, size), dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * size**3 / best_s(lambda: torch.mm(a, b, out=out)) / 1e9

    source = torch.zeros(bytes_, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = best_s(lambda: target.copy_(source))
    return CudaCeilings(
        fma_gflops=product_gflops(torch.float32),
        fp16_gflops=product_gflops(torch.float16),
        copy_gb_per_s=2 * bytes_ / copy_s / 1e9,
    )


def run(
    workloads: Sequence[Workload],
    peers: Sequence[str],
    clock: Clock,
    ceilings: CudaCeilings,
    reproduce: Callable[[Workload, str], str],
    *,
    rounds: int,
    cold: bool,
    dtype: str = FLOAT32,
    device: str = "cuda",
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Measure all peers on all workloads; each output is checked against the oracle first.

    Rates of a half type are shares of the fp16 product's, at which GPUs multiply bfloat16 too.

    Returns
    -------
    list of Row
        In the order of workloads and peers; of PyTorch also the graph that is pruned by hand.
    """
    evict = L2Evictor(device) if cold else None
    item, tolerance = 4, TOLERANCE
    if dtype != FLOAT32:
        item, tolerance = 2, TOLERANCES[dtype].max_abs
        ceilings = dataclasses.replace(ceilings, fma_gflops=ceilings.fp16_gflops)
    rows: list[Row] = []
    for workload in workloads:
        params, x = random_params(workload.config), random_input(workload)
        say(f"{workload.name}: oracle")
        expected = expected_output(workload, params, x)
        on_device = torch.from_numpy(x).to(device)
        calls: dict[int, Call] = {}
        for name in peers:
            for pruned in (False,) if name == OURS else (False, True):
                row = Row(workload.name, name, pruned, reproduce=reproduce(workload, name))
                say(f"{workload.name}: preparing {row.name}")
                try:
                    call = PEERS[name](workload, params, pruned, device, dtype)
                    error = relative_error(_on_cpu(call(on_device)), expected)
                except Exception as fault:  # a peer's failure is a row, whatever it raises
                    reason = f"{type(fault).__name__}: {str(fault).strip()[:200]}"
                    rows.append(dataclasses.replace(row, skipped=reason))
                    continue
                if error > tolerance:
                    reason = f"wrong output, error {error:.1e} > {tolerance:.0e}"
                    rows.append(dataclasses.replace(row, skipped=reason))
                    continue
                calls[len(rows)] = call
                rows.append(dataclasses.replace(row, error=error, form=dtype))
        say(f"{workload.name}: measuring {len(calls)} contestants")
        warm = _interleaved(calls, on_device, clock, rounds, None)
        emptied = _interleaved(calls, on_device, clock, rounds, evict) if evict else {}
        weight_bytes = item * sum(value.size for value in params.values())
        for index, timing in warm.items():
            row = dataclasses.replace(rows[index], warm=timing, cold=emptied.get(index))
            rows[index] = with_rates(row, workload, calls[index], weight_bytes, ceilings)
    return rows


def _interleaved(
    calls: dict[int, Call],
    x: torch.Tensor,
    clock: Clock,
    rounds: int,
    before: Callable[[], object] | None,
) -> dict[int, Timing]:
    """Time all contestants turn by turn; each round starts with another."""
    times: dict[int, list[int]] = {index: [] for index in calls}
    order = list(calls)
    for number in range(rounds if order else 0):
        first = number % len(order)
        for index in order[first:] + order[:first]:
            call = calls[index]
            clock.times(lambda call=call: call(x), WARMUP_CALLS)  # type: ignore[misc]
            times[index] += clock.times(
                lambda call=call: call(x),  # type: ignore[misc]
                CALLS_A_TURN,
                before,
            )
    return {index: Timing.of(found) for index, found in times.items()}


def _on_cpu(y: Any) -> Any:
    return torch.utils.dlpack.from_dlpack(y).cpu().numpy().copy()
