"""Small models, their graphs after the graph phase, and their results, for the tests of passes."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from unittest import mock

import numpy as np
import torch
import tvm
from torch import Tensor, nn
from tvm import relax
from tvm.relax.utils import copy_with_new_vars

from mega_tvm import pipeline
from mega_tvm.frontend.torch import import_module
from mega_tvm.passes import OPTIONAL_PASSES
from mega_tvm.relax_ops import is_op, shape_of
from mega_tvm.targets import resolve_target
from mega_tvm.tolerances import assert_parity
from reference import MegaConfig
from reference.torch_mega import Mega

EMBED, WIDTH = 13, 40
B, T = 2, 7
SHAPE = (B, T, EMBED)


@functools.cache
def random_mega(seed: int = 0, **options: object) -> Mega:
    """Return a small Mega in which every parameter is random, so that every term matters."""
    sizes = {"embed_dim": EMBED, "hidden_size": WIDTH, "ema_dim": 3, "num_layers": 2}
    model = Mega(MegaConfig.from_dict({**sizes, **options}), init="axon", seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for param in model.parameters():
            if not param.any():
                param.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()


def linear(k: int, n: int, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(k, n)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in layer.parameters():
            param.uniform_(-0.6, 0.6, generator=generator)
    return layer


def constant(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


class Around(nn.Module):
    """``function(layers, x)``, with the layers as attributes."""

    def __init__(self, function: Callable[[Around, Tensor], Tensor], **layers: object) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Graph:
    """The calls of one Relax function, in order."""

    def __init__(self, func: relax.Function) -> None:
        self.bindings = [
            (binding.var, binding.value) for block in func.body.blocks for binding in block.bindings
        ]
        self.values = dict(self.bindings)

    def __iter__(self) -> Iterator[relax.Call]:
        return (value for _, value in self.bindings if isinstance(value, relax.Call))

    def all(self, name: str) -> list[relax.Call]:
        """Return the calls of ``relax.<name>``."""
        return [call for call in self if is_op(call, name)]

    def count(self, name: str) -> int:
        return len(self.all(name))

    def one(self, name: str) -> relax.Call:
        (call,) = self.all(name)
        return call

    @property
    def names(self) -> list[str]:
        return [str(call.op.name).removeprefix("relax.") for call in self]

    @property
    def dense(self) -> list[tuple[int, int, int]]:
        """Rows, K and N of each dense layer."""
        return [(rows(call), *shape_of(call.args[1])) for call in self.all("mega.dense")]


def rows(call: relax.Call) -> int:
    return int(np.prod(shape_of(call)[:-1]))


def without(*names: str) -> tuple[str, ...]:
    """Return all optional passes but these, to switch off: those alone run then."""
    assert set(names) <= set(OPTIONAL_PASSES)
    return tuple(name for name in OPTIONAL_PASSES if name not in names)


_IMPORTED: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def imported(module: nn.Module, shape: Sequence[int]) -> tvm.IRModule:
    """Import a module, once for each shape: exporting takes far longer than the passes."""
    known = _IMPORTED.setdefault(module, {})
    if shape not in known:
        known[shape] = import_module(module, shape)
    return known[shape]


def graph(module: nn.Module, shape: Sequence[int] = SHAPE, off: Sequence[str] = ()) -> Graph:
    """Return the graph of a module after the graph phase, with the passes ``off`` switched off."""
    return Graph(pipeline.graph_phase(imported(module, shape), off)["main"])


def run(module: nn.Module, shape: Sequence[int] = SHAPE, off: Sequence[str] = ()) -> None:
    """Compile a module, run it, and check it against itself in float64.

    The kernels run as they are written, since what passes do does not depend on schedules, and
    these take most of the time.
    """
    target = resolve_target("native").tvm_target()
    with target:
        mod = pipeline.kernel_phase(pipeline.graph_phase(imported(module, shape), off))
        mod, tensors = pipeline.pack_phase(mod, {})
        machine = relax.VirtualMachine(pipeline.lower_phase(mod, target), tvm.cpu())
    x = example(shape)
    arguments = [tvm.runtime.tensor(x)]
    if tensors:
        arguments.append(tvm.runtime.convert([tvm.runtime.tensor(array) for array in tensors]))
    assert_parity(machine["main"](*arguments).numpy(), float64(module, x))


def run_graphs(graphs: Mapping[str, tvm.IRModule], x: Mapping[str, np.ndarray]) -> dict:
    """Compile graphs that have passed the graph phase, all in one module; run each on its input."""
    functions = {
        name: copy_with_new_vars(mod["main"]).with_attr("global_symbol", name)
        for name, mod in graphs.items()
    }
    with mock.patch.object(pipeline, "graph_phase", lambda mod, *_: mod):
        compiled = pipeline.run_pipeline(tvm.IRModule(functions), resolve_target("native"))
    return {name: compiled.run(name, x[name], shape_of(functions[name].body)) for name in graphs}


def example(shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def float64(module: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(module).double().eval()(torch.from_numpy(x).double()).numpy()
