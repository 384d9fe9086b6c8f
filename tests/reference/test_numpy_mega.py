"""The float64 oracle against the real Edifice, and against the properties of the contract."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from reference import MegaConfig, numpy_mega

# Edifice ran in float32, on values of magnitude 2 to 4: what is left is its own rounding.
GOLDEN_ATOL = 1e-6


def test_output_is_edifices(golden) -> None:
    output = numpy_mega.forward(golden.config, golden.params, golden.x)
    assert output.dtype == np.float64
    np.testing.assert_allclose(output, golden.output, rtol=0, atol=GOLDEN_ATOL)


@pytest.mark.parametrize("name", ["tiny", "tiny_laplace"])
def test_every_inner_value_is_edifices(load_golden, name: str) -> None:
    golden = load_golden(name)
    seen: dict[str, np.ndarray] = {}
    numpy_mega.forward(golden.config, golden.params, golden.x, intermediates=seen)
    assert seen.keys() == golden.intermediates.keys()
    for layer, expected in golden.intermediates.items():
        np.testing.assert_allclose(
            seen[layer], expected, rtol=0, atol=GOLDEN_ATOL, err_msg=f"layer {layer}"
        )


def test_the_two_layer_norms_differ_only_at_low_variance(golden) -> None:
    plain, axon = (
        numpy_mega.forward(
            dataclasses.replace(golden.config, layer_norm=form), golden.params, golden.x
        )
        for form in ("plain", "axon-0.8.0")
    )
    if golden.name.startswith("low_variance"):
        assert np.abs(plain - axon).max() > 1e-3
    else:
        np.testing.assert_array_equal(plain, axon)


def test_float32_stays_float32(load_golden) -> None:
    golden = load_golden("tiny")
    output = numpy_mega.forward(golden.config, golden.params, golden.x, dtype=np.float32)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, golden.output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 7, 40])
def test_softmax_mode_is_causal(random_params, length: int) -> None:
    config = MegaConfig(13, hidden_size=24, ema_dim=3, num_layers=2)
    params = random_params(config)
    x = np.random.default_rng(1).standard_normal((2, 40, 13))
    whole: dict[str, np.ndarray] = {}
    numpy_mega.forward(config, params, x, intermediates=whole)
    prefix = numpy_mega.forward(config, params, x[:, :length])
    np.testing.assert_allclose(prefix, whole["final_norm"][:, length - 1], rtol=0, atol=1e-13)


def test_laplace_weights_see_the_future() -> None:
    q = np.random.default_rng(0).standard_normal((1, 5, 4))
    assert (numpy_mega.attention_weights(q, q, laplace=True) > 0).all()
    assert (np.triu(numpy_mega.attention_weights(q, q, laplace=False)[0], k=1) == 0).all()


@pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
def test_attention_weights_against_the_plain_formula(laplace: bool) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2, 7, 5))
    weights = numpy_mega.attention_weights(q, k, laplace)
    for b in range(2):
        for i in range(7):
            if laplace:
                w = 1 / (1 + np.abs(q[b, i] - k[b]).sum(axis=-1))
            else:
                s = (q[b, i] * k[b, : i + 1]).sum(axis=-1) / np.sqrt(5)
                w = np.zeros(7)
                w[: i + 1] = np.exp(s - s.max())
            np.testing.assert_allclose(weights[b, i], w / (w.sum() + 1e-8), rtol=1e-13)


def test_ema_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    p, alpha = rng.standard_normal((2, 9, 3)), np.array([-2.0, 0.0, 5.0])
    a = 1 / (1 + np.exp(-alpha))
    h = numpy_mega.ema_scan(p, alpha)
    for t in range(9):
        powers = a ** np.arange(t, -1, -1)[:, None]  # [t + 1, D]
        np.testing.assert_allclose(h[:, t], ((1 - a) * powers * p[:, : t + 1]).sum(axis=1))


def test_sigmoid_does_not_overflow() -> None:
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_array_equal(
            numpy_mega.sigmoid(np.array([-1e4, 0.0, 1e4])), [0.0, 0.5, 1.0]
        )


@pytest.mark.parametrize("shape", [(2, 3), (2, 0, 4), (2, 3, 5), (1, 2, 3, 4)], ids=str)
def test_input_shape_is_checked(random_params, shape: tuple[int, ...]) -> None:
    config = MegaConfig(4, hidden_size=8, num_layers=1)
    with pytest.raises(ValueError, match=r"x must be \[B, T >= 1, embed_dim=4\]; got"):
        numpy_mega.forward(config, random_params(config), np.zeros(shape))
