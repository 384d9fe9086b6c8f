"""Whole models: the host code, the virtual machine and every kernel, on every device."""

from __future__ import annotations

import pytest

from tests.compiler.models import SHARED
from tests.cuda.devices import on_every_device, on_gpu
from tests.cuda.emulator.worker import in_emulator

LARGE = pytest.mark.skipif(
    not (SHARED / "default.npz").exists(), reason="the large golden case is not here"
)


@pytest.mark.parametrize("case", ["odd", "tiny_laplace"])
@on_every_device
def test_agrees_with_edifice(case: str) -> None:
    from tests.cuda.models import assert_agrees

    assert_agrees(case)


@pytest.mark.parametrize(
    "case",
    [
        "tiny", "equal_dims", "seq1", "long", "low_variance", "low_variance_axon081",
        pytest.param("default", marks=LARGE),
    ],
)  # fmt: skip
@on_gpu
def test_every_golden_case_agrees_with_edifice(case: str) -> None:
    from tests.cuda.models import assert_agrees

    assert_agrees(case)


@on_every_device
def test_what_the_manifest_says() -> None:
    import mega_tvm
    from tests.cuda.models import compiled

    manifest = mega_tvm.load(compiled("odd")[0]).metadata
    assert manifest["target"]["kind"] == "cuda"
    assert manifest["target"]["archs"] == ["sm_80", "sm_86", "sm_89", "sm_90"]
    assert manifest["target"]["ptx"] == "compute_90"
    assert manifest["parity"]["checked"]
    for kernel in manifest["kernels"]:
        assert kernel["launches"], kernel["name"]
        assert all(32 <= launch["threads"] <= 1024 for launch in kernel["launches"])


@on_every_device
def test_a_block_takes_at_most_8_launches() -> None:
    """From one block's EMA to the next block's."""
    import mega_tvm
    from mega_tvm.tracing import trace
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    calls = trace(model, "main", golden.x)
    first, second, *_ = (i for i, call in enumerate(calls) if call.is_a("ema_scan_dense"))
    assert sum(len(call.kernel["launches"]) for call in calls[first:second]) <= 8


@on_every_device
def test_tensors_on_the_device_stay_there() -> None:
    import numpy as np
    import tvm

    import mega_tvm
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    y = model(tvm.runtime.tensor(golden.x, tvm.cuda(0)))
    assert y.__dlpack_device__()[0] == 2
    np.testing.assert_array_equal(model.fetch(y), model(golden.x))


@on_every_device
def test_verify_and_trace() -> None:
    import mega_tvm
    from mega_tvm.tracing import trace
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    calls = trace(model, "main", golden.x)
    assert [call.kernel["op"] for call in calls].count("ema_scan_dense") == golden.config.num_layers


@on_every_device
def test_inputs_that_do_not_fit() -> None:
    import numpy as np
    import pytest
    import tvm

    import mega_tvm
    from mega_tvm.errors import InputError
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    with pytest.raises(
        InputError, match=r"expected an array of shape \[5, 7, 13\], found \[5, 13\]"
    ):
        model(golden.x[:, 0])
    with pytest.raises(InputError, match="expected float32, found float64"):
        model(golden.x.astype(np.float64))
    with pytest.raises(InputError, match="expected float32, found int32"):
        model(tvm.runtime.tensor(np.zeros(golden.x.shape, np.int32), tvm.cuda(0)))
    with pytest.raises(InputError, match=r"found \[1, 2\]"):
        model(tvm.runtime.tensor(np.zeros((1, 2), np.float32), tvm.cuda(0)))


@in_emulator
def test_a_gpu_that_does_not_fit() -> None:
    import os

    import pytest

    import mega_tvm
    from mega_tvm.errors import IncompatibleArtifactError, MegaError
    from tests.cuda.models import compiled

    path, *_ = compiled("odd")
    cases = [
        (
            {"EMULATED_ARCH": "75"},
            IncompatibleArtifactError,
            r"built for sm_80, sm_86, sm_89, sm_90 and newer than sm_90; this device \(.*\) is "
            r"sm_75: compile the model with",
        ),
        ({"EMULATED_DEVICES": "0"}, IncompatibleArtifactError, "this process sees none; run it on"),
        (
            {"EMULATED_DRIVER": "12040"},
            IncompatibleArtifactError,
            r"needs an NVIDIA driver for CUDA 13.0 .*this machine's driver supports CUDA 12.4",
        ),
        ({"EMULATED_MEMORY": "100"}, MegaError, "out of memory on emulated GPU: free some"),
    ]
    for variables, kind, message in cases:
        os.environ.update(variables)
        try:
            with pytest.raises(kind, match=message):
                mega_tvm.load(path)
        finally:
            for name in variables:
                del os.environ[name]
    for arch in ("80", "87", "90", "120"):
        os.environ["EMULATED_ARCH"] = arch
        try:
            mega_tvm.load(path)
        finally:
            del os.environ["EMULATED_ARCH"]


@in_emulator
def test_out_takes_the_result() -> None:
    import numpy as np
    import pytest
    import tvm

    import mega_tvm
    from mega_tvm.errors import InputError
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    expected = model(golden.x)
    out = np.full_like(expected, np.nan)
    assert model(golden.x, out=out) is out
    np.testing.assert_array_equal(out, expected)
    with pytest.raises(InputError, match="shape"):
        model(golden.x, out=out[:1])
    with pytest.raises(InputError, match="float64"):
        model(golden.x, out=out.astype(np.float64))
    on_device = tvm.runtime.tensor(golden.x, tvm.cuda(0))
    with pytest.raises(InputError, match="out and check_finite are for an x on the CPU"):
        model(on_device, out=out)
    with pytest.raises(InputError, match="out and check_finite are for an x on the CPU"):
        model(on_device, check_finite=True)
    bad = golden.x.copy()
    bad[0, 0, 0] = np.inf
    with pytest.raises(InputError, match="inf"):
        model(bad, check_finite=True)


@in_emulator
def test_windows_run_and_streams_are_refused() -> None:
    import numpy as np
    import pytest

    import mega_tvm
    from mega_tvm.errors import StreamUnsupportedError
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    window = model.window(len(golden.x))
    window.fill(golden.x)
    y = window.push(golden.x[:, 0])
    np.testing.assert_array_equal(y, model(np.roll(golden.x, -1, axis=1)))
    with pytest.raises(StreamUnsupportedError, match="streams run on CPUs"):
        model.stream()
