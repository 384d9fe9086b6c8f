"""A process without torch, without the compiler and without anything in PATH."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from mega_tvm.tolerances import assert_parity
from tests.standalone import REFUSE_COMPILER, bare_environment

SCRIPT = (
    REFUSE_COMPILER
    + """
library, x, y = sys.argv[1:]
model = mega_tvm.load(library, num_threads=1)
np.save(y, model(np.load(x)))
print(sorted(name for name in sys.modules if name.split(".")[0] in ("tvm", "torch")))
"""
)


def test_reproduces_edifice(run_golden, compile_once, tmp_path) -> None:
    here, found = run_golden("tiny", "plain", "native")
    library = compile_once("tiny_native", None)  # made by run_golden
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(x, found.x)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library), str(x), str(y)],
        env=bare_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert_parity(np.load(y), found.y)
    np.testing.assert_array_equal(np.load(y), here)
