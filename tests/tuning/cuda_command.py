"""The commands of a tuning for GPUs and of compiles that use it. Import only in the emulator."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path

from mega_tvm import compile as compile_command
from mega_tvm import tune as tune_command
from mega_tvm.artifact_format import read_manifest
from mega_tvm.model_source import resolve_model
from mega_tvm.tuning import session, workers
from mega_tvm.tuning.log import RECORDS, append, read_log
from mega_tvm.tuning.record import Record, TargetKey
from mega_tvm.tuning.tasks import extract_kernels
from reference import MegaConfig
from tests.tuning.cuda_builders import SM80, emulated_environment, few_runs

# Everything is odd, and kernels are few.
MODEL = ["--embed-dim", "5", "--hidden-size", "8", "--ema-dim", "2", "--num-layers", "1"]
MODEL += ["--seq-len", "3"]
TRIALS = 8


def run_tuning_and_compiles(folder: Path, fleet: bool) -> None:
    log, out = folder / "log", folder / "model.so"
    with emulated_environment(), _few_trials():
        with _servers() if fleet else contextlib.nullcontext([]) as device:
            said = _tune(log, device)
        assert "target cuda-sm_80 (sm_80)" in _plain(said), said
        assert f"--tuning-log {log} --target cuda-sm_80" in _plain(said), said
        records = read_log(log)
        assert records.problems == ()
        trials = [r for r in records.records if r.hand_seconds is None]
        assert len(trials) == TRIALS and all(r.error is None and r.seconds for r in trials)
        assert records.target.mcpu == "sm_80"
        if fleet:  # the rest is the same
            return

        said = _compile(["--target", "cuda-sm_80", "--tuning-log", str(log)], out)
        found = [line for line in said.splitlines() if line.strip().startswith("kernel ")]
        assert any(": hit" in line for line in found), said
        assert any(": miss (hand schedule)" in line for line in found), said
        _complete(log)
        said = _compile(["--target", "cuda-sm_80", "--tuning-log", str(log), "--strict"], out)
        found = [line for line in said.splitlines() if line.strip().startswith("kernel ")]
        assert found and all(": hit" in line for line in found), said
        manifest = read_manifest(out)
        assert manifest["parity"]["checked"] and manifest["tuning"]["log"]
        assert "tuned" in {kernel["schedule"] for kernel in manifest["kernels"]}

        # Other targets, one of them with this arch among others; then another length.
        said = _compile(["--target", "cuda-sm_80+sm_90", "--tuning-log", str(log)], out)
        assert "made for another target (sm_80; this compile: sm_80+sm_90)" in _plain(said)
        assert "miss (hand schedule)" in said and ": hit\n" not in said
        longer = ["--target", "cuda-sm_80", "--tuning-log", str(log), "--seq-len", "7", "--strict"]
        out.unlink()
        said = _compile(longer, out, status=2)
        assert "strict:" in said and "mega_tvm.tune --target cuda-sm_80, or" in _plain(said), said
        assert not out.exists()

        _make_older(log)
        said = _compile(["--target", "cuda-sm_80", "--tuning-log", str(log)], out)
        assert "stale (made by other versions: mega_tvm 0.0.1," in _plain(said), said


def tune_and_compile(log: Path, out: Path, dtype: str) -> str:
    """Tune for a type, a trial a kernel, and compile by the log; return what tuning said."""
    with emulated_environment(), _few_trials():
        said = _tune(log, ["--dtype", dtype, "--trials", "3"])
        trials = [r for r in read_log(log).records if r.hand_seconds is None]
        assert trials and all(r.error is None and r.seconds for r in trials), said
        assert all(dtype in r.key.storage for r in trials)
        options = ["--target", "cuda-sm_80", "--dtype", dtype, "--tuning-log", str(log)]
        compiled = _compile(options, out)
        assert ": hit" in compiled, compiled
    return _plain(said)


def _complete(log: Path) -> None:
    """Add what a longer tuning would find: records of other decisions than the hand schedule's."""
    config = MegaConfig(5, hidden_size=8, ema_dim=2, num_layers=1)
    module = resolve_model(config, {}, 0).module
    known = {r.key for r in read_log(log).records if r.hand_seconds is not None}
    records = []
    for kernel in extract_kernels(module, {"main": (1, 3, 5)}, SM80, 1):
        if kernel.key in known:
            continue
        others = {name: values[-1] for name, values in kernel.space.candidates.items()}
        target = SM80.tvm_target()
        records.append(Record.make(kernel.space, others, target, 1e-6, hand_seconds=2e-6))
    append(log, TargetKey.of(SM80), records, {"id": "a longer tuning"})


def _tune(log: Path, device: list[str]) -> str:
    arguments = ["--target", "cuda", *MODEL, "--trials", str(TRIALS), "--workers", "1"]
    return _said(tune_command.main, [*arguments, *device, "--tuning-log", str(log)])


def _compile(arguments: list[str], output: Path, status: int = 0) -> str:
    return _said(compile_command.main, [*MODEL, *arguments, "-o", str(output)], status)


def _said(main, arguments: list[str], status: int = 0) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        found = main(arguments)
    assert found == status, out.getvalue()
    return out.getvalue()


def _plain(text: str) -> str:
    return " ".join(text.split())


def _make_older(log: Path) -> None:
    """Let an older version have made all records, and the log know it."""
    from mega_tvm import __version__
    from mega_tvm.tuning.log import METADATA, WORKLOADS, _digests

    path = log / RECORDS
    path.write_text(path.read_text().replace(f"mega_tvm {__version__}", "mega_tvm 0.0.1"))
    metadata = json.loads((log / METADATA).read_text())
    metadata["sha256"] = _digests((log / WORKLOADS).read_bytes(), path.read_bytes())
    (log / METADATA).write_text(json.dumps(metadata))


@contextlib.contextmanager
def _few_trials() -> Iterator[None]:
    before = workers.Pool, session.FINALISTS, session.BATCH
    workers.Pool = functools.partial(workers.Pool, on_start=few_runs)
    session.FINALISTS, session.BATCH = 1, 4
    try:
        yield
    finally:
        workers.Pool, session.FINALISTS, session.BATCH = before


@contextlib.contextmanager
def _servers() -> Iterator[list[str]]:
    """Start a tracker and a server on loopback; yield the options that name them."""
    import socket

    from tvm.rpc import connect_tracker

    from tests.tuning.test_fleet import free_port, kill, start, wait_for

    key, port = "cuda-test", free_port()
    address = f"127.0.0.1:{port}"
    processes = [start("tvm.exec.rpc_tracker", "--port", str(port), "--port-end", str(port + 1))]
    try:
        wait_for(lambda: socket.create_connection(("127.0.0.1", port), 1).close() or True)
        low = free_port()
        processes.append(
            start(
                "tvm.exec.rpc_server", "--port", str(low), "--port-end", str(low + 20),
                "--tracker", address, "--key", key,
            )
        )  # fmt: skip
        wait_for(lambda: len(connect_tracker("127.0.0.1", port).summary()["server_info"]) == 1)
        yield ["--tracker", address, "--key", key]
    finally:
        for process in processes:
            kill(process)
