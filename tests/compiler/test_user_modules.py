"""A user's module around a Mega: compiled as one library, equal to itself in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import mega_tvm
from mega_tvm.compiler import compile_model
from mega_tvm.errors import CompileError, UnsupportedModelError
from mega_tvm.frontend.torch import import_module
from mega_tvm.tolerances import assert_parity
from reference.torch_mega import Mega, build_mega_block
from tests.compiler.models import float64, mega
from tests.passes.harness import constant


class Embedded(nn.Module):
    """Projects and normalizes frames ahead of the Mega, and adds positions."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(9, 13)
        self.norm = nn.LayerNorm(13)
        self.positions = constant(5, 13)
        self.mega = mega()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mega(self.norm(self.project(x)) + self.positions)


class States(nn.Module):
    """All timesteps of a block; no Mega, no linear layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.block = build_mega_block(mega().config, 1, seed=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


def _head() -> nn.Module:
    return nn.Sequential(
        mega(), nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 6), nn.Softmax(-1)
    )


MODULES = {
    "linear": (lambda: nn.Sequential(mega(), nn.Linear(16, 6)), {"batch": 3}),
    "head": (_head, {"batch": 1}),
    "embedded": (Embedded, {"input_shape": (2, 5, 9)}),
    "states": (States, {"input_shape": (2, 5, 16)}),
    "no_mega": (lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh()), {"input_shape": (4, 7)}),
}


@pytest.mark.parametrize("name", list(MODULES))
def test_equals_itself_in_float64(compile_once, rng, name) -> None:
    make, options = MODULES[name]
    torch.manual_seed(0)
    module = make()
    model = mega_tvm.load(compile_once(f"user_{name}", module, **options))
    for entry in model.entries:
        x = rng.standard_normal(entry.input_shape, dtype=np.float32)
        expected = float64(module, x)
        assert entry.output_shape == expected.shape
        assert_parity(model(x), expected)


def test_a_selection_with_a_negative_index(compile_once, rng) -> None:
    """Weights, a scalar index among them, survive the artifact."""
    module = Select()
    model = mega_tvm.load(compile_once("user_select", module, input_shape=(2, 5, 13)))
    x = rng.standard_normal((2, 5, 13), dtype=np.float32)
    assert_parity(model(x), float64(module, x))


class Select(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(13, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[:, -2]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_the_module_is_not_changed(training) -> None:
    """Neither its mode, part by part, nor its weights; dropout does not reach the graph."""
    module = nn.Sequential(mega(dropout=0.5), nn.Dropout(0.5), nn.BatchNorm1d(16))
    module.train(training)
    module[2].train(not training)  # a part that a user froze, or did not
    modes = {name: part.training for name, part in module.named_modules()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    import_module(module, (2, 5, 13))
    assert {name: part.training for name, part in module.named_modules()} == modes
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])


def test_the_mode_is_restored_after_a_failure() -> None:
    module = nn.Sequential(Branch()).train()
    with pytest.raises(UnsupportedModelError):
        import_module(module, (2, 5, 13))
    assert module.training and module[0].training


# What cannot be compiled


class Unsupported(nn.Module):
    """Three operators that TVM's importer lacks, one of them twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.special.bessel_j0(x) + torch.special.bessel_j0(-x) + torch.special.i0(x)
        return y + torch.linalg.det(x @ x.mT)[:, None, None]


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Outputs(nn.Module):
    def __init__(self, pack) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: torch.Tensor):
        return self.pack(x * 2)


def test_all_unsupported_operators_are_reported_at_once(tmp_path) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        compile_model(Unsupported(), input_shape=(2, 5, 5), output=tmp_path / "m.so")
    message = str(error.value)
    assert message.startswith("3 operator(s) of this module are not supported: ")
    for name in ("aten.special_bessel_j0.default", "aten.i0.default", "aten._linalg_det.default"):
        assert message.count(name) == 1
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_lowered_is_reported(tmp_path) -> None:
    """Imported, but without a lowering on this target."""

    class Cumulative(nn.Module):
        def forward(self, x):
            return x.cumsum(1)

    with pytest.raises(UnsupportedModelError, match=r"cannot be lowered: relax\.cumsum"):
        compile_model(Cumulative(), input_shape=(2, 5, 5), output=tmp_path / "m.so")


def test_a_module_that_cannot_be_exported(tmp_path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"torch\.export cannot export Branch at input"):
        compile_model(Branch(), input_shape=(2, 5, 5), output=tmp_path / "m.so")


def test_a_module_that_refuses_the_shape(tmp_path, small) -> None:
    with pytest.raises(UnsupportedModelError, match=r"at input shape \[2, 5, 9\]: x must be"):
        compile_model(small, input_shape=(2, 5, 9), output=tmp_path / "m.so")


@pytest.mark.parametrize(
    ("pack", "what"),
    [
        (lambda y: (y, y + 1), "a tuple of 2"),
        (lambda y: (y,), "a tuple of 1"),
        (lambda y: {"y": y}, "a dict of 1"),
        (lambda y: None, "None"),
    ],
    ids=["two", "tuple", "dict", "none"],
)
def test_other_outputs_than_one_tensor(pack, what) -> None:
    with pytest.raises(UnsupportedModelError, match=f"Outputs must return one tensor.* {what}$"):
        import_module(Outputs(pack), (2, 5, 5))


def test_a_module_without_mega_needs_a_shape(tmp_path) -> None:
    with pytest.raises(CompileError, match=r"Linear holds no Mega .* give input_shape"):
        compile_model(nn.Linear(3, 4), output=tmp_path / "m.so")


@pytest.mark.parametrize("model", [None, 3, {"embed_dim": 3}, Mega], ids=str)
def test_what_is_no_model(tmp_path, model) -> None:
    with pytest.raises(CompileError, match=r"expected a torch\.nn\.Module, .* got "):
        compile_model(model, output=tmp_path / "m.so")
