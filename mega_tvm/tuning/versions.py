"""By what a record was made: it holds for the same code generators and nothing else.

A measured time is that of code which TVM, LLVM or nvcc, and the schedule's own source wrote. The
source is told by a digest of its syntax trees, docstrings and comments left out, over the modules
of ``schedules`` that it imports: a schedule that was changed has no tuned records until it is tuned
again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import tvm

import mega_tvm
import schedules
from mega_tvm import lowering
from mega_tvm.cuda import lowering as cuda_lowering
from mega_tvm.cuda import toolchain
from mega_tvm.cuda.toolchain import nvcc_version
from schedules.common.cuda_device_code import device_code

_ROOT = Path(schedules.__file__).parent
_CUDA_LOWERING = (Path(cuda_lowering.__file__), Path(toolchain.__file__))


@functools.cache
def made_by(op: str, kind: str = "llvm") -> str:
    """Return the versions that make the code of a kernel, such as ``dense``.

    Parameters
    ----------
    op : str
    kind : str
        Of the target: ``llvm`` for a CPU, ``cuda`` for a GPU.
    """
    if kind == "cuda":
        return (
            f"mega_tvm {mega_tvm.__version__}, tvm {tvm.__version__}, nvcc {nvcc_version()}, "
            f"{op} {source_digest(_ROOT / op / 'cuda.py', _CUDA_LOWERING, device_code())[:8]}"
        )
    llvm = tvm.target.codegen.llvm_version_major(allow_none=True)
    return (
        f"mega_tvm {mega_tvm.__version__}, tvm {tvm.__version__}, llvm {llvm}, "
        f"{op} {source_digest(_ROOT / op / 'cpu.py')[:8]}"
    )


def source_digest(
    path: Path, lowered_by: Sequence[Path] = (Path(lowering.__file__),), called: str = ""
) -> str:
    """Return the digest of a schedule's source: its own, what it imports, and what lowers it.

    ``called`` is C that kernels call; comments do not count there either.
    """
    digest = hashlib.sha256(re.sub(r"//.*", "", called).encode())
    for code in sorted(map(_code, {*_closure(path), *lowered_by})):
        digest.update(code.encode())
    return digest.hexdigest()


def _closure(path: Path) -> set[Path]:
    """Return a module of ``schedules`` and those that it imports, by relative imports."""
    found: set[Path] = set()
    left = [path]
    while left:
        file = left.pop()
        if file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                names = [folder / f"{alias.name}.py" for alias in node.names]
                left += [p for p in (folder.with_suffix(".py"), *names) if p.is_file()]
    return found


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
