"""An entry as one function on a planned workspace, against the same kernels run by Relax's VM."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from mega_tvm.frontend.torch import import_module
from mega_tvm.pipeline import run_pipeline
from mega_tvm.targets import resolve_target
from tests.compiler.models import mega


@pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
def test_it_computes_what_the_vm_computes(laplace, rng) -> None:
    """To the bit. With a batch, small copies of rows stand between kernels; all are inlined into
    one function, where LLVM once took reused workspace for memory that nothing else had written."""
    shape = (3, 5, 13)
    compiled = run_pipeline(
        import_module(mega(laplace_attention=laplace), shape), resolve_target("native")
    )
    x = rng.standard_normal(shape, dtype=np.float32)
    machine = relax.VirtualMachine(compiled.executable, tvm.cpu())
    tensors = tvm.runtime.convert([tvm.runtime.tensor(array) for array in compiled.tensors])
    expected = machine["main"](tvm.runtime.tensor(x), tensors).numpy()
    np.testing.assert_array_equal(compiled.run("main", x, (3, 16)), expected)
