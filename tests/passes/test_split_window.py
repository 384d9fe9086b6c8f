"""split_window: what frames keep by themselves, and the rest."""

from __future__ import annotations

import torch
import tvm

from mega_tvm.passes.split_window import FRAME_ROWS, mark, split_of, without_windows
from mega_tvm.pipeline import graph_phase
from mega_tvm.relax_ops import dims_of
from tests.passes.harness import EMBED, Around, Graph, constant, imported, linear, random_mega


def _split(*modules: torch.nn.Module, off=(), shapes=((2, 5, EMBED),) * 2) -> tvm.IRModule:
    functions = {}
    for i, (module, shape) in enumerate(zip(modules, shapes, strict=False)):
        main = imported(module, shape)["main"].with_attr("global_symbol", f"main{i}")
        functions[f"main{i}"] = mark(main)
    return graph_phase(tvm.IRModule(functions), off)


def test_a_mega_keeps_its_input_projection() -> None:
    mod = _split(random_mega())
    split = split_of(mod)
    assert split.widths == (40,)
    assert split.entries == {"main0": "main0_window"}
    rows, rest, whole = (Graph(mod[name]) for name in (FRAME_ROWS, "main0_window", "main0"))
    assert rows.names == ["mega.dense"]
    for op in ("mega.dense", "mega.layer_norm", "mega.attention", "mega.ema_scan"):
        assert rows.count(op) + rest.count(op) == whole.count(op) > 0
    assert dims_of(mod[FRAME_ROWS].params[0].ty.shape) == ("batch", "seq_len", EMBED)


def test_without_an_input_projection_nothing_is_kept() -> None:
    assert split_of(_split(random_mega(embed_dim=40), shapes=((2, 5, 40),))) is None


def test_two_projections_are_kept_both() -> None:
    module = Around(lambda s, x: s.a(x) + s.b(x), a=random_mega(), b=random_mega(seed=3))
    mod = _split(module)
    assert split_of(mod).widths == (40, 40)
    assert Graph(mod[FRAME_ROWS]).count("mega.dense") == 2


def test_entries_of_all_shapes_share_what_frames_keep() -> None:
    mod = _split(random_mega(), random_mega(), shapes=((2, 5, EMBED), (1, 59, EMBED)))
    assert split_of(mod).entries == {"main0": "main0_window", "main1": "main1_window"}


def test_entries_that_keep_other_rows_get_no_window() -> None:
    mod = _split(random_mega(), random_mega(seed=3))
    assert split_of(mod).entries == {"main0": "main0_window"}


def test_with_rewrites_switched_off() -> None:
    mod = _split(random_mega(), off=["fold_layer_norm", "prune_last_timestep", "fuse_residual"])
    assert split_of(mod).widths == (40,)


def test_layers_ahead_of_the_mega_belong_to_the_frames() -> None:
    layers = torch.nn.Sequential(linear(EMBED, 24), torch.nn.SiLU(), random_mega(embed_dim=24))
    mod = _split(layers)
    assert split_of(mod).widths == (40,)
    assert Graph(mod[FRAME_ROWS]).count("mega.dense") == 2


def test_what_mixes_timesteps_or_rows_keeps_nothing() -> None:
    mega = random_mega()
    for function in (
        lambda s, x: s.mega(x.flip(1)),
        lambda s, x: s.mega(x + s.batch),  # varies over the batch
        lambda s, x: s.mega(x + s.time),
    ):
        module = Around(
            function, mega=mega, batch=constant(2, 1, EMBED), time=constant(1, 5, EMBED)
        )
        mod = _split(module)
        assert split_of(mod) is None
        assert set(without_windows(mod).get_global_vars()) == set(mod.get_global_vars())


def test_only_marked_functions_are_split() -> None:
    assert split_of(graph_phase(imported(random_mega(), (2, 5, EMBED)))) is None


def test_the_parts_leave_as_they_came() -> None:
    mod = _split(random_mega())
    names = {gvar.name_hint for gvar in without_windows(mod).get_global_vars()}
    assert names == {"main0"}
