from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mega_tvm
from mega_tvm import MegaConfig
from mega_tvm.artifact import write_artifact
from tests.runtime.builders import MANIFEST, TENSORS, build_executable, join, split

# What a subprocess runs first: neither the compiler nor torch can be imported.
PRELUDE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tvm", "torch"):
            raise ImportError(f"{name} must not be imported")
sys.meta_path.insert(0, Refuse())
import numpy as np, mega_tvm
"""


@pytest.fixture(scope="session")
def executable():
    return build_executable()


@pytest.fixture(scope="session")
def artifact(executable, tmp_path_factory):
    """A compiled model, in a directory whose name has a space and a letter beyond ASCII."""
    directory = tmp_path_factory.mktemp("artifact") / "a dir é"
    directory.mkdir()
    return write_artifact(executable, MANIFEST, directory / "model.so", TENSORS)


@pytest.fixture(scope="session")
def many_shapes(tmp_path_factory):
    """A very small Mega of three shapes, any other by its symbolic entry, and streams."""
    return mega_tvm.compile_model(
        MegaConfig(13, hidden_size=16, ema_dim=3, num_layers=1),
        seq_len=(1, 7, 59),
        output=tmp_path_factory.mktemp("many") / "many.so",
    )


@pytest.fixture(scope="session")
def model(artifact):
    return mega_tvm.load(artifact)


@pytest.fixture
def manifest():
    return copy.deepcopy(MANIFEST)


@pytest.fixture
def edited(artifact, tmp_path):
    """Return a copy of the artifact whose manifest a function has changed; digests are right."""

    def edit(change):
        body, manifest = split(artifact)
        changed = change(manifest)
        text = json.dumps(manifest if changed is None else changed).encode()
        path = tmp_path / "edited.so"
        path.write_bytes(join(body, text))
        return path

    return edit


@pytest.fixture(scope="session")
def run_python():
    """Run a script in a process without compilers; return what it printed.

    Nothing may be on standard error.
    """

    def run(script, *args, env=None, prelude=PRELUDE):
        root = str(Path(mega_tvm.__file__).parents[1])
        runtime = importlib.metadata.distribution("apache-tvm").locate_file("tvm/lib")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("TVM_", "OMP_"))}
        done = subprocess.run(
            [sys.executable, "-c", prelude + script, *map(str, args)],
            env={
                **clean,
                "PATH": "",
                "PYTHONPATH": root,
                "MEGA_TVM_RUNTIME": str(runtime),
                **(env or {}),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.stderr == ""
        return done.stdout

    return run
