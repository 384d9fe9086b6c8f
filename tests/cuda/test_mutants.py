"""That the emulator notices: faults in generated kernels, each of which must show."""

from __future__ import annotations

import pytest

from tests.cuda.emulator.worker import in_emulator

# Every barrier of every kernel, by the number of barriers.
BARRIERS = {
    "tiles": 2, "few_rows": 1, "scan": 2, "long_scan": 2, "scan_dense": 2, "attention": 4, "row": 3,
}  # fmt: skip
# kernel, pattern, replacement, which match; what shows it
INDICES = {
    "a_row_too_many_read": ("tiles", r", 58\)", ", 59)", 1, "out of bounds"),
    "a_row_too_many_written": ("tiles", r"< 59\) \{", "< 60) {", 0, "out of bounds"),
    "vector_off_by_one": ("tiles", r"\(x_ptr \+ \(", "(x_ptr + (1 + ", 0, "misaligned"),
    "tile_off_by_one": ("tiles", r"ws0_ptr\[\(", "ws0_ptr[1 + (", 0, "out of bounds"),
    "a_step_too_few": ("tiles", r"pair < 3", "pair < 2", 0, "outside tolerance"),
    "a_column_too_many": ("few_rows", r"< 33\) \{", "< 34) {", 0, "data race"),
    "a_channel_too_many": ("scan", r"threadIdx\.x\) < 16\)", "threadIdx.x) < 17)", 0, ""),
    "a_step_too_many": ("long_scan", r", 149\)", ", 150)", 1, "out of bounds"),
    "the_wrong_segment": ("scan_dense", r"powf\((.*?), 0x", "powf(2 * (\\1), 0x", 0, "outside"),
    "the_wrong_lane": ("attention", r", 8, 32\)", ", 4, 32)", 0, "outside tolerance"),
    "a_lane_too_few": ("row", r", 16, 32\)", ", 0, 32)", 0, "outside tolerance"),
    "not_quite_causal": ("attention", r" <= ", " < ", 0, ""),
}


@pytest.mark.parametrize("kernel", BARRIERS)
@in_emulator
def test_every_barrier_is_needed(kernel: str) -> None:
    from tests.cuda.mutants import caught, without_barrier

    for number in range(BARRIERS[kernel]):
        found = caught(kernel, without_barrier(number)) or "nothing"
        assert "data race" in found or "never written" in found, f"barrier {number}: {found}"
    with pytest.raises(AssertionError, match=f"has {BARRIERS[kernel]} barriers"):
        caught(kernel, without_barrier(BARRIERS[kernel]))


@pytest.mark.parametrize("name", INDICES)
@in_emulator
def test_a_wrong_index_shows(name: str) -> None:
    from tests.cuda.mutants import caught, replaced

    kernel, pattern, by, number, how = INDICES[name]
    found = caught(kernel, replaced(pattern, by, number))
    assert found is not None and how in found, found


@pytest.mark.parametrize("kernel", BARRIERS)
@in_emulator
def test_the_kernel_itself_is_right(kernel: str) -> None:
    from tests.cuda.mutants import caught

    assert caught(kernel, lambda source: source) is None
