"""CUDA graphs: captured at the first call, launched by later ones, equal to no graph to the bit."""

from __future__ import annotations

import pytest

from tests.cuda.devices import on_every_device
from tests.cuda.emulator.worker import in_emulator


@pytest.mark.parametrize("case", ["odd", "tiny_laplace"])
@on_every_device
def test_on_and_off_are_equal(case: str) -> None:
    import numpy as np
    import tvm

    import mega_tvm
    from tests.cuda import device
    from tests.cuda.models import compiled

    path, golden, _ = compiled(case)
    on, off = mega_tvm.load(path), mega_tvm.load(path, cuda_graph=False)
    assert (on.cuda_graph, off.cuda_graph) == (True, False)
    assert on.metadata["target"]["cuda_graph"]
    kept = []  # so that later inputs lie elsewhere
    with device.watched() as reports:
        for scale in (1, -1, 0.5):  # captured by the first, launched by the others
            x = (scale * golden.x).astype(np.float32)
            np.testing.assert_array_equal(on(x), off(x))
            kept.append(tvm.runtime.tensor(x, tvm.cuda(0)))
            np.testing.assert_array_equal(on.fetch(on(kept[-1])), off(x))
    assert not reports, "\n".join(reports)


@on_every_device
def test_a_result_on_the_device_is_not_written_by_the_next_call() -> None:
    import numpy as np
    import tvm

    import mega_tvm
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    first = model(tvm.runtime.tensor(golden.x, tvm.cuda(0)))
    model(tvm.runtime.tensor(-golden.x, tvm.cuda(0)))
    np.testing.assert_array_equal(model.fetch(first), model(golden.x))


@in_emulator
def test_all_kernels_but_the_first_and_the_last_are_in_graphs() -> None:
    import ctypes

    import mega_tvm
    from tests.cuda.emulator import activate
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    on, off = mega_tvm.load(path), mega_tvm.load(path, cuda_graph=False)
    in_graphs = activate._engine.emu_graph_launch_count
    in_graphs.restype = ctypes.c_uint64
    for model in (on, off):
        model(golden.x)
    with activate.watched():
        off(golden.x)
    alone = activate.launches()
    assert in_graphs() == 0
    with activate.watched():
        on(golden.x)
    assert activate.launches() == alone
    assert in_graphs() == alone - 2
