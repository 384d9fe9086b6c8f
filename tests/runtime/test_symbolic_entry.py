"""A symbolic entry's description: shapes, limits, workspace, and malformed ones."""

from __future__ import annotations

import copy

import pytest

from mega_tvm.manifest_schema import manifest_problem
from mega_tvm.symbolic_entry import SymbolicEntry, probe_shapes, workspace_bytes
from tests.runtime.builders import MANIFEST

ENTRY = {
    "name": "main_symbolic",
    "input": {"shape": ["batch", "seq_len", 13], "dtype": "float32"},
    "output": {"shape": ["batch", 40], "dtype": "float32"},
    "limits": {"batch": [1, 4], "seq_len": [3, 9]},
    "workspace": {"fixed": 64, "batch": 128, "batch*seq_len": 192},
}


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((4, 9, 13), {"batch": 4, "seq_len": 9}),
        ((1, 3, 13), {"batch": 1, "seq_len": 3}),
        ((0, 3, 13), None),
        ((5, 3, 13), None),
        ((1, 2, 13), None),
        ((1, 10, 13), None),
        ((1, 3, 12), None),
        ((1, 3), None),
        ((1, 3, 13, 1), None),
    ],
    ids=str,
)
def test_it_serves_what_lies_within_its_limits(shape, sizes) -> None:
    assert SymbolicEntry.of(ENTRY).sizes(shape) == sizes


def test_shapes_and_workspace_follow_from_the_sizes() -> None:
    entry, sizes = SymbolicEntry.of(ENTRY), {"batch": 2, "seq_len": 5}
    assert entry.output_at(sizes) == (2, 40)
    assert workspace_bytes(ENTRY["workspace"], sizes) == 64 + 2 * 128 + 2 * 5 * 192
    assert entry.workspace_at(sizes) == 64 + 2 * 128 + 2 * 5 * 192
    assert str(entry) == "[batch, seq_len, 13], batch 1 to 4, seq_len 3 to 9"


def test_it_describes_itself() -> None:
    assert SymbolicEntry.of(ENTRY).describe() == ENTRY


def test_probes_keep_to_the_limits() -> None:
    entry = SymbolicEntry.of(ENTRY)
    assert probe_shapes(entry) == [(1, 3, 13), (2, 9, 13), (3, 9, 13)]


def test_the_manifest_may_hold_it_or_not() -> None:
    manifest = {**complete(), "symbolic_entries": [ENTRY]}
    assert manifest_problem(manifest) is None
    assert manifest_problem(complete()) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.pop("limits"), "symbolic_entries[0].limits is missing"),
        (lambda e: e["limits"].pop("batch"), "symbolic_entries[0].limits.batch must be a list"),
        (lambda e: e["limits"].update(batch=[2, 1]), "least and the greatest value, found [2, 1]"),
        (lambda e: e["limits"].update(batch=[1]), "least and the greatest value, found [1]"),
        (lambda e: e["limits"].update(batch=[0, 1]), "limits.batch[0] must be at least 1"),
        (lambda e: e["workspace"].update(batch=-1), "workspace.batch must be at least 1"),
        (lambda e: e["workspace"].update(rows=1), "names a region rows"),
        (lambda e: e["input"]["shape"].append("B"), "input.shape[3] must match"),
        (lambda e: e["output"]["shape"].append("width"), "output has a dimension width"),
        (lambda e: e["output"].update(dtype="int8"), "output.dtype must match float32"),
    ],
    ids=range(10),
)
def test_malformed_descriptions(change, words) -> None:
    entry = copy.deepcopy(ENTRY)
    change(entry)
    found = manifest_problem({**complete(), "symbolic_entries": [entry]})
    assert found is not None and words in found


def complete() -> dict:
    return {
        **copy.deepcopy(MANIFEST),
        "format_version": 2,
        "library": {"sha256": "0" * 64, "bytes": 64},
        "tensors": {"offset": 64, "bytes": 0, "sha256": "0" * 64, "items": []},
        "versions": {"mega_tvm": "0", "tvm": "0.27", "tvm_ffi": "0.1", "llvm": None},
    }
