"""A record holds for the code that made it."""

from __future__ import annotations

import shutil

import pytest
import tvm

import mega_tvm
from mega_tvm.tuning import versions
from mega_tvm.tuning.versions import made_by, source_digest


@pytest.fixture
def copy(tmp_path):
    """A copy of the schedules, to change."""
    shutil.copytree(versions._ROOT, tmp_path / "schedules")
    return tmp_path / "schedules"


def test_it_names_the_versions() -> None:
    text = made_by("dense")
    assert f"mega_tvm {mega_tvm.__version__}" in text
    assert f"tvm {tvm.__version__}" in text
    assert "llvm " in text
    assert made_by("ema_scan") != text


def test_code_counts_and_comments_do_not(copy) -> None:
    file = copy / "dense" / "cpu.py"
    before = source_digest(file)
    assert before == source_digest(versions._ROOT / "dense" / "cpu.py")
    text = file.read_text()
    file.write_text(text.replace('"""How a dense', '"""Whatever a dense') + "\n# a comment\n")
    assert source_digest(file) == before
    file.write_text(text.replace("BLOCK_M = 120", "BLOCK_M = 96"))
    assert source_digest(file) != before


def test_what_kernels_call_counts() -> None:
    file = versions._ROOT / "dense" / "cuda.py"
    before = source_digest(file, (), "int f();\n")
    assert source_digest(file, (), "int f();// of a half\n") == before
    assert source_digest(file, (), "int g();\n") != before


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ("dense/packing.py", True),
        ("common/vector_math.py", True),
        ("common/attention_blocked.py", False),
        ("ema_scan/cpu.py", False),
    ],
)
def test_what_a_schedule_imports_counts(copy, changed, counts) -> None:
    before = source_digest(copy / "dense" / "cpu.py")
    with (copy / changed).open("a") as file:
        file.write("\nMORE = 1\n")
    assert (source_digest(copy / "dense" / "cpu.py") != before) == counts
