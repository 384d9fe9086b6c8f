"""Random options, against the float64 oracle."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import mega_tvm
from mega_tvm.compiler import compile_model
from mega_tvm.tolerances import assert_parity
from reference import numpy_mega
from tests.compiler.models import random_mega


@st.composite
def cases(draw):
    hidden = draw(st.integers(1, 50))
    options = {
        "embed_dim": draw(st.one_of(st.integers(1, 40), st.just(hidden))),
        "hidden_size": hidden,
        "ema_dim": draw(st.integers(1, 20)),
        "num_layers": draw(st.integers(1, 2)),
        "laplace_attention": draw(st.booleans()),
        "layer_norm": draw(st.sampled_from(["plain", "axon-0.8.0"])),
        "seq_len": draw(st.integers(1, 40)),
    }
    return options, draw(st.integers(1, 3))


@settings(
    max_examples=4,
    phases=[Phase.generate],  # shrinking would compile for minutes
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases())
def test_random_options(tmp_path_factory, case) -> None:
    options, batch = case
    source = random_mega(**options)
    # A fresh name: a process that loaded a library keeps it by its path.
    output = tmp_path_factory.mktemp("m") / "m.so"
    path = compile_model(source, batch=batch, symbolic=False, stream=False, output=output)
    x = np.random.default_rng(1).standard_normal(
        (batch, source.config.seq_len, source.config.embed_dim), dtype=np.float32
    )
    expected = numpy_mega.forward(source.config, source.to_params(), x)
    assert_parity(mega_tvm.load(path)(x), expected)
    assert mega_tvm.load(path).metadata["config"] == source.config.to_dict()
