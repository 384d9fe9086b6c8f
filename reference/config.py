"""The options of a Mega model: one frozen, validated dataclass.

Names and defaults follow ``Edifice.Attention.Mega.build/1`` (Edifice v0.2.0).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from pathlib import Path
from typing import Any

LAYER_NORM_FORMS = ("plain", "axon-0.8.0")


class ConfigError(ValueError):
    """An option that is missing, unknown, of the wrong type or out of range."""


@dataclasses.dataclass(frozen=True)
class MegaConfig:
    """Options of a Mega model.

    Parameters
    ----------
    embed_dim : int
        Width of each input frame.
    hidden_size : int, default 256
        Width H inside the model, and of the output.
    ema_dim : int, default 16
        Channels D of the moving average.
    num_layers : int, default 4
        Number of Mega blocks.
    dropout : float, default 0.1
        Probability, 0 <= p < 1, on the EMA, attention and FFN outputs; training only.
    window_size : int, default 60
        Expected sequence length in frames.
    seq_len : int, optional
        Overrides ``window_size``. The same weights serve any length at run time.
    laplace_attention : bool, default False
        L1-Laplace attention weights in place of softmax (then attention is not causal).
    layer_norm : {"plain", "axon-0.8.0"}, default "plain"
        ``"axon-0.8.0"`` uses ``rsqrt(eps)`` in place of ``rsqrt(var + eps)`` where
        ``var < eps``, as Axon 0.8.0 does; Axon 0.8.1 and PyTorch use the plain form.

    Raises
    ------
    ConfigError
        If an option is missing, of the wrong type, or out of range.
    """

    embed_dim: int
    hidden_size: int = 256
    ema_dim: int = 16
    num_layers: int = 4
    dropout: float = 0.1
    window_size: int = 60
    seq_len: int | None = None
    laplace_attention: bool = False
    layer_norm: str = "plain"

    def __post_init__(self) -> None:
        for name in ("embed_dim", "hidden_size", "ema_dim", "num_layers", "window_size"):
            object.__setattr__(self, name, _positive_int(name, getattr(self, name)))
        seq_len = self.window_size if self.seq_len is None else self.seq_len
        object.__setattr__(self, "seq_len", _positive_int("seq_len", seq_len))
        object.__setattr__(self, "dropout", _probability("dropout", self.dropout))
        if not isinstance(self.laplace_attention, bool):
            raise _wrong("laplace_attention", "True or False", self.laplace_attention)
        if self.layer_norm not in LAYER_NORM_FORMS:
            raise _wrong("layer_norm", f"one of {list(LAYER_NORM_FORMS)}", self.layer_norm)

    @property
    def output_size(self) -> int:
        """Width of the output, which is ``hidden_size``."""
        return self.hidden_size

    @property
    def has_input_projection(self) -> bool:
        """Whether frames are projected: only where the two widths differ."""
        return self.embed_dim != self.hidden_size

    @property
    def ffn_size(self) -> int:
        """Inner width of the SwiGLU FFN: 2.667 * H, rounded, then up to a multiple of 8."""
        rounded = math.floor(self.hidden_size * 2.667 + 0.5)
        return rounded + (8 - rounded % 8) % 8

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> MegaConfig:
        """Build a config from a mapping; an unknown key is refused by name.

        Parameters
        ----------
        options : dict
            Option names to values. ``embed_dim`` is required.

        Raises
        ------
        ConfigError
            If a key is unknown or missing, or a value is not allowed.
        """
        if not isinstance(options, dict):
            raise ConfigError(
                f"a Mega config is a mapping of options; got {type(options).__name__}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ConfigError(
                    f"unknown option {key!r}; known options: {', '.join(known)}.{hint}"
                )
        if "embed_dim" not in options:
            raise ConfigError("option embed_dim is required (a positive integer); it was not given")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Return all options as a plain dict, in declaration order."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> MegaConfig:
        """Read a config from a JSON file.

        Raises
        ------
        ConfigError
            If the file is not JSON or holds options that are not allowed.
        """
        path = Path(source)
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"{path}: not a JSON file: {error}") from error
        except RecursionError as error:
            raise ConfigError(f"{path}: JSON nested too deep for a config") from error
        try:
            return cls.from_dict(options)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_json(self) -> str:
        """Return the options as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)


def recommended_defaults() -> dict[str, Any]:
    """Return the options Edifice recommends, as its ``recommended_defaults/0`` does."""
    return {
        field.name: field.default
        for field in dataclasses.fields(MegaConfig)
        if field.name in ("hidden_size", "ema_dim", "num_layers", "dropout", "window_size")
    }


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _wrong(name, "a positive integer", value)
    number = value.__index__()
    if number < 1:
        raise _wrong(name, "a positive integer", value)
    return int(number)


def _probability(name: str, value: object) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise _wrong(name, "a number p with 0 <= p < 1", value)
    try:
        number = float(value.__float__())
    except OverflowError as error:
        raise _wrong(name, "a number p with 0 <= p < 1", value) from error
    if not 0.0 <= number < 1.0:  # also refuses NaN
        raise _wrong(name, "a number p with 0 <= p < 1", value)
    return number


def _wrong(name: str, expected: str, value: object) -> ConfigError:
    return ConfigError(f"option {name} must be {expected}; got {value!r} ({type(value).__name__})")
