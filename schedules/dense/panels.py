"""Which panel of packed weights a tile meets: a full one, or the narrow one behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from ..common.dims import Extent
from .packing import PanelLayout


def emit_panel(
    layout: PanelLayout, panel: Extent, write: Callable[..., None], *arguments: Any
) -> None:
    """Write ``write(*arguments, panel, width)`` for a panel that may be the narrow one."""
    if layout.tail_width == 0:
        write(*arguments, panel, layout.width)
    elif layout.full_panels == 0:
        write(*arguments, 0, layout.tail_width)
    else:
        with T.If(panel < layout.full_panels):
            with T.Then():
                write(*arguments, panel, layout.width)
            with T.Else():
                write(*arguments, layout.full_panels, layout.tail_width)
