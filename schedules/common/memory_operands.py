"""Elements that an instruction reads from memory itself, in place of a register."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T


def apart(count: int) -> tirx.Buffer:
    """Return so many zeros that LLVM can tell neither from other numbers nor from each other.

    Within a script. Added to an index, they keep loads of one element apart. An instruction of
    AVX-512 may take an element in memory as its second operand, for all lanes (an embedded
    broadcast): that needs no register, and none of the units that calculate, which a broadcast
    into a register keeps busy for half a cycle (Zen 4). LLVM does so with a load that has a single
    use, and would join loads of one address into a single one.
    """
    zeros = T.alloc_buffer((count,), "int64", scope="local")
    for nth in range(count):
        T.buffer_store(zeros, _zero(nth) if nth else 0, [nth])
    return zeros


def _zero(seed: int) -> tirx.PrimExpr:
    # The CRC of a number that continues the same number's is 0, which LLVM does not work out.
    same = T.int64(seed)
    return T.call_llvm_pure_intrin("int64", "llvm.x86.sse42.crc32.64.64", same, same)
