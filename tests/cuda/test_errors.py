"""Errors of use around GPUs, each told plainly and before the work that it would spoil."""

from __future__ import annotations

from pathlib import Path

import pytest

from mega_tvm.compile import main
from mega_tvm.cuda import toolchain
from mega_tvm.cuda.device import Device
from mega_tvm.cuda.nvidia_files import CUDART, DRIVER
from mega_tvm.errors import IncompatibleArtifactError
from tests.cuda.devices import on_every_device
from tests.cuda.emulator.worker import in_emulator

SMALL = ["--embed-dim", "5", "--hidden-size", "8", "--ema-dim", "2", "--num-layers", "1"]


def refused_early(capsys, *argv: str) -> str:
    """Return the error of a compile that must not get as far as its first phase."""
    assert main([*SMALL, *argv]) == 2
    out, error = capsys.readouterr()
    assert "phase:" not in out
    return " ".join(error.split())


def test_bundles_are_refused_before_the_compile(capsys, tmp_path) -> None:
    bundle = tmp_path / "bundle"
    error = refused_early(capsys, "--target", "cuda-sm_80", "--bundle", str(bundle))
    assert "target cuda-sm_80: bundles hold what runs on CPUs; write the library with -o" in error
    assert list(tmp_path.iterdir()) == []


def test_no_nvcc_is_told_before_the_compile(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(toolchain, "find_tool", lambda name: None)
    output = tmp_path / "m.so"
    error = refused_early(capsys, "--target", "cuda", "-o", str(output))
    assert "CUDA targets need nvcc" in error and "pip install 'mega-tvm[cuda]'" in error
    assert list(tmp_path.iterdir()) == []


def test_a_tuning_log_that_is_none_is_told_before_the_compile(capsys, tmp_path) -> None:
    arguments = ["--target", "cuda-sm_80", "--tuning-log", str(tmp_path / "log")]
    error = refused_early(capsys, *arguments, "--strict", "-o", str(tmp_path / "m.so"))
    assert "holds no tuning log; make one with python -m mega_tvm.tune" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (DRIVER, r"this machine has no NVIDIA driver \(libcuda.so.1 is not found\); run it on a"),
        (CUDART, r"needs CUDA's runtime library, libcudart.so.13, which is not found: pip install"),
    ],
    ids=["driver", "cudart"],
)
def test_libraries_that_are_missing(missing, message, monkeypatch) -> None:
    monkeypatch.setattr(
        "mega_tvm.cuda.device.load_shared", lambda name: None if name == missing else object()
    )
    with pytest.raises(IncompatibleArtifactError, match=message):
        Device("m.so", {"archs": ["sm_80"], "ptx": None}, Path())


@pytest.mark.parametrize("cuda_graph", [True, False], ids=["graph", "no_graph"])
@in_emulator
def test_a_call_that_finds_no_memory(cuda_graph: bool) -> None:
    """It fails, says why, and the next one works."""
    import os

    import numpy as np
    import pytest

    import mega_tvm
    from mega_tvm.errors import MegaError
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path, cuda_graph=cuda_graph)
    os.environ["EMULATED_MEMORY"] = "1"
    try:
        with pytest.raises(MegaError, match="out of memory on emulated GPU: free some of it, or"):
            model(golden.x)
    finally:
        del os.environ["EMULATED_MEMORY"]
    np.testing.assert_array_equal(model(golden.x), mega_tvm.load(path)(golden.x))


@on_every_device
def test_a_tensor_on_another_device() -> None:
    import numpy as np
    import pytest

    import mega_tvm
    from mega_tvm.errors import InputError
    from tests.cuda.models import compiled

    class Elsewhere:
        def __init__(self, kind: int, index: int) -> None:
            self.place = kind, index

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.place

        def __dlpack__(self, **_: object) -> object:
            raise AssertionError("it must not be read")

    path, golden, _ = compiled("odd")
    model = mega_tvm.load(path)
    with pytest.raises(InputError, match=r"expected a tensor on cuda:0, .* found one on cuda:1; "):
        model(Elsewhere(2, 1))
    with pytest.raises(InputError):  # another maker's GPU
        model(Elsewhere(10, 0))
    assert np.isfinite(model(golden.x)).all()
