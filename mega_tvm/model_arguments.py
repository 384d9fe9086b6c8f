"""Command-line options that say which model is meant: `compile`, `tune` and `export` share them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from reference import MegaConfig
from reference.config import ConfigError

from .dtypes import FLOAT32
from .errors import CompileError

DEFAULT_EMBED_DIM = 287  # the documented usage of Edifice's Mega


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is compiled, and for which target; `mega_tvm.tune` has them."""
    add = parser.add_argument
    add(
        "--target",
        default="native",
        metavar="NAME",
        help="native (default), x86-64-v3, x86-64-v4 or sapphirerapids; cuda, cuda-sm_80+sm_90",
    )
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="a checkpoint: .nx, .safetensors, .npz, .pt; without it the weights are freshly "
        "initialized from --seed",
    )
    add(
        "--model",
        type=Path,
        metavar="FILE.onnx",
        help="an ONNX file: the whole model, with its weights, in place of a checkpoint",
    )
    add("--config", type=Path, metavar="FILE.json", help="options of the model, as JSON")
    add("--embed-dim", type=int, metavar="N")
    add("--hidden-size", type=int, metavar="N")
    add("--ema-dim", type=int, metavar="N")
    add("--num-layers", type=int, metavar="N")
    add_unstated_options(parser)
    add(
        "--seq-len",
        type=_numbers,
        metavar="N[,N..]",
        help="sequence lengths to compile for (default: the model's)",
    )
    add(
        "--batch",
        type=_numbers,
        default=[1],
        metavar="N[,N..]",
        help="batch sizes to compile for (default: 1)",
    )
    add(
        "--dtype",
        default=FLOAT32,
        metavar="NAME",
        help="type of weights and activations: float32 (default); float16 or bfloat16 on GPUs",
    )


def add_unstated_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that no shape of a checkpoint tells; `mega_tvm.export` has them."""
    parser.add_argument(
        "--laplace-attention",
        action="store_true",
        default=None,
        help="L1-Laplace attention, where the checkpoint does not state it",
    )
    parser.add_argument(
        "--layer-norm",
        choices=("plain", "axon-0.8.0"),
        help="the layer norm of Axon 0.8.0 differs where a row's variance is below 1e-5",
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected positive integers separated by commas, such as 1,8; got {text!r}"
        ) from None


def input_file(arguments: argparse.Namespace) -> Path | None:
    """Return the checkpoint or the ONNX file, if one was given."""
    weights: Path | None = arguments.weights
    model: Path | None = arguments.model
    if weights and model:
        raise CompileError("give --weights or --model, not both: an ONNX file holds its weights")
    if weights and weights.suffix == ".onnx":
        raise CompileError(f"{weights}: an ONNX file is a whole model: give it by --model")
    if model and model.suffix != ".onnx":
        raise CompileError(f"{model}: --model takes an .onnx file; a checkpoint goes to --weights")
    return weights or model


def model_options(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the model's options that the user gave, by the config file or one by one."""
    options: dict[str, object] = {}
    if arguments.config is not None:
        options = _config_options(arguments.config)
    names = ("embed_dim", "hidden_size", "ema_dim", "num_layers", "laplace_attention", "layer_norm")
    given = {name: getattr(arguments, name) for name in names}
    options.update({name: value for name, value in given.items() if value is not None})
    return options


def _config_options(path: Path) -> dict[str, object]:
    """Return the options that a config file states, without defaults: a checkpoint may differ."""
    try:
        MegaConfig.from_json(path)
        stated = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return {str(name): value for name, value in stated.items()}
