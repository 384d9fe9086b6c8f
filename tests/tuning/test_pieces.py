"""Kernels in pieces: what is tuned for two threads, and a compile that takes it.

118 frames are two pieces of 59 rows, and 59 frames stay whole: kernels of 59 rows run on one thread
there, on two here.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json

import numpy as np
import pytest

import mega_tvm
from mega_tvm import compile as compile_command
from mega_tvm.artifact_format import read_manifest
from mega_tvm.errors import CompileError
from mega_tvm.passes.piece_kernels import SUFFIX
from mega_tvm.runtime import load
from mega_tvm.tolerances import assert_parity
from mega_tvm.tune import main
from mega_tvm.tuning import workers
from mega_tvm.tuning.limits import Limits
from mega_tvm.tuning.log import append, best_confirmed, read_log
from mega_tvm.tuning.lookup import ANY_SIZE
from mega_tvm.tuning.progress import Progress
from mega_tvm.tuning.record import Record
from mega_tvm.tuning.report import summary
from mega_tvm.tuning.search import Search
from mega_tvm.tuning.tasks import extract_kernels
from tests.compiler.models import float64, mega
from tests.tuning.builders import (
    ROOT,
    dense_kernel,
    native,
    norm_kernel,
    record,
    short_budget,
    target_key,
)

SIZES = {"embed_dim": 13, "hidden_size": 16, "ema_dim": 3, "num_layers": 2}
WHOLE, T = 59, 118


@pytest.fixture(scope="module")
def model():
    return mega(**SIZES)


def extracted(model, lengths, threads):
    shapes = {f"t{length}": (1, length, 13) for length in lengths}
    return extract_kernels(model, shapes, native(), threads)


@pytest.fixture(scope="module")
def kernels(model):
    return extracted(model, (WHOLE, T), 2)


def rows_of(kernel) -> int | None:
    lead = json.loads(kernel.key.spec).get("lead")
    return None if lead is None else lead[-1]


def test_kernels_in_pieces_run_on_one_thread(kernels) -> None:
    threads = {kernel.name: kernel.task.threads for kernel in kernels}
    assert len(threads) == len(kernels)
    assert set(threads.values()) == {1, 2}
    for kernel in kernels:
        whole = rows_of(kernel) != WHOLE or kernel.key.op != "dense"
        if kernel.name.endswith(SUFFIX):
            assert kernel.task.threads == 1
        elif whole and kernel.key.op != "layer_norm":  # attention and scan of 59, and last rows
            assert kernel.task.threads == 2
    assert all(kernel.task.target.num_cores == kernel.task.threads for kernel in kernels)


def test_a_kernel_of_both_is_two(kernels) -> None:
    by_key = collections.defaultdict(set)
    for kernel in kernels:
        by_key[kernel.key].add(kernel.task.threads)
    assert {kernel.key.op for kernel in kernels if by_key[kernel.key] == {1, 2}} == {
        "dense",
        "layer_norm",
    }


def test_attention_over_keys_of_any_number_is_none(kernels) -> None:
    attention = [kernel for kernel in kernels if kernel.key.op == "gated_attention"]
    assert [json.loads(kernel.key.spec)["k_len"] for kernel in attention] == [WHOLE]


def test_one_thread_makes_the_same_records(model, kernels) -> None:
    """Those of 59 rows, but for queries and values, which pieces project apart."""
    pieces = {kernel.key for kernel in kernels if kernel.task.threads == 1}
    alone = {kernel.key for kernel in extracted(model, (WHOLE,), 1)}
    assert len(pieces & alone) > len(pieces - alone) > 0
    assert {kernel.task.threads for kernel in extracted(model, (WHOLE, T), 1)} == {1}


@pytest.mark.parametrize(
    ("seq_len", "threads", "pieces", "in_a_row"),
    [(T, 2, 2, 1), (96, 2, 4, 2), (2304, 2, 9, 5), (2048, 1, 8, 8)],
)
def test_calls_are_one_for_each_piece(seq_len, threads, pieces, in_a_row) -> None:
    found = extracted(mega(**{**SIZES, "num_layers": 1}), (seq_len,), threads)
    calls = {k.name: (k.calls, k.in_a_row) for k in found}
    (projection,) = (name for name in calls if f"x{seq_len // pieces}x13x16" in name)
    assert calls[projection] == (pieces, in_a_row)
    assert calls[f"ema_scan_1x{seq_len}x3"] == (1, 1)  # whole


@pytest.fixture(scope="module")
def log(model, kernels, tmp_path_factory):
    """A log of the command's own for two threads, and a better record of each kernel in pieces."""
    directory = tmp_path_factory.mktemp("tuning") / "log"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setattr(workers, "Pool", functools.partial(workers.Pool, on_start=short_budget))
        for name in ("FIRST_BATCH", "FINALISTS"):
            patch.setattr(f"mega_tvm.tuning.session.{name}", 1)
        argv = [*options, f"--seq-len={WHOLE},{T}", "--threads=2", f"--trials={len(kernels)}"]
        assert main([*argv, "--workers=1", f"--tuning-log={directory}"]) == 0
    better = []
    for kernel in kernels:
        if kernel.task.threads == 1:
            others = {name: values[-1] for name, values in kernel.space.candidates.items()}
            target = kernel.task.target.tvm_target()
            better.append(Record.make(kernel.space, others, target, 1e-6, hand_seconds=9e-6))
    append(directory, target_key(), better, {"id": "a longer tuning"})
    return directory


