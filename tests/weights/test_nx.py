from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from mega_tvm.weights.erlang_term import Atom
from tests.weights.builders import (
    CONTAINER,
    GOLDEN,
    nx_blob,
    nx_envelope,
    nx_file,
    nx_tree,
    small_params,
    spec,
)

PARAMS = small_params()
GAMMA = "final_norm/gamma"


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("endianness", [0, 1], ids=["little", "big"])
def test_endianness(endianness, compressed, load_bytes, same_bits):
    stored = {name: array.astype("<>"[endianness] + "f4") for name, array in PARAMS.items()}
    content = nx_file(stored, endianness=endianness, compressed=compressed)
    same_bits(load_bytes(content, ".nx").params, PARAMS)


@pytest.mark.parametrize("endianness", [0, 1], ids=["little", "big"])
@pytest.mark.parametrize("dtype", ["f2", "f8"])
def test_other_float_widths_become_float32(dtype, endianness, load_bytes, same_bits):
    stored = {name: array.astype("<>"[endianness] + dtype) for name, array in PARAMS.items()}
    checkpoint = load_bytes(nx_file(stored, endianness=endianness), ".nx")
    same_bits(checkpoint.params, {name: array.astype(np.float32) for name, array in stored.items()})
    assert set(checkpoint.stored_dtypes.values()) == {f"float{8 * int(dtype[1])}"}


def test_big_endian_bfloat16(load_bytes, same_bits):
    bits = {name: (a.view(np.uint32) >> 16).astype(">u2") for name, a in PARAMS.items()}
    content = nx_file(bits, kinds=dict.fromkeys(bits, ("bf", 16)), endianness=1)
    expected = {n: (a.view(np.uint32) >> 16 << 16).view(np.float32) for n, a in PARAMS.items()}
    same_bits(load_bytes(content, ".nx").params, expected)


def test_dropout_keys_are_passed_over(load_bytes, same_bits):
    keys = {
        f"mega_block_1_{layer}/key": np.array([1, 2], np.uint32)
        for layer in ("ema_drop", "attn_drop", "ffn_dropout")
    }
    content = nx_file(keys | PARAMS, kinds=dict.fromkeys(keys, ("u", 32)))
    same_bits(load_bytes(content, ".nx").params, PARAMS)


UNREADABLE_METADATA = {
    "unknown-tag": b"\x83\x00",
    "not-a-term": b"hello",
    "not-a-map": b"\x83a\x01",
    "truncated": b"\x83t\x00\x00\x00\x05a\x01",
    "bomb": b"\x83\x50\xff\xff\xff\xff" + zlib.compress(b"a\x01"),
    "deep": b"\x83" + b"h\x01" * 10_000 + b"j",
    "spec-not-a-map": {b"__edifice_spec__": [1]},
    "build-opts-not-keywords": {b"__edifice_spec__": {"build_opts": [1]}},
    "no-build-opts": {b"__edifice_spec__": {"arch": "mega"}},
}


@pytest.mark.parametrize("case", UNREADABLE_METADATA)
def test_unreadable_metadata_is_a_warning(case, load_bytes, same_bits):
    checkpoint = load_bytes(nx_file(PARAMS, metadata=UNREADABLE_METADATA[case]), ".nx")
    same_bits(checkpoint.params, PARAMS)
    assert len(checkpoint.warnings) == 2  # the other: laplace_attention is stated nowhere


def test_spec_survives_beside_references_and_binaries(load_bytes):
    metadata = b"\x83t\x00\x00\x00\x03" + b"".join(
        [
            b"w\x03ref" + b"Z\x00\x02w\x01n" + bytes(12),
            b"w\x03bin" + b"m\x00\x00\x00\x02\xff\xfe",
            b"m\x00\x00\x00\x10__edifice_spec__",
            b"t\x00\x00\x00\x01w\x0abuild_opts",
            b"l\x00\x00\x00\x01h\x02w\x11laplace_attentionw\x04truej",
        ]
    )
    checkpoint = load_bytes(nx_file(PARAMS, metadata=metadata), ".nx")
    assert checkpoint.config.laplace_attention
    assert checkpoint.metadata["ref"] == "<reference>"
    assert checkpoint.metadata["bin"] == "<2 bytes>"


