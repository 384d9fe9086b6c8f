"""Weights of a Mega model: read from Edifice's, our own and PyTorch's files, and written."""

from mega_tvm.errors import WeightsError

from .checkpoint import Checkpoint, params_digest
from .files import detect_format, load_checkpoint, save_checkpoint
from .names import expected_shapes, to_axon, to_dotted

__all__ = [
    "Checkpoint",
    "WeightsError",
    "detect_format",
    "expected_shapes",
    "load_checkpoint",
    "params_digest",
    "save_checkpoint",
    "to_axon",
    "to_dotted",
]
