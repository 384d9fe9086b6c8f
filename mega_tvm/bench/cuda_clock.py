"""How calls on a GPU are timed: by CUDA events before and behind each, on one stream.

What a call takes is thus what a user waits for between two calls: kernels, and the gaps between
them where the host is slower than they are. PyTorch and TVM both run on the default stream. Ours
waits for its result in each call, as its interface promises; PyTorch's calls return before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Times calls, each on its own."""

    def times(
        self, call: Callable[[], object], count: int, before: Callable[[], object] | None = None
    ) -> list[int]:
        """Return nanoseconds of each of ``count`` calls; ``before`` runs ahead of each, untimed."""


class EventClock:
    """CUDA events, whose resolution is half a microsecond."""

    def times(
        self, call: Callable[[], object], count: int, before: Callable[[], object] | None = None
    ) -> list[int]:
        """Return nanoseconds of each call."""
        events = []
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if before is not None:
                before()
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [round(start.elapsed_time(end) * 1e6) for start, end in events]


class L2Evictor:
    """Puts everything out of L2, by writing a buffer of twice its size."""

    def __init__(self, device: str) -> None:
        size = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 1 << 20
        self._buffer: Any = torch.zeros(2 * size // 4, device=device)

    def __call__(self) -> None:
        """Evict."""
        self._buffer.add_(1)
