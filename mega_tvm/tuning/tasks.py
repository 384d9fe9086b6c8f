"""The kernels of a model, taken at the point where a compile schedules them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import torch
from tvm import tirx
from tvm.s_tir.meta_schedule.database import Workload

from schedules.registry import kernel_op

from ..cuda.target import CudaTarget
from ..dtypes import FLOAT32
from ..frontend.onnx import OnnxModel
from ..input_shapes import import_entries
from ..kernel_list import kernel_calls, kernels_in_pieces, piece_counts
from ..pipeline import graph_phase, kernel_phase, passes_of
from ..targets import CpuTarget, with_threads
from .record import KernelKey, kernel_key
from .space import Space, is_of_any_size
from .trial import Task


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a model.

    Parameters
    ----------
    name : str
        As the compile names it.
    key : KernelKey
    calls : int
        Over all entries of the model; of a kernel in pieces, one for each piece.
    in_a_row : int
        How many of them a run waits for: those of pieces are made by several threads side by side.
    space : Space
    task : Task
        What a worker gets.
    """

    name: str
    key: KernelKey
    calls: int
    in_a_row: int
    space: Space
    task: Task


def extract_kernels(
    module: torch.nn.Module | OnnxModel,
    shapes: Mapping[str, tuple[int, ...]],
    target: CpuTarget | CudaTarget,
    threads: int,
    dtype: str = FLOAT32,
) -> list[Kernel]:
    """Return the Mega kernels of a model that have decisions to make, each specification once.

    A kernel in pieces (`mega_tvm.passes.split_rows`) runs on one thread, whatever the library's
    number: it is another than one of the same specification that runs on all of them.

    Parameters
    ----------
    module : Module or OnnxModel
    shapes : mapping of str to tuple
        Input shapes by entry, as `mega_tvm.input_shapes.input_shapes` returns them.
    target : CpuTarget or CudaTarget
    threads : int
        The thread count that the library will mostly run with.
    dtype : str
        Type of weights and activations.
    """
    with with_threads(target, threads).tvm_target():
        mod = import_entries(module, shapes)[0]
        mod = kernel_phase(graph_phase(mod, passes=passes_of(target, dtype, threads)))
    in_pieces, pieces = kernels_in_pieces(mod), piece_counts(mod)
    calls: Counter[str] = Counter()
    in_a_row: Counter[str] = Counter()
    for function, name in kernel_calls(mod):
        count = pieces.get(function, 1)
        calls[name] += count
        in_a_row[name] += -(-count // threads)
    kernels: dict[tuple[KernelKey, int], Kernel] = {}
    for gvar, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc) or kernel_op(func) is None:
            continue
        name, key = str(gvar.name_hint), kernel_key(func)
        if is_of_any_size(func):  # causal attention in pieces
            continue
        measured = with_threads(target, 1 if name in in_pieces else threads)
        space = Space.of(func, measured.tvm_target())
        if space.size == 1:
            continue
        task = Task(name, Workload(space.workload).as_json(), measured)
        kernel = Kernel(name, key, calls[name], in_a_row[name], space, task)
        case = (key, task.threads)
        if same := kernels.get(case):
            kernel = dataclasses.replace(
                same, calls=same.calls + kernel.calls, in_a_row=same.in_a_row + kernel.in_a_row
            )
        kernels[case] = kernel
    return list(kernels.values())
