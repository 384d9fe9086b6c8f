"""The custom operators: values against the oracle, gradients, tracing, refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from reference import numpy_mega, ops

LENGTHS = (1, 7, 59, 257)
LAPLACE = pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
# float64 differs from the oracle in the order of summation only.
F64 = {"rtol": 1e-12, "atol": 1e-13}


def _tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(len, shapes)))
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]


def _ema_inputs(T: int) -> tuple[Tensor, ...]:
    return tuple(_tensors((2, T, 3), (3,)))


def _attention_inputs(T: int) -> tuple[Tensor, ...]:
    q, k, v, gate = _tensors(*[(2, T, 4)] * 4)
    return q, k, v, torch.sigmoid(gate)


def _norm_inputs(T: int) -> tuple[Tensor, ...]:
    x, gamma, beta = _tensors((2, T, 5), (5,), (5,))
    x[1] *= 1e-3  # below eps: the row where the two forms differ
    return x, gamma, beta


def _softmax(*args: Tensor) -> Tensor:
    return ops.gated_attention(*args, False)


def _laplace(*args: Tensor) -> Tensor:
    return ops.gated_attention(*args, True)


OPS = pytest.mark.parametrize(
    ("op", "inputs"),
    [
        pytest.param(ops.ema_scan, _ema_inputs, id="ema_scan"),
        pytest.param(_softmax, _attention_inputs, id="softmax"),
        pytest.param(_laplace, _attention_inputs, id="laplace"),
        pytest.param(ops.axon_layer_norm, _norm_inputs, id="axon_layer_norm"),
    ],
)
Op = Callable[..., Tensor]
Inputs = Callable[[int], tuple[Tensor, ...]]


@pytest.mark.parametrize("T", LENGTHS, ids=[f"B2-T{T}-D3" for T in LENGTHS])
def test_ema_scan_is_the_oracles(T: int) -> None:
    p, alpha = _ema_inputs(T)
    expected = numpy_mega.ema_scan(p.numpy(), alpha.numpy())
    np.testing.assert_allclose(ops.ema_scan(p, alpha).numpy(), expected, **F64)


@pytest.mark.parametrize("alpha", [-40.0, 0.0, 40.0])
def test_ema_scan_is_sound_at_extreme_decays(alpha: float) -> None:
    p = torch.ones(1, 2000, 1)
    h = ops.ema_scan(p, torch.tensor([alpha]))
    expected = numpy_mega.ema_scan(p.double().numpy(), np.array([alpha]))
    np.testing.assert_allclose(h.numpy(), expected, rtol=0, atol=1e-5)


@LAPLACE
@pytest.mark.parametrize("T", LENGTHS, ids=[f"B2-T{T}-H40" for T in LENGTHS])
def test_gated_attention_is_the_oracles(T: int, laplace: bool) -> None:
    q, k, v, gate = _tensors(*[(2, T, 40)] * 4)
    expected = numpy_mega.gated_attention(*(x.numpy() for x in (q, k, v, gate)), laplace)
    np.testing.assert_allclose(ops.gated_attention(q, k, v, gate, laplace).numpy(), expected, **F64)


def test_softmax_survives_large_scores() -> None:
    q, k, v, gate = _attention_inputs(9)
    out = _softmax(1e4 * q, 1e4 * k, v, gate)
    expected = numpy_mega.gated_attention(*(x.numpy() for x in (1e4 * q, 1e4 * k, v, gate)))
    np.testing.assert_allclose(out.numpy(), expected, **F64)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 4, 5)], ids=str)
def test_axon_layer_norm_is_the_oracles(shape: tuple[int, ...]) -> None:
    x, gamma, beta = _tensors(shape, (5,), (5,))
    for scale in (1e-6, 1e-3, 1.0):  # variances below and above eps
        expected = numpy_mega.layer_norm(
            scale * x.numpy(), gamma.numpy(), beta.numpy(), "axon-0.8.0"
        )
        out = ops.axon_layer_norm(scale * x, gamma, beta)
        np.testing.assert_allclose(out.numpy(), expected, **F64)


@OPS
@pytest.mark.parametrize("T", [1, 5], ids=["T1", "T5"])
def test_gradients(op: Op, inputs: Inputs, T: int) -> None:
    assert torch.autograd.gradcheck(op, tuple(x.requires_grad_() for x in inputs(T)))


@LAPLACE
def test_long_gradients_are_autograds(laplace: bool) -> None:
    q, k, v, gate = (x.requires_grad_() for x in _attention_inputs(59))
    if laplace:
        w = 1 / (1 + (q[:, :, None] - k[:, None]).abs().sum(dim=-1))
    else:
        scores = (q @ k.mT / 2).masked_fill(~torch.ones(59, 59, dtype=torch.bool).tril(), -1e9)
        w = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    plain = gate * ((w / (w.sum(dim=-1, keepdim=True) + 1e-8)) @ v)
    upstream = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (q, k, v, gate), upstream)
    got = torch.autograd.grad(
        ops.gated_attention(q, k, v, gate, laplace), (q, k, v, gate), upstream
    )
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-7)


@OPS
@pytest.mark.parametrize("T", [1, 5], ids=["T1", "T5"])
def test_opcheck(op: Op, inputs: Inputs, T: int) -> None:
    args: tuple[object, ...] = tuple(x.requires_grad_() for x in inputs(T))
    if op in (_softmax, _laplace):
        op, args = ops.gated_attention, (*args, op is _laplace)
    torch.library.opcheck(op, args)


@OPS
def test_opcheck_of_strided_inputs(op: Op, inputs: Inputs) -> None:
    # The fake kernels promise contiguous outputs: inputs with time last show whether they lie.
    args = tuple(x.mT.contiguous().mT if x.dim() == 3 else x for x in inputs(5))
    assert not args[0].is_contiguous()
    if op in (_softmax, _laplace):
        op, args = ops.gated_attention, (*args, op is _laplace)
    torch.library.opcheck(op, args)


def test_opcheck_of_the_backward_operators() -> None:
    p, alpha = _ema_inputs(5)
    grad = p.mT.contiguous().mT
    torch.library.opcheck(ops.ema_scan_backward, (grad, p, alpha))
    for laplace in (False, True):
        q, k, v, gate = _attention_inputs(5)
        grad = v.mT.contiguous().mT
        torch.library.opcheck(ops.gated_attention_backward, (grad, q, k, v, gate, laplace))


@OPS
def test_half_types_accumulate_in_float32(op: Op, inputs: Inputs) -> None:
    half = [x.bfloat16().requires_grad_() for x in inputs(257)]
    single = [x.detach().float().requires_grad_() for x in half]
    out, expected = op(*half), op(*single)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16(), rtol=0, atol=0)
    # Between the two gradients lies one rounding, to 8 bits of mantissa.
    for h, s in zip(
        torch.autograd.grad(out.sum(), half),
        torch.autograd.grad(expected.sum(), single),
        strict=True,
    ):
        assert h.dtype == torch.bfloat16
        assert (h.float() - s).abs().max() <= 2**-7 * s.abs().max()


@OPS
def test_output_is_a_new_tensor(op: Op, inputs: Inputs) -> None:
    args = inputs(1)
    out = op(*args)
    assert all(out.data_ptr() != x.data_ptr() for x in args)


@OPS
def test_integers_are_refused(op: Op, inputs: Inputs) -> None:
    first, *rest = inputs(3)
    with pytest.raises(TypeError, match=r"must have a floating dtype; got torch\.int64"):
        op(first.long(), *rest)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_are_checked(device: str) -> None:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    with pytest.raises(ValueError, match=r"ema_scan: p must be \[B, T, D\] and alpha \[D\]"):
        ops.ema_scan(zeros(4, 3), zeros(3))
    with pytest.raises(ValueError, match="ema_scan: p has 3 channels but alpha 2"):
        ops.ema_scan(zeros(1, 4, 3), zeros(2))
    with pytest.raises(ValueError, match=r"must share one shape .* k \[2, 4, 3\]"):
        ops.gated_attention(*[zeros(1, 4, 3), zeros(2, 4, 3)] * 2, False)
    with pytest.raises(ValueError, match="must share one shape"):
        ops.gated_attention(*[zeros(4, 3)] * 4, True)
    with pytest.raises(TypeError, match="must share one dtype"):
        ops.gated_attention(*[zeros(1, 4, 3)] * 3, zeros(1, 4, 3).double(), False)
    with pytest.raises(ValueError, match=r"axon_layer_norm: x must be \[..., H\]"):
        ops.axon_layer_norm(zeros(2, 3), zeros(3), zeros(2))
    with pytest.raises(ValueError, match="axon_layer_norm"):
        ops.axon_layer_norm(zeros(), zeros(1), zeros(1))
