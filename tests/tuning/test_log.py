"""Logs: what is written is read again, and what is damaged or foreign is named and skipped."""

from __future__ import annotations

import json
import multiprocessing

import pytest
from tvm.s_tir.meta_schedule.database import JSONDatabase

from mega_tvm.errors import TuningError
from mega_tvm.tuning import log as log_module
from mega_tvm.tuning.log import (
    METADATA,
    RECORDS,
    WORKLOADS,
    append,
    best_confirmed,
    keep_best,
    merge_logs,
    read_log,
)
from mega_tvm.tuning.record import TargetKey
from tests.tuning.builders import dense_kernel, norm_kernel, record, target_key

FOREIGN = TargetKey("llvm", "x86-64-v3", ("+foreign",))


@pytest.fixture(scope="module")
def kernels():
    return dense_kernel(), norm_kernel()


@pytest.fixture(scope="module")
def records(kernels):
    """A trial, a failed one and a confirmed one of each kernel."""
    made = []
    for kernel in kernels:
        made += [
            record(kernel, 3e-5),
            record(kernel, None),
            record(kernel, 2e-5, hand_seconds=3e-5),
        ]
    return made


@pytest.fixture
def directory(tmp_path, records):
    append(tmp_path / "log", target_key(), records, {"id": "one", "trials": 4})
    return tmp_path / "log"


