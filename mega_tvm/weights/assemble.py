"""From a file's tensors and everyone's options to a checked `Checkpoint`.

Names first, then sizes from shapes, then options, then shapes, then values: the first kind of
problem is reported, with every tensor that has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mega_tvm.errors import WeightsError
from reference.config import ConfigError, MegaConfig

from .checkpoint import Checkpoint
from .names import block_number, expected_names, expected_shapes, is_dropout_key
from .stored import FLOAT_DTYPES, Options, StoredCheckpoint, StoredTensor, clip, listing


def assemble(
    path: Path,
    stored: StoredCheckpoint,
    options: Mapping[str, object] | None,
    config: MegaConfig | None,
) -> Checkpoint:
    """Check what a reader found against the options, and decode the tensors.

    Raises
    ------
    WeightsError
        If tensors and options do not make one Mega model.
    """
    tensors = {n: tensor for n, tensor in stored.tensors.items() if not is_dropout_key(n)}
    num_layers, has_input_projection = _check_names(tensors)
    sources = [
        *_sizes(tensors, num_layers, has_input_projection),
        (stored.options_label, _validated(stored.options, stored.options_label)),
        ("the options given", _validated(options or {}, "the options given")),
        ("the config given", config.to_dict() if config else {}),
    ]
    merged, labels = _merge(sources)
    try:
        resolved = MegaConfig.from_dict(merged)
    except ConfigError as error:
        raise WeightsError(str(error)) from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_shapes(resolved, shapes, labels)
    _check_dtypes(tensors)
    if "laplace_attention" not in labels:
        # Shapes do not tell the two attentions apart, and the wrong one runs without an error.
        stored.warnings.append(
            "neither the file nor an option given states laplace_attention: softmax is assumed"
        )
    return Checkpoint(
        config=resolved,
        params={name: as_float32(name, tensors[name].read()) for name in expected_shapes(resolved)},
        source=path,
        format=stored.format,
        metadata=stored.metadata,
        warnings=tuple(stored.warnings),
        option_sources=labels,
        stored_dtypes={name: tensor.dtype for name, tensor in tensors.items()},
    )


def check_shapes(
    config: MegaConfig,
    shapes: Mapping[str, tuple[int, ...]],
    labels: Mapping[str, str] | None = None,
) -> None:
    """Check that tensors of these names and shapes make the config's model.

    Parameters
    ----------
    config : MegaConfig
    shapes : mapping of str to tuple of int
    labels : mapping of str to str, optional
        What states each option, for the error.

    Raises
    ------
    WeightsError
        Listing every tensor that is missing, not expected, or misshapen.
    """
    expected = expected_shapes(config)
    _report_names(expected, shapes)
    wrong = [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]
    if wrong:
        sizes = ", ".join(
            f"{option} {getattr(config, option)} (from {(labels or {}).get(option, 'the config')})"
            for option in ("embed_dim", "hidden_size", "ema_dim")
        )
        raise WeightsError(f"misshapen tensors for {sizes}: {listing(wrong)}")


def as_float32(name: str, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return a C-contiguous float32 copy; float64 is rounded to nearest.

    Raises
    ------
    WeightsError
        If a value is not finite, in the file or as float32.
    """
    with np.errstate(over="ignore"):
        converted = np.array(array, dtype=np.float32, order="C")
    finite = np.isfinite(converted)
    if not finite.all():
        index = np.unravel_index(int(np.argmin(finite)), finite.shape)
        raise WeightsError(
            f"tensor {name} holds {finite.size - int(np.count_nonzero(finite))} values that are "
            f"not finite float32 numbers, the first at {[int(i) for i in index]}: {array[index]}"
        )
    return converted


def _check_names(tensors: Mapping[str, StoredTensor]) -> tuple[int, bool]:
    blocks = {number for name in tensors if (number := block_number(name)) is not None}
    if not blocks:
        held = listing([clip(name) for name in sorted(tensors)], limit=8) or "none"
        raise WeightsError(
            "not a Mega checkpoint: no tensor of mega_block_1 is there; the tensors there: " + held
        )
    num_layers = len(blocks)
    if max(blocks) != num_layers:
        gap = min(set(range(1, num_layers + 1)) - blocks)
        raise WeightsError(
            f"{num_layers} blocks are there, up to mega_block_{max(blocks)}, "
            f"but every tensor of mega_block_{gap} is missing"
        )
    has_input_projection = any(name.startswith("input_projection/") for name in tensors)
    _report_names(expected_names(num_layers, has_input_projection), tensors)
    return num_layers, has_input_projection


def _report_names(expected: Iterable[str], found: Mapping[str, object]) -> None:
    wanted = dict.fromkeys(expected)
    missing = [name for name in wanted if name not in found]
    extra = [clip(name) for name in sorted(found) if name not in wanted]
    problems = []
    if missing:
        problems.append(f"missing tensors: {listing(missing)}")
    if extra:
        problems.append(f"tensors that a Mega model does not have: {listing(extra)}")
    if problems:
        raise WeightsError("; ".join(problems))


def _sizes(
    tensors: Mapping[str, StoredTensor], num_layers: int, has_input_projection: bool
) -> list[tuple[str, Options]]:
    """Read options from shapes, each labelled with what tells it."""

    def size(option: str, name: str, rank: int) -> tuple[str, Options]:
        shape = tensors[name].shape
        if len(shape) != rank:
            raise WeightsError(f"tensor {name} is {list(shape)}, expected {rank} dimension(s)")
        return f"the tensor {name} {list(shape)}", {option: shape[0]}

    hidden = size("hidden_size", "final_norm/gamma", rank=1)
    if has_input_projection:
        embed = size("embed_dim", "input_projection/kernel", rank=2)
    else:
        label = "the absence of input_projection/kernel (embed_dim is hidden_size then)"
        embed = label, {"embed_dim": hidden[1]["hidden_size"]}
    return [
        embed,
        hidden,
        size("ema_dim", "mega_block_1_ema/mega_block_1_ema_alpha", rank=1),
        ("the number of blocks", {"num_layers": num_layers}),
    ]


def _validated(options: Mapping[str, object], label: str) -> Options:
    """Check options by themselves, so that each is of its type before they are compared."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        config = MegaConfig.from_dict({"embed_dim": 1, **given})
    except (ConfigError, OverflowError) as error:  # OverflowError: an integer beyond any float
        raise WeightsError(f"{label}: {str(error)[:500]}") from error
    return {name: getattr(config, name) for name in given}


def _merge(sources: list[tuple[str, Options]]) -> tuple[dict[str, Any], dict[str, str]]:
    merged: dict[str, Any] = {}
    labels: dict[str, str] = {}
    for label, options in sources:
        for name, value in options.items():
            if name in merged and merged[name] != value:
                raise WeightsError(
                    f"contradicting option {name}: {labels[name]} says "
                    f"{clip(merged[name])}, {label} {clip(value)}"
                )
            if name not in merged:
                merged[name], labels[name] = value, label
    return merged, labels


def _check_dtypes(tensors: Mapping[str, StoredTensor]) -> None:
    wrong = [
        f"{name} is {tensor.dtype}"
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOAT_DTYPES
    ]
    if wrong:
        raise WeightsError(
            f"tensors of the wrong dtype: {listing(wrong)}; expected {', '.join(FLOAT_DTYPES)}"
        )
