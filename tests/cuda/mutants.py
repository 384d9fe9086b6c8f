"""Faults put into generated kernels on purpose. Import only in the emulator's process."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from mega_tvm.tolerances import compare
from schedules.dense.cuda import tiles
from schedules.dense.cuda_tiles import Tile
from schedules.dense.naive import DenseSpec
from schedules.ema_scan.naive import EmaScanSpec
from schedules.ema_scan_dense.naive import EmaScanDenseSpec
from schedules.normed_dense.naive import NormedDenseSpec
from tests.cuda.fused_cases import normed_case, scan_dense_case
from tests.cuda.harness import Kernel, scheduled, stored_in_half
from tests.schedules.cases import Case, attention_case, attention_spec, dense_case, ema_case

Mutation = Callable[[str], str]


def case_of(kernel: str) -> tuple[Case, dict[str, int]]:
    """Return a case, and the decisions that replace defaults."""
    rng = np.random.default_rng(0)
    found = {
        "tiles": lambda: (
            dense_case(rng, DenseSpec((59,), 40, 33, residual=True)),
            {"tile": tiles().index(Tile(32, 16, 1, slices=1))},
        ),
        "slices": lambda: (
            dense_case(rng, DenseSpec((59,), 200, 33, residual=True)),
            {"tile": tiles().index(Tile(16, 16, 2, slices=4))},
        ),
        "few_rows": lambda: dense_case(rng, DenseSpec((3,), 40, 33)),
        "scan": lambda: ema_case(rng, EmaScanSpec(1, 59, 16)),
        "long_scan": lambda: (ema_case(rng, EmaScanSpec(1, 150, 16)), {"segment": 64}),
        "scan_dense": lambda: (
            scan_dense_case(rng, EmaScanDenseSpec(1, 59, 16, 40, residual=True)),
            {"segmented": 1},
        ),
        "attention": lambda: attention_case(rng, attention_spec(False, 1, 70, 70, 40)),
        "mma": lambda: stored_in_half(
            dense_case(rng, DenseSpec((59,), 200, 34, residual=True)), wide=[2]
        ),
        "mma_bfloat16": lambda: stored_in_half(
            normed_case(rng, NormedDenseSpec((59,), 72, 34)), wide=[2], dtype="bfloat16"
        ),
        "mma_attention_bfloat16": lambda: stored_in_half(
            attention_case(rng, attention_spec(False, 1, 70, 150, 72)), dtype="bfloat16"
        ),
        "mma_attention": lambda: stored_in_half(
            attention_case(rng, attention_spec(False, 1, 70, 150, 72))
        ),
        "row": lambda: attention_case(rng, attention_spec(False, 1, 1, 300, 40)),
    }[kernel]()
    return found if isinstance(found, tuple) else (found, {})


def without_barrier(number: int) -> Mutation:
    """Remove one barrier, counted from 0 in the text."""

    def mutate(source: str) -> str:
        parts = source.split("__syncthreads();")
        assert number < len(parts) - 1, f"the kernel has {len(parts) - 1} barriers"
        left, right = parts[: number + 1], parts[number + 1 :]
        return "__syncthreads();".join(left) + ";" + "__syncthreads();".join(right)

    return mutate


def replaced(pattern: str, by: str, number: int = 0) -> Mutation:
    """Replace one match of a pattern, counted from 0."""

    def mutate(source: str) -> str:
        head, kernel = source[: source.rindex('extern "C"')], source[source.rindex('extern "C"') :]
        matches = list(re.finditer(pattern, kernel))
        assert number < len(matches), f"{len(matches)} matches of {pattern}"
        match = matches[number]
        return head + kernel[: match.start()] + match.expand(by) + kernel[match.end() :]

    return mutate


def caught(kernel: str, mutation: Mutation) -> str | None:
    """Return how a mutant shows: by a report, or by its result; None if it does not."""
    case, decisions = case_of(kernel)
    mutant = Kernel(scheduled(case.func, **decisions), mutation)
    out, reports = mutant(case.inputs, case.expected.shape)
    if reports:
        return reports[0]
    parity = compare(out, case.expected, mutant.dtypes[-1], condition=case.condition)
    return None if parity.ok else str(parity)
