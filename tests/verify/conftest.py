from __future__ import annotations

import json
from pathlib import Path

import pytest

import mega_tvm
from reference import MegaConfig
from tests.runtime.builders import join, split

GOLDEN = Path(__file__).parents[1] / "golden"
SEQ_LEN = 5  # of the artifacts that are not compiled for a golden input
SEED_CONFIG = MegaConfig(embed_dim=16, hidden_size=16, ema_dim=2, num_layers=1, seq_len=SEQ_LEN)


def golden_npz(case):
    return GOLDEN / f"{case}.npz"


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    """Return the artifact of a golden case, compiled for its input; each once a session."""
    directory, made = tmp_path_factory.mktemp("verify"), {}

    def compiled(case, **options):
        if case not in made:
            facts = json.loads((GOLDEN / f"{case}.json").read_text())
            made[case] = mega_tvm.compile_model(
                golden_npz(case),
                batch=facts["batch"],
                seq_len=facts["effective"]["seq_len"],
                options={"laplace_attention": facts["effective"]["laplace_attention"], **options},
                output=directory / f"{case}.so",
                symbolic=False,
                stream=False,
            )
        return made[case]

    return compiled


@pytest.fixture(scope="session")
def tiny(artifact):
    return artifact("tiny")


@pytest.fixture(scope="session")
def unfused(tmp_path_factory):
    """An artifact of seeded weights, two lengths, whose residuals are kernels of their own."""
    return mega_tvm.compile_model(
        SEED_CONFIG,
        seed=3,
        seq_len=[1, SEQ_LEN],
        disabled_passes=["fuse_residual"],
        symbolic=False,
        stream=False,
        output=tmp_path_factory.mktemp("verify") / "unfused.so",
    )


@pytest.fixture
def edited(tmp_path):
    """Return a copy of an artifact whose manifest a function has changed; digests are right."""

    def edit(path, change):
        library, manifest = split(path)
        change(manifest)
        copy = tmp_path / "edited.so"
        copy.write_bytes(join(library, json.dumps(manifest).encode()))
        return copy

    return edit
