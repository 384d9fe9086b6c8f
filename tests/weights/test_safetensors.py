from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from mega_tvm.weights import save_checkpoint, to_dotted
from tests.weights.builders import CONFIG, safetensors_file, safetensors_parts, small_params

PARAMS = small_params()
HEADER, DATA = safetensors_parts(PARAMS)
GAMMA = "final_norm.gamma"


def test_own_files_are_read_by_the_safetensors_library(tmp_path, same_bits):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, CONFIG, PARAMS)
    found = safetensors.numpy.load_file(path)
    same_bits(found, {to_dotted(name): array for name, array in PARAMS.items()})


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, ml_dtypes.bfloat16], ids=lambda d: d.__name__
)
def test_dtypes_that_the_library_writes(dtype, load_bytes, same_bits):
    stored = {name: array.astype(dtype) for name, array in PARAMS.items()}
    content = safetensors.numpy.save({to_dotted(name): a for name, a in stored.items()})
    checkpoint = load_bytes(content, ".safetensors")
    same_bits(checkpoint.params, {n: a.astype(np.float32) for n, a in stored.items()})
    assert set(checkpoint.stored_dtypes.values()) == {np.dtype(dtype).name}


def test_files_of_the_torch_writer(load_bytes, same_bits):
    tensors = {to_dotted(name): torch.from_numpy(array) for name, array in PARAMS.items()}
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    checkpoint = load_bytes(content, ".safetensors")
    same_bits(checkpoint.params, PARAMS)
    assert checkpoint.metadata == {"format": "pt"}


def bent_entry(**changes):
    header = HEADER | {GAMMA: HEADER[GAMMA] | changes}
    return safetensors_file(header, DATA)


START, STOP = HEADER[GAMMA]["data_offsets"]
BENT_ENTRIES = {
    "negative-offset": ({"data_offsets": [-16, 0]}, ["-16"]),
    "reversed-offsets": ({"data_offsets": [STOP, START]}, ["claims bytes"]),
    "overlap": ({"data_offsets": [START - 4, STOP - 4]}, ["overlap"]),
    "out-of-range": ({"data_offsets": [10**15, 10**15 + 16]}, ["holds only", "truncated"]),
    "size-not-of-shape": ({"shape": [5]}, ["[5]", "20"]),
    "giant-shape": ({"shape": [2**40, 2**40]}, ["takes"]),
    "giant-dim": ({"shape": [2**80]}, ["shape"]),
    "negative-dims": ({"shape": [-2, -2]}, ["shape"]),
    "float-dim": ({"shape": [4.0]}, ["shape"]),
    "shape-not-a-list": ({"shape": "4"}, ["shape"]),
    "unknown-dtype": ({"dtype": "F31"}, ["F31"]),
    "dtype-not-text": ({"dtype": []}, ["dtype"]),
    "integer": ({"dtype": "I32"}, ["int32", "float32"]),
    "three-offsets": ({"data_offsets": [0, 1, 2]}, ["data_offsets"]),
    "text-offsets": ({"data_offsets": ["0", "16"]}, ["data_offsets"]),
    "extra-field": ({"stride": 1}, ["entry"]),
}


@pytest.mark.parametrize("case", BENT_ENTRIES)
def test_bent_entry_is_refused_by_name(case, refuses):
    changes, words = BENT_ENTRIES[case]
    message = refuses(bent_entry(**changes), ".safetensors", *words)
    assert "final_norm" in message and "gamma" in message


TEXT = json.dumps(HEADER).encode()
TWICE = TEXT[:-1] + b', "final_norm.gamma": ' + json.dumps(HEADER[GAMMA]).encode() + b"}"
MALFORMED = {
    "seven-bytes": (b"1234567", ["7 bytes"]),
    "giant-header": (b"\xff" * 8 + TEXT + DATA, ["truncated"]),
    "header-past-the-end": (b"\x00\x01\x00\x00\x00\x00\x00\x00{}", ["truncated"]),
    "not-utf8": (safetensors_file(b"\xff{}"), ["UTF-8"]),
    "not-json": (safetensors_file(b"{hello}"), ["JSON"]),
    "list": (safetensors_file(b"[]"), ["not an object"]),
    "deep": (safetensors_file(b'{"a":' * 100_000), ["JSON"]),
    "giant-number": (safetensors_file(b'{"a":' + b"9" * 5000 + b"}"), ["JSON"]),
    "duplicate-key": (safetensors_file(TWICE, DATA), [GAMMA, "more than once"]),
    "duplicate-after-mapping": (
        safetensors_file(HEADER | {"final_norm/gamma": HEADER[GAMMA]}, DATA),
        ["final_norm/gamma", "twice"],
    ),
    "entry-not-an-object": (safetensors_file({"a": 1}), ["'a'"]),
    "metadata-not-strings": (safetensors_file({"__metadata__": {"a": 1}}), ["__metadata__"]),
    "metadata-not-a-map": (safetensors_file({"__metadata__": []}), ["__metadata__"]),
    "truncated-data": (safetensors_file(HEADER, DATA[:-1]), ["truncated", "final_norm"]),
    "trailing-data": (safetensors_file(HEADER, DATA + b"abc"), ["3 bytes follow"]),
    "gap": (
        safetensors_file({GAMMA: HEADER[GAMMA]}, DATA[:STOP]),
        [f"bytes 0 to {START}", "no tensor"],
    ),
    "no-tensors": (safetensors_file({}), ["not a Mega checkpoint"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused(case, refuses):
    content, words = MALFORMED[case]
    refuses(content, ".safetensors", *words)


OWN_METADATA = {
    "not-json": ("{", ["mega_config", "JSON"]),
    "list": ("[]", ["mega_config", "object"]),
    "unknown-option": ('{"embed_dims": 3}', ["mega_config", "embed_dims", "Did you mean"]),
    "bad-value": ('{"hidden_size": "4"}', ["mega_config", "hidden_size", "'4'"]),
    "nan": ('{"dropout": NaN}', ["dropout"]),
    "giant-number": ('{"dropout": 1' + "0" * 400 + "}", ["mega_config"]),
    "contradiction": ('{"ema_dim": 3}', ["ema_dim", "[2]", "mega_config", "3"]),
    "twice": ('{"ema_dim": 2, "ema_dim": 2}', ["more than once"]),
}


@pytest.mark.parametrize("case", OWN_METADATA)
def test_bent_options_of_our_own_files_are_refused(case, refuses):
    text, words = OWN_METADATA[case]
    header = HEADER | {"__metadata__": {"mega_config": text}}
    refuses(safetensors_file(header, DATA), ".safetensors", *words)
