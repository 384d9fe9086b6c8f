"""Each peer's model, in each of its forms, answers as the oracle does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mega_tvm.bench.oracle import TOLERANCE, expected_output, relative_error
from mega_tvm.bench.peers import OURS, PEERS, select_peers
from mega_tvm.bench.peers.plain import EMA_CHUNK, LONGEST_WHOLE_EMA, Form, Plan
from mega_tvm.bench.workloads import Workload, random_input, random_params
from reference import numpy_mega

# These are ready in milliseconds; the others compile for a second or more a form.
QUICK = ("torch-eager", "onnxruntime", "openvino")
LAPLACE = pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
PRUNED = pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
Tiny = Callable[..., Workload]


def check(name: str, workload: Workload, pruned: bool, forms: list[Form] | None = None) -> None:
    peer = PEERS[name]
    if reason := peer.available():
        pytest.skip(reason)
    params, x = random_params(workload.config), random_input(workload)
    expected = numpy_mega.forward(workload.config, params, x)
    for form in forms or peer.forms(workload, pruned):
        model = peer.prepare(workload, params, 1, pruned, form)
        error = relative_error(model(x), expected)
        assert error <= TOLERANCE, f"{name} {form.name}: {error:.1e}"
        # A second call with other values: nothing of the first may be left behind.
        other = numpy_mega.forward(workload.config, params, -x)
        assert relative_error(model(-x), other) <= TOLERANCE


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("T", [1, 7, 60])
@LAPLACE
@PRUNED
def test_quick_peer_agrees(tiny: Tiny, name: str, T: int, laplace: bool, pruned: bool) -> None:
    check(name, tiny(T, laplace), pruned)


@pytest.mark.parametrize("name", QUICK)
@PRUNED
def test_long_sequences_are_chunked_and_blocked(tiny: Tiny, name: str, pruned: bool) -> None:
    T = 300  # no multiple of the chunk or of the block
    workload = tiny(T)
    assert T > LONGEST_WHOLE_EMA and T % EMA_CHUNK and len(PEERS[name].forms(workload, False)) > 1
    check(name, workload, pruned)


@pytest.mark.parametrize("T", [1, 7, 60])
@LAPLACE
def test_jax_agrees(tiny: Tiny, T: int, laplace: bool) -> None:
    pytest.importorskip("jax", reason="extra: bench")
    pruned = T != 7
    # Of each attention form, the last of its variants: merged where the graph is pruned.
    forms = {form.attention: form for form in PEERS["jax"].forms(tiny(T, laplace), pruned)}
    check("jax", tiny(T, laplace), pruned, list(forms.values()))


def test_jax_agrees_on_long_sequences(tiny: Tiny) -> None:
    check("jax", tiny(300), True, [Form("blocked", merged=True)])


def test_iree_agrees(tiny: Tiny) -> None:
    check("iree", tiny(7), True, [Form("whole", merged=True)])


def test_torch_compile_agrees(tiny: Tiny) -> None:
    check("torch-compile", tiny(7), pruned=True)


def test_constants_of_a_merged_pruned_plan_compute_two_parts_at_once(tiny: Tiny) -> None:
    from mega_tvm.bench.peers.plain import constants

    workload = tiny()
    c = constants(
        Plan.of(workload, Form("whole", merged=True), True), random_params(workload.config)
    )
    assert c["b1_q_k_v_gate_w"].shape == (40, 160)
    assert c["b2_q_gate_w"].shape == c["b2_k_v_w"].shape == (40, 80)


@LAPLACE
def test_long_oracle_agrees_with_the_short_one(
    tiny: Tiny, laplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = tiny(300, laplace)
    params, x = random_params(workload.config), random_input(workload)
    expected = expected_output(workload, params, x)
    monkeypatch.setattr("mega_tvm.bench.oracle.LONGEST_WHOLE", 100)
    assert relative_error(expected_output(workload, params, x), expected) < 1e-8


def test_error_of_a_wrong_output_is_infinite() -> None:
    good = np.ones((2, 3))
    assert relative_error(good[:1], good) == float("inf")
    assert relative_error(np.full_like(good, np.nan), good) == float("inf")


def test_peers_are_selected_in_order() -> None:
    assert [peer.name for peer in select_peers("jax, torch-eager,jax")] == ["jax", "torch-eager"]
    assert select_peers("all")[0].name == OURS
    with pytest.raises(ValueError, match=r"unknown peer 'onnx'; known: mega_tvm, torch-eager"):
        select_peers("onnx")


@LAPLACE
def test_mega_tvm_agrees_and_executes_less_than_the_pruned_graph(tiny: Tiny, laplace: bool) -> None:
    from mega_tvm.bench.flops import executed_flops, plain_flops

    workload = tiny(60, laplace)
    check(OURS, workload, pruned=False)
    params = random_params(workload.config)
    model = PEERS[OURS].prepare(workload, params, 1, False, PEERS[OURS].forms(workload, False)[0])
    executed = executed_flops(model.metadata["kernels"])  # type: ignore[attr-defined]
    assert 0 < executed <= plain_flops(workload, pruned=True)
