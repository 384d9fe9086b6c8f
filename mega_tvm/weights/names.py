"""The one table of a Mega model's tensors: Axon names, dotted names, shapes.

Axon names are ``layer/param``. Edifice's safetensors export, our own safetensors files and the
torch module's ``state_dict`` all join the same two parts with a dot instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from reference.config import MegaConfig

# Dimensions: E embed_dim, H hidden_size, D ema_dim, I inner width of the FFN.
_INPUT_PROJECTION = (("input_projection/kernel", "EH"), ("input_projection/bias", "H"))
_BLOCK = (
    ("{b}_ema_norm/gamma", "H"),
    ("{b}_ema_norm/beta", "H"),
    ("{b}_ema/{b}_ema_proj_w", "HD"),
    ("{b}_ema/{b}_ema_proj_b", "D"),
    ("{b}_ema/{b}_ema_alpha", "D"),
    ("{b}_ema/{b}_ema_out_w", "DH"),
    ("{b}_ema/{b}_ema_out_b", "H"),
    ("{b}_attn_norm/gamma", "H"),
    ("{b}_attn_norm/beta", "H"),
    ("{b}_gattn_q/kernel", "HH"),
    ("{b}_gattn_q/bias", "H"),
    ("{b}_gattn_k/kernel", "HH"),
    ("{b}_gattn_k/bias", "H"),
    ("{b}_gattn_v/kernel", "HH"),
    ("{b}_gattn_v/bias", "H"),
    ("{b}_gattn_gate/kernel", "HH"),
    ("{b}_gattn_gate/bias", "H"),
    ("{b}_gattn_out/kernel", "HH"),
    ("{b}_gattn_out/bias", "H"),
    ("{b}_ffn_norm/gamma", "H"),
    ("{b}_ffn_norm/beta", "H"),
    ("{b}_ffn_gate/kernel", "HI"),
    ("{b}_ffn_gate/bias", "I"),
    ("{b}_ffn_up/kernel", "HI"),
    ("{b}_ffn_up/bias", "I"),
    ("{b}_ffn_down/kernel", "IH"),
    ("{b}_ffn_down/bias", "H"),
)
_FINAL_NORM = (("final_norm/gamma", "H"), ("final_norm/beta", "H"))

_BLOCK_NUMBER = re.compile(r"mega_block_([1-9][0-9]{0,5})_")
_DROPOUT_KEY = re.compile(r"[^/]+_(?:drop|dropout)/key")


def _table(num_layers: int, has_input_projection: bool) -> Iterator[tuple[str, str]]:
    if has_input_projection:
        yield from _INPUT_PROJECTION
    for i in range(1, num_layers + 1):
        for name, dims in _BLOCK:
            yield name.format(b=f"mega_block_{i}"), dims
    yield from _FINAL_NORM


def expected_names(num_layers: int, has_input_projection: bool) -> list[str]:
    """Return every tensor's Axon name in the order of the forward pass."""
    return [name for name, _ in _table(num_layers, has_input_projection)]


def expected_shapes(config: MegaConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor's Axon name and shape, in the order of the forward pass.

    Parameters
    ----------
    config : MegaConfig

    Returns
    -------
    dict of str to tuple of int
    """
    sizes = {
        "E": config.embed_dim,
        "H": config.hidden_size,
        "D": config.ema_dim,
        "I": config.ffn_size,
    }
    return {
        name: tuple(sizes[dim] for dim in dims)
        for name, dims in _table(config.num_layers, config.has_input_projection)
    }


def to_dotted(name: str) -> str:
    """Return an Axon name's dotted form: ``final_norm/gamma`` to ``final_norm.gamma``."""
    return ".".join(name.rsplit("/", 1))


def to_axon(name: str) -> str:
    """Return a dotted name's Axon form: ``final_norm.gamma`` to ``final_norm/gamma``."""
    return "/".join(name.rsplit(".", 1))


def block_number(name: str) -> int | None:
    """Return i where ``name`` belongs to ``mega_block_i``, else None."""
    match = _BLOCK_NUMBER.match(name)
    return int(match[1]) if match else None


def is_dropout_key(name: str) -> bool:
    """Whether an Axon name is a dropout layer's random key: training state, not a weight."""
    return _DROPOUT_KEY.fullmatch(name) is not None
