"""The definition of Mega: its options, a NumPy oracle and a trainable PyTorch module.

Importing this package needs NumPy alone; ``reference.torch_mega`` and ``reference.ops`` need torch.
"""

from .config import ConfigError, MegaConfig, recommended_defaults

__all__ = ["ConfigError", "MegaConfig", "recommended_defaults"]
