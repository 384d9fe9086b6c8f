"""The PyTorch module: parity, parameters, training mode."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import MegaConfig, numpy_mega
from reference.torch_mega import (
    Mega,
    build,
    build_mega_block,
    output_size,
    recommended_defaults,
)

SMALL = MegaConfig(13, hidden_size=24, ema_dim=3, num_layers=2)
LAPLACE = pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])


def _run(model: Mega, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def _assert_is_the_oracles(config: MegaConfig, params: dict, x: np.ndarray) -> None:
    expected = numpy_mega.forward(config, params, x)
    output = _run(Mega.from_params(config, params), x)
    assert output.dtype == np.float64
    # The same formulas in the same type: only the order of summation differs.
    assert np.abs(output - expected).max() <= 1e-12 * np.abs(expected).max()


def test_float32_is_edifices(golden) -> None:
    output = _run(Mega.from_params(golden.config, golden.params), golden.x)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, golden.output, rtol=0, atol=1e-5)


@LAPLACE
@pytest.mark.parametrize("T", [1, 7, 59, 257], ids=lambda T: f"B2-T{T}-H40")
def test_float64_is_the_oracles(random_params, T: int, laplace: bool) -> None:
    config = MegaConfig(13, hidden_size=40, ema_dim=3, num_layers=2, laplace_attention=laplace)
    x = np.random.default_rng(T).standard_normal((2, T, 13))
    _assert_is_the_oracles(config, random_params(config), x)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_options_agree_with_the_oracle(random_params, data: st.DataObject) -> None:
    def size(name: str, largest: int) -> int:
        return data.draw(st.integers(1, largest), label=name)

    config = MegaConfig(
        embed_dim=size("embed_dim", 9),
        hidden_size=size("hidden_size", 9),
        ema_dim=size("ema_dim", 5),
        num_layers=size("num_layers", 3),
        laplace_attention=data.draw(st.booleans(), label="laplace_attention"),
        layer_norm=data.draw(st.sampled_from(["plain", "axon-0.8.0"]), label="layer_norm"),
    )
    seed = size("seed", 1000)
    scale = data.draw(st.sampled_from([0.0, 1e-3, 1.0, 100.0]), label="scale")
    x = np.random.default_rng(seed).standard_normal((size("B", 3), size("T", 12), config.embed_dim))
    _assert_is_the_oracles(config, random_params(config, seed), scale * x)


def test_blocks_chain_into_the_model() -> None:
    model = build(SMALL, seed=0).eval()
    x = torch.randn(2, 7, 13)
    y = model.input_projection(x)
    for index in (1, 2):
        block = build_mega_block(SMALL, index).eval()
        keys = block.state_dict().keys()
        block.load_state_dict({key: model.state_dict()[key] for key in keys})
        y = block(y)
    torch.testing.assert_close(model.final_norm(y)[:, -1], model(x), rtol=0, atol=0)


def test_block_numbers_start_at_one() -> None:
    assert "mega_block_3_gattn_q.kernel" in build_mega_block(SMALL, 3).state_dict()
    with pytest.raises(ValueError, match="numbered from 1; got index=0"):
        build_mega_block(SMALL, 0)


def test_edifices_other_names() -> None:
    assert output_size(SMALL) == 24
    assert recommended_defaults()["hidden_size"] == 256


@pytest.mark.parametrize("shape", [(2, 13), (2, 0, 13), (2, 3, 12)], ids=str)
def test_input_shape_is_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must be \[B, T >= 1, embed_dim=13\]; got"):
        build(SMALL)(torch.zeros(shape))


def test_state_dict_has_axons_names(golden) -> None:
    model = build(golden.config)
    dotted = {name.replace("/", "."): value for name, value in golden.params.items()}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in dotted.items()
    }
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict())
    model.load_state_dict({name: torch.from_numpy(v) for name, v in dotted.items()}, strict=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_params_round_trip_bit_for_bit(random_params, dtype: type) -> None:
    params = random_params(SMALL, dtype=dtype)
    params["final_norm/beta"][:4] = [-0.0, np.nan, np.inf, np.finfo(dtype).smallest_subnormal]
    # Axon's training state, a Fortran array, and one from a machine of the other byte order.
    given = {f"mega_block_1_{d}/key": np.zeros(2, np.uint32) for d in ("ema_drop", "ffn_dropout")}
    given |= params
    given["input_projection/kernel"] = np.asfortranarray(params["input_projection/kernel"])
    given["final_norm/gamma"] = params["final_norm/gamma"].astype(np.dtype(dtype).newbyteorder())
    back = Mega.from_params(SMALL, given).to_params()
    assert back.keys() == params.keys()
    for name, value in params.items():
        assert back[name].dtype == value.dtype
        assert back[name].tobytes() == value.tobytes(), name


def test_params_are_copied_both_ways(random_params) -> None:
    params = random_params(SMALL)
    model = Mega.from_params(SMALL, params)
    params["final_norm/beta"][:] = 7
    model.to_params()["final_norm/beta"][:] = 8
    assert not {7, 8} & set(model.to_params()["final_norm/beta"])


def test_loaded_model_is_trainable_and_in_eval_mode(random_params) -> None:
    model = Mega.from_params(SMALL, random_params(SMALL))
    assert not model.training
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    model(torch.randn(1, 3, 13, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_params_that_do_not_fit_are_refused(random_params) -> None:
    params = random_params(SMALL)

    def refuses(match: str, change: dict[str, np.ndarray], drop: tuple[str, ...] = ()) -> None:
        changed = {n: v for n, v in (params | change).items() if n not in drop}
        with pytest.raises(ValueError, match=match):
            Mega.from_params(SMALL, changed)

    refuses(
        "missing parameters: final_norm/beta, final_norm/gamma",
        {},
        ("final_norm/gamma", "final_norm/beta"),
    )
    refuses("unknown parameters: foo/kernel", {"foo/kernel": np.zeros(3)})
    refuses(r"final_norm/beta must be \[24\]; got \[1\]", {"final_norm/beta": np.zeros(1)})
    refuses("got float32, float64", {"final_norm/beta": np.zeros(24, np.float32)})
    refuses("got int64", {n: v.astype(np.int64) for n, v in params.items()})


@LAPLACE
def test_training_lowers_the_loss(laplace: bool) -> None:
    config = MegaConfig(
        6, hidden_size=16, ema_dim=4, num_layers=2, dropout=0.1, laplace_attention=laplace
    )
    torch.manual_seed(0)
    model = build(config, seed=0)
    x = torch.randn(16, 12, 6)
    target = x.mean(dim=1) @ torch.randn(6, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.5 * losses[0]


def test_dropout_is_off_in_eval_mode_and_at_zero() -> None:
    model, x = build(SMALL, seed=0), torch.randn(2, 7, 13)
    assert not torch.equal(model(x), model(x))
    expected = model.eval()(x)
    assert torch.equal(expected, model(x))
    undropped = build(MegaConfig(13, hidden_size=24, ema_dim=3, num_layers=2, dropout=0), seed=0)
    assert torch.equal(undropped(x), expected)


@pytest.mark.parametrize("place", ["ema_drop", "attn_drop", "ffn_dropout"])
def test_each_dropout_silences_its_branch_alone(place: str) -> None:
    last_layer = {"ema_drop": "ema", "attn_drop": "gattn_out", "ffn_dropout": "ffn_down"}[place]
    block = build_mega_block(MegaConfig(16, hidden_size=16, num_layers=1, dropout=0), 1, seed=0)
    silenced = copy.deepcopy(block)
    for parameter in silenced.get_submodule(f"mega_block_1_{last_layer}").parameters():
        torch.nn.init.zeros_(parameter)
    block.get_submodule(f"mega_block_1_{place}").p = 1.0
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(block(x), silenced(x))
