"""Tuning for GPUs, on the emulated one: local, in a fleet on loopback, and what a compile takes."""

from __future__ import annotations

import pytest

from tests.cuda.emulator.worker import in_emulator


@in_emulator
def test_every_candidate_is_checked_and_timed() -> None:
    """The operands of each op agree with its schedules; the emulated clock tells candidates."""
    from mega_tvm.tuning.trial import Loaded, build_candidate, task_operands
    from schedules.common.storage import stored_as
    from schedules.dense.naive import DenseSpec, dense
    from schedules.ema_scan.naive import EmaScanSpec, ema_scan
    from schedules.ema_scan_dense.naive import EmaScanDenseSpec, ema_scan_dense
    from schedules.gated_attention.naive import GatedAttentionSpec, gated_attention
    from schedules.laplace_attention.naive import LaplaceAttentionSpec, laplace_attention
    from schedules.normed_dense.naive import NormedDenseSpec, normed_dense
    from tests.tuning.cuda_builders import emulated_environment, few_runs, kernel_of

    few_runs()
    sizes = {"batch": 1, "q_len": 7, "k_len": 7, "width": 13, "value_width": 13}
    split = {"q_stride": 13, "k_stride": 13, "v_stride": 13, "gate_stride": 13}
    functions = {
        "dense": dense(DenseSpec((1, 7), 13, 40, residual=True)),
        "normed": normed_dense(NormedDenseSpec((1, 9), 24, 2 * 23, swiglu=True)),
        "clamped": normed_dense(NormedDenseSpec((2,), 40, 7, clamp_variance=True)),
        "scan": ema_scan(EmaScanSpec(2, 59, 3)),
        "scan-dense": ema_scan_dense(EmaScanDenseSpec(1, 59, 3, 13, residual=True)),
        "gated": gated_attention(GatedAttentionSpec(**sizes, **split)),
    }
    functions |= {
        "half dense": stored_as(
            dense(DenseSpec((1, 19), 13, 40)), ["bfloat16", "bfloat16", "float32", "bfloat16"]
        ),
        "half gated": stored_as(functions["gated"], ["bfloat16"] * 5),
        "half laplace": stored_as(
            laplace_attention(LaplaceAttentionSpec(**sizes, **split)), ["float16"] * 5
        ),
    }
    with emulated_environment():
        for name, func in functions.items():
            kernel = kernel_of(func, name)
            operands = task_operands(kernel.task)
            candidate = build_candidate(kernel.task, kernel.space.hand, operands)
            seconds = Loaded.here(candidate, operands).measure(0.001)
            assert 2e-6 < seconds < 1e-3, f"{name}: {seconds}"


@in_emulator
def test_a_wrong_expectation_is_noticed() -> None:
    import dataclasses

    import numpy as np
    import pytest

    from mega_tvm.tuning.trial import Loaded, WrongResultError, build_candidate, task_operands
    from schedules.normed_dense.naive import NormedDenseSpec, normed_dense
    from tests.tuning.cuda_builders import emulated_environment, kernel_of

    kernel = kernel_of(normed_dense(NormedDenseSpec((3,), 40, 7)))
    right = task_operands(kernel.task)
    expected = right.expected.copy()
    expected.flat[-1] += 1e-3
    assert np.isfinite(expected).all()
    with emulated_environment():
        candidate = build_candidate(kernel.task, kernel.space.hand, right)
    with pytest.raises(WrongResultError, match="outside tolerance"):
        Loaded.here(candidate, dataclasses.replace(right, expected=expected)).check()


@in_emulator
def test_faulty_candidates_harm_nobody() -> None:
    from mega_tvm.tuning.workers import Pool
    from schedules.layer_norm.naive import LayerNormSpec, layer_norm
    from tests.tuning.cuda_builders import emulated_environment, install_faults, kernel_of

    kernel = kernel_of(layer_norm(LayerNormSpec((2, 7), 40, 1e-5, affine=False)), "layer_norm")
    candidates = [{"warps": warps} for warps in (2, 4, 8, 1)]
    with emulated_environment(), Pool(1, workers=1, on_start=install_faults) as pool:
        wrong, no_tile, crash, right = pool.measure(kernel.task, candidates)
    assert "wrong result" in wrong.error
    assert "no such tile" in no_tile.error
    assert "crashed" in crash.error
    assert right.error is None and right.seconds > 0


@pytest.mark.parametrize("fleet", [False, True], ids=["local", "fleet"])
@in_emulator
def test_a_tuning_and_the_compile_that_uses_it(fleet: bool) -> None:
    """The command, from its start to a strict compile; then what has no record, and what is old."""
    import tempfile
    from pathlib import Path

    from tests.tuning.cuda_command import run_tuning_and_compiles

    with tempfile.TemporaryDirectory() as folder:
        run_tuning_and_compiles(Path(folder), fleet)


