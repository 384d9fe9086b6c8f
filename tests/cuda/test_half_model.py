"""Whole models on tensors of a half type."""

from __future__ import annotations

import pytest

from schedules.common.half_types import HALF_TYPES
from tests.cuda.devices import on_every_device
from tests.cuda.emulator.worker import in_emulator

BOTH = pytest.mark.parametrize("dtype", HALF_TYPES)
CASES = [
    *((dtype, case) for dtype in HALF_TYPES for case in ("odd", "tiny_laplace")),
    ("bfloat16", "seq1"),
    ("bfloat16", "long"),
]


@pytest.mark.parametrize(("dtype", "case"), CASES)
@on_every_device
def test_agrees_with_edifice(dtype: str, case: str) -> None:
    from tests.cuda.models import assert_agrees

    assert_agrees(case, dtype)


@BOTH
@on_every_device
def test_what_is_half(dtype: str) -> None:
    """Weights and activations are; biases, decays and the ends of an entry are not."""
    import mega_tvm
    from tests.cuda.models import compiled

    model = mega_tvm.load(compiled("odd", dtype)[0])
    manifest = model.metadata
    assert manifest["dtype"] == dtype
    assert {
        entry[end]["dtype"] for entry in manifest["entries"] for end in ("input", "output")
    } == {"float32"}
    items = manifest["tensors"]["items"]
    assert {item["dtype"] for item in items} == {dtype, "float32"}
    assert all(item["dtype"] == dtype for item in items if len(item["shape"]) > 1)
    assert [str(tensor.dtype) for tensor in model.tensors] == [item["dtype"] for item in items]


@BOTH
@on_every_device
def test_what_kernels_hand_on_can_be_read(dtype: str) -> None:
    """Though NumPy has no bfloat16."""
    import numpy as np

    import mega_tvm
    from mega_tvm.tolerances import assert_parity
    from mega_tvm.tracing import trace
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd", dtype)
    model = mega_tvm.load(path)
    calls = trace(model, model.entries[0].name, golden.x)
    assert len(calls) >= sum(kernel["calls"] for kernel in model.metadata["kernels"])
    assert all(np.isfinite(call.output).all() for call in calls)
    last = next(call.output for call in reversed(calls) if call.is_a("layer_norm"))
    assert_parity(last.reshape(golden.y.shape), golden.y, dtype)


@BOTH
@on_every_device
def test_verify(dtype: str, tmp_path) -> None:
    from mega_tvm.verify import main
    from mega_tvm.weights import save_checkpoint
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd", dtype)
    weights = tmp_path / "odd.npz"
    save_checkpoint(weights, golden.config, golden.params)
    assert main([str(path), "--weights", str(weights)]) == 0


@BOTH
def test_cpus_refuse_it_before_they_work(dtype, tmp_path, capsys) -> None:
    from mega_tvm.compile import main

    output = tmp_path / "model.so"
    arguments = ["--target", "x86-64-v3", "--dtype", dtype, "-o", str(output)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"dtype {dtype!r} is not supported by target x86-64-v3; supported: float32; " in error
    assert f"{dtype} is for GPUs, --target cuda" in error
    assert not output.exists()


@in_emulator
def test_running_needs_no_ml_dtypes(tmp_path) -> None:
    """What runs a model is NumPy and TVM's runtime alone, and knows a bfloat16 by its bits."""
    import os
    import subprocess
    import sys

    import numpy as np

    from mega_tvm.tolerances import assert_parity
    from tests.cuda.emulator.environment import emulated
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd", "bfloat16")
    np.save(tmp_path / "x.npy", golden.x)
    script = (
        "import sys; sys.modules['ml_dtypes'] = None\n"
        "import mega_tvm, numpy as np\n"
        "path, folder = sys.argv[1:]\n"
        "np.save(folder + '/y.npy', mega_tvm.load(path)(np.load(folder + '/x.npy')))\n"
        "assert 'tvm' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, str(path), str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, **emulated(tmp_path / "cuda")})
    assert_parity(np.load(tmp_path / "y.npy"), golden.y, "bfloat16")
