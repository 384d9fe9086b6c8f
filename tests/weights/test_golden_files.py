"""Files that Edifice itself wrote load with every bit in place."""

from __future__ import annotations

import numpy as np
import pytest

from mega_tvm.weights import detect_format, load_checkpoint, params_digest, save_checkpoint
from tests.weights.builders import GOLDEN, golden_params

CHECKPOINTS = {
    "tiny.nx": "tiny",
    "tiny_spec.nx": "tiny",
    "tiny_compressed.nx": "tiny",
    "tiny.safetensors": "tiny",
    "odd.nx": "odd",
    "odd.safetensors": "odd",
    "tiny_trained.nx": "checkpoints/tiny_trained",
    "tiny_trained.npz": "checkpoints/tiny_trained",
}
NPZ_CASES = (
    "tiny",
    "tiny_laplace",
    "equal_dims",
    "odd",
    "seq1",
    "long",
    "low_variance",
    "low_variance_axon081",
    "tiny_pristine_init",
)


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_checkpoint_equals_its_npz(file, same_bits):
    expected = golden_params(CHECKPOINTS[file])
    checkpoint = load_checkpoint(GOLDEN / "checkpoints" / file)
    same_bits(checkpoint.params, expected)
    assert checkpoint.digest == params_digest(expected)
    assert set(checkpoint.stored_dtypes.values()) == {"float32"}


@pytest.mark.parametrize("case", NPZ_CASES)
def test_npz_case_loads(case, same_bits):
    same_bits(load_checkpoint(GOLDEN / f"{case}.npz").params, golden_params(case))


def test_bf16_equals_truncated_float32(same_bits):
    checkpoint = load_checkpoint(GOLDEN / "checkpoints/tiny_bf16.nx")
    truncated = {
        name: (array.view(np.uint32) >> 16 << 16).view(np.float32)
        for name, array in golden_params("tiny").items()
    }
    same_bits(checkpoint.params, truncated)
    assert set(checkpoint.stored_dtypes.values()) == {"bfloat16"}


def test_dropout_keys_of_a_training_state_are_dropped():
    raw = (GOLDEN / "checkpoints/tiny_trained.nx").read_bytes()
    assert b"mega_block_1_ema_drop" in raw
    checkpoint = load_checkpoint(GOLDEN / "checkpoints/tiny_trained.nx")
    assert not [name for name in checkpoint.params if "drop" in name]


def test_spec_and_metadata_are_read():
    checkpoint = load_checkpoint(GOLDEN / "checkpoints/tiny_spec.nx")
    assert checkpoint.config.seq_len == 16
    assert "spec" in checkpoint.option_sources["seq_len"]
    assert "final_norm/gamma" in checkpoint.option_sources["hidden_size"]
    assert "window_size" not in checkpoint.option_sources
    assert not checkpoint.warnings
    metadata = checkpoint.metadata
    assert metadata["notes"] == "caf\u00e9 \u2014 run \u03b1"
    assert metadata["big"] == 123456789012345678901
    assert metadata["parent"] is None
    assert metadata["schedule"] == ["cosine", 0.001, [1, 2, 3]]
    assert metadata["__edifice_spec__"]["edifice_version"] == "0.2.0"


def test_spec_of_a_training_run_sets_dropout():
    assert load_checkpoint(GOLDEN / "checkpoints/tiny_trained.nx").config.dropout == 0.2


def test_laplace_that_no_one_states_is_a_warning():
    path = GOLDEN / "tiny_laplace.npz"
    assert "laplace_attention" in load_checkpoint(path).warnings[0]
    checkpoint = load_checkpoint(path, options={"laplace_attention": True})
    assert checkpoint.config.laplace_attention
    assert not checkpoint.warnings


def test_intermediates_are_not_weights(refuses):
    content = (GOLDEN / "tiny_intermediates.npz").read_bytes()
    refuses(content, ".npz", "missing tensors", "tensors that a Mega model does not have")


def test_safetensors_of_edifice_are_unaligned():
    """The files that pin unaligned data do so: a header padded by accident would test nothing."""
    raw = (GOLDEN / "checkpoints/odd.safetensors").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 8


@pytest.mark.parametrize("pad", range(4))
def test_any_alignment_of_safetensors_data(pad, load_bytes, same_bits):
    raw = (GOLDEN / "checkpoints/odd.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    shifted = (size + pad).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * pad + raw[8 + size :]
    same_bits(load_bytes(shifted, ".safetensors").params, golden_params("odd"))


def test_round_trip_through_every_writer(tmp_path, same_bits):
    first = load_checkpoint(GOLDEN / "checkpoints/tiny_spec.nx")
    save_checkpoint(tmp_path / "a.safetensors", first.config, first.params)
    second = load_checkpoint(tmp_path / "a.safetensors")
    save_checkpoint(tmp_path / "b.npz", second.config, second.params)
    third = load_checkpoint(tmp_path / "b.npz")
    same_bits(third.params, first.params)
    assert third.config == second.config == first.config
    assert third.digest == first.digest


@pytest.mark.parametrize("rename", [False, True], ids=["suffix", "no-suffix"])
@pytest.mark.parametrize(
    "file", ["tiny.nx", "tiny_compressed.nx", "tiny_spec.nx", "odd.safetensors"]
)
def test_format_is_known_by_content(file, rename, tmp_path):
    path = GOLDEN / "checkpoints" / file
    if rename:
        path = tmp_path / "weights"
        path.write_bytes((GOLDEN / "checkpoints" / file).read_bytes())
    assert detect_format(path) == file.rsplit(".", 1)[1]
    assert load_checkpoint(path).params