def test_no_device_is_told(tmp_path, capsys) -> None:
    from mega_tvm.tune import main
    from tests.cuda.devices import why_no_gpu

    if not why_no_gpu():
        pytest.skip("there is a CUDA device here")
    log = tmp_path / "log"
    assert main(["--target", "cuda", "--tuning-log", str(log)]) == 2
    assert "no CUDA device here; give --tracker HOST:PORT --key K" in capsys.readouterr().err
    assert not log.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "cuda-sm_80+sm_90"], "target cuda-sm_80+sm_90 is of several archs"),
        (["--target", "cuda", "--threads", "2"], "--threads is for CPUs"),
        (["--target", "cuda-sm_75"], "names sm_75, which is not supported"),
        (["--target", "x86-64-v3", "--dtype", "bfloat16"], "bfloat16 is for GPUs, --target cuda"),
    ],
    ids=["archs", "threads", "unsupported", "dtype"],
)
def test_arguments_that_are_refused(arguments, message, tmp_path, capsys) -> None:
    from mega_tvm.tune import main

    log = tmp_path / "log"
    assert main([*arguments, "--tuning-log", str(log)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not log.exists()


@in_emulator
def test_a_log_of_several_types(tmp_path) -> None:
    """Kernels that differ in their tensors' type alone have records of their own."""
    import tvm_ffi

    from mega_tvm.tuning.log import append
    from mega_tvm.tuning.lookup import TunedSchedules
    from mega_tvm.tuning.record import Record, TargetKey
    from schedules.common.storage import stored_as
    from schedules.dense.naive import DenseSpec, dense
    from schedules.registry import generate
    from tests.tuning.cuda_builders import SM80, kernel_of

    func, target = dense(DenseSpec((1, 59), 24, 40)), SM80.tvm_target()
    types = {"float32": func}
    types |= {
        dtype: stored_as(func, [dtype, dtype, "float32", dtype])
        for dtype in ("float16", "bfloat16")
    }
    kernels = {dtype: kernel_of(each) for dtype, each in types.items()}
    tiles = {"float32": 3, "bfloat16": 5}
    records = [
        Record.make(kernels[dtype].space, {"tile": tile}, target, 1e-6, hand_seconds=2e-6)
        for dtype, tile in tiles.items()
    ]
    append(tmp_path / "log", TargetKey.of(SM80), records, {"id": "x"})
    tuned = TunedSchedules(SM80, 1, [tmp_path / "log"])
    for dtype, each in types.items():
        found = tuned.schedule(dtype, each, target)
        if dtype not in tiles:
            assert tuned.outcomes[dtype].kind == "miss"
            continue
        assert str(tuned.outcomes[dtype]) == "hit", tuned.outcomes[dtype]
        wanted = kernels[dtype].space.schedule({"tile": tiles[dtype]})
        assert tvm_ffi.structural_equal(found.func, generate(wanted.mod["main"], target).func)


@in_emulator
def test_a_tuning_for_bfloat16(tmp_path) -> None:
    """The command tunes kernels on tensor cores, and a compile of that type uses them."""
    from mega_tvm.artifact_format import read_manifest
    from tests.tuning.cuda_command import tune_and_compile

    out = tmp_path / "model.so"
    said = tune_and_compile(tmp_path / "log", out, "bfloat16")
    assert "--target cuda-sm_80 --dtype bfloat16" in said
    manifest = read_manifest(out)
    assert manifest["dtype"] == "bfloat16" and manifest["parity"]["checked"]
    assert manifest["tuning"]["log"]


@in_emulator
def test_a_device_of_another_arch() -> None:
    import os

    import pytest

    from mega_tvm.errors import TargetError, TuningError
    from mega_tvm.tuning.cuda_device import tuned_target

    cases = [
        ("80", "cuda", "cuda-sm_80", None),
        ("86", "cuda", "cuda-sm_86", None),
        ("103", "cuda", "cuda-sm_100", None),
        ("80", "cuda-sm_90", TuningError, r"this machine's GPU \(.*\) is sm_80: tune for cuda-sm"),
        ("86", "cuda-sm_80", TuningError, r"is sm_86: tune for cuda-sm_86, or on a fleet"),
        ("75", "cuda", TargetError, "a GPU of sm_75 is not supported; supported: sm_80"),
    ]
    try:
        for arch, name, expected, message in cases:
            os.environ["EMULATED_ARCH"] = arch
            if message is None:
                assert tuned_target(name, None).name == expected
            else:
                with pytest.raises(expected, match=message):
                    tuned_target(name, None)
    finally:
        del os.environ["EMULATED_ARCH"]


class Session:
    """An RPC session, as far as a check of its GPU sees one."""

    def __init__(self, version: str | None) -> None:
        self.exist, self.compute_version = version is not None, version

    def cuda(self, _index: int) -> Session:
        return self


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "has no GPU"), ("8.6", "GPU is sm_86, and candidates are cuda-sm_80")],
    ids=["none", "another"],
)
def test_a_server_that_does_not_fit(version, message) -> None:
    from mega_tvm.cuda.target import resolve_cuda
    from mega_tvm.tuning.cuda_device import UnfitServerError, check_server

    with pytest.raises(UnfitServerError, match=message):
        check_server(Session(version), resolve_cuda("cuda-sm_80"))
    check_server(Session("8.0"), resolve_cuda("cuda-sm_80"))


def test_whose_fault_it_is_in_a_fleet(monkeypatch) -> None:
    """A GPU's error is the candidate's; a server that does not fit, or went away, is lost."""
    from mega_tvm.tuning import worker_main
    from mega_tvm.tuning.cuda_device import UnfitServerError
    from mega_tvm.tuning.trial import Task
    from tests.tuning.cuda_builders import SM80

    cases = [
        (RuntimeError("CUDA: an illegal memory access was encountered"), False),
        (UnfitServerError("CUDA is not there"), True),
        (RuntimeError("connection reset by peer"), True),
    ]
    monkeypatch.setattr(worker_main._State, "tracker", worker_main.Tracker("h", 1, "k"))
    monkeypatch.setattr(worker_main, "_operands", lambda task: None)
    monkeypatch.setattr(worker_main, "build_candidate", lambda *_: object())
    for error, lost in cases:

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(worker_main, "_loaded", fail)
        result = worker_main.measure(Task("t", "w", SM80), {})
        assert (result.lost, result.fault) == (lost, not lost), result
