"""What a compiler gets: an exported graph with single nodes, Axon's names and dynamic sizes."""

from __future__ import annotations

import collections

import pytest
import torch
from torch.export import Dim

from reference import MegaConfig
from reference.torch_mega import build

LAPLACE = pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])


def _export(config: MegaConfig, dynamic: bool = True) -> torch.export.ExportedProgram:
    model = build(config, seed=0).eval()
    sizes = {0: Dim("B"), 1: Dim("T")} if dynamic else None
    x = torch.randn(3, 5, config.embed_dim)
    return torch.export.export(model, (x,), dynamic_shapes=(sizes,), strict=False)


@LAPLACE
def test_graph_is_plain(laplace: bool) -> None:
    config = MegaConfig(13, hidden_size=24, ema_dim=3, num_layers=2, laplace_attention=laplace)
    counts = collections.Counter(
        str(node.target) for node in _export(config).graph.nodes if node.op == "call_function"
    )
    blocks = 2
    assert counts == {
        "mega.ema_scan.default": blocks,
        "mega.gated_attention.default": blocks,
        "aten.layer_norm.default": 3 * blocks + 1,
        "aten.matmul.default": 10 * blocks + 1,
        "aten.add.Tensor": (10 + 3) * blocks + 1,
        "aten.sigmoid.default": blocks,
        "aten.silu.default": blocks,
        "aten.mul.Tensor": blocks,
        "aten.slice.Tensor": 1,
        "aten.select.int": 1,
    }


def test_graph_has_axons_names_and_layer_norm() -> None:
    config = MegaConfig(13, hidden_size=24, num_layers=1, layer_norm="axon-0.8.0")
    program = _export(config)
    parameters = set(program.graph_signature.inputs_to_parameters.values())
    assert parameters == build(config).state_dict().keys()
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("mega.axon_layer_norm.default") == 4
    assert "aten.layer_norm.default" not in targets


@LAPLACE
@pytest.mark.parametrize("form", ["plain", "axon-0.8.0"])
def test_exported_program_runs_at_any_size(laplace: bool, form: str) -> None:
    config = MegaConfig(
        13, hidden_size=24, num_layers=1, laplace_attention=laplace, layer_norm=form
    )
    program, model = _export(config).module(), build(config, seed=0).eval()
    for shape in ((1, 1, 13), (2, 59, 13), (7, 3, 13)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), model(x), rtol=0, atol=0)


def test_fixed_sizes_export_too() -> None:
    config = MegaConfig(24, hidden_size=24, num_layers=1)
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(
        _export(config, dynamic=False).module()(x), build(config, seed=0).eval()(x), rtol=0, atol=0
    )
