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
from ..kernel_list import kernel_calls, kernels_in_pieces
from ..pipeline import graph_phase, kernel_phase, passes_of
from ..targets import CpuTarget, with_threads
from .record import KernelKey, kernel_key
from .space import Space
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
        Over all entries of the model.
    space : Space
    task : Task
        What a worker gets.
    """

    name: str
    key: KernelKey
    calls: int
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

    Parameters
    ----------
    module : Module or OnnxModel
    shapes : mapping of str to tuple
        Input shapes by entry, as `mega_tvm.input_shapes.input_shapes` returns them.
    target : CpuTarget or CudaTarget
    threads : int
        Threads that kernels run with.
    dtype : str
        Type of weights and activations.
    """
    measured = with_threads(target, threads)
    tvm_target = measured.tvm_target()
    with tvm_target:
        mod = import_entries(module, shapes)[0]
        mod = kernel_phase(graph_phase(mod, passes=passes_of(target, dtype, threads)))
    in_pieces = kernels_in_pieces(mod)
    called = Counter(kernel for _, kernel in kernel_calls(mod))
    kernels: dict[KernelKey, Kernel] = {}
    for gvar, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc) or kernel_op(func) is None:
            continue
        name, key = str(gvar.name_hint), kernel_key(func)
        if name in in_pieces:
            continue
        space = Space.of(func, tvm_target)
        if space.size == 1:
            continue
        same = kernels.get(key)
        calls = called[name] + (same.calls if same else 0)
        name = same.name if same else name
        task = Task(name, Workload(space.workload).as_json(), measured)
        kernels[key] = Kernel(name, key, calls, space, task)
    return list(kernels.values())
