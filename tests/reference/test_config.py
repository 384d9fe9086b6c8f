from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from reference import ConfigError, MegaConfig, recommended_defaults

POSITIVE_INTS = ("embed_dim", "hidden_size", "ema_dim", "num_layers", "window_size", "seq_len")


def test_defaults_are_edifices() -> None:
    config = MegaConfig(287)
    assert config.to_dict() == {
        "embed_dim": 287,
        "hidden_size": 256,
        "ema_dim": 16,
        "num_layers": 4,
        "dropout": 0.1,
        "window_size": 60,
        "seq_len": 60,
        "laplace_attention": False,
        "layer_norm": "plain",
    }


def test_recommended_defaults_build_a_config() -> None:
    assert recommended_defaults() == {
        "hidden_size": 256,
        "ema_dim": 16,
        "num_layers": 4,
        "dropout": 0.1,
        "window_size": 60,
    }
    assert MegaConfig(7, **recommended_defaults()) == MegaConfig(7)


def test_seq_len_overrides_window_size() -> None:
    assert MegaConfig(1, window_size=30).seq_len == 30
    assert MegaConfig(1, window_size=30, seq_len=8).seq_len == 8


@pytest.mark.parametrize(
    ("hidden", "inner"), [(1, 8), (32, 88), (40, 112), (64, 176), (256, 688)], ids=str
)
def test_ffn_size(hidden: int, inner: int) -> None:
    assert MegaConfig(1, hidden_size=hidden).ffn_size == inner


def test_derived_widths() -> None:
    assert MegaConfig(8, hidden_size=16).has_input_projection
    assert not MegaConfig(16, hidden_size=16).has_input_projection
    assert MegaConfig(8, hidden_size=16).output_size == 16


@pytest.mark.parametrize("name", POSITIVE_INTS)
@pytest.mark.parametrize("value", [0, -1, 1.0, "4", True, [4], float("nan")], ids=repr)
def test_positive_ints_refuse(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"option {name} must be a positive integer; got"):
        MegaConfig(**{"embed_dim": 4, name: value})


@pytest.mark.parametrize("name", [name for name in POSITIVE_INTS if name != "seq_len"])
def test_only_seq_len_may_be_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"option {name} .* got None"):
        MegaConfig(**{"embed_dim": 4, name: None})


@pytest.mark.parametrize("value", [-0.1, 1.0, 1, float("nan"), "0.1", None, False], ids=repr)
def test_dropout_refuses(value: object) -> None:
    with pytest.raises(ConfigError, match="option dropout must be a number p with 0 <= p < 1"):
        MegaConfig(4, dropout=value)


@pytest.mark.parametrize("value", [0, 1, "true", None], ids=repr)
def test_laplace_attention_refuses(value: object) -> None:
    with pytest.raises(ConfigError, match="option laplace_attention must be True or False"):
        MegaConfig(4, laplace_attention=value)


@pytest.mark.parametrize("value", ["Plain", "axon", None, 0], ids=repr)
def test_layer_norm_refuses(value: object) -> None:
    with pytest.raises(ConfigError, match=r"option layer_norm must be one of .*axon-0\.8\.0"):
        MegaConfig(4, layer_norm=value)


def test_numpy_numbers_become_plain_ones() -> None:
    config = MegaConfig(np.int64(4), dropout=np.float32(0.25))
    assert type(config.embed_dim) is int and type(config.dropout) is float
    assert config == MegaConfig(4, dropout=0.25)


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MegaConfig(4).embed_dim = 5


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("hiden_size", "hidden_size"),
        ("laplace_atention", "laplace_attention"),
        ("ema_dims", "ema_dim"),
    ],
)
def test_unknown_option_is_named_with_a_suggestion(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{typo}'.*Did you mean '{meant}'"):
        MegaConfig.from_dict({"embed_dim": 4, typo: 8})


def test_unknown_option_without_a_likeness() -> None:
    with pytest.raises(ConfigError, match="unknown option 'xyzzy'; known options: embed_dim") as e:
        MegaConfig.from_dict({"embed_dim": 4, "xyzzy": 8})
    assert "Did you mean" not in str(e.value)


def test_embed_dim_is_required() -> None:
    with pytest.raises(ConfigError, match="embed_dim is required"):
        MegaConfig.from_dict({"hidden_size": 4})


@pytest.mark.parametrize("value", [[1], None, "embed_dim", 3], ids=repr)
def test_from_dict_refuses_what_is_no_mapping(value: object) -> None:
    with pytest.raises(ConfigError, match="mapping of options"):
        MegaConfig.from_dict(value)


@pytest.mark.parametrize(
    "config",
    [
        MegaConfig(4),
        MegaConfig(13, 40, 3, 2, 0.0, 7, 9, True, "axon-0.8.0"),
    ],
    ids=["defaults", "all-options"],
)
def test_json_round_trip(config: MegaConfig, tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert MegaConfig.from_json(path) == config
    assert MegaConfig.from_json(str(path)) == config


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "not a JSON file"),
        (b"\xff\xfe", "not a JSON file"),
        (b"[" * 100_000, "not a JSON file|nested too deep"),
        (b"[1, 2]", "mapping of options"),
        (json.dumps({"embed_dim": -4}).encode(), "option embed_dim must be"),
    ],
    ids=["truncated", "not-utf8", "deep", "a-list", "bad-option"],
)
def test_bad_json_names_the_file(content: bytes, fault: str, tmp_path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=fault) as e:
        MegaConfig.from_json(path)
    assert "broken.json" in str(e.value)


def test_importing_the_package_needs_no_torch() -> None:
    code = "import sys, reference, reference.numpy_mega; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
