"""Reads ``.nx`` files, the checkpoints that ``Edifice.Checkpoint.save`` writes.

An envelope (compressed flag, metadata as an Erlang term), then an Nx blob, deflated where the
flag says so: ``"nx"``, version, endianness, a tree of containers and tensors as an Erlang term,
the tensors' bytes. Edifice's spec of the build, where there is one, is in the metadata.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from mega_tvm.errors import WeightsError

from .erlang_term import Atom, Opaque, Term, TermError, decode
from .inflate import Inflater
from .stored import (
    Options,
    StoredCheckpoint,
    StoredTensor,
    check_shape,
    check_spans,
    clip,
    widen_bfloat16,
)

_CONTAINER = "Elixir.Nx.Container.Map"
_SPEC = b"__edifice_spec__"
_WIDTH_ALIASES = ("obs_size", "input_dim", "input_size")  # what Edifice may call embed_dim
_KNOWN_OPTIONS = (
    "embed_dim",
    "hidden_size",
    "ema_dim",
    "num_layers",
    "dropout",
    "window_size",
    "seq_len",
    "laplace_attention",
)
_DTYPES = {
    ("f", 16): ("float16", 2),
    ("f", 32): ("float32", 4),
    ("f", 64): ("float64", 8),
    ("bf", 16): ("bfloat16", 2),
    **{("s", bits): (f"int{bits}", bits // 8) for bits in (8, 16, 32, 64)},
    **{("u", bits): (f"uint{bits}", bits // 8) for bits in (8, 16, 32, 64)},
}


def read_nx(data: bytes) -> StoredCheckpoint:
    """List what a ``.nx`` file holds.

    Raises
    ------
    WeightsError
        If it is malformed. Metadata that cannot be read is a warning only.
    """
    if len(data) < 5 or data[0] > 1:
        raise WeightsError("not a .nx file: it does not start with a flag of 0 or 1 and a length")
    metadata_size = int.from_bytes(data[1:5], "big")
    if metadata_size > len(data) - 5:
        raise WeightsError(
            f"not a .nx file, or truncated: {metadata_size} bytes of metadata claimed, "
            f"{len(data) - 5} bytes follow"
        )
    view = memoryview(data)
    blob = view[5 + metadata_size :]
    stored = StoredCheckpoint("nx", _read_blob(Inflater(blob) if data[0] else _Plain(blob)))
    if metadata_size:
        try:
            metadata = decode(view[5 : 5 + metadata_size])
        except TermError as error:
            stored.warnings.append(f"the metadata cannot be read, and with it any spec: {error}")
        else:
            _read_metadata(stored, metadata)
    return stored


class _Body(Protocol):
    def take(self, size: int, what: str) -> memoryview: ...

    def finish(self) -> None: ...


class _Plain:
    def __init__(self, data: memoryview) -> None:
        self._data = data

    def take(self, size: int, what: str) -> memoryview:
        if size > len(self._data):
            raise WeightsError(
                f"truncated, or not a .nx file: {what} takes {size} bytes, {len(self._data)} left"
            )
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def finish(self) -> None:
        if self._data:
            raise WeightsError(f"{len(self._data)} bytes follow the last tensor's data")


@dataclasses.dataclass(frozen=True)
class _Node:
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int


def _read_blob(body: _Body) -> dict[str, StoredTensor]:
    header = body.take(12, "the header")
    if bytes(header[:2]) != b"nx":
        raise WeightsError(f"not a .nx file: b'nx' expected, {bytes(header[:2])!r} found")
    if header[2] != 1:
        raise WeightsError(f"version {header[2]} of the Nx format; this reads version 1")
    if header[3] > 1:
        raise WeightsError(f"endianness {header[3]}; expected 0 (little) or 1 (big)")
    order: Literal["<", ">"] = ">" if header[3] else "<"
    tree = body.take(int.from_bytes(header[4:12], "big"), "the tree of tensors")
    try:
        root = decode(tree)
    except TermError as error:
        raise WeightsError(f"the tree of tensors cannot be read: {error}") from error

    nodes: dict[str, _Node] = {}
    for layer, container in _pairs(root, "the tree's root"):
        for param, node in _pairs(container, f"layer {clip(layer)}"):
            name = f"{layer}/{param}"
            if name in nodes:
                raise WeightsError(f"tensor {clip(name)} stands twice in the tree")
            nodes[name] = _node(name, node)

    spans = {name: (node.start, node.stop) for name, node in nodes.items()}
    last, size = max(
        ((name, node.stop) for name, node in nodes.items()),
        key=lambda item: item[1],
        default=("", 0),
    )
    check_spans(spans, size)
    data = body.take(size, f"the data up to tensor {clip(last)}")
    body.finish()
    return {
        name: StoredTensor(node.shape, node.dtype, functools.partial(_decode, data, node, order))
        for name, node in nodes.items()
    }


def _pairs(node: Term, what: str) -> Iterator[tuple[str, Term]]:
    if not (isinstance(node, tuple) and len(node) == 3 and node[0] == _CONTAINER):
        raise WeightsError(f"{what} is {_sketch(node)}, not a container of named tensors")
    pairs = node[1]
    if not isinstance(pairs, list):
        raise WeightsError(f"{what} holds {_sketch(pairs)}, not a list of pairs")
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], bytes)):
            raise WeightsError(f"{what} holds {_sketch(pair)}, not a pair of a name and a node")
        try:
            yield pair[0].decode("utf-8"), pair[1]
        except UnicodeDecodeError as error:
            raise WeightsError(f"{what} holds a name that is not UTF-8: {clip(pair[0])}") from error


def _node(name: str, node: Term) -> _Node:
    if not (isinstance(node, tuple) and len(node) == 7 and node[0] == "t"):
        raise WeightsError(f"{clip(name)} is {_sketch(node)}, not a tensor")
    _, raw_shape, kind, _, vectorized_axes, start, size = node
    shape = check_shape(name, raw_shape)
    if vectorized_axes != []:
        raise WeightsError(f"tensor {clip(name)} has vectorized axes; expected none")
    try:
        dtype, itemsize = _DTYPES[kind]
    except (KeyError, TypeError) as error:
        raise WeightsError(f"tensor {clip(name)} has an unknown dtype, {_sketch(kind)}") from error
    if type(start) is not int or type(size) is not int:
        raise WeightsError(f"tensor {clip(name)} has an offset or size that is not an integer")
    expected = math.prod(shape) * itemsize
    if size != expected:
        raise WeightsError(
            f"tensor {clip(name)} claims {size} bytes; "
            f"its shape {list(shape)} of {dtype} takes {expected}"
        )
    return _Node(shape, dtype, start, start + size)


def _sketch(term: Term) -> str:
    """Name a term's kind: its full text could be as long as the file, and nested as deep."""
    if isinstance(term, (tuple, list, dict)):
        return f"a {type(term).__name__} of {len(term)}"
    return clip(term, 60)


