"""Writes small checkpoint files of every format, valid or bent, for the tests."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from mega_tvm.weights import expected_shapes, to_dotted
from mega_tvm.weights.erlang_term import Atom
from reference.config import MegaConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CONFIG = MegaConfig(embed_dim=3, hidden_size=4, ema_dim=2, num_layers=1)
CONTAINER = Atom("Elixir.Nx.Container.Map")


def small_params(config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }


def golden_params(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files if not key.startswith("__")}


def encode_term(term) -> bytes:
    """Encode without the leading 131; `bytes` is a binary, `str` and `Atom` are atoms."""
    if term is None or isinstance(term, (bool, str)):
        text = "nil" if term is None else str(term).lower() if term in (True, False) else term
        return b"\x77" + bytes([len(text.encode())]) + text.encode()
    if isinstance(term, int):
        if 0 <= term < 256:
            return bytes([97, term])
        if -(2**31) <= term < 2**31:
            return b"b" + struct.pack(">i", term)
        magnitude = abs(term).to_bytes((abs(term).bit_length() + 7) // 8, "little")
        return bytes([110, len(magnitude), term < 0]) + magnitude
    if isinstance(term, float):
        return b"F" + struct.pack(">d", term)
    if isinstance(term, bytes):
        return b"m" + struct.pack(">I", len(term)) + term
    if isinstance(term, tuple):
        return bytes([104, len(term)]) + b"".join(map(encode_term, term))
    if isinstance(term, list):
        body = b"".join(map(encode_term, term))
        return b"l" + struct.pack(">I", len(term)) + body + b"j" if term else b"j"
    pairs = b"".join(encode_term(key) + encode_term(value) for key, value in term.items())
    return b"t" + struct.pack(">I", len(term)) + pairs


def nx_tree(arrays, kinds=None):
    """Return the tree of an Nx blob and the tensors' bytes, little-endian as they are."""
    layers, data = {}, b""
    for name, array in arrays.items():
        layer, param = name.split("/")
        raw = array.tobytes()
        kind = (kinds or {}).get(name) or ("f", 8 * array.dtype.itemsize)
        kind = (Atom(kind[0]), kind[1])
        node = (Atom("t"), array.shape, kind, [None] * array.ndim, [], len(data), len(raw))
        layers.setdefault(layer, []).append((param.encode(), node))
        data += raw
    pairs = [(layer.encode(), (CONTAINER, nodes, [])) for layer, nodes in layers.items()]
    return (CONTAINER, pairs, []), data


def nx_blob(tree, data, *, endianness=0, version=1) -> bytes:
    term = tree if isinstance(tree, bytes) else b"\x83" + encode_term(tree)
    return b"nx" + bytes([version, endianness]) + struct.pack(">Q", len(term)) + term + data


def nx_envelope(blob, *, metadata=b"", compressed=False) -> bytes:
    metadata = metadata if isinstance(metadata, bytes) else b"\x83" + encode_term(metadata)
    body = zlib.compress(blob) if compressed else blob
    return bytes([compressed]) + struct.pack(">I", len(metadata)) + metadata + body


def nx_file(arrays, *, kinds=None, endianness=0, **envelope) -> bytes:
    tree, data = nx_tree(arrays, kinds)
    return nx_envelope(nx_blob(tree, data, endianness=endianness), **envelope)


def spec(**build_opts):
    return {b"__edifice_spec__": {"arch": "mega", "build_opts": list(build_opts.items())}}


def safetensors_file(header, data=b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def safetensors_parts(arrays):
    header, data = {}, b""
    for name, array in arrays.items():
        end = len(data) + array.nbytes
        header[to_dotted(name)] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [len(data), end],
        }
        data += array.tobytes()
    return header, data


def npz_file(arrays, *, compressed=False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def npy_header(shape, dtype="<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def zip_file(members, method=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()
