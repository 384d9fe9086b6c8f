"""No PrimFunc ships as it was written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import tvm
import tvm_ffi
from torch import Tensor, nn
from tvm import te, tirx
from tvm.s_tir import SBlockRealize

import mega_tvm
from mega_tvm import pipeline
from mega_tvm.frontend.torch import import_module
from mega_tvm.kernel_list import SCHEDULE_ATTR
from mega_tvm.targets import resolve_target
from schedules.registry import kernel_op
from tests.compiler.models import mega

# Elements of work from which a kernel must have a vector loop.
WORK = 1000


def phases(module: tvm.IRModule) -> tuple[dict, dict]:
    """Return a module's PrimFuncs after the kernel phase and after the schedule phase."""
    target = resolve_target("native").tvm_target()
    with target:
        naive = pipeline.kernel_phase(pipeline.graph_phase(module))
        before = prim_funcs(naive)
        return before, prim_funcs(pipeline.schedule_phase(naive, target, {}))


def prim_funcs(mod: tvm.IRModule) -> dict[str, tirx.PrimFunc]:
    return {
        gvar.name_hint: func
        for gvar, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc)
    }


def faults(before: dict, after: dict) -> list[str]:
    """Return what is wrong with each kernel that is not scheduled."""
    found = []
    for name, func in after.items():
        attrs = func.attrs or {}
        if SCHEDULE_ATTR not in attrs:
            found.append(f"{name}: no schedule is recorded")
        naive = before.get(name, func)
        if tvm_ffi.structural_equal(naive.body, func.body, map_free_vars=True):
            found.append(f"{name}: its loops are as they were written")
        if work(naive) > WORK and not has_vector_loop(func):
            found.append(f"{name}: no vectorized loop")
    return found


def work(func: tirx.PrimFunc) -> int:
    """Return the largest number of iterations of any loop nest."""
    most = 1

    def visit(stmt, extent):
        nonlocal most
        if isinstance(stmt, tirx.For):
            extent *= int(stmt.extent)
            most = max(most, extent)
            visit(stmt.body, extent)
        elif isinstance(stmt, tirx.SeqStmt):
            for part in stmt.seq:
                visit(part, extent)
        elif isinstance(stmt, SBlockRealize):
            visit(stmt.block.body, extent)
        elif hasattr(stmt, "body"):
            visit(stmt.body, extent)

    visit(func.body, 1)
    return most


def has_vector_loop(func: tirx.PrimFunc) -> bool:
    found = []

    def loop(node):
        if node.kind == tirx.ForKind.VECTORIZED and int(node.extent) > 1:
            found.append(node)

    tvm_ffi.structural_walk(func.body, [(tirx.For, loop), (tirx.Ramp, found.append)])
    return bool(found)


class Head(nn.Module):
    """Operators that have no schedule of ours, on sizes that no vector divides."""

    def __init__(self) -> None:
        super().__init__()
        self.mega = mega()
        self.conv = nn.Conv1d(16, 33, 3, padding=1)
        self.out = nn.Linear(33, 57)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mega(x)[:, :, None].expand(-1, -1, 21)
        y = F.gelu(self.conv(y)).transpose(1, 2)
        return F.softmax(self.out(y * torch.rsqrt(1 + y.square())), dim=-1).mean(1)


@pytest.fixture(scope="module")
def megas():
    """Both forms, at lengths that choose different schedules."""
    functions = {}
    for laplace in (False, True):
        for length in (1, 59):
            name = f"laplace{laplace:d}_{length}"
            model = mega(laplace_attention=laplace, num_layers=2, hidden_size=23)
            main = import_module(model, (2, length, 13))["main"]
            functions[name] = main.with_attr("global_symbol", name)
    return phases(tvm.IRModule(functions))


@pytest.fixture(scope="module")
def head():
    return phases(import_module(Head(), (2, 5, 13)))


def test_every_kernel_of_a_mega_is_scheduled(megas) -> None:
    before, after = megas
    assert before.keys() == after.keys()
    assert {kernel_op(func) for func in after.values()} == {
        "dense", "layer_norm", "ema_scan", "gated_attention", "laplace_attention", None,
    }  # fmt: skip
    assert faults(before, after) == []


def test_every_operator_around_a_mega_is_scheduled(head) -> None:
    before, after = head
    others = [name for name, func in after.items() if kernel_op(func) is None]
    assert len([name for name in others if work(before[name]) > WORK]) >= 3
    assert faults(before, after) == []


def test_the_manifest_names_each_kernel_and_its_schedule(small_path) -> None:
    kernels = mega_tvm.load(small_path).metadata["kernels"]
    assert {k["schedule"] for k in kernels} <= {"hand", "generic"}
    assert {k["op"] for k in kernels if k["schedule"] == "hand"} == {
        "dense", "layer_norm", "ema_scan", "gated_attention",
    }  # fmt: skip
    assert all(k["calls"] >= 1 for k in kernels)
    assert all((k["spec"] is None) == (k["schedule"] == "generic") for k in kernels)


# That the check can fail.


def _unscheduled() -> tirx.PrimFunc:
    x = te.placeholder((64, 64), "float32", "x")
    return te.create_prim_func([x, te.compute((64, 64), lambda i, j: x[i, j] + 1.0, "y")])


def test_an_unscheduled_kernel_is_found(megas) -> None:
    before, after = megas
    func = _unscheduled()
    assert faults({**before, "naive": func}, {**after, "naive": func}) == [
        "naive: no schedule is recorded",
        "naive: its loops are as they were written",
        "naive: no vectorized loop",
    ]


def test_a_mark_alone_does_not_hide_an_unscheduled_kernel() -> None:
    func = _unscheduled()
    marked = func.with_attr(SCHEDULE_ATTR, "generic")
    assert faults({"naive": func}, {"naive": marked}) == [
        "naive: its loops are as they were written",
        "naive: no vectorized loop",
    ]


def test_a_kernel_that_never_saw_the_schedule_phase_is_found(monkeypatch) -> None:
    """As if the phase had passed over a function."""
    monkeypatch.setattr(pipeline, "generic_schedule", lambda func, _target: func)
    found = faults(*phases(import_module(nn.Sequential(nn.Linear(13, 64), nn.Tanh()), (2, 59, 13))))
    assert any("as they were written" in fault for fault in found)
    assert any("no vectorized loop" in fault for fault in found)
