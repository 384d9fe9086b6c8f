"""A small compiled model, and tools to take a compiled model's file apart."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import tvm
from tvm import relax, s_tir, te

from mega_tvm.aot import add_run_functions
from mega_tvm.pipeline import lower_phase

SHORT, PAIR, LONG = (1, 4, 16), (2, 4, 16), (1, 4096, 64)
BIAS = np.arange(16, dtype="float32")
# The second lies behind 60 bytes of padding, and no entry reads it.
TENSORS = (np.arange(-3, 4, dtype="int8").reshape(7, 1)[:1], BIAS, np.array(2.5))


def _column_sums(shape, has_bias):
    """Return y[b, j] = bias[j % 16] + sum over t of x[b, t, j]: parallel over j, 16 lanes each."""
    batch, length, width = shape
    x = te.placeholder(shape, name="x")
    bias = te.placeholder((16,), name="bias")
    t = te.reduce_axis((0, length), name="t")
    total = te.compute((batch, width), lambda b, j: te.sum(x[b, t, j], t), name="total")
    if has_bias:
        y = te.compute((batch, width), lambda b, j: total[b, j] + bias[j % 16], name="y")
        sch = s_tir.Schedule(te.create_prim_func([x, bias, y]))
    else:
        y = te.compute((batch, width), lambda b, j: total[b, j] + 0, name="y")
        sch = s_tir.Schedule(te.create_prim_func([x, y]))
    block = sch.get_sblock("y")
    b, j = sch.get_loops(block)
    outer, inner = sch.split(j, [None, 16])
    sch.reorder(outer, b, inner)
    sch.parallel(outer)
    sch.vectorize(inner)
    total = sch.get_sblock("total")
    sch.compute_at(total, b)
    *_, inner, reduced = sch.get_loops(total)
    sch.reorder(reduced, inner)
    sch.vectorize(inner)
    return sch.mod["main"].without_attr("global_symbol")


def build_executable(tensors=TENSORS):
    """Compile y[b, j] = bias[j % 16] + sum over t of x[b, t, j] for each shape.

    The bias is the second tensor; without tensors, the sum alone is computed.
    """
    builder = relax.BlockBuilder()
    for name, shape in (("main", SHORT), ("main_b2", PAIR), ("long", LONG)):
        x = relax.Var("x", relax.TensorType(shape, "float32"))
        pool = relax.Var("tensors", relax.ObjectType())
        with builder.function(name, [x, pool] if tensors else [x]):
            with builder.dataflow():
                kernel = builder.add_func(_column_sums(shape, bool(tensors)), f"column_sums_{name}")
                out = relax.TensorType((shape[0], shape[2]), "float32")
                fetch = relax.call_pure_packed(
                    "vm.builtin.tuple_getitem",
                    pool,
                    relax.prim_value(1),
                    ty_args=[relax.TensorType(BIAS.shape, "float32")],
                )
                bias = [builder.emit(fetch)] if tensors else []
                y = builder.emit_output(relax.call_tir(kernel, [x, *bias], out))
            builder.emit_func_output(y)
    mod, _ = add_run_functions(builder.get(), list(tensors))
    return lower_phase(mod, tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"}))


def _entry(name, shape):
    batch, length, width = shape
    return {
        "name": name,
        "batch": batch,
        "seq_len": length,
        "input": {"shape": list(shape), "dtype": "float32"},
        "output": {"shape": [batch, width], "dtype": "float32"},
        "workspace": 64,
    }


MANIFEST = {
    "target": {
        "name": "x86-64-v3",
        "kind": "llvm",
        "mcpu": "x86-64-v3",
        "mattr": [],
        "cpu_features": ["avx2", "fma"],
    },
    "dtype": "float32",
    "entries": [_entry("main", SHORT), _entry("main_b2", PAIR), _entry("long", LONG)],
    "config": None,
    "weights": {"digest": None, "source": "a test"},
    "kernels": [],
    "parity": None,
}


def expected(x, bias=BIAS):
    return np.resize(bias, x.shape[2]) + np.asarray(x, np.float32).sum(axis=1)


def split(path):
    """Return a compiled model's body and manifest, by the format's description alone.

    The body is the library, zeros and the tensors.
    """
    data = Path(path).read_bytes()
    digest, length, magic = struct.unpack("<32sQ8s", data[-48:])
    text = data[-48 - length : -48]
    assert magic == b"MEGATVM1"
    assert hashlib.sha256(text).digest() == digest
    return data[: -48 - length], json.loads(text)


def join(body, text, magic=b"MEGATVM1"):
    return body + text + struct.pack("<32sQ8s", hashlib.sha256(text).digest(), len(text), magic)
