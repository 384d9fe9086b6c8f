"""Records at compile time: hit, miss and stale, and what is never applied."""

from __future__ import annotations

import dataclasses

import pytest
import tvm
import tvm_ffi

from mega_tvm.compiler import compile_model
from mega_tvm.errors import CompileError, TuningError
from mega_tvm.kernel_list import SCHEDULE_ATTR
from mega_tvm.pipeline import schedule_phase
from mega_tvm.tuning import lookup
from mega_tvm.tuning.log import append
from mega_tvm.tuning.lookup import TunedSchedules, find_logs
from mega_tvm.tuning.record import Record, TargetKey
from schedules.dense.naive import DenseSpec, dense
from schedules.gated_attention.naive import GatedAttentionSpec, gated_attention
from schedules.registry import generate, hand_schedule
from tests.compiler.models import mega
from tests.tuning.builders import dense_kernel, kernel_of, native, record, target_key

TARGET = native()


@pytest.fixture(scope="module")
def kernel():
    return dense_kernel()


@pytest.fixture
def write(tmp_path):
    """Write a log of these records and return its directory."""

    def write(*records, target=None):
        append(tmp_path / "log", target or target_key(), records, {"id": "x"})
        return tmp_path / "log"

    return write


def look_up(directory, func, threads: int = 1, in_pieces: bool = False):
    tuned = TunedSchedules(TARGET, threads, [directory])
    kernel = tuned.schedule("k", func, TARGET.tvm_target(), in_pieces=in_pieces)
    return kernel, tuned.outcomes["k"], tuned


def test_a_confirmed_record_is_replayed(write, kernel) -> None:
    directory = write(record(kernel, 1e-5, 2e-5, tile_m=3, block_m=24))
    found, outcome, tuned = look_up(directory, kernel.space.workload["main"])
    assert (outcome.kind, outcome.source, str(outcome)) == ("hit", "tuned", "hit")
    assert tuned.problems == []
    wanted = kernel.space.schedule({**kernel.space.hand, "tile_m": 3, "block_m": 24})
    target = TARGET.tvm_target()
    same = tvm_ffi.structural_equal
    assert same(found.func, generate(wanted.mod["main"], target).func)
    assert not same(found.func, hand_schedule(kernel.space.workload["main"], target).func)


def test_the_hand_schedule_may_be_the_best(write, kernel) -> None:
    directory = write(record(kernel, 1e-5, 1e-5))
    _, outcome, _ = look_up(directory, kernel.space.workload["main"])
    assert (outcome.kind, outcome.source) == ("hit", "hand")


def test_a_kernel_of_another_length_is_a_miss(write, kernel) -> None:
    directory = write(record(kernel, 1e-5, 2e-5, tile_m=3))
    _, outcome, _ = look_up(directory, dense(DenseSpec((1, 8), 13, 40)))
    assert (outcome.kind, outcome.source) == ("miss", "hand")
    assert str(outcome) == "miss (hand schedule)"


@pytest.mark.parametrize(("made", "wanted"), [(1, 2), (2, 1), (3, 2)])
def test_another_thread_count_is_a_miss(write, kernel, made, wanted) -> None:
    directory = write(record(dense_kernel(threads=made), 1e-5, 2e-5, tile_m=3))
    _, outcome, tuned = look_up(directory, kernel.space.workload["main"], wanted)
    assert outcome.kind == "miss"
    assert (tuned.digest is None) == (made > 1)  # one thread's may be for kernels in pieces


@pytest.mark.parametrize("threads", [1, 2])
def test_a_kernel_in_pieces_takes_the_records_of_one_thread(write, kernel, threads) -> None:
    directory = write(record(dense_kernel(threads=2), 1e-5, 3e-5, tile_m=2))
    func = kernel.space.workload["main"]
    _, outcome, _ = look_up(directory, func, threads, in_pieces=True)
    assert str(outcome) == "miss (hand schedule)"
    write(record(kernel, 1e-5, 2e-5, tile_m=3))
    found, outcome, _ = look_up(directory, func, threads, in_pieces=True)
    assert (str(outcome), outcome.source) == ("hit", "tuned")
    wanted = kernel.space.schedule({**kernel.space.hand, "tile_m": 3}).mod["main"]
    assert tvm_ffi.structural_equal(found.func, generate(wanted, TARGET.tvm_target()).func)


def test_the_digest_holds_what_kernels_in_pieces_may_take(write, kernel) -> None:
    directory = write(record(dense_kernel(threads=2), 1e-5, 2e-5, tile_m=3))
    digests = [TunedSchedules(TARGET, 2, [directory]).digest]
    for threads in (1, 3):
        write(record(dense_kernel(threads=threads), 1e-5, 2e-5, tile_m=3))
        digests.append(TunedSchedules(TARGET, 2, [directory]).digest)
    assert digests[0] != digests[1] == digests[2]


def test_a_record_that_was_not_confirmed_is_a_miss(write, kernel) -> None:
    directory = write(record(kernel, 1e-9, tile_m=3), record(kernel, None, tile_m=2))
    _, outcome, _ = look_up(directory, kernel.space.workload["main"])
    assert (outcome.kind, outcome.source) == ("miss", "hand")
    assert "2 trials, not confirmed" in outcome.detail


