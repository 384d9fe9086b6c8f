"""Compiled models, each made once a session."""

from __future__ import annotations

import numpy as np
import pytest

import mega_tvm
from mega_tvm.compiler import compile_model
from mega_tvm.targets import machine_runs, resolve_target
from tests.compiler.models import SHARED, golden, mega


@pytest.fixture(scope="session")
def compile_once(tmp_path_factory):
    """Compile under a name, once a session; return the library's path.

    Without the symbolic entry, if nothing else is said: it takes as long as several others.
    """
    folder = tmp_path_factory.mktemp("compiled")
    made = {}

    def compile_it(name, model, **options):
        if name not in made:
            options = {"symbolic": False, "stream": False, **options}
            made[name] = compile_model(model, output=folder / f"{name}.so", **options)
        return made[name]

    return compile_it


@pytest.fixture(scope="session")
def run_golden(compile_once):
    """Compile a golden case for a target, and return its output there, and the case."""

    def run(case, layer_norm, target):
        if not machine_runs(resolve_target(target)):
            pytest.skip(f"this machine cannot run {target} code")
        found = golden(case, layer_norm)
        batch, seq_len, _ = found.x.shape
        path = compile_once(
            f"{case}_{target}", found.checkpoint, target=target, batch=batch, seq_len=seq_len
        )
        return mega_tvm.load(path)(found.x), found

    return run


@pytest.fixture(scope="session")
def default_case():
    if not (SHARED / "default.npz").exists():
        pytest.skip("the large golden case is not beside the repository")
    return golden("default", folder=SHARED)


@pytest.fixture(scope="session")
def small():
    """A very small Mega."""
    return mega()


@pytest.fixture(scope="session")
def small_path(compile_once, small):
    return compile_once("small", small)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
