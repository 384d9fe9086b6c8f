"""That the emulator notices: faults in generated kernels, each of which must show."""

from __future__ import annotations

import pytest

from tests.cuda.emulator.worker import in_emulator

# Every barrier of every kernel, by the number of barriers.
BARRIERS = {
    "tiles": 2,
    "slices": 3,
    "few_rows": 1,
    "scan": 2,
    "long_scan": 2,
    "scan_dense": 2,
    "attention": 4,
    "row": 3,
    "mma": 1,
    "mma_attention": 4,
}
# kernel, pattern, replacement, which match; what shows it
INDICES = {
    "a_row_too_many_read": ("tiles", r", 58\)", ", 59)", 1, "out of bounds"),
    "a_row_too_many_written": ("tiles", r"< 59\) \{", "< 60) {", 0, "out of bounds"),
    "vector_off_by_one": ("tiles", r"\(x_ptr \+ \(", "(x_ptr + (1 + ", 0, "misaligned"),
    "tile_off_by_one": ("tiles", r"\(stage0_ptr \+ \(", "(stage0_ptr + (4 + ", 0, "out of bounds"),
    "a_step_too_few": ("tiles", r"pair < 3", "pair < 2", 0, "outside tolerance"),
    "a_slice_not_added": ("slices", r"\+ 256\)\]", "+ 128)]", 0, "outside tolerance"),
    "rows_of_another_slice": (
        "slices",
        r"threadIdx\.x\) >> 5\) \* 160",
        "threadIdx.x) >> 6) * 160",
        1,
        "outside tolerance",
    ),
    "a_slice_not_stored": ("slices", r"32 <= \(\(int\)threadIdx", "64 <= ((int)threadIdx", 0, ""),
    "a_column_too_many": ("few_rows", r"< 33\) \{", "< 34) {", 0, "data race"),
    "a_channel_too_many": ("scan", r"threadIdx\.x\) < 16\)", "threadIdx.x) < 17)", 0, ""),
    "a_step_too_many": ("long_scan", r", 149\)", ", 150)", 1, "out of bounds"),
    "the_wrong_segment": ("scan_dense", r"powf\((.*?), 0x", "powf(2 * (\\1), 0x", 0, "outside"),
    "the_wrong_lane": ("attention", r", 8, 32\)", ", 4, 32)", 0, "outside tolerance"),
    "a_lane_too_few": ("row", r", 16, 32\)", ", 0, 32)", 0, "outside tolerance"),
    "a_copy_not_waited_for": (
        "mma",
        r"mega_wait_copies\(2\);",
        "",
        0,
        "an asynchronous copy is still filling",
    ),
    "a_copy_waited_for_too_late": (
        "mma",
        r"mega_wait_copies\(2\);",
        "mega_wait_copies(3);",
        0,
        "is still filling",
    ),
    "copies_of_two_steps_in_a_group": ("mma", r"mega_commit_copies\(\);", "", 1, "still filling"),
    "the_wrong_fragment": ("mma", r"(mega_mma_\w+\(.*), 2\);", r"\1, 0);", 0, "outside tolerance"),
    "rows_in_another_order": (
        "mma",
        r"mega_load_matrices\(a_ptr, 0, xs_ptr, \(",
        "mega_load_matrices(a_ptr, 0, xs_ptr, 8 ^ (",
        0,
        "outside tolerance",
    ),
    "values_not_waited_for": ("mma_attention", r"mega_wait_copies\(2\);", "", 1, "still filling"),
    "keys_of_another_half": (
        "mma_attention",
        r"(mega_mma_\w+\(s_ptr.*), 2\);",
        r"\1, 0);",
        0,
        "outside tolerance",
    ),
    "values_not_turned": ("mma_attention", "_transposed", "", 0, "outside tolerance"),
    "a_sum_of_too_few_lanes": (
        "mma_attention",
        r"(total_ptr\S* \+ __shfl\w+\(.*), 2, 32\)",
        r"\1, 0, 32)",
        0,
        "outside tolerance",
    ),
    "a_key_too_many": ("mma_attention", r" <= ", " <= 1 + ", 9, "outside tolerance"),
    # Of the other half type; products of bfloat16 taken for float16 are nearly 0.
    **{
        f"{what}_of_float16": (
            kernel,
            f"mega_{call}_bfloat16",
            f"mega_{call}_float16",
            0,
            "outside",
        )
        for what, kernel, call in (
            ("a_product", "mma_bfloat16", "mma"),
            ("a_normalized_fragment", "mma_bfloat16", "normalize"),
            ("scores", "mma_attention_bfloat16", "mma"),
        )
    },
    "a_row_too_many_copied": ("mma", r"< 59\)", "< 60)", 0, "out of bounds"),
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
