"""Loads mutated artifacts in processes of their own, and counts how each ends.

    python -m tests.runtime.fuzz MODEL.so COUNT [SEED] [FAMILY..]

Prints, as JSON, per family of mutations how many were refused by each error, how many loaded and
computed what the model computes, and, which must be none: wrong results, other exceptions, crashes.
A mutant that loads must compute what the model does, or refuse the call.

The families *manifest*, *sizes* and *headers* have right digests, as if the compiler had written
them: what stands behind the digests is tried there. *headers* leaves the bytes alone that the
dynamic loader takes as they are: with those, a library is another program, not a damaged one.
"""

from __future__ import annotations

import collections
import copy
import hashlib
import json
import os
import random
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np

import mega_tvm
from mega_tvm.errors import ArtifactError, MegaError
from mega_tvm.symbolic_entry import probe_shapes

BATCH = 50
VALUES = [None, True, 0, 1, -1, 2**70, 1.5, "", "x", [], {}, [1], [[1]], {"a": 1}, "\ud800", "\0"]
WRONG = ("wrong result", "crash", "hang", "other exception")


class Source:
    """The artifact that is mutated, taken apart by the format's description."""

    def __init__(self, path):
        self.data = Path(path).read_bytes()
        length = struct.unpack("<Q", self.data[-16:-8])[0]
        self.text = self.data[-48 - length : -48]
        self.manifest = json.loads(self.text)
        self.library = self.data[: self.manifest["library"]["bytes"]]
        start, size = self.manifest["tensors"]["offset"], self.manifest["tensors"]["bytes"]
        self.body = self.data[: start + size]
        self.tensors = self.data[start : start + size]


def sign(body, manifest):
    text = json.dumps(manifest).encode()
    footer = struct.pack("<32sQ8s", hashlib.sha256(text).digest(), len(text), b"MEGATVM1")
    return body + text + footer


