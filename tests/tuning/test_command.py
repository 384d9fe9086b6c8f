"""python -m mega_tvm.tune: interrupted, resumed, and used by a compile."""

from __future__ import annotations

import contextlib
import functools
import io
import signal
import subprocess
import sys

import pytest

from mega_tvm import compile as compile_command
from mega_tvm.artifact_format import read_manifest
from mega_tvm.targets import machine_runs, resolve_target
from mega_tvm.tune import main
from mega_tvm.tuning import workers
from mega_tvm.tuning.log import append, read_log
from tests.tuning.builders import ROOT, norm_kernel, record, short_budget, target_key

# A model of a dozen kernels that compile in a moment.
MODEL = ["--embed-dim", "8", "--hidden-size", "8", "--ema-dim", "2", "--num-layers", "1"]
MODEL += ["--seq-len", "3"]
PLAIN = ["--no-symbolic", "--no-stream"]  # no records are of them


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A tuning that was interrupted after a few batches: its log, and the finished process."""
    directory = tmp_path_factory.mktemp("tuning") / "log"
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "mega_tvm.tune", *MODEL, "--trials", "200", "--workers", "1",
         "--tuning-log", str(directory)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        done, _, rest = line.strip().partition("/200 ")
        if rest and int(done) >= 16:
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    return directory, process.returncode, lines, error


@pytest.fixture(scope="module")
def resumed(interrupted):
    """The same tuning, started again and run to its end; what it printed."""
    directory, *_ = interrupted
    before = read_log(directory)
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setattr(workers, "Pool", functools.partial(workers.Pool, on_start=short_budget))
    patch.setattr("mega_tvm.tuning.session.FINALISTS", 1)
    try:
        output = _captured([*MODEL, "--trials", "48", "--tuning-log", str(directory)])
    finally:
        patch.undo()
    return directory, before, output


def _captured(argv) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(argv) == 0
    return out.getvalue()


def test_an_interrupt_keeps_what_was_measured(interrupted) -> None:
    directory, status, lines, error = interrupted
    assert status == 130
    assert (
        error.strip() == f"interrupted; what was measured is in {directory}, start again to go on"
    )
    assert any("hand " in line and "best " in line for line in lines)
    log = read_log(directory)
    assert log.problems == ()
    assert len(log.records) >= 16
    assert log.runs[0]["trials"] == len(log.records)


def test_started_again_it_goes_on_and_ends(resumed) -> None:
    directory, before, output = resumed
    assert f"{len(before.records)} trials are in the log" in output
    log = read_log(directory)
    assert log.records[: len(before.records)] == before.records
    trials = [r for r in log.records if r.hand_seconds is None]
    assert len(trials) == max(48, len(before.records))
    assert "all calls" in output
    assert "s a trial" in output


def test_a_compile_uses_what_was_tuned(resumed, tmp_path, capsys, monkeypatch) -> None:
    directory, *_ = resumed
    monkeypatch.chdir(tmp_path)
    for name in ("a.so", "b.so"):
        argv = [*MODEL, *PLAIN, "--tuning-log", str(directory), "-o", name]
        assert compile_command.main(argv) == 0
    out = capsys.readouterr().out
    confirmed = {r.key for r in read_log(directory).records if r.hand_seconds is not None}
    assert out.count(": hit\n") + out.count("hit (nothing beat") == 2 * len(confirmed)
    nothing_to_decide = out.count("there is nothing to decide") // 2
    manifest = read_manifest(tmp_path / "a.so")
    sources = [kernel["schedule"] for kernel in manifest["kernels"]]
    assert sources.count("tuned") == out.count(": hit\n") // 2
    sized = out.count("  kernel ") // 2
    assert out.count(f"  tuning records: {len(confirmed) + nothing_to_decide} hits of {sized}") == 2
    assert len(manifest["tuning"]["log"]) == 64
    assert manifest["tuning"]["threads"] == 1
    assert (tmp_path / "a.so").read_bytes() == (tmp_path / "b.so").read_bytes()


def test_no_tuning(resumed, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compile_command.main([*MODEL, *PLAIN, "--no-tuning", "-o", "c.so"]) == 0
    manifest = read_manifest(tmp_path / "c.so")
    assert {kernel["schedule"] for kernel in manifest["kernels"]} <= {"hand", "generic"}
    assert manifest["tuning"] == {"log": None, "threads": 1}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["--trials", "0"], "--trials must be a positive integer; got 0", id="trials"),
        pytest.param(["--threads", "-1"], "--threads must be a positive", id="threads"),
        pytest.param(["--tracker", "a:1"], "needs both --tracker HOST:PORT and --key", id="no-key"),
        pytest.param(["--key", "k"], "needs both --tracker HOST:PORT and --key", id="no-tracker"),
        pytest.param(["--tracker", "9190", "--key", "k"], "such as 127.0.0.1:9190", id="no-host"),
        pytest.param(["--target", "pdp11"], "unknown target 'pdp11'", id="target"),
        pytest.param(["--merge", "none"], "none: holds no tuning log", id="merge-nothing"),
        pytest.param(["--keep-best"], "holds no tuning log", id="prune-nothing"),
    ],
)
def test_bad_options(argv, message, capsys, tmp_path) -> None:
    assert main([*argv, "--tuning-log", str(tmp_path / "log")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "log" / "metadata.json").exists()


def test_a_target_that_this_machine_cannot_run(capsys, tmp_path) -> None:
    if machine_runs(resolve_target("sapphirerapids")):
        pytest.skip("this machine runs every target")
    argv = ["--target", "sapphirerapids", "--tuning-log", str(tmp_path / "log")]
    assert main(argv) == 2
    assert "this machine cannot run sapphirerapids code" in capsys.readouterr().err


def test_merge_and_keep_best(capsys, tmp_path) -> None:
    kernel = norm_kernel()
    for name, seconds in (("a", 2e-5), ("b", 1e-5)):
        append(tmp_path / name, target_key(), [record(kernel, seconds)], {"id": name})
    out = str(tmp_path / "out")
    assert main(["--merge", str(tmp_path / "a"), str(tmp_path / "b"), "--tuning-log", out]) == 0
    assert main(["--keep-best", "--tuning-log", out]) == 0
    assert capsys.readouterr().out == f"{out}: 2 records\n{out}: 1 records\n"
    assert read_log(tmp_path / "out").records[0].seconds == 1e-5
