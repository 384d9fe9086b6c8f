"""Workloads, arithmetic, ceilings, timing and memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from mega_tvm.bench import ceilings, flops, measure, memory
from mega_tvm.bench.peers import Form
from mega_tvm.bench.workloads import WORKLOADS, Workload, random_params, select_workloads
from mega_tvm.targets import resolve_target
from reference import MegaConfig
from schedules.common.cpu_features import vector_unit

Tiny = Callable[..., Workload]


def test_groups_and_names_select_workloads_once() -> None:
    assert select_workloads("all") == list(WORKLOADS)
    assert [w.name for w in select_workloads("small,all")][:2] == ["small", "default"]
    with pytest.raises(ValueError, match="unknown workload 'smal'"):
        select_workloads("smal")


def test_reshaped_workload_is_named_for_its_shape() -> None:
    small = select_workloads("small")[0]
    assert small.reshaped(None, 16) is small
    assert small.reshaped(2, None).name == "small-B2-T16"


def test_random_params_leave_no_term_out() -> None:
    params = random_params(MegaConfig(13, hidden_size=24, num_layers=1))
    assert all(np.all(value != 0) and value.dtype == np.float32 for value in params.values())


def test_flops_of_the_default_model() -> None:
    default = select_workloads("default")[0]
    # The figures: about 430 MFLOP whole; the hand-pruned last block saves a fifth.
    assert flops.plain_flops(default, pruned=False) == pytest.approx(430e6, rel=0.01)
    assert flops.plain_flops(default, pruned=True) == pytest.approx(344e6, rel=0.01)


def test_executed_flops_count_calls() -> None:
    dense = {"op": "dense", "spec": {"lead": [2, 3], "k": 5, "n": 7}, "calls": 4}
    assert flops.executed_flops([dense]) == 4 * 2 * 6 * 5 * 7
    sizes = {"batch": 1, "q_len": 3, "k_len": 3, "width": 10, "value_width": 10}
    assert flops.kernel_flops("gated_attention", sizes) == 6 * 40
    assert flops.kernel_flops("laplace_attention", sizes) == 9 * 40
    assert flops.kernel_flops("gated_attention", {**sizes, "q_len": 1}) == 3 * 40
    assert flops.kernel_flops("layer_norm", {}) == 0


def test_fma_ceiling_is_a_loop_of_nothing_but_fmas() -> None:
    target = resolve_target("native").tvm_target()
    unit = vector_unit(target)
    registers = unit.registers - 4
    built = ceilings.build(ceilings.fma_kernel(1, unit.lanes, registers), target)
    loop = ceilings.innermost_loop(built.mod.inspect_source("asm"), "vfmadd")
    fmas = [line for line in loop if line.startswith("vfmadd") and "(" not in line]
    assert len(fmas) >= registers and len(fmas) % registers == 0
    # What else is there counts the steps: a decrement and a jump.
    assert len(loop) - len(fmas) <= 2, loop


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "FMA_STEPS", 1000)
    found = ceilings.measure_ceilings(1, repeats=1)
    assert found.fma_gflops > 1 and found.copy_gb_per_s > 0.1


def test_turns_are_interleaved_and_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SETTLE_S", 0)
    calls: list[str] = []

    def model(name: str) -> Callable[[np.ndarray], np.ndarray]:
        def call(x: np.ndarray) -> np.ndarray:
            calls.append(name)
            return x

        return call

    evictions: list[int] = []
    timings = measure.interleaved(
        {"a": model("a"), "b": model("b")},
        np.zeros(1),
        rounds=3,
        turn_s=0.0,
        limit_s=100,
        before=lambda: evictions.append(len(calls)),
    )
    # One call a turn: a b, b a, a b; the evictor ran before each (and twice to be timed).
    assert calls[-6:] == ["a", "b", "b", "a", "a", "b"]
    assert len(evictions) == 6 + 2
    assert timings["a"].calls == 3 and timings["a"].minimum_us <= timings["a"].median_us


def test_timing_summarizes() -> None:
    assert measure.Timing.of([3000, 1000, 2000]) == measure.Timing(1.0, 2.0, 3)


def test_memory_grows_with_the_scores(tiny: Tiny) -> None:
    # Eager, all scores of 1500 rows at once: at least 2 x 9 MB for scores and mask of one batch.
    found = memory.peak_memory("torch-eager", tiny(1500, batch=1), 1, False, Form("whole"))
    assert 9e6 < found["call_bytes"] < 200e6


def test_memory_of_a_failing_child_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(RuntimeError, match=r"memory of nothing: [\s\S]*KeyError: 'nothing'"):
        memory.peak_memory("nothing", tiny(), 1, False, Form("whole"))


def test_importing_the_package_loads_no_library() -> None:
    code = "import sys, mega_tvm.bench.__main__; print({'numpy','torch','tvm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
