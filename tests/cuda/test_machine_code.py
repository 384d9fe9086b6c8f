"""The machine code of the kernels, read without a GPU: budgets for two archs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tvm
from tvm import tirx

from mega_tvm.cuda import toolchain
from mega_tvm.cuda.lowering import generated_source, launch_threads
from mega_tvm.cuda.machine_code import find_fatbins, read_kernels
from mega_tvm.cuda.nvidia_files import find_tool
from mega_tvm.cuda.target import resolve_cuda
from mega_tvm.errors import CompileError, MegaError, TargetError
from mega_tvm.inspect import main as inspect_main
from schedules.common.half_types import HALF_TYPES
from schedules.common.storage import stored_as
from schedules.dense.naive import DenseSpec, dense
from schedules.ema_scan_dense.naive import EmaScanDenseSpec, ema_scan_dense
from schedules.gated_attention.naive import GatedAttentionSpec, gated_attention
from schedules.laplace_attention.naive import LaplaceAttentionSpec, laplace_attention
from schedules.normed_dense.naive import NormedDenseSpec, normed_dense
from schedules.registry import hand_schedule

TARGET = resolve_cuda("cuda-sm_80+sm_90")
needs_nvcc = pytest.mark.skipif(find_tool("nvcc") is None, reason="there is no nvcc here")
needs_tools = pytest.mark.skipif(
    find_tool("cuobjdump") is None or find_tool("nvdisasm") is None,
    reason="there is no cuobjdump or nvdisasm here",
)


def _attention(kind, length: int, width: int = 256):
    sizes = {"batch": 1, "q_len": length, "k_len": length, "width": width, "value_width": width}
    strides = dict.fromkeys(("q_stride", "k_stride", "v_stride", "gate_stride"), width)
    return kind(**sizes, **strides)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a kernel may use, on every arch: none spills."""

    func: tirx.PrimFunc
    registers: int
    occupancy: float
    ffma: float = 0.0  # least share of the loop's instructions
    loads: float = 1.0  # least share of loads from global memory that are of 16 bytes
    stores: int = 0  # stores to global memory that are not of 16 bytes


# The kernels of the default model, and of long sequences. Loads that are not of 16 bytes: rows of x
# that a warp adds up (4 bytes a lane, side by side), and steps of a scan (a channel a lane).
KERNELS = {
    "dense_large": Budget(
        dense(DenseSpec((1920,), 256, 768, residual=True)), 88, occupancy=0.37, ffma=0.82
    ),
    "dense_swiglu": Budget(
        normed_dense(NormedDenseSpec((1920,), 256, 1376, swiglu=True)), 96, 0.31, 0.81, 0.5, 8
    ),
    "dense_small": Budget(
        dense(DenseSpec((1, 60), 256, 768, sigmoid_from=512)), 48, 0.62, ffma=0.63
    ),
    "dense_row": Budget(dense(DenseSpec((1, 1), 256, 256)), 32, 1.0, loads=0.4, stores=1),
    "normed": Budget(
        normed_dense(NormedDenseSpec((1, 60), 256, 1376, swiglu=True)), 64, 0.5, 0.72, 0.5, 4
    ),
    "scan": Budget(
        ema_scan_dense(EmaScanDenseSpec(1, 60, 16, 256, residual=True)), 40, 0.75, loads=0.5
    ),
    "scan_long": Budget(
        ema_scan_dense(EmaScanDenseSpec(1, 4096, 16, 256, residual=True)), 64, 0.5, loads=0.25
    ),
    "softmax": Budget(gated_attention(_attention(GatedAttentionSpec, 60)), 48, 0.62, 0.29),
    "softmax_long": Budget(gated_attention(_attention(GatedAttentionSpec, 4096)), 64, 0.5, 0.43),
    "softmax_512": Budget(
        gated_attention(_attention(GatedAttentionSpec, 4096, 512)), 96, 0.31, 0.43
    ),
    "laplace": Budget(laplace_attention(_attention(LaplaceAttentionSpec, 60)), 48, 0.62, 0.5),
    "laplace_long": Budget(
        laplace_attention(_attention(LaplaceAttentionSpec, 4096)), 64, 0.5, 0.28
    ),
}


@dataclasses.dataclass(frozen=True)
class HalfBudget:
    """What a kernel on tensors of a half type may use; those at ``wide`` stay float32."""

    func: tirx.PrimFunc
    wide: tuple[int, ...]
    registers: int
    tensor_cores: bool = True

    def stored(self, dtype: str) -> tirx.PrimFunc:
        count = len(self.func.params)
        return stored_as(self.func, ["float32" if i in self.wide else dtype for i in range(count)])


HALF_KERNELS = {
    "large": HalfBudget(dense(DenseSpec((1920,), 256, 768, residual=True)), (2,), 168),
    "small": HalfBudget(dense(DenseSpec((1, 60), 256, 768, sigmoid_from=512)), (2,), 64),
    "narrow": HalfBudget(normed_dense(NormedDenseSpec((1, 60), 256, 16)), (2,), 64),
    "unaligned": HalfBudget(dense(DenseSpec((1, 60), 287, 256)), (2,), 64),
    "row": HalfBudget(dense(DenseSpec((1, 1), 256, 256)), (2,), 64, tensor_cores=False),
    "swiglu": HalfBudget(normed_dense(NormedDenseSpec((1, 60), 256, 1376, swiglu=True)), (2,), 64),
    "scan": HalfBudget(
        ema_scan_dense(EmaScanDenseSpec(1, 60, 16, 256, residual=True)), (1, 3), 64, False
    ),
    "softmax": HalfBudget(gated_attention(_attention(GatedAttentionSpec, 60)), (), 96),
    "softmax_long": HalfBudget(gated_attention(_attention(GatedAttentionSpec, 4096)), (), 168),
    "softmax_512": HalfBudget(gated_attention(_attention(GatedAttentionSpec, 4096, 512)), (), 168),
    "laplace": HalfBudget(
        laplace_attention(_attention(LaplaceAttentionSpec, 60)), (), 96, tensor_cores=False
    ),
}


