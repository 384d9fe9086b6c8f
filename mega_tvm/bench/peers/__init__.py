"""The contestants: mega_tvm and the libraries it is compared with, one module each."""

from __future__ import annotations

from .base import Model, Peer, versions
from .iree import Iree
from .jax import Jax
from .mega import MegaTvm
from .onnxruntime import OnnxRuntime
from .openvino import OpenVino
from .plain import Form
from .torch_compile import TorchCompile
from .torch_eager import TorchEager

__all__ = ["OURS", "PEERS", "Form", "Model", "Peer", "select_peers", "versions"]

OURS = MegaTvm.name
_ALL: tuple[Peer, ...] = (
    MegaTvm(),
    TorchEager(),
    TorchCompile(),
    OnnxRuntime(),
    OpenVino(),
    Jax(),
    Iree(),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def select_peers(names: str) -> list[Peer]:
    """Return the contestants of a comma-separated list, or all of them for ``"all"``.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    if names.strip() == "all":
        return list(PEERS.values())
    chosen = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; known: {', '.join(PEERS)}, all")
        if PEERS[name] not in chosen:
            chosen.append(PEERS[name])
    if not chosen:
        raise ValueError(f"no peer named; known: {', '.join(PEERS)}, all")
    return chosen
