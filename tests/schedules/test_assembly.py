"""What the hot loops of the kernels compile to: multiply-adds on full vectors, in registers."""

from __future__ import annotations

import pytest

from schedules.dense.naive import DenseSpec, dense
from schedules.gated_attention.naive import gated_attention
from schedules.laplace_attention.cpu import MAXIMUM
from schedules.laplace_attention.naive import laplace_attention
from tests.schedules.assembly import Loop, distance_loops, inner_loops, product_loops
from tests.schedules.cases import attention_spec, sized
from tests.schedules.harness import LEVELS, assembly, cpu_target

# Assembly can be read on a machine that could not run it.
MCPU = pytest.mark.parametrize("mcpu", list(LEVELS))
LAPLACE = pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
BITS = {"x86-64-v4": 512, "x86-64-v3": 256}

# Rows that only a call brings.
ANY = ("batch", "seq_len")

# What a local buffer becomes that was not kept on the stack: an allocation a tile.
WORKSPACE = "TVMBackendAllocWorkspace"

DENSE = [
    DenseSpec((1, 60), 256, 768, sigmoid_from=512),
    DenseSpec((1, 60), 256, 1376, swiglu=True),
    DenseSpec((1, 60), 688, 256, residual=True),
    DenseSpec((1, 60), 256, 16),
    DenseSpec((1, 60), 16, 256, residual=True),
    DenseSpec((4, 59), 287, 40),
    DenseSpec((1, 59), 100, 90, swiglu=True),
    *(DenseSpec((m,), 256, 300) for m in range(1, 8)),
    DenseSpec((1,), 256, 1376, swiglu=True),
    DenseSpec((3,), 256, 1376, swiglu=True),
    DenseSpec(ANY, 256, 300, sigmoid_from=200),
    DenseSpec(ANY, 256, 1376, swiglu=True),
    DenseSpec(ANY, 256, 16),
    DenseSpec(("batch", 1), 688, 256, residual=True),
]


def _assert_clean(loops: list[Loop], *, bits: int, density: float) -> None:
    """Check all loops, and that the densest, the full tile's, uses full vectors.

    ``density`` is the least share of its instructions that must calculate.
    """
    for loop in loops:
        assert not loop.faults(), f"{loop.faults()} in {loop}"
        assert not loop.reloads(), f"reloads {loop.reloads()} in {loop}"
    densest = max(loops, key=lambda loop: len(loop.arithmetic) / len(loop.body))
    assert densest.vector_bits == bits, str(densest)
    assert len(densest.arithmetic) >= density * len(densest.body), str(densest)


def _assert_products(loops: list[Loop], *, bits: int) -> None:
    assert loops, "no loop multiplies and adds"
    # 6x4 and 6x2 tiles: 24 of 37 instructions, 12 of 23; the rest loads, broadcasts, counts. Few
    # rows need more loads: 3x6 18 of 33, 2x4 16 of 35.
    _assert_clean(loops, bits=bits, density=0.5 if bits == 512 else 0.45)
    for loop in loops:
        assert loop.fma_count == len(loop.arithmetic), f"not all arithmetic is FMA in {loop}"


def _assert_distances(loops: list[Loop], *, bits: int) -> None:
    assert loops, "no loop sums distances"
    _assert_clean(loops, bits=bits, density=0.6)
    for loop in loops:
        count = [sum(i.opcode.startswith(op) for i in loop.arithmetic) for op in _DISTANCE]
        assert len(set(count)) == 1 and sum(count) == len(loop.arithmetic), str(loop)


def _assert_embedded(loop: Loop) -> None:
    """Check that queries are operands in memory: what else is broadcast is a constant."""
    subtractions = [i for i in loop.body if i.opcode == "vsubps"]
    assert all(i.memory and "{1to" in i.memory for i in subtractions), str(loop)
    broadcasts = [i for i in loop.body if "broadcast" in i.opcode]
    assert all("%rip" in str(i.memory) for i in broadcasts), str(loop)


# |q - k| by a subtraction and a mask; half of it is added by an FMA.
_DISTANCE = ("vsubps", "vand", "vfmadd")


@MCPU
@pytest.mark.parametrize("spec", DENSE, ids=lambda spec: spec.name)
def test_dense(mcpu, spec) -> None:
    text = assembly(dense(spec), cpu_target(mcpu))
    assert WORKSPACE not in text
    _assert_products(product_loops(text), bits=BITS[mcpu])


@MCPU
@LAPLACE
@sized("B T W V", [(1, 1024, 256, 256), (1, 59, 100, 103), ("batch", "seq_len", 256, 256)])
def test_blocked_attention(mcpu, laplace, B, T, W, V) -> None:
    spec = attention_spec(laplace, B, T, T, W, V)
    text = assembly((laplace_attention if laplace else gated_attention)(spec), cpu_target(mcpu))
    products = product_loops(text)
    _assert_products(products, bits=BITS[mcpu])
    if laplace:
        distances = distance_loops(text)
        _assert_distances(distances, bits=BITS[mcpu])
        if mcpu == "x86-64-v4":
            for loop in distances:
                _assert_embedded(loop)
    else:
        full = [loop for loop in products if loop.vector_bits == BITS[mcpu]]
        assert len(full) >= 2, "scores and weighted values are two products"


