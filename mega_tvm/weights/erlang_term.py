"""A bounds-checked reader of Erlang's external term format.

Every count is checked against the bytes that are left, terms and nesting are limited, so that
memory stays within a small multiple of the input.

=====================  ===========================
Erlang                 Python
=====================  ===========================
integer, float         int, float
``nil true false``     None, True, False
any other atom         `Atom`
binary                 bytes
tuple, list, map       tuple, list, dict
pid, port, ref, fun    `Opaque`
=====================  ===========================
"""

from __future__ import annotations

import dataclasses
import math
import struct
import zlib
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

from .stored import expansion_limit

Term: TypeAlias = Any  # None, bool, int, float, bytes, Atom, Opaque, tuple, list or dict of them

MAX_DEPTH = 64
MAX_TERMS = 1_000_000
_MAX_BIG_BYTES = 1024  # 2466 digits: Python prints integers up to 4300

_VERSION = 131
_COMPRESSED = 80
_CONSTANTS = {"nil": None, "true": True, "false": False}
# What names a process, port or reference: a node's name, then this many bytes.
_IDENTIFIERS = {101: 5, 103: 9, 88: 12, 102: 5, 89: 8, 120: 12}


class TermError(ValueError):
    """Bytes that are not an external term, or exceed this reader's limits."""


class Atom(str):
    """An atom other than ``nil``, ``true`` and ``false``."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A term that means nothing outside the Erlang node that wrote it."""

    kind: str


def decode(data: bytes | memoryview) -> Term:
    """Read one external term, which must fill ``data``.

    Raises
    ------
    TermError
        If it is malformed, or too large or too deep.
    """
    view = memoryview(data)
    if len(view) < 2 or view[0] != _VERSION:
        raise TermError("does not start with 131, the external term format's first byte")
    body = _inflate(view[2:]) if view[1] == _COMPRESSED else view[1:]
    reader = _Reader(body)
    term = reader.term(0)
    if reader.left:
        raise TermError(f"{reader.left} bytes follow the term")
    return term


def _inflate(view: memoryview) -> memoryview:
    if len(view) < 4:
        raise TermError("ends inside the header of a compressed term")
    size = int.from_bytes(view[:4], "big")
    if size > expansion_limit(len(view)):
        raise TermError(f"{len(view)} bytes claim to decompress to {size}")
    inflater = zlib.decompressobj()
    try:
        body = inflater.decompress(view[4:], size + 1)
    except zlib.error as error:
        raise TermError(f"compressed term: {error}") from error
    if len(body) != size or not inflater.eof or inflater.unused_data:
        raise TermError(f"a compressed term does not hold the {size} bytes that it claims")
    return memoryview(body)


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0
        self._terms = 0
        self._readers: dict[int, Callable[[int], Term]] = {
            70: lambda _: self._float(),
            77: lambda _: self._bit_binary(),
            97: lambda _: self._uint(1),
            98: lambda _: int.from_bytes(self._take(4), "big", signed=True),
            99: lambda _: self._text_float(),
            100: lambda _: self._atom(2, "latin-1"),
            115: lambda _: self._atom(1, "latin-1"),
            118: lambda _: self._atom(2, "utf-8"),
            119: lambda _: self._atom(1, "utf-8"),
            104: lambda depth: tuple(self._items(self._uint(1), depth)),
            105: lambda depth: tuple(self._items(self._uint(4), depth)),
            106: lambda _: [],
            107: lambda _: list(self._take(self._count(self._uint(2)))),
            108: self._list,
            109: lambda _: bytes(self._take(self._uint(4))),
            110: lambda _: self._big(self._uint(1)),
            111: lambda _: self._big(self._uint(4)),
            112: lambda _: self._function(),
            113: lambda depth: self._opaque("function", 3, 0, depth),
            114: lambda depth: self._opaque("reference", 1, 4 * self._uint(2) + 1, depth),
            90: lambda depth: self._opaque("reference", 1, 4 * self._uint(2) + 4, depth),
            116: self._map,
        }

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def term(self, depth: int) -> Term:
        if depth > MAX_DEPTH:
            raise TermError(f"nested deeper than {MAX_DEPTH} terms")
        self._count(1)
        tag = self._uint(1)
        if tag in _IDENTIFIERS:
            return self._opaque("identifier", 1, _IDENTIFIERS[tag], depth)
        if tag not in self._readers:
            raise TermError(f"unknown tag {tag} at byte {self._at - 1}")
        return self._readers[tag](depth)

    def _take(self, size: int) -> memoryview:
        if size > self.left:
            raise TermError(f"ends inside a term: {size} bytes wanted, {self.left} left")
        self._at += size
        return self._data[self._at - size : self._at]

    def _uint(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _count(self, terms: int) -> int:
        self._terms += terms
        if self._terms > MAX_TERMS:
            raise TermError(f"more than {MAX_TERMS} terms")
        return terms

    def _items(self, count: int, depth: int) -> list[Term]:
        if count > self.left:  # an item takes a byte at least
            raise TermError(f"{count} items claimed with {self.left} bytes left")
        return [self.term(depth + 1) for _ in range(count)]

    def _list(self, depth: int) -> list[Term]:
        items = self._items(self._uint(4), depth)
        if self.term(depth + 1) != []:
            raise TermError("an improper list")
        return items

    def _map(self, depth: int) -> dict[Term, Term]:
        items = self._items(2 * self._uint(4), depth)
        keys, values = items[0::2], items[1::2]
        if not all(_hashable(key) for key in keys):
            raise TermError("a map with a list or a map as a key")
        pairs = dict(zip(keys, values, strict=True))
        if len(pairs) != len(keys):  # also 1 beside 1.0: two keys in Erlang, one here
            raise TermError("a map holds the same key twice")
        return pairs

    def _float(self) -> float:
        return _finite(struct.unpack(">d", self._take(8))[0])

    def _text_float(self) -> float:
        text = bytes(self._take(31)).rstrip(b"\0")
        try:
            return _finite(float(text))
        except ValueError as error:
            raise TermError(f"not a number: {text!r}") from error

    def _big(self, size: int) -> int:
        if size > _MAX_BIG_BYTES:
            raise TermError(f"an integer of {size} bytes")
        sign = self._uint(1)
        magnitude = int.from_bytes(self._take(size), "little")
        return -magnitude if sign else magnitude

    def _atom(self, size: int, encoding: str) -> Term:
        raw = bytes(self._take(self._uint(size)))
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError as error:
            raise TermError(f"an atom that is not {encoding}: {raw[:40]!r}") from error
        return _CONSTANTS[text] if text in _CONSTANTS else Atom(text)

    def _bit_binary(self) -> Opaque:
        self._take(self._uint(4) + 1)
        return Opaque("bitstring")

    def _function(self) -> Opaque:
        size = self._uint(4)
        if size < 4:
            raise TermError("a function shorter than its own header")
        self._take(size - 4)
        return Opaque("function")

    def _opaque(self, kind: str, terms: int, size: int, depth: int) -> Opaque:
        self._items(terms, depth)
        self._take(size)
        return Opaque(kind)


def _hashable(key: Term) -> bool:
    if isinstance(key, tuple):
        return all(_hashable(item) for item in key)
    return isinstance(key, Hashable)


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise TermError("a float that is not finite")
    return number
