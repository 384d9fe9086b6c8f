"""``python -m mega_tvm.compile``: a checkpoint goes in, a shared library comes out."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from reference import MegaConfig
from reference.config import ConfigError

from .console import console, print_settings, run_command
from .dtypes import check_dtype
from .errors import CompileError

if TYPE_CHECKING:
    from .tuning.lookup import TunedSchedules

DEFAULT_EMBED_DIM = 287  # the documented usage of Edifice's Mega


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.bundle is None:
        return run_command(lambda: _compile(arguments))
    if arguments.output is not None:
        parser.error("--bundle and -o name two places for one library; give one of them")
    return run_command(lambda: _compile_bundle(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mega_tvm.compile",
        description="Compile a Mega model into one shared library with its weights inside.",
    )
    add_model_options(parser)
    _add_compile_options(parser)
    return parser


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


def _add_compile_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--no-symbolic",
        action="store_true",
        help="leave out the symbolic entry, which runs any other batch and length",
    )
    add(
        "--max-batch",
        type=int,
        default=256,
        metavar="N",
        help="greatest batch of the symbolic entry (default: 256)",
    )
    add(
        "--max-seq-len",
        type=int,
        default=4096,
        metavar="N",
        help="greatest length of the symbolic entry (default: 4096)",
    )
    add(
        "--no-stream",
        action="store_true",
        help="leave out the code of streams, which are fed frame by frame",
    )
    add(
        "--dtype",
        default="float32",
        help="type of weights and activations: float32 (default); float16 on GPUs",
    )
    add(
        "--fast-products",
        action="store_true",
        help="multiply by Strassen's method where that is faster: 1.3 times the rounding error of "
        "dense layers, 1.75 times the bytes of their weights; CPUs only",
    )
    add(
        "--tuning-log",
        type=Path,
        metavar="DIR",
        help="a log of mega_tvm.tune (default: those shipped for the target)",
    )
    add("--no-tuning", action="store_true", help="schedule every kernel by hand")
    add(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads that the library will mostly run with: chooses tuning records (default: 1)",
    )
    add("--strict", action="store_true", help="fail where a kernel has no valid tuning record")
    add("--seed", type=int, default=0, metavar="N", help="seed of fresh weights (default: 0)")
    add(
        "--disable-pass",
        action="append",
        default=[],
        metavar="NAME",
        help="switch a graph pass off; may be given again",
    )
    add(
        "--debug-dump",
        type=Path,
        metavar="DIR",
        help="write the module after each phase, and the assembly, into DIR",
    )
    add(
        "-o",
        "--output",
        type=Path,
        metavar="OUT.so",
        help="where the library goes (default: the name of the checkpoint or model, or mega.so)",
    )
    add(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="write the library, and all that a host without pip needs to run it from C++ or "
        "Python, into a new directory; in place of -o",
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected positive integers separated by commas, such as 1,8; got {text!r}"
        ) from None


def _compile_bundle(arguments: argparse.Namespace) -> int:
    from .bundle import MODEL, check_bundle_destination, check_bundle_target, write_bundle

    directory = Path(os.path.abspath(arguments.bundle))
    check_bundle_target(arguments.target)
    check_bundle_destination(directory)  # now, not after the compile
    with tempfile.TemporaryDirectory(prefix="mega_tvm-") as aside:
        arguments.output = Path(aside) / MODEL
        if status := _compile(arguments):
            return status
        write_bundle(arguments.output, directory)
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    console().print(f"bundled into {directory} ({size / 1e6:.1f} MB)", markup=False)
    return 0


def _compile(arguments: argparse.Namespace) -> int:
    out = console()
    started = time.perf_counter()
    options = model_options(arguments)
    file = input_file(arguments)
    output = arguments.output or Path(f"{file.stem}.so" if file else "mega.so")
    with out.status("loading the compiler"):
        # Heavy: torch and TVM's compiler. A wrong option is told before they are loaded.
        from .artifact_format import read_manifest
        from .compiler import compile_model
        from .cuda.toolchain import find_nvcc
        from .model_source import resolve_model
        from .targets import CpuTarget, resolve_target

    on_cpu = isinstance(resolve_target(arguments.target), CpuTarget)
    check_dtype(arguments.dtype, arguments.target, on_gpu=not on_cpu)
    if not on_cpu:
        find_nvcc()  # told now, not when kernels are to be compiled
    model: Path | MegaConfig | None = file
    if model is None:
        model = MegaConfig.from_dict({"embed_dim": DEFAULT_EMBED_DIM, **options})
    source = resolve_model(model, options, arguments.seed)
    config = source.config
    fresh = f"freshly initialized from seed {arguments.seed}: this is no trained model"
    lengths = arguments.seq_len or ([config.seq_len] if config else ["as the file says"])
    print_settings(
        out,
        "compile",
        {
            "target": arguments.target,
            "model" if arguments.model else "weights": file or fresh,
            **{f"config.{k}": value for k, value in (config.to_dict() if config else {}).items()},
            "batch": ", ".join(map(str, arguments.batch)),
            "seq_len": ", ".join(map(str, lengths)),
            "any other shape": "refused"
            if arguments.no_symbolic or not on_cpu
            else f"batch to {arguments.max_batch}, seq_len to {arguments.max_seq_len}",
            "streams": "if the model can" if on_cpu and not arguments.no_stream else "left out",
            "dtype": arguments.dtype,
            "fast products": "where they pay" if arguments.fast_products else "no",
            "tuning log": "none"
            if arguments.no_tuning
            else arguments.tuning_log or "those shipped for the target",
            "threads": arguments.threads,
            "strict": "yes" if arguments.strict else "no",
            "disabled passes": ", ".join(arguments.disable_pass) or "none",
            "output": output if arguments.bundle is None else f"bundle {arguments.bundle}",
        },
    )
    for warning in source.warnings:
        out.print(f"warning: {warning}", markup=False)
    with out.status("starting") as status:

        def on_phase(phase: str) -> None:
            status.update(f"phase: {phase}")
            if not out.is_terminal:
                out.print(f"  phase: {phase}")

        path = compile_model(
            model,
            target=arguments.target,
            batch=arguments.batch,
            seq_len=arguments.seq_len,
            symbolic=not arguments.no_symbolic,
            max_batch=arguments.max_batch,
            max_seq_len=arguments.max_seq_len,
            stream=not arguments.no_stream,
            dtype=arguments.dtype,
            fast_products=arguments.fast_products,
            tuning_log=arguments.tuning_log,
            use_tuning=not arguments.no_tuning,
            threads=arguments.threads,
            strict=arguments.strict,
            output=output,
            options=options,
            seed=arguments.seed,
            disabled_passes=arguments.disable_pass,
            debug_dump=arguments.debug_dump,
            on_phase=on_phase,
            on_tuning=lambda tuned: _print_lookups(out, tuned),
            on_note=lambda note: out.print(f"note: {note}", markup=False),
        )
    manifest = read_manifest(path)
    parity = manifest["parity"]
    if parity["checked"]:
        checked = [entry["max_abs"] for entry in parity["entries"].values() if entry["checked"]]
        figure = f"max abs error against float64: {max(checked):.2e}" if checked else "not checked"
    else:
        figure = f"parity not checked: {parity['reason']}"
    what = "compiled" if arguments.bundle else f"wrote {path}"
    out.print(
        f"{what} ({path.stat().st_size / 1e6:.1f} MB) in "
        f"{time.perf_counter() - started:.1f} s; {figure}",
        markup=False,
    )
    return 0


def _print_lookups(out: Console, tuned: TunedSchedules) -> None:
    """Print what was looked up for each kernel, and what was skipped."""
    from .tuning.lookup import ANY_SIZE, HIT

    for problem in tuned.problems:
        out.print(f"warning: {problem}; skipped", markup=False)
    for name, outcome in sorted(tuned.outcomes.items()):
        out.print(f"  kernel {name}: {outcome}", markup=False)
    sized = [outcome for outcome in tuned.outcomes.values() if outcome.kind != ANY_SIZE]
    if sized:
        hits = sum(outcome.kind == HIT for outcome in sized)
        out.print(f"  tuning records: {hits} hits of {len(sized)} kernels")


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


if __name__ == "__main__":
    sys.exit(main())
