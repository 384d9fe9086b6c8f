"""Names of CUDA targets, and which GPUs run what is compiled for them."""

from __future__ import annotations

import pytest

from mega_tvm.cuda.archs import runs_on
from mega_tvm.cuda.target import resolve_cuda
from mega_tvm.cuda.toolchain import gencode_flags
from mega_tvm.errors import TargetError


def test_cuda_is_four_generations_and_ptx() -> None:
    target = resolve_cuda("cuda")
    assert (target.archs, target.ptx) == ((80, 86, 89, 90), 90)
    codes = [flag.partition("code=")[2] for flag in gencode_flags(target)[1::2]]
    assert codes == ["sm_80", "sm_86", "sm_89", "sm_90", "compute_90"]


def test_named_archs_are_all_and_nothing_else() -> None:
    target = resolve_cuda("cuda-sm_90+sm_80")
    assert (target.archs, target.ptx) == ((80, 90), None)
    assert str(target.tvm_target().attrs["arch"]) == "sm_80"  # the lowest


@pytest.mark.parametrize("name", ["cuda-", "cuda-90", "cuda-sm_80,sm_90", "cuda:0", "cuda-sm_80+"])
def test_other_forms_are_refused(name) -> None:
    with pytest.raises(TargetError, match=r"unknown target .* such as cuda-sm_80\+sm_90"):
        resolve_cuda(name)


def test_an_arch_that_is_too_old_or_unknown() -> None:
    with pytest.raises(TargetError, match=r"names sm_75, which is not supported: .* of sm_80, "):
        resolve_cuda("cuda-sm_80+sm_75")


def test_an_arch_named_twice() -> None:
    with pytest.raises(TargetError, match="twice"):
        resolve_cuda("cuda-sm_80+sm_80")


@pytest.mark.parametrize(
    ("device", "archs", "ptx", "runs"),
    [
        (80, [80, 90], None, True),
        (86, [80, 90], None, True),  # a later one of the same generation
        (75, [80, 90], None, False),
        (80, [86], None, False),  # an earlier one
        (100, [80, 90], None, False),
        (100, [80, 90], 90, True),
        (75, [80], 80, False),
    ],
)
def test_runs_on(device, archs, ptx, runs) -> None:
    assert runs_on(device, archs, ptx) is runs