def _decode(data: memoryview, node: _Node, order: Literal["<", ">"]) -> npt.NDArray[Any]:
    raw = data[node.start : node.stop]
    if node.dtype == "bfloat16":
        return widen_bfloat16(np.frombuffer(raw, f"{order}u2")).reshape(node.shape)
    return np.frombuffer(raw, np.dtype(node.dtype).newbyteorder(order)).reshape(node.shape)


def _read_metadata(stored: StoredCheckpoint, metadata: Term) -> None:
    if not isinstance(metadata, dict):
        stored.warnings.append(f"the metadata is {_sketch(metadata)}, not a map: it is left out")
        return
    stored.metadata = {_text(key): _to_plain(value) for key, value in metadata.items()}
    spec = metadata.get(_SPEC)
    if spec is None:
        return
    if not isinstance(spec, dict):
        stored.warnings.append(f"the spec is {_sketch(spec)}, not a map: it is left out")
        return
    arch = spec.get("arch", "mega")
    if arch != "mega":
        raise WeightsError(
            f"the spec says architecture {clip(_to_plain(arch))}; this reads 'mega' only"
        )
    stored.options_label = "the spec (__edifice_spec__)"
    stored.options = _spec_options(spec.get("build_opts"), stored.warnings)


def _spec_options(build_opts: Term, warnings: list[str]) -> Options:
    options: Options = {}
    if not isinstance(build_opts, list) or not all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Atom)
        for pair in build_opts
    ):
        warnings.append("the spec's build_opts are not a keyword list: they are left out")
        return options
    for key, value in build_opts:
        name = "embed_dim" if key in _WIDTH_ALIASES else str(key)
        if name not in _KNOWN_OPTIONS:
            # Edifice itself passes over options that it does not know.
            warnings.append(f"the spec's option {clip(name)} is not one of Mega's: it is left out")
        elif value is not None:  # nil is Elixir's way to leave an option at its default
            if name in options and options[name] != value:
                raise WeightsError(
                    f"the spec says both {clip(options[name])} and {clip(_to_plain(value))} "
                    f"for option {name}"
                )
            options[name] = _to_plain(value)
    return options


def _to_plain(term: Term) -> object:
    """Return a term as JSON-like values; binaries that are not text become their length."""
    if isinstance(term, bytes):
        try:
            return term.decode("utf-8")
        except UnicodeDecodeError:
            return f"<{len(term)} bytes>"
    if isinstance(term, Opaque):
        return f"<{term.kind}>"
    if isinstance(term, dict):
        return {_text(key): _to_plain(value) for key, value in term.items()}
    if isinstance(term, list) and all(
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Atom) for item in term
    ):
        return {str(key): _to_plain(value) for key, value in term} if term else []
    if isinstance(term, (list, tuple)):
        return [_to_plain(item) for item in term]
    return str(term) if isinstance(term, Atom) else term


def _text(key: Term) -> str:
    plain = _to_plain(key)
    return plain if isinstance(plain, str) else str(plain)
