"""Options, names, shapes and values: what makes a file's tensors one Mega model."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from mega_tvm.weights import (
    WeightsError,
    detect_format,
    expected_shapes,
    load_checkpoint,
    params_digest,
    save_checkpoint,
    to_axon,
    to_dotted,
)
from reference.config import MegaConfig
from tests.weights.builders import CONFIG, npz_file, small_params

PARAMS = small_params()
FILE = npz_file(PARAMS)


def without(*names):
    return {name: array for name, array in PARAMS.items() if name not in names}


def test_dotted_names_are_a_bijection():
    names = list(expected_shapes(MegaConfig(embed_dim=2, num_layers=12)))
    assert [to_axon(to_dotted(name)) for name in names] == names
    assert len(set(map(to_dotted, names))) == len(names) == 12 * 27 + 4
    assert to_dotted("mega_block_1_ema/mega_block_1_ema_alpha") == (
        "mega_block_1_ema.mega_block_1_ema_alpha"
    )


def test_digest_depends_on_names_shapes_and_bits_only():
    digest = params_digest(PARAMS)
    assert params_digest(dict(reversed(PARAMS.items()))) == digest
    assert params_digest({n: np.asfortranarray(a) for n, a in PARAMS.items()}) == digest
    kernel = PARAMS["input_projection/kernel"]
    assert params_digest(PARAMS | {"input_projection/kernel": kernel.reshape(4, 3)}) != digest
    assert params_digest(PARAMS | {"input_projection/kernel": np.nextafter(kernel, 9)}) != digest
    assert params_digest(without("final_norm/beta")) != digest


def test_options_that_the_file_does_not_state(load_bytes):
    options = {"laplace_attention": True, "dropout": 0.0, "layer_norm": "axon-0.8.0"}
    checkpoint = load_bytes(FILE, ".npz", options=options)
    assert checkpoint.config.laplace_attention
    assert checkpoint.config.layer_norm == "axon-0.8.0"
    assert checkpoint.option_sources["dropout"] == "the options given"


def test_options_that_confirm_what_the_file_states(load_bytes):
    options = {"embed_dim": 3, "hidden_size": np.int64(4), "ema_dim": 2, "num_layers": 1}
    assert load_bytes(FILE, ".npz", options=options).config == CONFIG


def test_whole_config(load_bytes):
    config = MegaConfig(**{**CONFIG.to_dict(), "seq_len": 7, "laplace_attention": True})
    assert load_bytes(FILE, ".npz", config=config).config == config


def test_absent_input_projection_means_equal_widths(load_bytes):
    content = npz_file(without("input_projection/kernel", "input_projection/bias"))
    assert load_bytes(content, ".npz").config.embed_dim == 4


CONTRADICTIONS = {
    "hidden_size": ({"hidden_size": 5}, ["hidden_size", "final_norm/gamma [4]", "5"]),
    "embed_dim": ({"embed_dim": 4}, ["embed_dim", "input_projection/kernel [3, 4]", "4"]),
    "ema_dim": ({"ema_dim": 16}, ["ema_dim", "ema_alpha [2]", "16"]),
    "num_layers": ({"num_layers": 4}, ["num_layers", "1", "4"]),
    "unknown": ({"hiden_size": 4}, ["hiden_size", "Did you mean 'hidden_size'"]),
    "type": ({"hidden_size": "4"}, ["hidden_size", "'4'", "positive integer"]),
    "range": ({"dropout": 1.0}, ["dropout", "1.0"]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_wrong_option_is_refused(case, refuses):
    options, words = CONTRADICTIONS[case]
    refuses(FILE, ".npz", "the options given", *words, options=options)


def test_wrong_config_is_refused(refuses):
    refuses(FILE, ".npz", "the config given", "hidden_size", "256", config=MegaConfig(embed_dim=3))


@pytest.mark.parametrize(
    "option",
    [{"seq_len": 9}, {"window_size": 9}, {"dropout": 0.5}, {"laplace_attention": True}],
    ids=lambda o: next(iter(o)),
)
def test_option_against_our_own_file_is_refused(option, tmp_path):
    path = tmp_path / "model.npz"
    save_checkpoint(path, CONFIG, PARAMS)
    with pytest.raises(WeightsError, match=f"option {next(iter(option))}: __config__ says"):
        load_checkpoint(path, options=option)


BAD_TENSORS = {
    "missing-and-extra": (
        {**without("final_norm/beta", "mega_block_1_gattn_q/bias"), "a/b": np.zeros(1)},
        ["final_norm/beta", "mega_block_1_gattn_q/bias", "'a/b'"],
    ),
    "missing-gamma": (without("final_norm/gamma"), ["missing", "final_norm/gamma"]),
    "half-an-input-projection": (without("input_projection/bias"), ["input_projection/bias"]),
    "gap-between-blocks": (
        {n.replace("_block_1", "_block_3"): a for n, a in PARAMS.items()} | PARAMS,
        ["mega_block_2"],
    ),
    "block-of-giant-number": (
        {n.replace("_block_1", "_block_999999"): a for n, a in PARAMS.items()},
        ["mega_block_1"],
    ),
    "block-zero": (
        PARAMS | {"mega_block_0_ffn_up/bias": np.zeros(16, np.float32)},
        ["mega_block_0_ffn_up/bias"],
    ),
    "no-block": ({"final_norm/gamma": np.ones(4)}, ["not a Mega checkpoint", "final_norm/gamma"]),
    "square-input-projection": (
        PARAMS | {"input_projection/kernel": np.ones((4, 4))},
        ["input_projection/kernel"],
    ),
    "two-misshapen": (
        PARAMS | {"final_norm/beta": np.ones(5), "mega_block_1_ffn_up/kernel": np.ones((16, 4))},
        ["final_norm/beta is [5], expected [4]", "[16, 4], expected [4, 16]"],
    ),
    "gamma-of-rank-2": (PARAMS | {"final_norm/gamma": np.ones((4, 1))}, ["final_norm/gamma"]),
    "gamma-empty": (PARAMS | {"final_norm/gamma": np.ones(0)}, ["hidden_size", "0"]),
    "alpha-scalar": (
        PARAMS | {"mega_block_1_ema/mega_block_1_ema_alpha": np.float32(1)},
        ["mega_block_1_ema_alpha", "[]"],
    ),
    "nan": (PARAMS | {"final_norm/gamma": np.array([1, np.nan, 3, np.nan])}, ["2 values", "[1]"]),
    "infinite": (
        PARAMS | {"input_projection/kernel": np.where(np.eye(3, 4), np.inf, 0.0)},
        ["input_projection/kernel", "[0, 0]", "inf"],
    ),
    "float64-beyond-float32": (
        PARAMS | {"final_norm/gamma": np.array([1, 2, 3, 1e39])},
        ["final_norm/gamma", "float32", "1e+39"],
    ),
    "integers": (PARAMS | {"final_norm/gamma": np.ones(4, np.int64)}, ["int64", "float32"]),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(case, refuses):
    arrays, words = BAD_TENSORS[case]
    refuses(npz_file(arrays), ".npz", *words)


def test_names_of_another_model_are_listed_in_bounds(refuses):
    arrays = PARAMS | {f"x{'y' * 200}{i}/z": np.zeros(1) for i in range(500)}
    assert len(refuses(npz_file(arrays), ".npz", "and 450 more")) < 10_000


def test_float64_is_rounded_to_nearest(load_bytes):
    third = np.full(4, 1 / 3)
    checkpoint = load_bytes(npz_file(PARAMS | {"final_norm/gamma": third}), ".npz")
    assert (checkpoint.params["final_norm/gamma"] == np.float32(1 / 3)).all()


@pytest.mark.parametrize("suffix", [".nx", ".safetensors", ".npz", ".pt", ".pth", "", ".onnx"])
def test_empty_file(suffix, refuses):
    refuses(b"", suffix, "empty")


@pytest.mark.parametrize("suffix", [".nx", ".safetensors", ".npz", ".pt", ".txt"])
def test_file_that_is_something_else(suffix, refuses):
    refuses(b"# A text of some length that is no checkpoint of any kind.\n" * 9, suffix)


def test_unknown_format_lists_the_known(refuses):
    refuses(b"hello, world", ".bin", ".nx", ".safetensors", ".npz", ".pt")


@pytest.mark.parametrize("function", [load_checkpoint, detect_format])
@pytest.mark.parametrize("name", ["absent.nx", ".", "nul\0.nx", "pipe"])
def test_path_that_is_no_file(function, name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError):
        function(tmp_path / name)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_save_and_load(suffix, tmp_path, same_bits):
    config = MegaConfig(
        **{**CONFIG.to_dict(), "seq_len": 5, "dropout": 0.3, "layer_norm": "axon-0.8.0"}
    )
    path = tmp_path / f"model{suffix}"
    save_checkpoint(path, config, PARAMS)
    checkpoint = load_checkpoint(path)
    same_bits(checkpoint.params, PARAMS)
    assert checkpoint.config == config
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_saving_twice_gives_the_same_bytes(suffix, tmp_path):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    save_checkpoint(first, CONFIG, PARAMS)
    save_checkpoint(second, CONFIG, dict(reversed(PARAMS.items())))
    if suffix == ".safetensors":
        assert first.read_bytes() == second.read_bytes()
    save_checkpoint(second, CONFIG, PARAMS)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "params",
    [
        without("final_norm/beta"),
        PARAMS | {"final_norm/beta": np.ones(5)},
        PARAMS | {"final_norm/beta": np.full(4, np.nan)},
    ],
    ids=["missing", "misshapen", "nan"],
)
def test_bad_params_are_not_saved(params, tmp_path):
    with pytest.raises(WeightsError, match="final_norm/beta"):
        save_checkpoint(tmp_path / "model.npz", CONFIG, params)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["model.nx", "model.pt", "model", "absent/model.npz"])
def test_paths_that_cannot_be_saved_to(name, tmp_path):
    with pytest.raises(WeightsError, match="model"):
        save_checkpoint(tmp_path / name, CONFIG, PARAMS)
    assert not os.listdir(tmp_path)


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    save_checkpoint(path, CONFIG, PARAMS)
    before = path.read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WeightsError, match="No space left"):
        save_checkpoint(path, CONFIG, small_params(seed=1))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.npz"]


def test_missing_safetensors_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(WeightsError, match=r"pip install mega-tvm\[compile\]"):
        save_checkpoint(tmp_path / "model.safetensors", CONFIG, PARAMS)
