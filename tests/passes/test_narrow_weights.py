"""narrow_weights: after folding, Mega's operators hold float32, rounded once."""

from __future__ import annotations

import numpy as np
import pytest

from mega_tvm.errors import CompileError
from mega_tvm.passes import CPU_PASSES, GRAPH_PASSES, OPTIONAL_PASSES, REQUIRED_PASSES
from mega_tvm.passes.rewrite import constant64
from mega_tvm.pipeline import check_pass_names
from tests.passes.harness import graph, random_mega, without


def _constants(found):
    for call in found:
        for arg in call.args:
            if hasattr(arg, "value"):
                yield call, arg


@pytest.mark.parametrize("off", [(), OPTIONAL_PASSES], ids=["all_on", "all_off"])
def test_no_float64_is_left(off) -> None:
    dtypes = {str(arg.ty.dtype) for _, arg in _constants(graph(random_mega(), off=off))}
    assert dtypes == {"float32"}


def test_weights_that_nothing_was_folded_into_keep_their_bits() -> None:
    model = random_mega(num_layers=1)
    found = graph(model, off=without())
    kernel = model.mega_block_1_ffn_down.kernel.detach().numpy()
    *_, down = found.all("mega.dense")
    np.testing.assert_array_equal(constant64(down.args[1]), kernel)


def test_required_passes_cannot_be_switched_off() -> None:
    passes = {p.info.name for p in (*GRAPH_PASSES, *CPU_PASSES)}
    assert passes == REQUIRED_PASSES | set(OPTIONAL_PASSES)
    for name in REQUIRED_PASSES:
        with pytest.raises(CompileError, match=f"cannot switch off {name}"):
            check_pass_names([name])
