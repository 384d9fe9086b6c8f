"""Mutated artifacts: refused by a clear error, or right; never a crash, never another result."""

from __future__ import annotations

import json

import pytest

# More by hand: python -m tests.runtime.fuzz MODEL.so 1000
COUNT = 60
SCRIPT = """
import json
from tests.runtime.fuzz import *
print(json.dumps(fuzz(sys.argv[1], int(sys.argv[2]))))
"""
ERRORS = {"NotAnArtifactError", "DamagedArtifactError", "IncompatibleArtifactError"}
# MegaError: memory for sizes that no process has.
ERRORS_OF_CALLS = {
    f"{name} of a call"
    for name in ("DamagedArtifactError", "InputError", "StreamUnsupportedError", "MegaError")
}


@pytest.fixture(scope="module")
def counts(many_shapes, run_python):
    return json.loads(run_python(SCRIPT, many_shapes, COUNT))


@pytest.mark.parametrize(
    ("family", "allowed"),
    [
        # Not covered by digests: everything is refused.
        ("bytes", ERRORS),
        ("length", ERRORS),
        ("footer", ERRORS),
        # With right digests: some fields do not matter.
        ("manifest", ERRORS | ERRORS_OF_CALLS | {"right result"}),
        ("sizes", ERRORS | ERRORS_OF_CALLS | {"right result"}),
        ("headers", ERRORS | {"right result"}),
    ],
)
def test_mutants_are_refused_or_right(counts, family, allowed):
    found = counts[family]
    assert sum(found.values()) == COUNT
    assert found.keys() <= allowed
    # A mutation that changes nothing would show nothing.
    assert found.get("right result", 0) < 0.8 * COUNT


def test_faults_are_noticed(many_shapes, run_python):
    script = """
import tests.runtime.fuzz as fuzz
source = fuzz.Source(sys.argv[1])
whole = source.data
expected = fuzz.probes(mega_tvm.load(sys.argv[1]))
import tempfile
with tempfile.TemporaryDirectory() as folder:
    def outcomes(*mutants):
        return fuzz.run_batch(mutants, expected, folder)
    print(outcomes(whole, whole[:-1]))
    # All code is overwritten by traps: the first to run is a constructor of the library.
    library = bytearray(source.library)
    import struct
    start, size, count = struct.unpack_from("<Q14xHH", library, 32)
    for at in range(start, start + size * count, size):
        kind, flags, offset, _, _, length = struct.unpack_from("<IIQQQQ", library, at)
        if kind == 1 and flags & 1:
            library[offset : offset + length] = b"\\xcc" * length
    print(outcomes(whole, fuzz.relink(source, source.manifest, bytes(library)), whole))
    expected[0] = (expected[0][0], expected[0][1] + 1)
    print(outcomes(whole))
    fuzz.mega_tvm.load = None
    print(outcomes(whole))
"""
    assert run_python(script, many_shapes).splitlines() == [
        "['right result', 'DamagedArtifactError']",
        "['right result', 'crash']",
        "['wrong result']",
        "['other exception']",
    ]
