"""By what a record was made: it holds for the same code generators and nothing else.

A measured time is that of code which TVM, LLVM and the schedule's own source wrote. The source is
told by a digest of its syntax trees, docstrings and comments left out, over the modules of
``schedules`` that it imports: a schedule that was changed has no tuned records until it is tuned
again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

import tvm

import mega_tvm
import schedules
from mega_tvm import lowering

_ROOT = Path(schedules.__file__).parent


@functools.cache
def made_by(op: str) -> str:
    """Return the versions that make the code of a kernel, such as ``dense`` on a CPU."""
    llvm = tvm.target.codegen.llvm_version_major(allow_none=True)
    return (
        f"mega_tvm {mega_tvm.__version__}, tvm {tvm.__version__}, llvm {llvm}, "
        f"{op} {source_digest(_ROOT / op / 'cpu.py')[:8]}"
    )


def source_digest(path: Path) -> str:
    """Return the digest of a schedule's source: its own, what it imports, and the TIR pipeline."""
    digest = hashlib.sha256()
    for code in sorted(map(_code, {*_closure(path), Path(lowering.__file__)})):
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
