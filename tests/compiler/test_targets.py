"""Names of targets, this machine's features, and what a machine must have."""

from __future__ import annotations

import dataclasses

import pytest

from mega_tvm import targets
from mega_tvm.errors import TargetError
from mega_tvm.targets import machine_runs, resolve_target

V3 = targets._features("x86-64-v3")
V4 = targets._features("x86-64-v4")


@pytest.fixture
def machine(monkeypatch):
    """Pretend that this machine's CPU has these flags."""

    def pretend(*flags):
        monkeypatch.setattr(targets, "_machine_flags", lambda: set().union(*flags))

    return pretend


@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4", "sapphirerapids"])
def test_named_targets(name) -> None:
    target = resolve_target(name)
    assert (target.name, target.mcpu, target.mattr) == (name, name, ())
    assert str(target.tvm_target().attrs["mcpu"]) == name
    assert list(target.cpu_features) == sorted(set(target.cpu_features))


def test_levels_contain_each_other() -> None:
    assert {"avx2", "fma", "bmi2"} <= V3 < V4
    assert {"avx512f", "avx512vl"} <= V4 - V3
    assert targets._features("sapphirerapids") > V4


def test_features_have_the_kernels_names() -> None:
    """What /proc/cpuinfo calls pni and abm, archspec calls sse3 and lzcnt."""
    for features in (V3, V4):
        assert "pni" in features
        assert "abm" in V3
        assert not {"sse3", "lzcnt"} & features


@pytest.mark.parametrize(
    ("flags", "mcpu", "mattr"),
    [
        ([V3], "x86-64-v3", ()),
        ([V4], "x86-64-v4", ()),
        ([V3, {"avx512f"}], "x86-64-v3", ()),
        ([V3, {"avx_vnni"}], "x86-64-v3", ("+avxvnni",)),
        (
            [V4, {"amx_tile", "amx_bf16", "avx512_bf16", "hypervisor"}],
            "x86-64-v4",
            ("+amx-bf16", "+amx-tile", "+avx512bf16"),
        ),
    ],
    ids=["v3", "v4", "half_of_v4", "v3_and_more", "v4_and_more"],
)
def test_native_goes_by_flags(machine, flags, mcpu, mattr) -> None:
    machine(*flags)
    target = resolve_target("native")
    assert (target.mcpu, target.mattr) == (mcpu, mattr)
    assert set(target.cpu_features) <= set().union(*flags)
    assert targets._features(mcpu) <= set(target.cpu_features)
    assert machine_runs(target)
    if mattr:
        assert [str(m) for m in target.tvm_target().attrs["mattr"]] == list(mattr)


def test_native_on_a_machine_that_is_too_old(machine) -> None:
    machine(V3 - {"avx2", "fma"})
    with pytest.raises(TargetError, match=r"needs at least x86-64-v3 .* lacks avx2, fma$"):
        resolve_target("native")


def test_machine_runs(machine) -> None:
    machine(V3)
    assert machine_runs(resolve_target("x86-64-v3"))
    assert not machine_runs(resolve_target("x86-64-v4"))
    machine(V4)
    assert machine_runs(resolve_target("x86-64-v4"))
    demanding = dataclasses.replace(resolve_target("x86-64-v4"), cpu_features=("no_such_flag",))
    assert not machine_runs(demanding)


def test_this_machine_runs_its_native_target() -> None:
    assert machine_runs(resolve_target("native"))


@pytest.mark.parametrize("name", ["", "Native", "x86-64", "x86-64-v2", "llvm", "haswell"])
def test_unknown_names(name) -> None:
    with pytest.raises(TargetError) as error:
        resolve_target(name)
    message = f"unknown target {name!r}; known targets: native, x86-64-v3, x86-64-v4, "
    assert str(error.value).startswith(message)
