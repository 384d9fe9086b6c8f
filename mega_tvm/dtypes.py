"""The types that a model can be compiled in, and which targets take them."""

from __future__ import annotations

from schedules.common.half_types import HALF_TYPES

from .errors import CompileError

FLOAT32 = "float32"
CPU_DTYPES = (FLOAT32,)
CUDA_DTYPES = (FLOAT32, *HALF_TYPES)


def check_dtype(dtype: str, target: str, *, on_gpu: bool) -> None:
    """Refuse a type that a target does not compute in.

    Parameters
    ----------
    dtype, target : str
        As the user gave them.
    on_gpu : bool
        Whether the target is a GPU.

    Raises
    ------
    CompileError
        It says which the target takes.
    """
    supported = CUDA_DTYPES if on_gpu else CPU_DTYPES
    if dtype in supported:
        return
    advice = f"supported: {', '.join(supported)}"
    if dtype in CUDA_DTYPES:
        advice += f"; {dtype} is for GPUs, --target cuda"
    raise CompileError(f"dtype {dtype!r} is not supported by target {target}; {advice}")
