"""What tests share that run a library in a process without the compiler and an empty PATH."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import mega_tvm

# Begins such a process' script.
REFUSE_COMPILER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tvm", "torch", "onnx", "reference", "schedules"):
            raise ImportError(f"{name} must not be imported")
sys.meta_path.insert(0, Refuse())
import numpy as np, mega_tvm
"""


def bare_environment(*dropped: str) -> dict[str, str]:
    """Return this process' environment for it, without variables of these prefixes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TVM_", *dropped))}
    runtime = importlib.metadata.distribution("apache-tvm").locate_file("tvm/lib")
    return {
        **kept,
        "PATH": "",
        "PYTHONPATH": str(Path(mega_tvm.__file__).parents[1]),
        "MEGA_TVM_RUNTIME": str(runtime),
    }
