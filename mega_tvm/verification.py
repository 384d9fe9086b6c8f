"""Compares a compiled model with the float64 oracle: `verify_artifact`."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mega_tvm.errors import InputError
from mega_tvm.runtime import Entry, Model, load
from mega_tvm.symbolic_entry import probe_shapes
from mega_tvm.tolerances import TOLERANCES, compare
from mega_tvm.tracing import Localization, localize
from mega_tvm.verify_inputs import (
    INPUTS,
    ORDINARY,
    Array,
    Golden,
    Input,
    VerificationError,
    float32_error,
    has_golden,
    load_golden,
    meets_jump,
)
from mega_tvm.verify_report import ORACLE, STORED, Check, Skipped, VerifyReport
from mega_tvm.verify_stream import check_stream
from mega_tvm.weights import load_checkpoint, params_digest
from reference import MegaConfig, numpy_mega

# What the outputs depend on; the others (dropout, window) may differ between file and manifest.
_OPTIONS = (
    "embed_dim", "hidden_size", "ema_dim", "num_layers", "laplace_attention", "layer_norm",
)  # fmt: skip

# A relative RMS error of float32 itself from which on bounds widened by it would let all pass.
_NOTHING_LEFT = 1e-3


@dataclasses.dataclass(frozen=True)
class Subject:
    """An artifact, and the weights it should hold.

    Parameters
    ----------
    path : Path
    model : Model
    config : MegaConfig
    params : mapping of str to array
    weights : str
        Where the weights are from.
    golden : tuple of Golden
    """

    path: Path
    model: Model
    config: MegaConfig
    params: numpy_mega.Params
    weights: str
    golden: tuple[Golden, ...]

    def settings(self) -> dict[str, Any]:
        """Return what is compared with what, as JSON-like values."""
        manifest = self.model.metadata
        return {
            "artifact": str(self.path),
            "target": manifest["target"]["name"],
            "dtype": manifest["dtype"],
            "weights": self.weights,
            "digest": manifest["weights"]["digest"],
            **{f"config.{name}": getattr(self.config, name) for name in _OPTIONS},
            "entries": [f"{e.name} {list(e.input_shape)}" for e in self.model.entries]
            + [f"{e.name} {e}" for e in self.model.symbolic_entries],
            "golden": [str(golden.path) for golden in self.golden],
            "threads": self.model.num_threads,
        }


def verify_artifact(
    path: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    golden: Sequence[str | os.PathLike[str]] = (),
    num_threads: int = 1,
) -> VerifyReport:
    """Compare a compiled model with the float64 oracle at every entry.

    Symbolic entries run at a few odd shapes.

    Parameters
    ----------
    path : path-like
        A ``.so`` that `mega_tvm.compile_model` wrote.
    weights : path-like, optional
        The checkpoint that it was compiled from; by default where the manifest says that is.
    golden : sequence of path-like
        ``.npz`` files with ``__input__`` and ``__output__``, which is compared too.
    num_threads : int

    Returns
    -------
    VerifyReport
        Its ``ok`` says whether all is within tolerance; if not, ``localization`` says where.

    Raises
    ------
    ArtifactError, WeightsError, VerificationError
        If the artifact, its weights or a golden file cannot be read or do not belong together.
    """
    return run(prepare(path, weights=weights, golden=golden, num_threads=num_threads))


def prepare(
    path: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    golden: Sequence[str | os.PathLike[str]] = (),
    num_threads: int = 1,
) -> Subject:
    """Load what `verify_artifact` compares, and check that it belongs together."""
    path = Path(os.path.abspath(path))
    model = load(path, num_threads=num_threads)
    manifest = model.metadata
    if manifest["dtype"] not in TOLERANCES:
        known = ", ".join(TOLERANCES)
        raise VerificationError(
            f"{path}: no tolerance is known for dtype {manifest['dtype']}, only for {known}"
        )
    config, label, params, inside = _weights(path, manifest, weights)
    expected, found = manifest["weights"].get("digest"), params_digest(params)
    if found != expected:
        raise VerificationError(
            f"{path}: compiled from weights with digest {expected}, but {label} has digest "
            f"{found}: give the checkpoint that it was compiled from by --weights, or compile "
            "this one"
        )
    files = [load_golden(Path(file)) for file in golden]
    for file in files:
        if _entry_of(model, file) is None:
            shapes = [str(list(entry.input_shape)) for entry in model.entries]
            shapes += map(str, model.symbolic_entries)
            raise VerificationError(
                f"{file.path}: its input {list(file.x.shape)} and output {list(file.y.shape)} fit "
                f"no entry; expected an input of shape {' or '.join(shapes)}"
            )
    given = {file.path.resolve() for file in files}
    files += [file for file in inside if file.path.resolve() not in given]
    return Subject(path, model, config, params, label, tuple(files))


def run(
    subject: Subject, on_case: Callable[[int, int, str], None] = lambda index, total, name: None
) -> VerifyReport:
    """Compare; ``on_case`` is told the number, the total and the name of each case at its start."""
    model = subject.model
    total = len(INPUTS) * len(model.entries) + len(_odd(model)) + len(subject.golden)
    checks: list[Check] = []
    skipped: list[Skipped] = []
    localization: Localization | None = None
    for index, (case, entry, x, stored) in enumerate(_cases(subject)):
        on_case(index, total, f"{case}, {entry.label}" if entry else case)
        if entry is None:
            reason = f"the artifact has no entry for its shape {list(x.shape)}"
            skipped.append(Skipped(case, "", reason))
            continue
        actual = model(x)
        if stored is not None:
            parity = compare(actual, stored, model.metadata["dtype"])
            checks.append(Check(case, entry.label, STORED, parity))
        found = _against_oracle(subject, case, entry, x, actual)
        if isinstance(found, Skipped):
            skipped.append(found)
            continue
        checks.append(found)
        if not found.parity.ok and localization is None:
            localization = localize(
                model,
                subject.params,
                case,
                entry.name,
                x,
                condition=found.condition,
            )
    stream = check_stream(model, subject.config, subject.params)
    checks += [] if stream is None else [stream]
    return VerifyReport(subject.settings(), tuple(checks), tuple(skipped), localization)


def _cases(subject: Subject) -> Iterator[tuple[str, Entry | None, Input, Array | None]]:
    for entry, (case, make) in itertools.product(subject.model.entries, INPUTS.items()):
        yield case, entry, make(entry.input_shape), None
    for entry in _odd(subject.model):
        yield ORDINARY, entry, INPUTS[ORDINARY](entry.input_shape), None
    for golden in subject.golden:
        yield golden.path.name, _entry_of(subject.model, golden), golden.x, golden.y


def _entry_of(model: Model, golden: Golden) -> Entry | None:
    try:
        entry = model.entry_at(golden.x.shape)
    except InputError:
        return None
    return entry if entry.output_shape == golden.y.shape else None


def _odd(model: Model) -> list[Entry]:
    """Return shapes that only symbolic entries run."""
    entries = [
        model.entry_at(shape)
        for symbolic in model.symbolic_entries
        for shape in probe_shapes(symbolic)
    ]
    return [entry for entry in entries if entry.symbolic]


def _against_oracle(
    subject: Subject, case: str, entry: Entry, x: Input, actual: Array
) -> Check | Skipped:
    config, params, dtype = subject.config, subject.params, subject.model.metadata["dtype"]
    seen: dict[str, Array] = {}
    expected = numpy_mega.forward(config, params, x, intermediates=seen)
    if meets_jump(config, x, seen):
        reason = "a row's variance lies at 1e-5, where Axon 0.8.0's layer norm jumps"
        return Skipped(case, entry.label, reason)
    parity = compare(actual, expected, dtype)
    if parity.ok or case == ORDINARY:
        return Check(case, entry.label, ORACLE, parity)
    # Computed only now, since it runs the oracle three times more, and can only widen the bounds.
    ordinary = INPUTS[ORDINARY](entry.input_shape)
    usual = float32_error(config, params, ordinary, numpy_mega.forward(config, params, ordinary))
    here = float32_error(config, params, x, expected)
    if here > _NOTHING_LEFT:
        reason = f"float32 is not enough for these inputs: NumPy's errs by {here:.2g} of the output"
        return Skipped(case, entry.label, reason)
    if not 0 < usual < here:
        return Check(case, entry.label, ORACLE, parity)
    condition = here / usual
    reason = (
        f"NumPy's float32 errs {condition:.3g} times as much on these inputs as on random ones "
        f"(relative RMS {here:.2e} and {usual:.2e}): they amplify rounding"
    )
    parity = compare(actual, expected, dtype, condition=condition)
    return Check(case, entry.label, ORACLE, parity, condition, reason)


def _weights(
    path: Path, manifest: Mapping[str, Any], weights: str | os.PathLike[str] | None
) -> tuple[MegaConfig, str, numpy_mega.Params, list[Golden]]:
    """Return config, where the weights are from, the weights, and golden data found beside them."""
    origin = manifest["weights"] or {}
    kind = origin.get("kind")
    if kind == "module" or manifest["config"] is None:
        what = origin.get("class") or origin.get("path") or "of an unknown class"
        raise VerificationError(
            f"{path}: was compiled from a module ({what}), for which there is no oracle: such a "
            "module is compared with its own float64 run when it is compiled, and `python -m "
            "mega_tvm.inspect` shows the result"
        )
    config = MegaConfig.from_dict(manifest["config"])
    if weights is None and kind == "seed":
        from mega_tvm.model_source import resolve_model  # loads torch

        checkpoint = resolve_model(config, seed=origin["seed"]).checkpoint
        assert checkpoint is not None  # a config resolves to a Mega
        return config, f"fresh weights of seed {origin['seed']}", checkpoint.params, []
    if weights is None and (kind != "file" or "path" not in origin):
        raise VerificationError(
            f"{path}: was compiled from weights in memory: save them (mega_tvm.weights."
            "save_checkpoint) and give the file by --weights"
        )
    file = Path(origin["path"] if weights is None else weights)
    if not file.is_file():
        told = ", which the manifest names as its weights," if weights is None else ""
        raise VerificationError(f"{file}:{told} is not there; give a checkpoint by --weights")
    options = {name: getattr(config, name) for name in _OPTIONS}
    loaded = load_checkpoint(file, options=options)
    beside = loaded.format == "npz" and has_golden(file)
    return config, str(file), loaded.params, [load_golden(file)] if beside else []