def test_aliases_and_nil_of_a_spec(load_bytes):
    metadata = spec(obs_size=3, input_size=3, seq_len=None, window_size=9, hidden_size=4)
    config = load_bytes(nx_file(PARAMS, metadata=metadata), ".nx").config
    assert (config.embed_dim, config.window_size, config.seq_len) == (3, 9, 9)


def test_unknown_option_of_a_spec_is_a_warning(load_bytes):
    content = nx_file(PARAMS, metadata=spec(head_count=2, laplace_attention=False))
    assert "head_count" in load_bytes(content, ".nx").warnings[0]


SPEC_CONTRADICTIONS = {
    "hidden": (spec(hidden_size=8), ["hidden_size", "final_norm/gamma [4]", "8"]),
    "alias": (spec(obs_size=5), ["embed_dim", "input_projection/kernel [3, 4]", "5"]),
    "two-aliases": (spec(embed_dim=3, obs_size=5), ["embed_dim", "3", "5"]),
    "layers": (spec(num_layers=2), ["num_layers", "number of blocks says 1", "2"]),
    "type": (spec(dropout=b"high"), ["spec", "dropout", "high"]),
    "range": (spec(dropout=1.5), ["spec", "dropout", "1.5"]),
    "huge": (spec(dropout=2**1500), ["spec", "dropout"]),
    "architecture": ({b"__edifice_spec__": {"arch": "retnet"}}, ["retnet", "mega"]),
}


@pytest.mark.parametrize("case", SPEC_CONTRADICTIONS)
def test_spec_that_contradicts_is_refused(case, refuses):
    metadata, words = SPEC_CONTRADICTIONS[case]
    refuses(nx_file(PARAMS, metadata=metadata), ".nx", *words)


def bent_node(**changes):
    """Return a file whose tensor final_norm/gamma has these fields of its node changed."""
    tree, data = nx_tree(PARAMS)
    pairs = dict(tree[1])
    nodes = dict(pairs[b"final_norm"][1])
    fields = ["tag", "shape", "kind", "names", "vectorized_axes", "offset", "size"]
    values = dict(zip(fields, nodes[b"gamma"], strict=True)) | changes
    nodes[b"gamma"] = tuple(values.values())
    pairs[b"final_norm"] = (CONTAINER, list(nodes.items()), [])
    return nx_envelope(nx_blob((CONTAINER, list(pairs.items()), []), data))


BENT_NODES = {
    "negative-offset": ({"offset": -16}, ["-16"]),
    "overlap": ({"offset": 0}, ["overlap"]),
    "out-of-range": ({"offset": 10**12}, []),
    "huge-offset": ({"offset": 2**600}, []),
    "size-not-of-shape": ({"size": 20}, ["20 bytes", "[4]", "16"]),
    "shape-not-of-size": ({"shape": (5,)}, ["16 bytes", "[5]", "20"]),
    "negative-dim": ({"shape": (-4,)}, ["shape"]),
    "two-negative-dims": ({"shape": (-2, -2)}, ["shape"]),
    "giant-dim": ({"shape": (2**70,)}, ["shape"]),
    "giant-shape": ({"shape": (2**40, 2**40)}, ["takes"]),
    "shape-not-a-tuple": ({"shape": 4}, ["shape"]),
    "many-dims": ({"shape": (1,) * 100}, ["shape"]),
    "boolean-dim": ({"shape": (True,)}, ["shape"]),
    "unknown-kind": ({"kind": (Atom("c"), 64)}, ["dtype"]),
    "kind-not-a-tuple": ({"kind": [1]}, ["dtype"]),
    "float-bits": ({"kind": (Atom("f"), [32])}, ["dtype"]),
    "integer": ({"kind": (Atom("s"), 32)}, ["int32", "float32"]),
    "vectorized": ({"vectorized_axes": [1]}, ["vectorized"]),
    "offset-not-a-number": ({"offset": b"0"}, ["offset"]),
    "not-a-tensor": ({"tag": Atom("u")}, ["not a tensor"]),
}


@pytest.mark.parametrize("case", BENT_NODES)
def test_bent_tensor_is_refused_by_name(case, refuses):
    changes, words = BENT_NODES[case]
    message = refuses(bent_node(**changes), ".nx", *words)
    assert GAMMA in message or "belong to no tensor" in message


def blob_of(tree, **kwargs):
    return nx_envelope(nx_blob(tree, b"", **kwargs))


