"""Where the intermediates of a run function lie."""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from .manifest_schema import ALIGNMENT, round_up
from .relax_ops import dims_of, shape_of
from .symbolic_entry import region_name

# A kind of row: the names whose product is their number, none for what has a known size.
Region = tuple[str, ...]
# A byte of the workspace: the region, and the bytes a row ahead of it there.
Offset = tuple[Region, int]


class Workspace:
    """Offsets of intermediates: first fit among those that live at the same time.

    Intermediates whose rows a call brings lie in regions, one for each kind of row (``batch``,
    ``batch * seq_len``), and are planned by their bytes a row: offsets scale with the rows.
    """

    def __init__(self) -> None:
        self.sizes: dict[Region, int] = {}
        self._live: dict[relax.Var, tuple[Region, int, int]] = {}

    def place(self, var: relax.Var) -> Offset:
        """Reserve memory for a variable."""
        dims = dims_of(shape_of(var))
        region = tuple(sorted(dim for dim in dims if isinstance(dim, str)))
        elements = math.prod(dim for dim in dims if isinstance(dim, int))
        size = round_up(max(elements * np.dtype(str(var.ty.dtype)).itemsize, 1))
        start = self._find(region, size)
        self._live[var] = (region, start, start + size)
        return region, start

    def spare(self, size: int) -> Offset:
        """Return bytes that nothing which lives has: they are free again for what comes next."""
        return (), self._find((), round_up(size))

    def _find(self, region: Region, size: int) -> int:
        start = 0
        for other, begin, end in sorted(self._live.values()):
            if other != region:
                continue
            if start + size <= begin:
                break
            start = max(start, end)
        self.sizes[region] = max(self.sizes.get(region, ALIGNMENT), start + size)
        return start

    def hand_over(self, var: relax.Var, heir: relax.Var) -> None:
        """Let another variable have a variable's bytes."""
        self._live[heir] = self._live.pop(var)

    def release(self, var: relax.Var) -> None:
        """Give a variable's bytes back."""
        self._live.pop(var, None)

    def by_name(self) -> dict[str, int]:
        """Return the bytes a row of each region, as the manifest holds them."""
        return {region_name(region): self.sizes[region] for region in sorted(self.sizes)}
