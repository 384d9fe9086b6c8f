"""What a CPU target offers to a schedule."""

from __future__ import annotations

import dataclasses

from tvm.target import Target, codegen


@dataclasses.dataclass(frozen=True)
class VectorUnit:
    """Float32 lanes of a vector register, and how many such registers there are."""

    lanes: int
    registers: int


def vector_unit(target: Target) -> VectorUnit:
    """Return the widest vector unit of an x86 target: AVX-512, or else AVX2."""
    if codegen.llvm_cpu_has_features("avx512f", target):
        return VectorUnit(lanes=16, registers=32)
    return VectorUnit(lanes=8, registers=16)
