"""python -m mega_tvm.compile, and what is left behind when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mega_tvm
from mega_tvm import compiler, parity
from mega_tvm.artifact_format import read_manifest
from mega_tvm.compile import main
from mega_tvm.compiler import compile_model
from mega_tvm.errors import CompileError
from mega_tvm.passes import OPTIONAL_PASSES
from mega_tvm.tolerances import compare
from mega_tvm.weights import Checkpoint
from tests.compiler.models import GOLDEN, mega

TINY = GOLDEN / "checkpoints" / "tiny.safetensors"
# A model that compiles in a second or two.
FRESH = ["--embed-dim", "8", "--hidden-size", "8", "--ema-dim", "2", "--num-layers", "1"]
FRESH += ["--no-symbolic", "--no-stream"]
PLAIN = {"symbolic": False, "stream": False}
ROOT = Path(mega_tvm.__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory of one's own, that a failure must leave empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A compile by the command in a process of its own: folder and finished process."""
    folder = tmp_path_factory.mktemp("command")
    done = subprocess.run(
        [sys.executable, "-m", "mega_tvm.compile", "--weights", str(TINY), "--target", "native",
         "--seq-len", "5", "--debug-dump", "dump"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return folder, done


def refused(capsys, here, *argv, status: int = 2) -> str:
    """Run a command that must fail without leaving anything; return the one line it wrote."""
    before = sorted(here.rglob("*"))
    assert main(argv) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sorted(here.rglob("*")) == before
    return error


def test_it_compiles_and_says_what_it_did(compiled) -> None:
    folder, done = compiled
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in folder.iterdir()) == ["dump", "tiny.json", "tiny.so"]
    lines = done.stdout.splitlines()
    assert lines[0] == "compile"
    settings = dict(line.split(maxsplit=1) for line in lines[1:] if line.startswith("  config."))
    assert settings["config.hidden_size"] == "64"
    first_phase = next(i for i, line in enumerate(lines) if "phase:" in line)
    assert first_phase > max(i for i, line in enumerate(lines) if line.startswith("  output"))
    phases = [line.split()[-1] for line in lines if "phase:" in line]
    assert phases == ["import", "graph", "kernels", "schedule", "pack", "lower", "parity", "link"]
    assert f"wrote {folder / 'tiny.so'}" in lines[-1]
    assert "max abs error against float64: " in lines[-1]


def test_the_debug_dump(compiled) -> None:
    folder, _ = compiled
    names = ["0_import.py", "1_graph.py", "2_kernels.py", "3_schedule.py", "4_pack.py", "5_lower.s"]
    text = {p.name: p.read_text() for p in (folder / "dump").iterdir()}
    assert sorted(text) == names
    for wanted, absent, name in (
        ("R.matmul", "R.call_tir", names[0]),
        ("R.mega.dense", "R.matmul", names[1]),
        ("R.call_tir", "T.vectorized", names[2]),
        ("T.vectorized", "R.mega.", names[3]),
    ):
        assert wanted in text[name] and absent not in text[name], name
    assert "zmm" in text[names[5]] or "ymm" in text[names[5]]


def test_the_manifest_beside_is_the_one_inside(compiled) -> None:
    folder, _ = compiled
    assert json.loads((folder / "tiny.json").read_text()) == read_manifest(folder / "tiny.so")


def test_another_process_compiles_the_same_bytes(compiled, here) -> None:
    folder, _ = compiled
    other = compile_model(TINY, target="native", seq_len=5, output=here / "other.so")
    assert other.read_bytes() == (folder / "tiny.so").read_bytes()


def test_fresh_weights_are_told(capsys, here) -> None:
    assert main([*FRESH, "--seq-len", "3", "--batch", "1,2", "--seed", "7"]) == 0
    out = capsys.readouterr().out
    assert "freshly initialized from seed 7: this is no trained model" in out
    manifest = read_manifest(here / "mega.so")
    assert manifest["weights"]["kind"] == "seed"
    assert manifest["weights"]["seed"] == 7
    assert [entry["name"] for entry in manifest["entries"]] == ["main_b1_t3", "main_b2_t3"]


def test_a_config_file_states_what_it_states(capsys, here, monkeypatch) -> None:
    """Options that it leaves out are the checkpoint's, not defaults that contradict it."""
    given = {}
    monkeypatch.setattr(compiler, "compile_model", lambda model, **options: given.update(options))
    monkeypatch.setattr("mega_tvm.artifact_format.read_manifest", _stop)
    config = here / "options.json"
    config.write_text('{"embed_dim": 32, "laplace_attention": true}')
    with pytest.raises(_StopError):
        main(["--weights", str(TINY), "--config", str(config)])
    assert given["options"] == {"embed_dim": 32, "laplace_attention": True}
    assert "config.hidden_size        64" in capsys.readouterr().out


class _StopError(Exception):
    pass


def _stop(*_args):
    raise _StopError


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--weights", str(TINY), "--hidden-size", "32"], ["hidden_size", "says 64", "given 32"]),
        (["--weights", str(TINY), "--num-layers", "3"], ["num_layers", "3", "2"]),
        (["--weights", "missing.nx"], ["missing.nx"]),
        (["--weights", __file__], ["test_command.py"]),
        (["--config", "missing.json"], ["missing.json", "cannot be read"]),
        ([*FRESH, "--target", "pentium"], ["unknown target 'pentium'", "x86-64-v3"]),
        ([*FRESH, "--target", "cuda-pascal"], ["unknown target 'cuda-pascal'", "sm_80+sm_90"]),
        ([*FRESH, "--dtype", "float16"], ["dtype 'float16' is not supported", "float32"]),
        ([*FRESH, "--batch", "0"], ["batch must be a positive integer; got 0"]),
        ([*FRESH, "--seq-len", "4,-1"], ["seq_len must be a positive integer; got -1"]),
        ([*FRESH, "--disable-pass", "nonsense"], ["cannot switch off nonsense", *OPTIONAL_PASSES]),
        (["--hidden-size", "0"], ["hidden_size must be a positive integer; got 0"]),
    ],
    ids=lambda v: "_".join(v[-2:]).strip("-").replace("/", "_")[-40:] if v[0][0] == "-" else "",
)
def test_errors_of_use(capsys, here, argv, words) -> None:
    error = refused(capsys, here, *argv)
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a JSON file"),
        ('{"embed_dim": 8, "hiden_size": 8}', "Did you mean 'hidden_size'?"),
        ('{"embed_dim": 0}', "embed_dim must be a positive integer; got 0"),
        ("[]", "mapping"),
    ],
    ids=["no_json", "misspelt", "out_of_range", "no_mapping"],
)
def test_wrong_config_files(capsys, here, text, words) -> None:
    (here / "config.json").write_text(text)
    error = refused(capsys, here, "--config", "config.json")
    assert "config.json: " in error
    assert words in error


