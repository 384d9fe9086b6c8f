"""What a kernel has to do at least, and what bounds it."""

from __future__ import annotations

import dataclasses

import pytest

from mega_tvm.bench import ceilings
from mega_tvm.tuning import distance_rate, limits, pair_rate
from mega_tvm.tuning.limits import Limits, Work, bound, ceiling, work_of
from schedules.dense.naive import DenseSpec
from schedules.ema_scan.naive import EmaScanSpec
from schedules.laplace_attention.cpu import DIFFERENCE, L1_FORMS, MAXIMUM
from schedules.layer_norm.naive import LayerNormSpec
from tests.schedules.assembly import assert_in_pairs, inner_loops
from tests.schedules.cases import attention_spec
from tests.schedules.harness import LEVELS, assembly_of, compiled, cpu_target


def _work(op: str, spec: object, **decisions: int) -> Work:
    found = work_of(op, dataclasses.asdict(spec), 16, decisions)
    assert found is not None
    return found


def test_dense_counts_products_epilogue_and_bytes() -> None:
    plain = _work("dense", DenseSpec((2, 3), 8, 32))
    assert plain == Work(6 * 8 * 32 / 16, 4 * 6 * (8 + 32), 4 * 8 * 32)
    swiglu = _work("dense", DenseSpec((2, 3), 8, 32, swiglu=True))
    assert swiglu.vectors - plain.vectors == 6 * limits.SWIGLU  # 16 units: a vector a row
    sigmoid = _work("dense", DenseSpec((2, 3), 8, 32, sigmoid_from=16))
    assert sigmoid.vectors - plain.vectors == 6 * limits.SIGMOID
    paired = _work("dense", DenseSpec((2, 3), 48, 32, paired=True, sigmoid_from=16))
    scaling = 6 * (48 * 7 / 3 + 32 * 2) / 16
    assert paired.vectors == pytest.approx(6 * limits.SIGMOID + scaling)
    assert paired.pairs == 6 * 48 * 32 / 16
    few = _work("dense", DenseSpec((1, 3), 48, 32, paired=True))
    assert (few.vectors, few.pairs) == (3 * 48 * 32 / 16, 0)
    residual = _work("dense", DenseSpec((2, 3), 8, 32, residual=True))
    assert residual.activations - plain.activations == 4 * 6 * 32


def test_attention_counts_whole_vectors_of_seen_keys() -> None:
    spec = attention_spec(False, 1, 17, 17, 32)
    scored, shuffles = 16 + 2, 17 * 32 / 16 * 4
    expected = scored * (32 + limits.EXP) + 17 * 18 / 2 * 2 + 17 * 2 + shuffles
    assert _work("gated_attention", spec).vectors == expected
    every = _work("laplace_attention", attention_spec(True, 1, 17, 17, 32), l1_form=MAXIMUM)
    assert every.vectors == 34 * limits.LAPLACE + 17 * 17 * 2 + 17 * 2 + shuffles
    assert (every.distances, every.l1_form) == (34 * 32, MAXIMUM)
    row = _work("gated_attention", attention_spec(False, 2, 1, 17, 32))
    assert row.vectors == pytest.approx(2 * 17 * (64 + limits.EXP) / 16)
    distant = _work("laplace_attention", attention_spec(True, 2, 1, 17, 32))
    assert distant.vectors == pytest.approx(2 * 17 * (32 + limits.LAPLACE) / 16)
    assert (distant.distances, distant.l1_form) == (2 * 17 * 32 / 16, DIFFERENCE)


def test_layer_norm_and_scan_count_products_and_bytes() -> None:
    spec = LayerNormSpec((2, 3), 32, 1e-5, affine=False)
    assert _work("layer_norm", spec) == Work(6 * 2 * 2, 8 * 6 * 32)
    affine = _work("layer_norm", dataclasses.replace(spec, affine=True))
    assert affine.vectors == 6 * 3 * 2
    assert _work("ema_scan", EmaScanSpec(2, 5, 32)) == Work(2 * 5 * 2, 8 * 2 * 5 * 32)


