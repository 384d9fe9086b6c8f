"""Damaged files of every format load or raise `WeightsError`, within bounded memory."""

from __future__ import annotations

import io
import random
import tracemalloc
import zipfile
import zlib

import pytest
import torch

from mega_tvm.weights import WeightsError, to_dotted
from reference.onnx_mega import build_model
from tests.weights.builders import (
    CONFIG,
    npy_header,
    npz_file,
    nx_blob,
    nx_envelope,
    nx_file,
    safetensors_file,
    safetensors_parts,
    small_params,
    spec,
    zip_file,
)

PARAMS = small_params()
ROUNDS = 500


def torch_file():
    file = io.BytesIO()
    torch.save({to_dotted(name): torch.from_numpy(array) for name, array in PARAMS.items()}, file)
    return file.getvalue()


METADATA = spec(embed_dim=3, hidden_size=4, dropout=0.1, laplace_attention=False) | {"epoch": 3}
FILES = {
    "nx": (".nx", nx_file(PARAMS, metadata=METADATA)),
    "nx-compressed": (".nx", nx_file(PARAMS, compressed=True)),
    "safetensors": (".safetensors", safetensors_file(*safetensors_parts(PARAMS))),
    "npz": (".npz", npz_file(PARAMS)),
    "npz-deflated": (".npz", npz_file(PARAMS, compressed=True)),
    "torch": (".pt", torch_file()),
    "onnx": (".onnx", build_model(CONFIG, PARAMS).SerializeToString()),
}


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, overwrite, cut, repeat or insert, most often in the first bytes."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        reach = rng.choice((16, 256, 4096, len(damaged)))
        at = rng.randrange(max(min(reach, len(damaged)), 1))
        if rng.random() < 0.2:  # the directory of a zip is at the end
            at = len(damaged) - 1 - at
        kind = rng.randrange(6)
        if kind == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            damaged[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            value = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\xff" * 8))
            damaged[at : at + len(value)] = value
        elif kind == 3:
            del damaged[at : at + rng.choice((1, 4, 100))]
        elif kind == 4:
            damaged[at:at] = damaged[at : at + rng.choice((1, 8, 200))]
        else:
            del damaged[at:]
        damaged = damaged or bytearray(1)
    return bytes(damaged)


@pytest.mark.parametrize("case", FILES)
def test_mutated_files_load_or_raise_weights_error(case, load_bytes):
    suffix, content = FILES[case]
    assert load_bytes(content, suffix).params
    rng = random.Random(case)
    refused = 0
    for _ in range(ROUNDS):
        try:
            load_bytes(mutate(content, rng), suffix)
        except WeightsError:
            refused += 1
    assert refused > ROUNDS // 4  # else the mutations do not reach what is checked


@pytest.mark.parametrize("case", ["nx-compressed", "nx"])
def test_mutated_trees_below_the_compression(case, load_bytes):
    """Damage before compression: the checksum of zlib would hide the tree from the test above."""
    plain = nx_file(PARAMS)[5:]
    rng = random.Random(case)
    for _ in range(ROUNDS):
        body = mutate(plain[:2500], rng) + plain[2500:]
        content = nx_envelope(body, metadata=METADATA, compressed=case != "nx")
        try:
            load_bytes(content, ".nx")
        except WeightsError:
            continue


def bomb_npz(size):
    content = npy_header((size // 4,)) + bytes(size)
    return zip_file([("final_norm/gamma.npy", content)], zipfile.ZIP_DEFLATED)


def bomb_tree():
    term = b"\x83\x50" + (1 << 30).to_bytes(4, "big") + zlib.compress(bytes(1 << 24))
    return nx_envelope(nx_blob(term, b""))


BOMBS = {
    "nx-body": (".nx", nx_envelope(nx_blob(b"\x83j", bytes(1 << 27)), compressed=True)),
    "nx-giant-tree": (
        ".nx",
        b"\x01\0\0\0\0" + zlib.compress(b"nx\x01\x00" + b"\x00\x00\x00\x7f" + bytes(1 << 24)),
    ),
    "nx-tree-of-tag-80": (".nx", bomb_tree()),
    "nx-metadata-of-tag-80": (
        ".nx",
        nx_file(PARAMS, metadata=b"\x83\x50\xff\xff\xff\xff" + zlib.compress(bytes(1 << 24))),
    ),
    "npz": (".npz", bomb_npz(1 << 27)),
    "npz-within-the-ratio": (".npz", bomb_npz(1 << 25)),
    "safetensors-giant-header": (".safetensors", (1 << 62).to_bytes(8, "little") + b"{}"),
    "safetensors-wide-header": (".safetensors", safetensors_file(b'{"a":[' + b"[]," * 10**6)),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_take_little_memory(case, load_bytes):
    """The limit is 32 times the file (JSON's empty lists) and 8 MiB, far below what they claim."""
    suffix, content = BOMBS[case]
    tracemalloc.start()
    try:
        try:
            load_bytes(content, suffix)
            assert "metadata" in case  # which must not block reading the weights
        except WeightsError:
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * len(content) + (8 << 20), f"{peak:,} bytes for a file of {len(content):,}"
