"""The errors that mega_tvm raises on purpose: all are `MegaError`.

Each message says what was expected, what came, and what to do.
"""

from __future__ import annotations


class MegaError(Exception):
    """Base of every error that mega_tvm raises on purpose."""


class WeightsError(MegaError):
    """A weights file is malformed, or its tensors do not make a Mega model."""


class UnsupportedModelError(MegaError):
    """A graph holds operators that the compiler does not know; all are listed at once."""


class TargetError(MegaError):
    """A target's name is not known, or this machine cannot compile for it."""


class CompileError(MegaError):
    """A compile cannot go on: contradicting options, an unwritable path, a failed link."""


class ArtifactError(MegaError):
    """A compiled library is not one of ours, is damaged, or does not fit this process."""


class ModelFileError(MegaError):
    """A model file (ONNX) is malformed, or not of a kind that is compiled."""


class ExportError(MegaError):
    """A model cannot be written as an ONNX file."""


class InputError(MegaError, ValueError):
    """An input of a call has the wrong shape, dtype or layout."""


class StreamUnsupportedError(MegaError):
    """A compiled model has no code for streams; the message says why."""


class StreamFullError(MegaError):
    """A stream's row holds as many frames as its caches have room for."""


class NotAnArtifactError(ArtifactError):
    """A file is not a compiled model: missing, unreadable, or without a manifest."""


class DamagedArtifactError(ArtifactError):
    """A compiled model's bytes are not those that the compiler wrote."""


class IncompatibleArtifactError(ArtifactError):
    """A compiled model is whole, but not for this CPU, these versions or this process."""


class UntrustedArtifactError(ArtifactError):
    """A file is not the one that the caller named by its digest."""


class TuningError(MegaError):
    """A tuning log cannot be read or written, or a tuning cannot go on."""