def test_a_record_by_other_versions_is_stale(write, kernel, monkeypatch) -> None:
    monkeypatch.setattr(
        "mega_tvm.tuning.record.made_by", lambda op, kind: "mega_tvm 0.0.9, tvm 0.26"
    )
    directory = write(record(kernel, 1e-5, 2e-5, tile_m=3))
    _, outcome, _ = look_up(directory, kernel.space.workload["main"])
    assert (outcome.kind, outcome.source) == ("stale", "hand")
    assert "made by other versions: mega_tvm 0.0.9, tvm 0.26" in str(outcome)


def test_a_record_with_a_value_that_is_no_candidate_any_more_is_stale(write, kernel) -> None:
    made = record(kernel, 1e-5, 2e-5, tile_m=3)
    text = made.record_json.replace("[1, 2, 3, 4,", "[1, 2, 33, 4,", 1)
    directory = write(Record.parse(made.key, made.workload_json, text))
    _, outcome, _ = look_up(directory, kernel.space.workload["main"])
    assert outcome.kind == "stale"


def test_a_record_of_a_kernel_that_computes_something_else_is_stale(write, kernel) -> None:
    """The same specification, another naive kernel: as after a change of ``naive.py``."""
    spec = DenseSpec((1, 257), 13, 40)
    changed = spec.attach(dense(dataclasses.replace(spec, sigmoid_from=0)))
    directory = write(record(kernel_of(changed), 1e-5, 2e-5, tile_m=3))
    _, outcome, _ = look_up(directory, kernel.space.workload["main"])
    assert (outcome.kind, outcome.source) == ("stale", "hand")
    assert "computes something else" in outcome.detail


def test_a_log_of_another_target_is_named_and_not_applied(write, kernel) -> None:
    foreign = TargetKey("llvm", "x86-64-v3", ("+foreign",))
    directory = write(target=foreign)
    _, outcome, tuned = look_up(directory, kernel.space.workload["main"])
    assert outcome.kind == "miss"
    assert "made for another target (x86-64-v3 +foreign" in tuned.problems[0]


def test_a_damaged_line_is_named(write, kernel) -> None:
    directory = write(record(kernel, 1e-5, 2e-5, tile_m=3), record(kernel, 2e-5))
    path = directory / "database_tuning_record.json"
    path.write_bytes(path.read_bytes()[:-50])
    _, outcome, tuned = look_up(directory, kernel.space.workload["main"])
    assert outcome.kind == "hit"
    assert any("database_tuning_record.json:2: damaged" in p for p in tuned.problems)


def test_a_kernel_without_decisions_is_a_hit(write, kernel) -> None:
    directory = write(record(kernel))
    func = gated_attention(GatedAttentionSpec(1, 1, 7, 40, 40, 40, 40, 40))
    _, outcome, _ = look_up(directory, func)
    assert str(outcome) == "hit (there is nothing to decide)"


def test_the_schedule_phase_notes_each_kernels_source(write, kernel) -> None:
    directory = write(record(kernel, 1e-5, 2e-5, tile_m=3))
    functions = {"a": kernel.space.workload["main"], "b": dense(DenseSpec((1, 8), 13, 40))}
    tuned = TunedSchedules(TARGET, 1, [directory])
    mod = schedule_phase(tvm.IRModule(functions), TARGET.tvm_target(), {}, tuned)
    assert {n: str(mod[n].attrs[SCHEDULE_ATTR]) for n in "ab"} == {"a": "tuned", "b": "hand"}


def test_the_digest_is_that_of_the_records(write, kernel, tmp_path) -> None:
    directory = write(record(kernel, 1e-5, 2e-5, tile_m=3))
    digest = TunedSchedules(TARGET, 1, [directory]).digest
    assert digest == TunedSchedules(TARGET, 1, [directory]).digest
    append(directory, target_key(), [record(kernel, 3e-5)], {"id": "y"})
    assert TunedSchedules(TARGET, 1, [directory]).digest != digest


def test_a_directory_without_a_log_is_an_error(tmp_path) -> None:
    with pytest.raises(TuningError, match="holds no tuning log; make one"):
        find_logs(TARGET, tmp_path)


def test_shipped_logs_are_found_by_target(tmp_path, kernel, monkeypatch) -> None:
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path)
    append(tmp_path / "this", target_key(), [], {"id": "x"})
    append(tmp_path / "other", TargetKey("llvm", "x86-64-v3", ("+foreign",)), [], {"id": "x"})
    (tmp_path / "notes").mkdir()
    assert find_logs(TARGET, None) == [tmp_path / "this"]


def test_strict_names_what_is_missing(write, kernel, tmp_path) -> None:
    phases = []
    options = {"tuning_log": write(record(kernel)), "strict": True, "output": tmp_path / "m.so"}
    options |= {"symbolic": False, "stream": False, "on_phase": phases.append}
    told = (
        r"strict: \d+ of \d+ kernels .* dense_1x24x13x16: miss .*\. "
        r"Tune them with python -m mega_tvm.tune --target native --threads 2, or"
    )
    with pytest.raises(CompileError, match=told):  # 48 frames: two pieces of 24 rows
        compile_model(mega(), seq_len=48, threads=2, **options)
    assert phases[-1] == "schedule"  # before the slow phases
    assert not (tmp_path / "m.so").exists()