def mutate_bytes(source, rng):
    """Flip, replace, insert or delete bytes: of the library, the tensors, the manifest."""
    mutant = bytearray(source.data)
    part = rng.choice([(0, 4096), (0, len(source.library)), (len(source.library), len(mutant))])
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = min(rng.randrange(*part), len(mutant) - 1)
        kind = rng.randrange(3)
        if kind == 0:
            mutant[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            mutant[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
        else:
            del mutant[at : at + rng.randrange(1, 5000)]
    return bytes(mutant)


def mutate_length(source, rng):
    """Cut off, append, or take a part twice."""
    at = rng.randrange(len(source.data))
    kind = rng.randrange(4)
    if kind == 0:
        return source.data[:at]
    if kind == 1:
        return source.data[at:]
    if kind == 2:
        return source.data + rng.choice([b"\0", source.data[at:], rng.randbytes(60)])
    return source.data[:at] + source.data[rng.randrange(len(source.data)) :]


def mutate_footer(source, rng):
    """Other lengths, digests and magics."""
    digest, length, magic = struct.unpack("<32sQ8s", source.data[-48:])
    kind = rng.randrange(3)
    if kind == 0:
        near = length + rng.choice([-64, -48, -2, -1, 1, 2, 48, 64])
        length = rng.choice([0, 1, 2, near, len(source.data), 2**32, 2**63, 2**64 - 1])
    elif kind == 1:
        digest = rng.choice([bytes(32), rng.randbytes(32), digest[::-1]])
    else:
        magic = rng.choice([b"MEGATVM2", b"megatvm1", bytes(8), rng.randbytes(8)])
    return source.data[:-48] + struct.pack("<32sQ8s", digest, length, magic)


def nodes(value, path=()):
    """Yield the path of each value within a manifest."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, (dict, list)):
            yield from nodes(inner, (*path, key))
        else:
            yield (*path, key)


def at_path(manifest, path):
    for key in path:
        manifest = manifest[key]
    return manifest


def mutate_manifest(source, rng):
    """Delete, replace or exchange any values; digests are right."""
    mutant = copy.deepcopy(source.manifest)
    for _ in range(rng.choice([1, 1, 2])):
        paths = list(nodes(mutant))
        path = rng.choice(paths)
        parent = at_path(mutant, path[:-1])
        kind = rng.randrange(3)
        if kind == 0:
            del parent[path[-1]]
        elif kind == 1:
            parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
        else:
            parent[path[-1]] = copy.deepcopy(at_path(mutant, rng.choice(paths)))
    return sign(source.body, mutant)


def mutate_sizes(source, rng):
    """Other numbers in the manifest, and a file whose sizes agree with them; digests are right."""
    mutant = copy.deepcopy(source.manifest)
    kind = rng.randrange(4)
    body = source.body
    if kind == 0:  # any number
        paths = [p for p in nodes(mutant) if type(at_path(mutant, p)) is int]
        for path in rng.choices(paths, k=rng.choice([1, 1, 2])):
            parent, number = at_path(mutant, path[:-1]), at_path(mutant, path)
            near = [number + d for d in (-64, -4, -1, 1, 4, 64)]
            parent[path[-1]] = rng.choice([0, -1, number * 2, number // 2, 2**31, 2**63, *near])
        return sign(body, mutant)
    if kind == 1:  # fewer or more tensors
        items = mutant["tensors"]["items"]
        tensors = source.tensors
        if rng.random() < 0.5 and items:
            last = items.pop()
            tensors = tensors[: last["offset"]].rstrip(b"\0") if items else b""
            if items:
                end = items[-1]["offset"] + size_of(items[-1])
                tensors = source.tensors[:end]
        else:
            start = -(-len(tensors) // 64) * 64
            tensors = tensors.ljust(start, b"\0") + rng.randbytes(8)
            items.append({"offset": start, "shape": [8], "dtype": "uint8"})
        mutant["tensors"].update(bytes=len(tensors), sha256=hashlib.sha256(tensors).hexdigest())
        return sign(source.data[: mutant["tensors"]["offset"]] + tensors, mutant)
    if kind == 2:  # a shorter or longer library
        cut = rng.randrange(1, len(source.library))
        library = rng.choice([source.library[:cut], source.library + rng.randbytes(cut % 500)])
        return relink(source, mutant, library)
    window = mutant.get("window") or {}
    described = [*mutant.get("symbolic_entries", []), mutant.get("stream") or {}, window]
    described += window.get("entries", {}).values()
    entry = rng.choice([d for d in described if "workspace" in d] + mutant["entries"])
    if isinstance(entry["workspace"], dict):  # another workspace, limit or width of any shape
        numbers = [entry["workspace"], *entry.get("limits", {}).values(), *entry.get("state", [])]
        numbers += [entry["widths"]] if "widths" in entry else []
        chosen = rng.choice(numbers)
        places = range(len(chosen)) if isinstance(chosen, list) else list(chosen)
        place = rng.choice([p for p in places if type(chosen[p]) is int])
        chosen[place] = max(0, chosen[place] + rng.choice([-4096, -64, -4, -1, 1, 4, 64, 4096]))
    elif rng.random() < 0.5:  # another shape or workspace of an entry
        entry["workspace"] = max(1, entry["workspace"] + rng.choice([-64, -1, 1, 64, 4096]))
    else:
        shape = entry[rng.choice(["input", "output"])]["shape"]
        shape[rng.randrange(len(shape))] += rng.choice([1, 2, 16])
    return sign(body, mutant)


def size_of(item):
    return int(np.prod(item["shape"], dtype=np.int64)) * np.dtype(item["dtype"]).itemsize


def relink(source, manifest, library):
    padding = bytes(-len(library) % 64)
    manifest["library"] = {"sha256": hashlib.sha256(library).hexdigest(), "bytes": len(library)}
    manifest["tensors"]["offset"] = len(library) + len(padding)
    return sign(library + padding + source.tensors, manifest)


def mutate_headers(source, rng):
    """Other fields of the ELF header, and places and sizes of segments; digests are right."""
    library = bytearray(source.library)
    big = rng.choice([2**31, 2**40, 2**62, 2**63, 2**64 - 1, len(library), len(library) + 1])
    start, size, count = struct.unpack_from("<Q14xHH", library, 32)
    program = start + size * rng.randrange(count)
    kind = rng.randrange(5)
    if kind == 0:
        library[rng.choice([0, 1, 2, 3, 4, 5])] ^= 1 << rng.randrange(8)
    elif kind == 1:
        struct.pack_into("<H", library, rng.choice([16, 18]), rng.choice([0, 1, 2, 183, 65535]))
    elif kind == 2:
        struct.pack_into("<Q", library, 32, max(big, len(library)))
    elif kind == 3:
        value = rng.choice([0, 1, 55, 57, 65535])
        struct.pack_into("<H", library, rng.choice([54, 56]), value)
    else:
        loads = struct.unpack_from("<I", library, program)[0] in (1, 2)
        field = rng.choice([8, 32]) if loads else 8  # p_offset, p_filesz
        struct.pack_into("<Q", library, program + field, big)
    return relink(source, copy.deepcopy(source.manifest), bytes(library))


FAMILIES = {
    name.removeprefix("mutate_"): function
    for name, function in list(globals().items())
    if name.startswith("mutate_")
}


def random_input(shape):
    return np.random.default_rng(list(shape)).standard_normal(shape, dtype=np.float32)


def run_stream(model, width):
    """Feed two rows frames at once and one by one, beyond a full cache; return all outputs."""
    x = random_input((2, 24, width))
    stream = model.stream(2, max_len=20, on_full="slide")
    found = [stream.prefill(x[:, :11])]
    stream.reset([1])
    return np.stack([*found, *(stream.step(x[:, t]) for t in range(11, 24))])


def run_window(model, shape):
    """Push frames until the window has slid over the end of its memory; return all outputs."""
    batch, seq_len, width = shape
    window = model.window(batch, seq_len=seq_len)
    x = random_input((batch, 2 * seq_len + 5, width))
    window.fill(x[:, :seq_len])
    return np.stack([window.push(x[:, t]) for t in range(seq_len, x.shape[1])])


def probes(model):
    """Return calls of all that a model has: functions of a model, with the result of each."""
    calls = []
    shapes = [entry.input_shape for entry in model.entries]
    for symbolic in model.symbolic_entries:
        shapes += probe_shapes(symbolic)
    for shape in dict.fromkeys(shapes):
        x = random_input(shape)
        calls.append(lambda model, x=x: model(x))
    if "name" in (stream := model.metadata.get("stream") or {}):
        calls.append(lambda model: run_stream(model, stream["input_width"]))
    if "name" in (model.metadata.get("window") or {}):
        batch, seq_len, width = model.entries[0].input_shape
        for shape in [(batch, seq_len, width), (2, 5, width)][: 1 + len(model.symbolic_entries)]:
            calls.append(lambda model, shape=shape: run_window(model, shape))
    return [(call, call(model)) for call in calls]


def with_other_entries(path, expected):
    """Add what the symbolic entries give, which run a shape that a manifest no longer names."""
    model = mega_tvm.load(path)
    if not model.symbolic_entries:
        return expected
    model._runners.clear()
    return [(call, y, call(model)) for call, y in expected]


def attempt(path, expected):
    """Load a mutant and run it; return how that ended."""
    try:
        model = mega_tvm.load(path)
    except ArtifactError as error:
        message = str(error)
        if str(path) not in message or len(message) > 1000:
            return "other exception"
        return type(error).__name__
    except Exception:
        return "other exception"
    outcome = "right result"
    for call, *right in expected:
        try:
            if call(model).tobytes() not in {y.tobytes() for y in right}:
                return "wrong result"
        except MegaError as error:
            outcome = f"{type(error).__name__} of a call"
        except Exception:
            return "other exception"
    return outcome


def run_batch(mutants, expected, folder):
    """Try mutants in a forked process; return their outcomes, up to a crash's included."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        import signal

        signal.alarm(60)
        with open(writer, "w", buffering=1) as out:
            for i, mutant in enumerate(mutants):
                path = Path(folder) / f"mutant{i % 2}.so"
                path.write_bytes(mutant)
                print(attempt(path, expected), file=out, flush=True)
        os._exit(0)
    os.close(writer)
    with open(reader) as lines:
        outcomes = lines.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if len(outcomes) < len(mutants):
        outcomes.append("hang" if status == -14 else "crash")
    return outcomes


def fuzz(path, count, seed=0, families=tuple(FAMILIES), keep=None):
    """Try so many mutants of each family; return the outcomes' counts."""
    source = Source(path)
    expected = with_other_entries(path, probes(mega_tvm.load(path)))
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            rng = random.Random(f"{seed} {family}")
            mutants = [FAMILIES[family](source, rng) for _ in range(count)]
            outcomes = []
            while len(outcomes) < count:
                batch = mutants[len(outcomes) : len(outcomes) + BATCH]
                found = run_batch(batch, expected, folder)
                for i, (mutant, outcome) in enumerate(zip(batch, found, strict=False)):
                    if outcome in WRONG and keep:
                        Path(f"{keep}-{family}-{len(outcomes) + i}.so").write_bytes(mutant)
                outcomes += found
            counts[family] = dict(collections.Counter(outcomes).most_common())
    return counts


if __name__ == "__main__":
    path, count, *rest = sys.argv[1:]
    seed = int(rest.pop(0)) if rest else 0
    keep = os.environ.get("FUZZ_KEEP")
    print(json.dumps(fuzz(path, int(count), seed, rest or tuple(FAMILIES), keep), indent=1))
