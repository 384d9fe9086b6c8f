"""``python -m mega_tvm.export``: a checkpoint goes in, a standard ONNX file comes out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reference import MegaConfig, numpy_mega

from .atomic_write import write_atomically
from .console import console, print_settings, run_command
from .errors import ExportError
from .model_arguments import add_unstated_options
from .tolerances import compare
from .weights import Checkpoint, load_checkpoint

if TYPE_CHECKING:
    import onnx

    from reference.torch_mega import Mega

_MOST_BYTES = 2**31 - 1  # what protobuf puts into one file
# Small sizes at which the file is run before it is written: more than one chunk of the EMA.
_CHECKED_SHAPE = (2, 67)


def export_onnx(
    model: Mega | Checkpoint | MegaConfig | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    inline: bool = False,
    options: Mapping[str, object] | None = None,
) -> Path:
    """Write a Mega as an ONNX file of standard operators, batch and length symbolic.

    The file is run by ONNX's reference evaluator and compared with the oracle before it is
    written; it appears whole or not at all.

    Parameters
    ----------
    model : Mega, Checkpoint, MegaConfig or path
        A path is a checkpoint in any format that `load_checkpoint` reads. A config alone gets
        fresh weights of seed 0.
    output : path-like
        A file name that ends in ``.onnx``.
    inline : bool, default False
        Write the bodies of Mega's functions in their place, for runtimes that do not expand
        functions.
    options : mapping, optional
        Options of `MegaConfig` that a checkpoint file does not state.

    Returns
    -------
    Path
        The file's absolute path.

    Raises
    ------
    ExportError, WeightsError
        If the checkpoint cannot be read, or the file not be written.
    """
    path = Path(os.path.abspath(output))
    check_output(path)
    return _write(_checkpoint(model, options), path, inline)


def check_output(path: Path) -> None:
    """Refuse a destination that cannot be written, before any work.

    Raises
    ------
    ExportError
    """
    if path.suffix != ".onnx":
        raise ExportError(f"{path}: expected a file name that ends in .onnx")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no directory {path.parent}; create it first")
    if path.is_dir():
        raise ExportError(f"{path}: is a directory")


def _checkpoint(
    model: Mega | Checkpoint | MegaConfig | str | os.PathLike[str],
    options: Mapping[str, object] | None,
) -> Checkpoint:
    if isinstance(model, str | os.PathLike):
        return load_checkpoint(model, options=options)
    if isinstance(model, Checkpoint):
        return model
    from .model_source import resolve_model  # loads torch

    checkpoint = resolve_model(model, options).checkpoint
    if checkpoint is None:
        raise ExportError(
            f"{type(model).__name__} is not a Mega alone: export the Mega inside it, and join the "
            "rest to the file with onnx.compose.merge_models"
        )
    return checkpoint


def _write(checkpoint: Checkpoint, path: Path, inline: bool) -> Path:
    try:
        from reference import onnx_mega
    except ImportError as error:
        raise ExportError("export needs the onnx package: pip install mega-tvm[compile]") from error

    model = onnx_mega.build_model(checkpoint.config, checkpoint.params)
    if inline:
        model = onnx_mega.inline(model)
    if model.ByteSize() > _MOST_BYTES:
        raise ExportError(
            f"{path}: the weights take {model.ByteSize()} bytes; an ONNX file of one part holds "
            f"at most {_MOST_BYTES}"
        )
    _check(model, checkpoint)
    try:
        write_atomically(path, model.SerializeToString(deterministic=True))
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error}") from error
    return path


def _check(model: onnx.ModelProto, checkpoint: Checkpoint) -> None:
    """Check the model by ONNX's checker and strict shape inference, and run it."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    config = checkpoint.config
    shape = (*_CHECKED_SHAPE, config.embed_dim)
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    (y,) = ReferenceEvaluator(model).run(None, {"x": x})
    parity = compare(y, numpy_mega.forward(config, checkpoint.params, x))
    if not parity.ok:
        raise ExportError(
            f"the ONNX model differs from the float64 reference: {parity}. Nothing was written"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _export(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mega_tvm.export",
        description="Write a Mega as an ONNX file of standard operators, for any batch and length.",
    )
    add = parser.add_argument
    add(
        "model",
        type=Path,
        metavar="CHECKPOINT",
        help="a .nx, .safetensors, .npz, .pt or .onnx file",
    )
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE.onnx",
        help="where it goes (default: the checkpoint's name)",
    )
    add(
        "--inline",
        action="store_true",
        help="write the bodies of Mega's functions in their place, for runtimes that do not "
        "expand functions, such as OpenVINO",
    )
    add_unstated_options(parser)
    return parser


def _export(arguments: argparse.Namespace) -> int:
    out = console()
    path = Path(os.path.abspath(arguments.output or f"{arguments.model.stem}.onnx"))
    check_output(path)
    names = ("laplace_attention", "layer_norm")
    given = {name: getattr(arguments, name) for name in names}
    options = {name: value for name, value in given.items() if value is not None}
    checkpoint = load_checkpoint(arguments.model, options=options)
    print_settings(
        out,
        "export",
        {
            "weights": arguments.model,
            **{f"config.{name}": value for name, value in checkpoint.config.to_dict().items()},
            "functions": "inlined" if arguments.inline else "mega.*, with standard bodies",
            "output": path,
        },
    )
    for warning in checkpoint.warnings:
        out.print(f"warning: {warning}", markup=False)
    with out.status("writing and checking"):
        _write(checkpoint, path, arguments.inline)
    out.print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
