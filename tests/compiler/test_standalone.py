"""A process without torch, without the compiler and without anything in PATH."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import mega_tvm
from mega_tvm.tolerances import assert_parity

SCRIPT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tvm", "torch", "onnx", "reference", "schedules"):
            raise ImportError(f"{name} must not be imported")
sys.meta_path.insert(0, Refuse())
import numpy as np, mega_tvm
library, x, y = sys.argv[1:]
model = mega_tvm.load(library, num_threads=1)
np.save(y, model(np.load(x)))
print(sorted(name for name in sys.modules if name.split(".")[0] in ("tvm", "torch")))
"""


def test_reproduces_edifice(run_golden, compile_once, tmp_path) -> None:
    here, found = run_golden("tiny", "plain", "native")
    library = compile_once("tiny_native", None)  # made by run_golden
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(x, found.x)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TVM_")}
    runtime = importlib.metadata.distribution("apache-tvm").locate_file("tvm/lib")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library), str(x), str(y)],
        env={
            **environment,
            "PATH": "",
            "PYTHONPATH": str(Path(mega_tvm.__file__).parents[1]),
            "MEGA_TVM_RUNTIME": str(runtime),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert_parity(np.load(y), found.y)
    np.testing.assert_array_equal(np.load(y), here)
