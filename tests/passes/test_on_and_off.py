"""Every pass on, every pass off, and each one off alone: all agree with the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest

from mega_tvm.passes import OPTIONAL_PASSES
from mega_tvm.pipeline import graph_phase
from mega_tvm.tolerances import assert_parity
from reference import numpy_mega
from tests.passes.harness import EMBED, B, T, example, imported, random_mega, run_graphs

VARIANTS = {"all_on": (), "all_off": OPTIONAL_PASSES, **{f"no_{p}": (p,) for p in OPTIONAL_PASSES}}
FORMS = {"softmax": False, "laplace": True}


@pytest.fixture(scope="module", params=list(FORMS))
def outputs(request):
    """By variant and length, the compiled output and the oracle's."""
    model = random_mega(laplace_attention=FORMS[request.param])
    params = model.to_params()
    inputs, graphs = {}, {}
    for length in (1, T):
        shape = (B, length, EMBED)
        for variant, off in VARIANTS.items():
            inputs[f"{variant}_{length}"] = example(shape)
            graphs[f"{variant}_{length}"] = graph_phase(imported(model, shape), off)
    expected = {name: numpy_mega.forward(model.config, params, x) for name, x in inputs.items()}
    return run_graphs(graphs, inputs), expected


@pytest.mark.parametrize("length", [1, T], ids=["T1", f"T{T}"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_agrees_with_the_oracle(outputs, variant, length) -> None:
    actual, expected = outputs
    name = f"{variant}_{length}"
    assert_parity(actual[name], expected[name], name=name)


def test_the_variants_were_compiled_differently(outputs) -> None:
    """Bits differ: the comparison is not of one program with itself."""
    actual, _ = outputs
    assert not np.array_equal(actual[f"all_on_{T}"], actual[f"all_off_{T}"])