def rewrite(path, change) -> None:
    """Change a file's lines behind the log's back."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))


def test_records_are_read_as_they_were_written(directory, records) -> None:
    log = read_log(directory)
    assert log.records == tuple(records)
    assert log.target == target_key()
    assert log.problems == ()
    failed = log.records[1]
    assert failed.seconds is None
    assert failed.error == "crashed"
    assert log.records[2].hand_seconds == pytest.approx(3e-5)


def test_an_error_with_quotes_and_lines_survives(kernels, tmp_path) -> None:
    kernel = kernels[1]
    odd = log_module.Record.make(
        kernel.space, kernel.space.hand, kernel.task.target.tvm_target(), None,
        error='it said "no"\\ \n and left',
    )  # fmt: skip
    append(tmp_path, target_key(), [odd], {"id": "one"})
    (found,) = read_log(tmp_path).records
    assert found.error == "it said 'no'/ and left"


def test_tvm_reads_the_database(directory, records, kernels) -> None:
    database = JSONDatabase(work_dir=str(directory))
    assert len(database) == len(records)
    assert database.has_workload(kernels[0].space.workload)


def test_a_second_append_keeps_what_is_there(directory, records, kernels) -> None:
    append(directory, target_key(), [record(kernels[0], 1e-6)], {"id": "two"})
    append(directory, target_key(), [], {"id": "one", "trials": 9})
    log = read_log(directory)
    assert len(log.records) == len(records) + 1
    assert {run["id"]: run.get("trials") for run in log.runs} == {"one": 9, "two": None}
    assert not [p for p in directory.iterdir() if p.name.startswith(".database")]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda line: line[: len(line) // 2], id="truncated"),
        pytest.param(lambda line: "{}\n", id="another-object"),
        pytest.param(lambda line: line.replace("SampleCategorical", "Sample"), id="other-trace"),
        pytest.param(lambda line: line.replace("[", "]", 1), id="not-json"),
        pytest.param(lambda line: line.replace("[0, ", "[99, ", 1), id="no-such-workload"),
        pytest.param(lambda line: line.replace("3e-05", "-1.0"), id="negative-time"),
    ],
)
def test_a_damaged_record_is_named_and_skipped(directory, records, damage) -> None:
    rewrite(directory / RECORDS, lambda lines: [damage(lines[0]), *lines[1:]])
    log = read_log(directory)
    # A line without its end swallows the next one.
    lost = len(records) - len(log.records)
    assert lost in (1, 2)
    assert log.records == tuple(records[lost:])
    assert any(f"{RECORDS}:1: damaged" in problem for problem in log.problems)
    assert any("SHA-256" in problem for problem in log.problems)


def test_a_last_line_cut_short(directory, records) -> None:
    path = directory / RECORDS
    path.write_bytes(path.read_bytes()[:-40])
    log = read_log(directory)
    assert log.records == tuple(records[:-1])
    assert f"{RECORDS}:{len(records)}: damaged" in log.problems[-1]


def test_a_damaged_workload_takes_its_records_along(directory, records) -> None:
    rewrite(directory / WORKLOADS, lambda lines: [lines[0][:500] + "\n", lines[1]])
    log = read_log(directory)
    assert log.records == tuple(records[3:])
    assert any(f"{WORKLOADS}:1: damaged" in problem for problem in log.problems)
    assert sum("its workload, line 1" in problem for problem in log.problems) == 3


def test_writing_drops_what_is_damaged(directory, records, kernels) -> None:
    rewrite(directory / RECORDS, lambda lines: ["nonsense\n", *lines[1:]])
    append(directory, target_key(), [record(kernels[0], 1e-6)], {"id": "two"})
    log = read_log(directory)
    assert log.problems == ()
    assert len(log.records) == len(records)


def test_a_record_of_another_target_is_named_and_skipped(directory, records) -> None:
    def change(lines):
        return [lines[0].replace("x86-64-v", "x86-64-w"), *lines[1:]]

    rewrite(directory / RECORDS, change)
    log = read_log(directory)
    assert log.records == tuple(records[1:])
    assert any("made for another target (x86-64-w" in problem for problem in log.problems)


def test_a_log_of_another_target_is_not_written_to(directory, kernels) -> None:
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(TuningError, match=r"is a log of target .*, not of x86-64-v3 \+foreign"):
        append(directory, FOREIGN, [record(kernels[0])], {"id": "two"})
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", "damaged", id="not-json"),
        pytest.param("[]", "damaged", id="a-list"),
        pytest.param('{"format_version": 1, "sha256": 3, "runs": []}', "damaged", id="no-digests"),
        pytest.param('{"format_version": 9, "sha256": {}, "runs": []}', "format 9", id="newer"),
        pytest.param(
            '{"format_version": 1, "sha256": {}, "runs": []}', "no target", id="no-target"
        ),
    ],
)
def test_bad_metadata(directory, text, message) -> None:
    (directory / METADATA).write_text(text)
    with pytest.raises(TuningError, match=message):
        read_log(directory)


def test_no_log(tmp_path) -> None:
    with pytest.raises(TuningError, match="holds no tuning log"):
        read_log(tmp_path / "none")


def _write_many(directory, kernel, name) -> None:
    for index in range(10):
        append(directory, target_key(), [record(kernel, 1e-5 + index * 1e-6)], {"id": name})


def test_two_processes_write_one_log(tmp_path, kernels) -> None:
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write_many, args=(tmp_path, kernel, name))
        for kernel, name in zip(kernels, "ab", strict=True)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / METADATA).exists():  # a reader in between sees a whole log
            assert read_log(tmp_path).problems == ()
    assert [writer.exitcode for writer in writers] == [0, 0]
    log = read_log(tmp_path)
    assert [sum(r.key == kernel.key for r in log.records) for kernel in kernels] == [10, 10]
    assert {run["id"] for run in log.runs} == {"a", "b"}


def test_a_lock_that_is_held(directory, kernels, monkeypatch) -> None:
    monkeypatch.setattr(log_module, "LOCK_SECONDS", 0.05)
    held = pytest.raises(TuningError, match="another process has been writing")
    with log_module._locked(directory), held:
        append(directory, target_key(), [record(kernels[0])], {"id": "two"})


def test_an_interrupt_while_writing_leaves_the_log_as_it_was(directory, records, monkeypatch):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(log_module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        append(directory, target_key(), records, {"id": "two"})
    monkeypatch.undo()
    assert read_log(directory).records == tuple(records)
    assert len(list(directory.iterdir())) == 4  # three files and the lock


def test_merge(directory, records, kernels, tmp_path) -> None:
    other = record(kernels[0], 1e-6)
    append(tmp_path / "b", target_key(), [other, records[0]], {"id": "two"})
    merged = merge_logs([directory, tmp_path / "b"], tmp_path / "all")
    assert merged.records == (*records, other)  # what both hold is there once
    assert read_log(tmp_path / "all").records == merged.records
    assert {run["id"] for run in merged.runs} == {"one", "two"}
    assert merge_logs([directory], tmp_path / "all").records == merged.records


def test_logs_of_different_targets_do_not_merge(directory, tmp_path) -> None:
    append(tmp_path / "b", FOREIGN, [], {"id": "two"})
    with pytest.raises(TuningError, match="different targets"):
        merge_logs([directory, tmp_path / "b"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_keep_best(directory, records, kernels) -> None:
    """A confirmed record stays, however fast a trial was; without one the fastest trial."""
    fast = record(kernels[0], 1e-9)
    append(directory, target_key(), [fast], {"id": "two"})
    assert keep_best(directory).records == (records[2], records[5])
    assert read_log(directory).records == (records[2], records[5])


def test_the_best_is_the_confirmed_one_with_the_largest_gain(kernels) -> None:
    slow_day = record(kernels[0], 4e-5, hand_seconds=6e-5)
    fast_day = record(kernels[0], 2e-5, hand_seconds=2.2e-5)
    trial = record(kernels[0], 1e-9)
    assert best_confirmed([fast_day, slow_day, trial]) is slow_day
    assert best_confirmed([trial]) is None


def test_a_record_says_by_what_it_was_made(directory, kernels) -> None:
    (record_line, *_) = (directory / RECORDS).read_text().splitlines()
    assert "tuning.made_by" in record_line
    assert json.loads((directory / METADATA).read_text())["target"]["kind"] == "llvm"