@pytest.mark.parametrize("value", ["x", "1;2", "1,", ""])
def test_batch_must_be_numbers(capsys, value) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["--batch", value])
    assert leave.value.code == 2
    assert "expected positive integers separated by commas" in capsys.readouterr().err


def test_a_directory_that_is_missing(capsys, here) -> None:
    """Told before the compile, not after it."""
    assert main([*FRESH, "-o", "none/m.so"]) == 2
    out, error = capsys.readouterr()
    assert "there is no directory" in error
    assert "phase:" not in out
    assert list(here.iterdir()) == []


def test_a_directory_that_cannot_be_written(here) -> None:
    """Run without root's privileges where tests run as root."""
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (here / "locked").mkdir(mode=0o500)
    with pytest.raises(CompileError, match="cannot be written"):
        compile_model(mega(), output=here / "locked" / "m.so")


def test_a_debug_dump_that_cannot_be_written(capsys, here) -> None:
    (here / "file").write_text("")
    error = refused(capsys, here, *FRESH, "--debug-dump", "file", "--seq-len", "2")
    assert "the debug dump cannot be written" in error


@pytest.fixture
def bad_parity(monkeypatch):
    """As if every output were wrong."""
    monkeypatch.setattr(
        parity, "compare", lambda actual, expected, dtype: compare(actual + 1, expected, dtype)
    )


def test_a_parity_failure_leaves_nothing(capsys, here, bad_parity) -> None:
    error = refused(capsys, here, *FRESH, "--seq-len", "2")
    assert "entry main differs from the float64 reference" in error
    assert "nothing was written" in error


def test_a_parity_failure_leaves_the_former_library(here, small, bad_parity) -> None:
    (here / "m.so").write_bytes(b"former")
    with pytest.raises(CompileError, match="float64 reference"):
        compile_model(small, output=here / "m.so", **PLAIN)
    assert [p.name for p in here.iterdir()] == ["m.so"]
    assert (here / "m.so").read_bytes() == b"former"


def test_an_interrupt_while_linking_leaves_nothing(here) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mega_tvm.compile", *FRESH, "--seq-len", "9"],
        cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "phase: link":
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "interrupted; nothing was written"
    time.sleep(0.2)  # a linker that outlives the interrupt
    assert list(here.iterdir()) == []


def test_passes_that_were_switched_off_are_in_the_manifest(here) -> None:
    off = ["fuse_sigmoid", "fold_scale"]
    path = compile_model(mega(), disabled_passes=off, output=here / "m.so", **PLAIN)
    assert read_manifest(path)["disabled_passes"] == sorted(off)


def test_phases_are_told_in_order(small_path, small, here, bad_parity) -> None:
    phases = []
    with pytest.raises(CompileError):
        compile_model(small, output=here / "m.so", on_phase=phases.append, **PLAIN)
    assert phases == ["import", "graph", "kernels", "schedule", "pack", "lower", "parity"]


def test_weights_in_memory_are_told_by_digest(small_path, small) -> None:
    digest = Checkpoint(small.config, small.to_params()).digest
    assert read_manifest(small_path)["weights"] == {"kind": "memory", "digest": digest}
