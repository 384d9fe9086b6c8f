"""``python -m mega_tvm.compile``: a checkpoint goes in, a shared library comes out."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from reference import MegaConfig

from .console import console, print_settings, run_command
from .dtypes import check_dtype
from .model_arguments import DEFAULT_EMBED_DIM, add_model_options, input_file, model_options

if TYPE_CHECKING:
    from .tuning.lookup import TunedSchedules


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
        help="threads that the library will mostly run with: chooses tuning records, and may split "
        "rows over them (default: 1)",
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


if __name__ == "__main__":
    sys.exit(main())
