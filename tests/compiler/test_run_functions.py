"""An entry as one function on a planned workspace, against the same kernels run by Relax's VM."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from mega_tvm.frontend.torch import import_module
from mega_tvm.pipeline import run_pipeline
from mega_tvm.targets import resolve_target
from tests.compiler.models import mega, resident_bytes

SHAPE = (3, 5, 13)


@pytest.fixture(scope="module", params=[False, True], ids=["softmax", "laplace"])
def compiled(request):
    module = import_module(mega(num_layers=2, laplace_attention=request.param), SHAPE)
    return run_pipeline(module, resolve_target("native"))


def test_it_computes_what_the_vm_computes(compiled, rng) -> None:
    """To the bit. With a batch, small copies of rows stand between kernels; all are inlined into
    one function, where LLVM once took reused workspace for memory that nothing else had written."""
    x = rng.standard_normal(SHAPE, dtype=np.float32)
    machine = relax.VirtualMachine(compiled.executable, tvm.cpu())
    tensors = tvm.runtime.convert([tvm.runtime.tensor(array) for array in compiled.tensors])
    expected = machine["main"](tvm.runtime.tensor(x), tensors).numpy()
    np.testing.assert_array_equal(compiled.run("main", x, (3, 16)), expected)


def test_a_call_gives_back_all_memory_that_it_takes(compiled, rng) -> None:
    """An attention's transposed keys, 12 KB here, once stayed behind at every call."""
    x = rng.standard_normal(SHAPE, dtype=np.float32)

    def grown_by(calls: int) -> int:
        before = resident_bytes()
        for _ in range(calls):
            compiled.run("main", x, (3, 16))
        return resident_bytes() - before

    grown_by(100)
    assert grown_by(1000) < 1000 * 3 * 64 * 16 * 4 / 2
