"""Compiles a model into a shared library: `compile_model`."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm

from reference import MegaConfig

from .artifact import check_destination, write_artifact
from .cuda.target import CudaTarget
from .dtypes import check_dtype
from .errors import CompileError
from .frontend.onnx import OnnxModel, import_onnx
from .frontend.torch import import_module
from .model_source import DEFAULT_SEED, ModelSource, positive_option, resolve_model
from .pipeline import Compiled, run_pipeline
from .stream_plan import NAME as STREAM
from .stream_plan import NOT_ASKED_FOR, StreamPlan, check_stream, plan_stream
from .symbolic import MAX_BATCH, MAX_SEQ_LEN, SymbolicPlan, plan_symbolic
from .symbolic_entry import FIXED, probe_shapes
from .targets import CpuTarget, machine_runs, resolve_target
from .tolerances import compare
from .tuning.lookup import FOUND, TunedSchedules, find_logs
from .weights import Checkpoint

DEFAULT_OUTPUT = "mega.so"
# Query-key pairs beyond which the float64 reference takes longer than the compile: 512^2 at 4
# layers.
_PARITY_PAIRS = 4 * 512 * 512
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
    fast_products: bool = False,
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
        Whether `Model.stream` will work. Models that cannot stream (L1-Laplace attention, a module
        that mixes timesteps; all on a GPU) are compiled without; the manifest says why.
    dtype : str
        Type of weights and of what kernels hand on: ``float32``; on GPUs also ``float16``. Sums,
        states, statistics, and the input and output of a call are float32 always.
    fast_products : bool
        Multiply by Strassen's method in dense layers where that is faster, see
        `schedules.strassen_dense.cpu`: an eighth fewer multiplications, 1.3 times the rounding
        error of these layers, 1.75 times the bytes of their weights. For CPUs.
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
        The thread count that the library will mostly run with: it chooses among records.
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
    if fast_products and not isinstance(resolved, CpuTarget):
        raise CompileError(
            f"fast products are for CPUs: target {target} has no kernels of Strassen's method; "
            "leave fast_products (--fast-products) out, or compile for a CPU (--target native)"
        )
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
    if stream and on_cpu:
        streaming = plan_stream(source, next(iter(shapes.values())), plan)

    def compile_with(plan: SymbolicPlan, streaming: StreamPlan) -> Compiled:
        return run_pipeline(
            tvm.IRModule({**mod.functions, **plan.functions, **streaming.functions}),
            resolved,
            dtype=dtype,
            fast_products=fast_products,
            tuned=tuned,
            on_scheduled=lambda: _check_tuning(tuned, strict, on_tuning),
            disabled_passes=disabled_passes,
            debug_dump=None if debug_dump is None else Path(debug_dump),
            on_phase=on_phase,
        )

    try:
        compiled = compile_with(plan, streaming)
    except CompileError:
        raise
    except Exception as error:
        # Operators around a Mega may want sizes that are known; if it is another fault, the
        # compile without the symbolic entries tells it.
        if not (plan.functions or streaming.functions) or source.checkpoint is not None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        plan, streaming = SymbolicPlan(left_out=reason), StreamPlan(left_out=reason)
        compiled = compile_with(plan, streaming)
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
    parity = _parity(compiled, source, resolved, checks, dtype)
    if parity["checked"] and streaming.functions:
        found = check_stream(compiled, stream_field, source.oracle(), dtype)
        figures = {"max_abs": found.max_abs, "relative_rms": found.relative_rms}
        parity["entries"][STREAM] = {"checked": True, **figures}
    manifest = {
        "target": _describe_target(resolved),
        "dtype": dtype,
        "fast_products": fast_products,
        "entries": entries,
        "symbolic_entries": [entry.describe() for entry in symbolic_entries],
        "stream": stream_field,
        "config": None if source.config is None else source.config.to_dict(),
        "weights": source.origin,
        "kernels": compiled.kernels,
        "tuning": {"log": tuned.digest, "threads": tuned.threads},
        "disabled_passes": sorted(disabled_passes),
        "parity": parity,
    }
    on_phase("link")
    return write_artifact(compiled.executable, manifest, output, compiled.tensors)


def _describe_target(target: CpuTarget | CudaTarget) -> dict[str, Any]:
    """Return the manifest's field about the target."""
    if isinstance(target, CudaTarget):
        return {
            "name": target.name,
            "kind": "cuda",
            "mcpu": None,
            "mattr": [],
            "cpu_features": [],
            "archs": [f"sm_{arch}" for arch in target.archs],
            "cuda_graph": True,
            "ptx": None if target.ptx is None else f"compute_{target.ptx}",
        }
    return {
        "name": target.name,
        "kind": "llvm",
        "mcpu": target.mcpu,
        "mattr": list(target.mattr),
        "cpu_features": list(target.cpu_features),
    }


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
            f"strict: {len(missed)} of {len(tuned.outcomes)} kernels have no valid tuning record "
            f"{tuned.subject}: {'; '.join(missed)}. Tune them with "
            "python -m mega_tvm.tune, or compile without strict"
        )


