"""Compiles a model into a shared library: `compile_model`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import tvm

from reference import MegaConfig

from .artifact import check_destination, write_artifact
from .compiled import Compiled
from .cuda.target import CudaTarget
from .dtypes import check_dtype
from .errors import CompileError
from .input_shapes import import_entries, input_shapes
from .model_source import DEFAULT_SEED, positive_option, resolve_model
from .parity import check_parity
from .pipeline import run_pipeline
from .stream_plan import NAME as STREAM
from .stream_plan import NOT_ASKED_FOR, StreamPlan, check_stream, plan_stream
from .symbolic import MAX_BATCH, MAX_SEQ_LEN, SymbolicPlan, plan_symbolic
from .symbolic_entry import FIXED, probe_shapes
from .targets import CpuTarget, resolve_target
from .tuning.lookup import FOUND, TunedSchedules, find_logs
from .weights import Checkpoint
from .window_plan import describe_windows, window_checks, with_windows

DEFAULT_OUTPUT = "mega.so"
_NO_STREAM_ON_GPU = "streams run on CPUs; compile the model for one, with --target native"


def compile_model(
    model: torch.nn.Module | Checkpoint | MegaConfig | str | os.PathLike[str],
    *,
    target: str = "native",
    batch: int | Sequence[int] = 1,
    seq_len: int | Sequence[int] | None = None,
    input_shape: Sequence[int] | None = None,
    symbolic: bool = True,
    max_batch: int = MAX_BATCH,
    max_seq_len: int = MAX_SEQ_LEN,
    stream: bool = True,
    dtype: str = "float32",
    output: str | os.PathLike[str] = DEFAULT_OUTPUT,
    options: Mapping[str, object] | None = None,
    seed: int = DEFAULT_SEED,
    tuning_log: str | os.PathLike[str] | None = None,
    use_tuning: bool = True,
    threads: int = 1,
    strict: bool = False,
    disabled_passes: Collection[str] = (),
    debug_dump: str | os.PathLike[str] | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
    on_tuning: Callable[[TunedSchedules], None] = lambda tuned: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """Compile a model into one shared library with its weights inside.

    Parameters
    ----------
    model : Module, Checkpoint, MegaConfig or path
        A Mega, a module around one, or the path of a checkpoint (``.nx``, ``.safetensors``,
        ``.npz``, ``.pt``) or of an ONNX file (``.onnx``), which holds the whole model. A config
        alone gets fresh weights from ``seed``.
    target : str
        ``native``, ``x86-64-v3``, ``x86-64-v4`` or ``sapphirerapids``; ``cuda``, or ``cuda-sm_90``
        and the like.
    batch, seq_len : int or sequence of int
        Shapes to compile for: every batch with every length. ``seq_len`` defaults to the config's.
    input_shape : sequence of int, optional
        For a module without a Mega inside, in place of ``batch`` and ``seq_len``.
    symbolic : bool
        Whether any other batch and length runs too, through a symbolic entry. A module around a
        Mega that does not leave them open gets none, with a warning that says why. GPUs run the
        given shapes alone.
    max_batch, max_seq_len : int
        The greatest batch and length of the symbolic entry.
    stream : bool
        Whether `Model.stream` will work, and `Model.window` keep what a frame keeps. Models that
        cannot stream (L1-Laplace attention, a module that mixes timesteps; all on a GPU) are
        compiled without; the manifest says why.
    dtype : str
        Type of weights and of what kernels hand on: ``float32``; on GPUs also ``float16`` and
        ``bfloat16``. Sums, states, statistics, and the input and output of a call are float32
        always.
    output : path-like
        Where the library goes; ``OUT.json`` goes beside it.
    options : mapping, optional
        Options of `MegaConfig` that a checkpoint file does not state.
    seed : int
        Seed of fresh weights.
    tuning_log : path-like, optional
        A tuning log; without, those shipped with the package for the target.
    use_tuning : bool
        False schedules every kernel by hand.
    threads : int
        The thread count that the library will mostly run with: it chooses among records, and may
        split a sequence's rows, see `mega_tvm.passes.split_rows`.
    strict : bool
        Fail where a kernel has no record that is valid.
    disabled_passes : collection of str
        Graph passes to switch off, see `mega_tvm.passes.OPTIONAL_PASSES`.
    debug_dump : path-like, optional
        A folder for the module after each phase, and the generated assembly.
    on_phase : callable
        Called with the name of each phase as it starts.
    on_tuning : callable
        Called with what the lookups found, after the schedule phase.
    on_note : callable
        Called with what a user should know of how an ONNX file is compiled.

    Returns
    -------
    Path
        The library's absolute path.

    Raises
    ------
    CompileError, WeightsError, ModelFileError, TargetError, UnsupportedModelError, TuningError
        Each says what was expected, what came, and what to do. Nothing is written then.
    """
    resolved = resolve_target(target)
    check_dtype(dtype, target, on_gpu=isinstance(resolved, CudaTarget))
    check_destination(Path(os.path.abspath(output)))  # now, not after the compile
    source = resolve_model(model, options, seed)
    shapes = input_shapes(source, batch, seq_len, input_shape)
    tuned = _tuned_schedules(resolved, tuning_log, use_tuning, strict, threads)
    on_phase("import")
    mod, notes = import_entries(source.module, shapes)
    for note in notes:
        on_note(note)
    on_cpu = isinstance(resolved, CpuTarget)
    plan = SymbolicPlan()
    streaming = StreamPlan(left_out=NOT_ASKED_FOR if on_cpu else _NO_STREAM_ON_GPU)
    if symbolic and on_cpu:
        plan = plan_symbolic(source, shapes.values(), max_batch, max_seq_len)
    windows = stream and on_cpu
    if windows:
        streaming = plan_stream(source, next(iter(shapes.values())), plan)

    def compile_with(plan: SymbolicPlan, streaming: StreamPlan, windows: bool) -> Compiled:
        functions = {**mod.functions, **plan.functions}
        if windows:
            functions = with_windows(functions)
        return run_pipeline(
            tvm.IRModule({**functions, **streaming.functions}),
            resolved,
            dtype=dtype,
            tuned=tuned,
            on_scheduled=lambda: _check_tuning(tuned, strict, on_tuning),
            disabled_passes=disabled_passes,
            debug_dump=None if debug_dump is None else Path(debug_dump),
            on_phase=on_phase,
        )

    try:
        compiled = compile_with(plan, streaming, windows)
    except CompileError:
        raise
    except Exception as error:
        # Operators around a Mega may want sizes that are known; if it is another fault, the
        # compile without the symbolic entries tells it.
        if not (plan.functions or streaming.functions or windows) or source.checkpoint is not None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        plan, streaming = SymbolicPlan(left_out=reason), StreamPlan(left_out=reason)
        windows = False
        compiled = compile_with(plan, streaming, windows)
    if plan.left_out is not None and len(next(iter(shapes.values()))) == 3:
        warnings.warn(
            f"no symbolic entry, only the given shapes will run: {plan.left_out}", stacklevel=2
        )
    on_phase("parity")
    entries = [
        _entry(name, shape, mod) | {"workspace": compiled.workspaces[name][FIXED]}
        for name, shape in shapes.items()
    ]
    symbolic_entries = plan.entries(compiled.workspaces)
    checks = {name: [shape] for name, shape in shapes.items()}
    checks |= {entry.name: probe_shapes(entry) for entry in symbolic_entries}
    width, output_shape = entries[0]["input"]["shape"][-1], entries[0]["output"]["shape"][1:]
    stream_field = streaming.describe(compiled, width, output_shape)
    parity = check_parity(compiled, source, resolved, checks, dtype)
    if parity["checked"] and streaming.functions:
        found = check_stream(compiled, stream_field, source.oracle(), dtype)
        figures = {"max_abs": found.max_abs, "relative_rms": found.relative_rms}
        parity["entries"][STREAM] = {"checked": True, **figures}
    window_field: dict[str, Any] = {"left_out": streaming.left_out}
    if windows:
        runs = window_checks(entries, symbolic_entries) if parity["checked"] else {}
        window_field = describe_windows(compiled, width, runs)
    manifest = {
        "target": resolved.describe(),
        "dtype": dtype,
        "entries": entries,
        "symbolic_entries": [entry.describe() for entry in symbolic_entries],
        "stream": stream_field,
        "window": window_field,
        "config": None if source.config is None else source.config.to_dict(),
        "weights": source.origin,
        "kernels": compiled.kernels,
        "tuning": {"log": tuned.digest, "threads": tuned.threads},
        "disabled_passes": sorted(disabled_passes),
        "parity": parity,
    }
    on_phase("link")
    return write_artifact(compiled.executable, manifest, output, compiled.tensors)


def _tuned_schedules(
    target: CpuTarget | CudaTarget,
    given: str | os.PathLike[str] | None,
    use_tuning: bool,
    strict: bool,
    threads: int,
) -> TunedSchedules:
    """Return the records to look up."""
    positive_option("threads", threads)
    if isinstance(target, CudaTarget):
        threads = 1  # a GPU's kernels have threads of their own
    if not use_tuning:
        return TunedSchedules(target, threads, [])
    logs = find_logs(target, None if given is None else Path(given))
    return TunedSchedules(target, threads, logs)


def _check_tuning(
    tuned: TunedSchedules, strict: bool, on_tuning: Callable[[TunedSchedules], None]
) -> None:
    """Tell what the lookups found, and refuse a miss where the user asked for that."""
    on_tuning(tuned)
    missed = [f"{n}: {found}" for n, found in tuned.outcomes.items() if found.kind not in FOUND]
    if strict and missed:
        raise CompileError(
            f"strict: {len(missed)} of {len(tuned.outcomes)} kernels have no valid tuning record: "
            f"{'; '.join(missed)}. Tune them with python -m mega_tvm.tune {tuned.tune_options}, "
            "or compile without strict"
        )


def _entry(name: str, shape: tuple[int, ...], mod: tvm.IRModule) -> dict[str, Any]:
    ret = mod[name].ret_ty
    out = [int(size) for size in ret.shape]
    sequence = len(shape) == 3
    return {
        "name": name,
        "batch": shape[0] if sequence else None,
        "seq_len": shape[1] if sequence else None,
        "input": {"shape": list(shape), "dtype": "float32"},
        "output": {"shape": out, "dtype": "float32"},
    }