@MCPU
@sized("B T W V", [(1, 1024, 256, 256), ("batch", "seq_len", 256, 256)])
def test_distances_of_maxima(mcpu, B, T, W, V) -> None:
    spec = attention_spec(True, B, T, T, W, V)
    text = assembly(laplace_attention(spec), cpu_target(mcpu), l1_form=MAXIMUM)
    loops = [loop for loop in product_loops(text) if "vmaxps" in loop.opcodes()]
    assert loops, "no loop sums maxima"
    _assert_clean(loops, bits=BITS[mcpu], density=0.5)
    for loop in loops:
        maxima = [i for i in loop.body if i.opcode == "vmaxps"]
        assert len(maxima) == loop.fma_count == len(loop.arithmetic) / 2, str(loop)
        if mcpu == "x86-64-v4":
            assert all(i.memory and "{1to" in i.memory for i in maxima), str(loop)


@MCPU
@LAPLACE
@sized("B T", [(1, 60), ("batch", "seq_len")])
def test_row_attention(mcpu, laplace, B, T) -> None:
    """One row: a score's loop ends in a horizontal sum and one scalar store a key.

    With AVX2 a query of 256 does not fit the registers, and its vectors are fetched from the stack
    in place of the query itself: no reload check.
    """
    spec = attention_spec(laplace, B, 1, T, 256)
    text = assembly((laplace_attention if laplace else gated_attention)(spec), cpu_target(mcpu))
    loops = product_loops(text) + distance_loops(text)
    assert len(distance_loops(text)) == laplace
    for loop in loops:
        assert not loop.faults(), f"{loop.faults()} in {loop}"
        assert loop.vector_bits == BITS[mcpu], str(loop)


# That the checks can fail.

LOOP = """
\t.text
kernel:
\tmovq\t%rsp, %rbp
.LBB0_1:
\tvmovaps\t(%rsi), %zmm0
.Ltmp3:
\tvfmadd231ps\t-4(%rdi,%rax,4){1to16}, %zmm0, %zmm1
{extra}
\taddq\t$64, %rsi
\tcmpq\t%rsi, (%rdx)
\tjne\t.LBB0_1
\tvmovaps\t%zmm1, (%rcx)
\tvzeroupper
\tretq
"""


@pytest.mark.parametrize(
    ("extra", "faults", "reloads"),
    [
        ("", [], []),
        ("\tvmovss\t%xmm3, (%rcx,%rax,4)", [], []),
        ("\tvmovaps\t%zmm1, -64(%rsp)", ["store: vmovaps %zmm1, -64(%rsp)"], []),
        ("\tvmovups\t%ymm1, (%rcx)\t# 32-byte Spill", ["store: vmovups %ymm1, (%rcx)"], []),
        ("\tmovq\t%rax, 8(%rsp)", ["store: movq %rax, 8(%rsp)"], []),
        ("\tcallq\t*%r11", ["call: callq *%r11"], []),
        ("\tcallq\texpf@PLT", ["call: callq expf@PLT"], []),
        ("\tvmovaps\t-64(%rsp), %zmm1", [], ["vmovaps -64(%rsp), %zmm1"]),
        ("\tvaddps\t32(%rbp), %ymm2, %ymm2", [], ["vaddps 32(%rbp), %ymm2, %ymm2"]),
        ("\tvbroadcastss\t400(%rsp,%rsi,4), %ymm8", [], []),  # a buffer, walked over
        ("\tleaq\t8(%rax), %rax", [], []),
        ("\tprefetcht1\t512(%rsi)", [], []),
    ],
    ids=lambda v: v.strip().replace("\t", " ") or "clean" if isinstance(v, str) else "",
)
def test_a_loops_faults_are_found(extra, faults, reloads) -> None:
    (loop,) = product_loops(LOOP.replace("{extra}", extra))
    assert (loop.function, loop.label) == ("kernel", ".LBB0_1")
    assert loop.fma_count == 1
    assert loop.vector_bits == 512
    assert loop.faults() == faults
    assert loop.reloads() == reloads


def test_only_innermost_loops_count() -> None:
    text = """
f:
.LBB0_1:
\tvmovaps\t%ymm0, (%rcx)
.LBB0_2:
\tvfmadd213ps\t%ymm1, %ymm2, %ymm0
\ttestb\t%al, %al
\tje\t.LBB0_4
\tvaddps\t%ymm1, %ymm1, %ymm1
.LBB0_4:
\tdecq\t%rax
\tjne\t.LBB0_2
\tdecq\t%rbx
\tjne\t.LBB0_1
\tretq
g:
.LBB1_1:
\tvdivps\t%ymm1, %ymm2, %ymm0
\tjmp\t.LBB1_1
"""
    f, g = inner_loops(text)
    assert (f.function, f.label, f.blocks) == ("f", ".LBB0_2", 3)
    assert f.faults() == ["3 basic blocks"]
    assert (g.function, g.label, g.blocks) == ("g", ".LBB1_1", 1)
    assert product_loops(text) == [f]


@MCPU
def test_tvms_own_pipeline_is_flagged(mcpu) -> None:
    """Without `keep_locals_on_stack` tiles are allocated, and a row's partial sums are stored."""
    target = cpu_target(mcpu)
    assert WORKSPACE in assembly(dense(DenseSpec((1, 60), 256, 768)), target, pipeline="default")
    row = gated_attention(attention_spec(False, 1, 1, 60, 256))
    loops = product_loops(assembly(row, target, pipeline="default"))
    stores = [fault for loop in loops for fault in loop.faults() if fault.startswith("store")]
    assert len(stores) >= 6


@MCPU
def test_a_tile_that_is_too_large_is_flagged(mcpu) -> None:
    func = dense(DenseSpec((28,), 256, 768))
    text = assembly(func, cpu_target(mcpu), tile_m=14, panel_vectors=4)
    assert any(loop.faults() and loop.reloads() for loop in product_loops(text))