def test_a_tuning_for_two_threads_has_a_record_of_each_kernel(log, kernels) -> None:
    records = read_log(log).records
    for kernel in kernels:
        case = (kernel.key, kernel.task.threads)
        assert best_confirmed(r for r in records if (r.key, r.threads) == case) is not None


@pytest.fixture(scope="module")
def compiled(model, log, tmp_path_factory):
    found = []
    path = mega_tvm.compile_model(
        model, output=tmp_path_factory.mktemp("compiled") / "m.so", seq_len=[WHOLE, T], threads=2,
        tuning_log=log, strict=True, symbolic=False, stream=False, on_tuning=found.append,
    )  # fmt: skip
    return path, found[0]


def test_a_strict_compile_finds_them(compiled, kernels) -> None:
    path, tuned = compiled
    outcomes = tuned.outcomes
    assert {outcome.kind for outcome in outcomes.values()} == {"hit", ANY_SIZE}
    (keys,) = (name for name in outcomes if "xkeysx" in name)
    assert str(outcomes[keys]) == "any size (hand schedule)"
    manifest = read_manifest(path)
    assert manifest["tuning"] == {"log": tuned.digest, "threads": 2}
    sources = {kernel["name"]: kernel["schedule"] for kernel in manifest["kernels"]}
    for kernel in kernels:
        if kernel.task.threads == 1:
            assert sources[kernel.name] == "tuned"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seq_len", [WHOLE, T])
def test_its_library_computes_the_same(compiled, model, seq_len, threads) -> None:
    x = np.random.default_rng(0).standard_normal((1, seq_len, 13), dtype=np.float32)
    assert_parity(load(compiled[0], num_threads=threads)(x), float64(model, x))


def test_streams_and_windows_have_no_other_kernels(model, log, compiled, tmp_path) -> None:
    """But those of any size."""
    found = {}

    def stop(tuned):
        found.update(tuned.outcomes)
        raise CompileError("that is all")

    with pytest.raises(CompileError, match="that is all"):
        mega_tvm.compile_model(
            model, output=tmp_path / "m.so", seq_len=T, threads=2, tuning_log=log,
            symbolic=False, on_tuning=stop,
        )  # fmt: skip
    assert {outcome.kind for outcome in found.values()} == {"hit", ANY_SIZE}
    of_known_size = {name for name, outcome in found.items() if outcome.kind == "hit"}
    entries = {name.removesuffix(SUFFIX) for name in compiled[1].outcomes}
    assert of_known_size and of_known_size < entries
    assert any("_carried" in name for name in found)


def test_without_records_a_kernel_in_pieces_is_a_miss(log, tmp_path, monkeypatch, capsys) -> None:
    """All of the log but one thread's: a strict compile names each kernel, and what to run."""
    monkeypatch.chdir(tmp_path)
    two = [r for r in read_log(log).records if r.threads == 2]
    append(tmp_path / "two", target_key(), two, {"id": "two"})
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    argv = [*options, f"--seq-len={WHOLE},{T}", "--tuning-log=two", "--strict", "-o", "m.so"]
    argv += ["--no-symbolic", "--no-stream"]
    assert compile_command.main([*argv, "--threads=2"]) == 2
    out, error = capsys.readouterr()
    assert f"  kernel dense_1x59x13x16{SUFFIX}: miss (hand schedule)\n" in out
    assert "  kernel dense_1x59x13x16: hit" in out
    error = " ".join(error.split())
    assert f"dense_1x59x13x16{SUFFIX}: miss (hand schedule)" in error
    assert "Tune them with python -m mega_tvm.tune --target native --threads 2, or" in error
    assert not (tmp_path / "m.so").exists()


def test_the_summary_takes_each_kernels_thread_count() -> None:
    """The ceiling is of as many threads, and calls side by side count once in the sum."""
    found = []
    for kernel, in_a_row in ((norm_kernel(), 3), (dense_kernel(threads=2), 6)):
        kernel = dataclasses.replace(kernel, calls=6, in_a_row=in_a_row)
        confirmed = record(kernel, 1e-5, 2e-5)
        found.append(Progress(kernel, Search(kernel.space, 0), confirmed=confirmed))
    slow = Limits(16, 100.0, (1.0, 1.0), 1.0, copy_gb_per_s=0.064, read_gb_per_s=100.0)
    fast = Limits(16, 100.0, (1.0, 1.0), 1.0, copy_gb_per_s=100.0, read_gb_per_s=0.416)
    table = summary(found, {1: slow, 2: fast})
    columns = [column.cells for column in table.columns]
    rows = {name: cells for name, *cells in zip(*columns, strict=True)}
    assert rows["layer_norm"] == ["1", "6", "0", "20.00", "hand", "+100.0%", "50% copy"]
    assert rows["dense"] == ["2", "6", "0", "20.00", "hand", "+100.0%", "50% weights"]
    assert rows["all calls"] == ["", "12", "0", "180.0", "90.0", "+100.0%", ""]
