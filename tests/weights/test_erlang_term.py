from __future__ import annotations

import struct
import time
import zlib

import pytest

from mega_tvm.weights.erlang_term import MAX_DEPTH, MAX_TERMS, Atom, Opaque, TermError, decode
from tests.weights.builders import encode_term

NODE = encode_term("node@host")

TERMS = {
    "small-int": (b"\x61\x05", 5),
    "int": (b"\x62\xff\xff\xff\xf9", -7),
    "small-big": (b"\x6e\x05\x00\x00\x00\x00\x00\x01", 2**32),
    "large-big-negative": (b"\x6f\x00\x00\x00\x01\x01\x02", -2),
    "float": (b"F" + struct.pack(">d", 0.1), 0.1),
    "text-float": (b"c" + b"1.50000000000000000000e+00".ljust(31, b"\0"), 1.5),
    "atom-latin1": (b"d\x00\x02\xe9a", Atom("éa")),
    "small-atom-latin1": (b"s\x01\xe9", Atom("é")),
    "atom-utf8": (b"v\x00\x02\xc3\xa9", Atom("é")),
    "small-atom-utf8": (b"w\x02\xc3\xa9", Atom("é")),
    "nil-atom": (b"d\x00\x03nil", None),
    "true": (b"w\x04true", True),
    "tuple": (b"h\x02a\x01a\x02", (1, 2)),
    "large-tuple": (b"i\x00\x00\x00\x01a\x01", (1,)),
    "empty-list": (b"j", []),
    "string-is-ints": (b"k\x00\x02ab", [97, 98]),
    "list": (b"l\x00\x00\x00\x01a\x01j", [1]),
    "binary": (b"m\x00\x00\x00\x02\xff\x00", b"\xff\x00"),
    "map": (b"t\x00\x00\x00\x01a\x01j", {1: []}),
    "reference": (b"e" + NODE + bytes(5), Opaque("identifier")),
    "new-reference": (b"r\x00\x02" + NODE + bytes(9), Opaque("reference")),
    "newer-reference": (b"Z\x00\x02" + NODE + bytes(12), Opaque("reference")),
    "pid": (b"X" + NODE + bytes(12), Opaque("identifier")),
    "v4-port": (b"x" + NODE + bytes(12), Opaque("identifier")),
    "function": (b"p\x00\x00\x00\x06ab", Opaque("function")),
    "export": (b"q" + NODE + NODE + b"a\x01", Opaque("function")),
    "bitstring": (b"M\x00\x00\x00\x01\x03\xe0", Opaque("bitstring")),
}


@pytest.mark.parametrize("case", TERMS)
def test_every_tag(case):
    encoded, expected = TERMS[case]
    found = decode(b"\x83" + encoded)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("case", TERMS)
def test_every_truncation_of_every_tag(case):
    encoded = b"\x83" + TERMS[case][0]
    for size in range(len(encoded)):
        with pytest.raises(TermError):
            decode(encoded[:size])


def compressed(term, size):
    return b"\x83\x50" + struct.pack(">I", size) + zlib.compress(term)


def test_compressed_term():
    assert decode(compressed(b"h\x02a\x01a\x02", 6)) == (1, 2)


MALFORMED = {
    "empty": b"",
    "no-131": b"a\x01\x00",
    "unknown-tag": b"\x83\x00",
    "trailing-bytes": b"\x83a\x01\x00",
    "giant-tuple": b"\x83i\xff\xff\xff\xff",
    "giant-list": b"\x83l\xff\xff\xff\xffa\x01",
    "giant-map": b"\x83t\xff\xff\xff\xff",
    "giant-binary": b"\x83m\xff\xff\xff\xffa",
    "giant-integer": b"\x83o\x00\x00\x10\x00\x00" + bytes(4096),
    "improper-list": b"\x83l\x00\x00\x00\x01a\x01a\x02",
    "deep-lists": b"\x83" + b"l\x00\x00\x00\x01" * 100_000 + b"j" * 100_001,
    "deep-tuples": b"\x83" + b"h\x01" * 1_000_000 + b"j",
    "too-deep-by-one": b"\x83" + b"h\x01" * (MAX_DEPTH + 1) + b"j",
    "duplicate-key": b"\x83t\x00\x00\x00\x02a\x01ja\x01j",
    "list-as-key": b"\x83t\x00\x00\x00\x01ja\x01",
    "tuple-of-list-as-key": b"\x83t\x00\x00\x00\x01h\x01ja\x01",
    "nan": b"\x83F" + struct.pack(">d", float("nan")),
    "text-float-inf": b"\x83c" + b"inf".ljust(31, b"\0"),
    "text-float-words": b"\x83c" + b"\xffwords".ljust(31, b"\0"),
    "atom-not-utf8": b"\x83w\x01\xff",
    "short-function": b"\x83p\x00\x00\x00\x03",
    "compressed-too-short": b"\x83\x50\x00",
    "compressed-not-zlib": b"\x83\x50\x00\x00\x00\x04abcd",
    "compressed-claims-less": compressed(b"h\x02a\x01a\x02", 5),
    "compressed-claims-more": compressed(b"h\x02a\x01a\x02", 7),
    "compressed-bomb": compressed(b"a\x01", 2**32 - 1),
    "compressed-truncated": compressed(b"h\x02a\x01a\x02", 6)[:-2],
    "compressed-twice": compressed(compressed(b"a\x01", 2)[1:], 15),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_terms_are_refused(case):
    start = time.perf_counter()
    with pytest.raises(TermError):
        decode(MALFORMED[case])
    assert time.perf_counter() - start < 2


def test_number_of_terms_is_limited():
    with pytest.raises(TermError, match="terms"):
        decode(b"\x83i" + struct.pack(">I", MAX_TERMS) + b"j" * MAX_TERMS)
    with pytest.raises(TermError, match="terms"):
        strings = (b"k\xff\xff" + bytes(65535)) * 16
        decode(b"\x83h\x10" + strings)


def test_deepest_allowed_term():
    term = decode(b"\x83" + b"h\x01" * MAX_DEPTH + b"j")
    for _ in range(MAX_DEPTH):
        (term,) = term
    assert term == []
