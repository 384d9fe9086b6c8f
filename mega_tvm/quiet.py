"""Keeps one line of TVM's off the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

# Written once for every constant that is saved; it warns of nothing.
_NOISE = b"Warning: Scope Saving:"


@contextlib.contextmanager
def without_saving_noise() -> Iterator[None]:
    """Drop TVM's "Scope Saving" lines from standard error; all others appear at the end."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as capture:
        os.dup2(capture.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            capture.seek(0)
            kept = [line for line in capture if _NOISE not in line]
            os.write(2, b"".join(kept))
