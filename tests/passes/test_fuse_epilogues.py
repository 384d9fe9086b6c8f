"""fuse_swiglu, fuse_sigmoid, fuse_residual: elementwise work moves into the dense layer before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mega_tvm.relax_ops import shape_of
from tests.passes.harness import EMBED, Around, B, T, graph, linear, random_mega, run, without

INNER = 112  # of H = 40


# swiglu

SWIGLU = without("fuse_swiglu")


def test_gate_and_up_become_one_dense() -> None:
    model = random_mega()
    off, on = graph(model, off=without()), graph(model, off=SWIGLU)
    fused = [call for call in on.all("mega.dense") if call.attrs["swiglu"]]
    assert [shape_of(call.args[1]) for call in fused] == [(40, 2 * INNER)] * 2
    assert [shape_of(call) for call in fused] == [(B, T, INNER)] * 2
    assert off.count("mega.dense") - on.count("mega.dense") == 2
    assert not any(call.attrs["swiglu"] for call in off.all("mega.dense"))
    assert on.count("multiply") == 2  # the EMA's gains


def _pair(function):
    return Around(function, g=linear(EMBED, 8), u=linear(EMBED, 8, 1), o=linear(8, 8, 2))


FUSED = {
    "silu_first": lambda s, x: F.silu(s.g(x)) * s.u(x),
    "silu_second": lambda s, x: s.u(x) * F.silu(s.g(x)),
    "written_out": lambda s, x: s.u(x) * ((g := s.g(x)) * torch.sigmoid(g)),
    "written_the_other_way": lambda s, x: (torch.sigmoid(g := s.g(x)) * g) * s.u(x),
}


@pytest.mark.parametrize("name", list(FUSED))
def test_ways_to_write_swiglu(name) -> None:
    module = _pair(FUSED[name])
    assert graph(module, off=SWIGLU).names == ["mega.dense"]
    run(module, off=SWIGLU)


NO_SWIGLU = {
    "sigmoid_alone": lambda s, x: torch.sigmoid(s.g(x)) * s.u(x),
    "sigmoid_of_another": lambda s, x: (s.g(x) * torch.sigmoid(s.u(x))) * s.u(x),
    "other_rows": lambda s, x: F.silu(s.g(x)) * s.u(-x),
    "up_is_returned": lambda s, x: F.silu(s.g(x)) * (u := s.u(x)) + u,
    "silu_is_returned": lambda s, x: (g := F.silu(s.g(x))) * s.u(x) + g,
    "silu_of_silu": lambda s, x: F.silu(F.silu(s.g(x))) * s.u(x),
    "no_dense": lambda s, x: F.silu(x) * x,
    "broadcast": lambda s, x: F.silu(s.g(x)) * s.u(x)[:, :1],
}


@pytest.mark.parametrize("name", list(NO_SWIGLU))
def test_what_is_no_swiglu(name) -> None:
    module = _pair(NO_SWIGLU[name])
    found = graph(module, off=SWIGLU)
    assert not any(call.attrs["swiglu"] for call in found.all("mega.dense"))
    run(module)


def test_a_gate_that_is_read_again_is_not_computed_twice() -> None:
    module = _pair(lambda s, x: F.silu(g := s.g(x)) * s.u(x) + g)
    assert graph(module, off=SWIGLU).count("mega.dense") == 2
    run(module)


# sigmoid

SIGMOID = without("fuse_sigmoid")


def test_the_attention_gates_sigmoid_is_fused() -> None:
    model = random_mega()
    off, on = graph(model, off=without()), graph(model, off=SIGMOID)
    assert [call.attrs["sigmoid_from"] for call in on.all("mega.dense")].count(0) == 2
    # the FFN's silu is not touched: its sigmoid reads a value that its product reads too
    assert off.count("sigmoid") - on.count("sigmoid") == 2
    assert off.count("mega.dense") == on.count("mega.dense")


def test_a_sigmoid_of_a_value_that_is_read_again_stays() -> None:
    module = _pair(lambda s, x: torch.sigmoid(g := s.g(x)) + g)
    found = graph(module, off=SIGMOID)
    assert (found.count("mega.dense"), found.count("sigmoid")) == (1, 1)
    run(module, off=SIGMOID)


def test_a_sigmoid_of_no_dense_stays() -> None:
    module = _pair(lambda s, x: torch.sigmoid(-s.g(x)))
    assert graph(module, off=SIGMOID).count("sigmoid") == 1
    run(module, off=SIGMOID)


# residual

RESIDUAL = without("fuse_residual")


def test_residuals_are_fused() -> None:
    model = random_mega()
    off, on = graph(model, off=without()), graph(model, off=RESIDUAL)
    assert sum(len(call.args) == 4 for call in on.all("mega.dense")) == 3 * 2
    assert off.count("add") == 3 * 2
    assert on.count("add") == 0


TWICE = {
    "residual_first": lambda s, x: (y := torch.tanh(s.g(x))) + s.o(y),
    "residual_second": lambda s, x: s.o(y := torch.tanh(s.g(x))) + y,
}


@pytest.mark.parametrize("name", list(TWICE))
def test_either_side_may_be_the_residual(name) -> None:
    module = _pair(TWICE[name])
    assert graph(module, off=RESIDUAL).names == ["mega.dense", "tanh", "mega.dense"]
    run(module, off=RESIDUAL)


def test_of_two_dense_layers_one_is_the_others_residual() -> None:
    module = _pair(lambda s, x: s.g(x) + s.u(x))
    assert graph(module, off=RESIDUAL).names == ["mega.dense", "mega.dense"]
    run(module, off=RESIDUAL)


NO_RESIDUAL = {
    "broadcast_over_time": lambda s, x: s.g(x) + torch.tanh(x[:, :1, :8]),
    "widened_over_time": lambda s, x: s.g(x.mean(1, keepdim=True)) + torch.tanh(x[..., :8]),
    "read_again": lambda s, x: torch.tanh(x[..., :8]) + (g := s.g(x)) * g,
    "twice_itself": lambda s, x: (g := s.g(x)) + g,
    "sigmoid_between": lambda s, x: torch.tanh(s.u(x)) + torch.sigmoid(s.g(x)),
}


@pytest.mark.parametrize("name", list(NO_RESIDUAL))
def test_what_is_no_residual(name) -> None:
    module = _pair(NO_RESIDUAL[name])
    found = graph(module, off=without("fuse_residual", "fuse_sigmoid"))
    assert all(len(call.args) == 3 for call in found.all("mega.dense"))
    assert found.count("add") == 1
    run(module)