def input_shapes(
    source: ModelSource,
    batch: int | Sequence[int],
    seq_len: int | Sequence[int] | None,
    input_shape: Sequence[int] | None,
) -> dict[str, tuple[int, ...]]:
    """Return the input shapes to compile for, by entry name.

    Raises
    ------
    CompileError
        If they are no positive integers, or not distinct.
    """
    if isinstance(source.module, OnnxModel):
        given = {"batch": batch, "seq_len": seq_len, "input_shape": input_shape}
        sizes = {
            name: None
            if value is None
            else [positive_option(name, size) for size in _as_list(value)]
            for name, value in given.items()
        }
        return _named(source.module.shapes(**sizes))
    if input_shape is not None:
        return {"main": tuple(positive_option("input_shape", size) for size in input_shape)}
    config = source.config
    if config is None:
        raise CompileError(
            f"{type(source.module).__name__} holds no Mega that would tell the shape of its input: "
            "give input_shape"
        )
    lengths = config.seq_len if seq_len is None else seq_len
    batches = [positive_option("batch", b) for b in _as_list(batch)]
    pairs = list(
        itertools.product(batches, [positive_option("seq_len", t) for t in _as_list(lengths)])
    )
    return _named([(b, t, config.embed_dim) for b, t in pairs])


def _named(shapes: Sequence[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    if len(set(shapes)) < len(shapes) or not shapes:
        listed = ", ".join(str(list(shape)) for shape in shapes) or "none"
        raise CompileError(f"batch and seq_len must give distinct shapes; they give {listed}")
    if len(shapes) == 1:
        return {"main": shapes[0]}
    return {f"main_b{shape[0]}_t{shape[1]}": shape for shape in shapes}


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value]


def import_entries(
    module: torch.nn.Module | OnnxModel, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tvm.IRModule, Sequence[str]]:
    """Import a module once for each input shape.

    Returns
    -------
    IRModule
    sequence of str
        What a user should know of how an ONNX file is compiled.
    """
    if isinstance(module, OnnxModel):
        return import_onnx(module, shapes)
    functions = {}
    for name, shape in shapes.items():
        main = import_module(module, shape)["main"]
        functions[name] = main.with_attr("global_symbol", name)
    return tvm.IRModule(functions), ()


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


def _parity(
    compiled: Compiled,
    source: ModelSource,
    target: CpuTarget | CudaTarget,
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    dtype: str,
) -> dict[str, Any]:
    """Run the compiled code against the float64 reference, before anything is written.

    Raises
    ------
    CompileError
        If an entry leaves the tolerance.
    """
    if not machine_runs(target):
        return {"checked": False, "reason": f"this machine cannot run {target.name} code"}
    oracle = source.oracle()
    layers = source.config.num_layers if source.config else 1
    found: dict[str, Any] = {"checked": True, "entries": {}}
    for name, several in shapes.items():
        entry: dict[str, Any] = {"checked": True, "max_abs": 0.0, "relative_rms": 0.0}
        for shape in several:
            if layers * shape[0] * (shape[1] if len(shape) == 3 else 1) ** 2 > _PARITY_PAIRS:
                entry = {"checked": False, "reason": "long; run mega_tvm.verify"}
                break
            x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
            expected = oracle(x)
            parity = compare(compiled.run(name, x, expected.shape), expected, dtype)
            if not parity.ok:
                raise CompileError(
                    f"entry {name} differs from the float64 reference at input shape "
                    f"{list(shape)}: {parity}. This is a bug of the compiler; nothing was written"
                )
            entry["max_abs"] = max(entry["max_abs"], parity.max_abs)
            entry["relative_rms"] = max(entry["relative_rms"], parity.relative_rms)
        found["entries"][name] = entry
    return found