@pytest.mark.parametrize(
    ("work", "seconds", "name"),
    [
        (Work(vectors=1e9, activations=1.0, weights=1.0), 0.32, "FMA"),
        (Work(vectors=1e9, distances=1e9), 0.82, "FMA"),
        (Work(vectors=1e9, distances=1e9, l1_form=MAXIMUM), 0.57, "FMA"),
        (Work(vectors=1e9, pairs=1e9), 0.52, "FMA"),
        (Work(vectors=1.0, activations=1e9, weights=1e9), 0.05, "weights"),
        (Work(vectors=1.0, activations=1e9, weights=1e6), 0.01, "copy"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_the_largest_of_three_bounds_a_kernel(work: Work, seconds: float, name: str) -> None:
    rates = Limits(
        lanes=16,
        fma_gflops=100,
        distances=(2.0, 4.0),
        pairs=5.0,
        copy_gb_per_s=100,
        read_gb_per_s=20,
    )
    found = bound(work, rates)
    assert found == (pytest.approx(seconds), name)


def test_one_thread_may_be_done_before_two_have_started() -> None:
    one = Limits(16, 100.0, (1.0, 1.0), 1.0, copy_gb_per_s=100.0, read_gb_per_s=10.0)
    limits = {1: one, 2: dataclasses.replace(one, read_gb_per_s=20.0, region_s=1e-6)}
    small, large = Work(weights=1e4), Work(weights=1e5)
    assert ceiling(small, limits, 2) == (pytest.approx(1e-6), "weights")
    assert ceiling(large, limits, 2) == (pytest.approx(6e-6), "weights")
    assert ceiling(large, limits, 1) == (pytest.approx(1e-5), "weights")


@pytest.mark.parametrize("mcpu", list(LEVELS))
def test_distances_add_up_in_registers(mcpu: str) -> None:
    """The rate is that of what a distance takes, and of nothing else."""
    target = cpu_target(mcpu)
    for form, accumulate in enumerate(L1_FORMS):
        func = distance_rate.distance_kernel(1, target, accumulate)
        loops = [
            loop for loop in inner_loops(assembly_of(compiled(func, target))) if loop.fma_count
        ]
        (loop,) = loops
        assert not loop.faults() and not loop.reloads(), str(loop)
        assert len(loop.arithmetic) == (2 if form == MAXIMUM else 3) * loop.fma_count, str(loop)


def test_pairs_add_up_in_registers() -> None:
    """The loop of a kernel's tile, but for its loads of weights."""
    text = assembly_of(compiled(pair_rate.pair_kernel(1), cpu_target("x86-64-v4")))
    assert_in_pairs(max(inner_loops(text), key=lambda loop: loop.fma_count))


def test_kernels_without_a_model_have_no_ceiling() -> None:
    assert work_of("cached_attention", {}, 16) is None


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "FMA_STEPS", 1000)
    monkeypatch.setattr(limits, "COLD_BYTES", 1 << 20)
    monkeypatch.setattr(distance_rate, "PASSES", 2)
    monkeypatch.setattr(pair_rate, "PASSES", 2)
    found = limits.measure_limits(1)
    assert len(found.distances) == 2 and min(found.distances) > 0.01
    assert (found.pairs > 0.01) == (found.lanes == 16)
    assert found.region_s == 0
    assert limits._region_seconds(cpu_target("x86-64-v3"), 2)() > 0
    assert found.fma_gflops > 1 and found.copy_gb_per_s > 0.1 and found.read_gb_per_s > 0.1


def test_a_disturbed_measurement_is_made_again() -> None:
    """Twice as long for a while, then right: what two measurements agree on counts."""
    times = iter([2.0, 2.0, 1.0, 1.3, 1.01, 9.0])
    assert ceilings.agreed(lambda: next(times), pause_s=0) == 1.0
    assert list(times) == [9.0]
    calls: list[int] = []

    def never() -> float:
        calls.append(1)
        return 1.0 / len(calls)

    assert ceilings.agreed(never, most=4, pause_s=0) == 0.25