@pytest.fixture(scope="module")
def generated():
    """The CUDA C of all kernels."""
    functions = {
        name: hand_schedule(func, TARGET.tvm_target()).func.with_attr("global_symbol", name)
        for name, func in (
            *((name, budget.func) for name, budget in KERNELS.items()),
            *(
                (f"{name}_{dtype}", budget.stored(dtype))
                for name, budget in HALF_KERNELS.items()
                for dtype in HALF_TYPES
            ),
        )
    }
    return tvm.compile(tvm.IRModule(functions), TARGET.tvm_target())


@pytest.fixture(scope="module")
def kernels(generated):
    fatbin = toolchain.compile_fatbin(generated_source(generated), TARGET)
    return {(k.name, k.arch): k for k in read_kernels(fatbin, launch_threads(generated))}


@needs_nvcc
@needs_tools
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_budgets(kernels, name, arch) -> None:
    budget = KERNELS[name]
    # A scan in segments is two kernels; the second one does the work.
    kernel = kernels.get((f"{name}_kernel_1", arch)) or kernels[f"{name}_kernel", arch]
    assert kernel.local == 0, "it spills, or keeps an array in local memory"
    assert kernel.registers <= budget.registers
    assert kernel.shared <= 48 << 10
    assert kernel.occupancy is not None and kernel.occupancy >= budget.occupancy
    assert kernel.count(r"LDG\S*\.128") >= budget.loads * kernel.count("LDG")
    assert kernel.count("STG") - kernel.count(r"STG\S*\.128") <= budget.stores
    assert kernel.loop_share("FFMA") >= budget.ffma


@needs_nvcc
@needs_tools
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("name", HALF_KERNELS)
def test_budgets_in_half(kernels, name, dtype, arch) -> None:
    budget = HALF_KERNELS[name]
    kernel = kernels[f"{name}_{dtype}_kernel", arch]
    assert kernel.local == 0, "it spills, or keeps an array in local memory"
    assert kernel.registers <= budget.registers
    assert kernel.shared <= 48 << 10
    products = kernel.count("HMMA")
    assert kernel.count(r"HMMA\.16816\.F32\.BF16") == (products if dtype == "bfloat16" else 0)
    assert (products > 0) == budget.tensor_cores
    if budget.tensor_cores:
        assert kernel.count("LDSM") > 0 and kernel.count(r"LDGSTS\S*\.128") > 0


@needs_nvcc
@needs_tools
def test_no_kernel_uses_fast_math(kernels) -> None:
    """A fast exponential is MUFU.EX2 of a scaled argument alone; expf rounds it in steps."""
    sigmoid = kernels["dense_small_kernel", 80]
    assert sigmoid.count("MUFU.EX2") > 0
    assert sigmoid.count(r"FFMA\.(RM|SAT)") > 0


@needs_nvcc
def test_what_nvcc_refuses_is_told() -> None:
    with pytest.raises(CompileError, match=r"cannot compile the kernels .*(\n|.)*this is no CUDA"):
        toolchain.compile_fatbin("#error this is no CUDA C\n", resolve_cuda("cuda-sm_80"))


def test_no_nvcc_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(toolchain, "find_tool", lambda name: None)
    with pytest.raises(
        TargetError, match=r"CUDA targets need nvcc.*pip install 'mega-tvm\[cuda\]'"
    ):
        toolchain.compile_fatbin("", TARGET)


def test_a_library_without_gpu_code() -> None:
    assert find_fatbins(b"\x50\xed\x55\xba" + bytes(3)) == []
    with pytest.raises(MegaError, match="holds no machine code for GPUs"):
        read_kernels(b"\x7fELF")


@needs_nvcc
@needs_tools
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inspect_kernels(dtype, tmp_path, capsys) -> None:
    """A whole library, compiled with no GPU driver in the process."""
    from mega_tvm.compiler import compile_model
    from tests.compiler.models import mega

    path = compile_model(
        mega(seq_len=9), target="cuda-sm_80", dtype=dtype, output=tmp_path / "model.so"
    )
    assert inspect_main([str(path), "--kernels", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {kernel["arch"] for kernel in report["kernels"]} == {"sm_80"}
    manifest = json.loads(path.with_suffix(".json").read_text())
    launches = {launch["name"] for k in manifest["kernels"] for launch in k["launches"]}
    assert {kernel["name"] for kernel in report["kernels"]} == launches
    assert all(kernel["local_memory_instructions"] == 0 for kernel in report["kernels"])
    assert any(kernel["tensor_core"] for kernel in report["kernels"]) == (dtype == "bfloat16")
    assert inspect_main([str(path), "--kernels"]) == 0
    assert "occupancy" in capsys.readouterr().out
    assert inspect_main([str(path), "--estimate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == dtype
    assert {k["name"] for k in found["kernels"]} == {k["name"] for k in manifest["kernels"]}
    assert all(us > 0 for kernel in found["kernels"] for us in kernel["us"])
    assert all(a100 > h100 for a100, h100 in found["total_us"].values())
    assert inspect_main([str(path)]) == 0