TREE, DATA = nx_tree(PARAMS)
BLOB = nx_blob(TREE, DATA)
LEAF = (CONTAINER, [], [])
MALFORMED = {
    "one-byte": (b"\x00", ["not a .nx file"]),
    "flag-2": (b"\x02" + nx_envelope(BLOB)[1:], ["flag"]),
    "giant-metadata": (b"\x00\xff\xff\xff\xff" + BLOB, ["metadata"]),
    "no-magic": (nx_envelope(b"ny" + BLOB[2:]), ["b'nx' expected"]),
    "version": (nx_envelope(nx_blob(TREE, DATA, version=2)), ["version 2"]),
    "endianness": (nx_envelope(nx_blob(TREE, DATA, endianness=2)), ["endianness 2"]),
    "giant-tree": (nx_envelope(BLOB[:4] + b"\xff" * 8 + BLOB[12:]), ["tree"]),
    "tree-not-a-term": (blob_of(b"hello"), ["tree", "131"]),
    "deep-tree": (blob_of(b"\x83" + b"h\x01" * 100_000 + b"j"), ["tree", "nested"]),
    "tree-of-atom": (blob_of(Atom("x")), ["root", "container"]),
    "tree-of-giant-list": (blob_of([1] * 70_000), ["a list of 70000"]),
    "other-container": (blob_of((Atom("Elixir.Other"), [], [])), ["container"]),
    "pairs-not-a-list": (blob_of((CONTAINER, {}, [])), ["list of pairs"]),
    "pair-of-three": (blob_of((CONTAINER, [(b"a", LEAF, 1)], [])), ["pair"]),
    "name-not-utf8": (blob_of((CONTAINER, [(b"\xff", LEAF)], [])), ["UTF-8"]),
    "layer-not-a-container": (blob_of((CONTAINER, [(b"a", b"b")], [])), ["layer", "'a'"]),
    "duplicate-layer": (
        nx_envelope(nx_blob((CONTAINER, TREE[1] + TREE[1], []), DATA)),
        ["stands twice"],
    ),
    "no-tensors": (blob_of(LEAF), ["not a Mega checkpoint"]),
    "trailing-bytes": (nx_envelope(BLOB + b"abc"), ["3 bytes follow"]),
    "truncated-by-one": (nx_envelope(BLOB)[:-1], ["truncated", "final_norm/beta"]),
    "compressed-truncated": (nx_envelope(BLOB, compressed=True)[:-9], []),
    "compressed-no-checksum": (nx_envelope(BLOB, compressed=True)[:-4], ["does not end"]),
    "compressed-short-data": (nx_envelope(BLOB[:-1], compressed=True), ["truncated"]),
    "compressed-trailing": (nx_envelope(BLOB + b"a", compressed=True), ["does not end"]),
    "compressed-then-more": (nx_envelope(BLOB, compressed=True) + b"a", ["does not end"]),
    "compressed-not-zlib": (b"\x01\x00\x00\x00\x00" + BLOB, ["compressed body is damaged"]),
    "compressed-empty": (b"\x01\x00\x00\x00\x00", ["header"]),
    "compressed-flag-on-plain": (b"\x01" + nx_envelope(BLOB)[1:], ["damaged"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused(case, refuses):
    content, words = MALFORMED[case]
    refuses(content, ".nx", *words)


def test_every_truncation_is_refused(refuses):
    raw = (GOLDEN / "checkpoints/tiny_spec.nx").read_bytes()
    for size in [*range(1, 60), *range(60, len(raw), 9973), len(raw) - 1]:
        refuses(raw[:size], ".nx")


def test_bomb_of_compressed_zeros_is_refused(refuses):
    """A body within deflate's ratio, but of a size that no weights compress to."""
    size = 1 << 28
    node = (Atom("t"), (size // 4,), (Atom("f"), 32), [], [], 0, size)
    tree = (CONTAINER, [(b"final_norm", (CONTAINER, [(b"gamma", node)], []))], [])
    packer = zlib.compressobj()
    body = packer.compress(nx_blob(tree, b""))
    body += b"".join(packer.compress(bytes(1 << 20)) for _ in range(64))
    content = b"\x01" + struct.pack(">I", 0) + body + packer.flush()
    refuses(content, ".nx", "plausibly")
