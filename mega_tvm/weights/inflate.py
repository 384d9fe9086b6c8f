"""A zlib stream, read piece by piece without trusting what it expands to."""

from __future__ import annotations

import zlib

from mega_tvm.errors import WeightsError

from .stored import expansion_limit

_CHUNK = 1 << 20


class Inflater:
    """Decompresses no more than is asked for, and never more than `expansion_limit`.

    Parameters
    ----------
    data : memoryview
        The whole stream.
    """

    def __init__(self, data: memoryview) -> None:
        self._inflater = zlib.decompressobj()
        self._data = data
        self._compressed = len(data)
        self._budget = expansion_limit(len(data))

    def take(self, size: int, what: str) -> memoryview:
        """Return the next ``size`` bytes.

        Raises
        ------
        WeightsError
            If the stream is damaged, ends before, or cannot plausibly hold them.
        """
        if size > self._budget:
            raise WeightsError(
                f"{what} claims {size} bytes, more than the file's {self._compressed} "
                "compressed bytes can plausibly hold"
            )
        self._budget -= size
        taken = bytearray()
        while len(taken) < size:
            piece = self._inflate(min(size - len(taken), _CHUNK))
            if not piece:
                raise WeightsError(
                    f"truncated: {what} takes {size} bytes, "
                    f"{len(taken)} left in the compressed body"
                )
            taken += piece
        return memoryview(taken)

    def finish(self) -> None:
        """Check that the stream ends here.

        Raises
        ------
        WeightsError
            If it does not, or its checksum does not match.
        """
        more = self._inflate(1)
        if more or not self._inflater.eof or self._inflater.unused_data or self._data:
            raise WeightsError("the compressed body does not end where the last tensor does")

    def _inflate(self, size: int) -> bytes:
        while not self._inflater.eof:
            pending: bytes | memoryview = self._inflater.unconsumed_tail
            if not pending:
                # A chunk at a time: zlib copies what it leaves unconsumed at every call.
                pending, self._data = self._data[:_CHUNK], self._data[_CHUNK:]
            try:
                piece = self._inflater.decompress(pending, size)
            except zlib.error as error:
                raise WeightsError(f"the compressed body is damaged: {error}") from error
            if piece or not pending:
                return piece
        return b""
