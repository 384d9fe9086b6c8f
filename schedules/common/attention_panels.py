"""Keys of the blocked attention kernel on x86, transposed into panels.

A panel ``[width, panel]`` holds one component of a vector's worth of keys in each of its vectors.
Squares of a key's components are transposed in registers, what is left an element at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from .attention import AttentionSpec
from .dims import Extent
from .transpose import transposed


def key_packer(spec: AttentionSpec, keys: Extent, panel: int, L: int) -> Callable[..., None]:
    """Return the inline ``(k, kt, b, to, p, slot, vectors)``; made within a script's function.

    It writes the first ``vectors`` vectors of keys of panel ``p`` of batch element ``b``, whose
    keys lie in ``k``, to ``kt[to, slot]``. Behind the last key it stands again: nobody looks at it.
    """
    W, k_off = spec.width, spec.k_offset

    @T.inline
    def store_column(kt, column, to, slot, d, j):
        kt[to, slot, d, T.Ramp(j, 1, L)] = column

    def pack_square(k, kt, b, to, p, slot, d0, j0):
        # L components of L keys
        rows = [
            k[b, T.min(p * panel + j0 + j, keys - 1), T.Ramp(k_off + d0, 1, L)] for j in range(L)
        ]
        for d, column in enumerate(transposed(rows)):
            store_column(kt, column, to, slot, d0 + d, j0)

    @T.inline
    def pack_panel(k, kt, b, to, p, slot, vectors):
        for j in T.serial(vectors):
            for c in T.serial(W // L):
                pack_square(k, kt, b, to, p, slot, c * L, j * L)
            if W % L > 0:
                for i in T.serial(L):
                    for d in T.serial(W % L):
                        key = T.meta_var(T.min(p * panel + j * L + i, keys - 1))
                        at = T.meta_var(W - W % L + d)
                        kt[to, slot, at, j * L + i] = k[b, key, k_off + at]

    return pack_panel
