from __future__ import annotations

import io
import pickle
import sys
import zipfile

import pytest
import torch

from mega_tvm.weights import load_checkpoint, to_dotted
from reference.torch_mega import Mega, build
from tests.weights.builders import CONFIG, small_params, zip_file

PARAMS = small_params()
STATE = {to_dotted(name): torch.from_numpy(array) for name, array in PARAMS.items()}


def saved(content, **kwargs) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_state_dict(suffix, load_bytes, same_bits):
    checkpoint = load_bytes(saved(STATE), suffix)
    same_bits(checkpoint.params, PARAMS)
    assert checkpoint.format == "torch"


def test_module_round_trip(tmp_path, same_bits):
    module = build(CONFIG, seed=1)
    path = tmp_path / "model.pt"
    torch.save(module.state_dict(), path)
    checkpoint = load_checkpoint(path)
    again = Mega.from_params(checkpoint.config, checkpoint.params)
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_options_beside_the_state_dict(load_bytes):
    content = saved({"state_dict": STATE, "config": {"laplace_attention": True, "seq_len": 7}})
    checkpoint = load_bytes(content, ".pt")
    assert checkpoint.config.laplace_attention
    assert checkpoint.config.seq_len == 7
    assert checkpoint.option_sources["seq_len"] == "'config'"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, load_bytes, same_bits):
    stored = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    expected = {name: stored[to_dotted(name)].float().numpy() for name in PARAMS}
    same_bits(load_bytes(saved(stored), ".pt").params, expected)


def test_transposed_parameters_become_contiguous(load_bytes, same_bits):
    stored = {
        name: torch.nn.Parameter(tensor.t().contiguous().t() if tensor.ndim == 2 else tensor)
        for name, tensor in STATE.items()
    }
    same_bits(load_bytes(saved(stored), ".pt").params, PARAMS)


@pytest.mark.parametrize("in_the_zip_format", [True, False], ids=["zip", "legacy"])
def test_malicious_pickle_is_refused_and_not_run(in_the_zip_format, refuses, tmp_path):
    ran = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return ran.touch, ()

    content = saved(
        STATE | {"extra": Malicious()}, _use_new_zipfile_serialization=in_the_zip_format
    )
    refuses(content, ".pt", "PyTorch")
    assert not ran.exists()
    torch.load(io.BytesIO(content), weights_only=False)
    assert ran.exists()  # the pickle is armed: a loader that trusts it does run it


def bent_pickle(old, new):
    """Return STATE's file with bytes of its pickle replaced."""
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    assert any(old in content for name, content in members if name.endswith("data.pkl"))
    return zip_file([(n, c.replace(old, new) if n.endswith("data.pkl") else c) for n, c in members])


GAMMA = "final_norm.gamma"
SHAPE_4 = b"K\x04\x85"  # the tuple (4,)
FIRST = PARAMS["input_projection/kernel"].tobytes()
MALFORMED = {
    "not-a-zip": (b"\x80\x02hello", ["zip format"]),
    "bare-pickle": (pickle.dumps({"a": 1}), ["zip format"]),
    "truncated": (saved(STATE)[:-40], ["zip"]),
    "empty-pickle": (zip_file([("model/data.pkl", b"")]), ["PyTorch"]),
    "deep-pickle": (zip_file([("model/data.pkl", b"\x80\x02" + b"(" * 10**5)]), ["PyTorch"]),
    "compressed": (zip_file([("m/data.pkl", bytes(999))], zipfile.ZIP_DEFLATED), ["compressed"]),
    "shape-beyond-storage": (
        bent_pickle(SHAPE_4, b"J" + (1 << 28).to_bytes(4, "little") + b"\x85"),
        ["PyTorch"],
    ),
    "flipped-bit": (saved(STATE).replace(FIRST, FIRST[:-1] + b"?"), ["checksum"]),
    "list": (saved([1, 2]), ["list", "state_dict"]),
    "nested": (saved({"model": STATE}), ["'model'", "dict"]),
    "number": (saved(STATE | {"step": 3}), ["'step'", "int"]),
    "config-not-options": (saved({"state_dict": STATE, "config": [1]}), ["config"]),
    "config-of-tensors": (
        saved({"state_dict": STATE, "config": {"ema_dim": torch.zeros(2)}}),
        ["config"],
    ),
    "config-unknown": (saved({"state_dict": STATE, "config": {"heads": 1}}), ["heads"]),
    "expanded": (saved(STATE | {GAMMA: torch.zeros(1).expand(10**9)}), [GAMMA, "bytes"]),
    "sparse": (saved(STATE | {GAMMA: torch.ones(4).to_sparse()}), [GAMMA, "sparse"]),
    "meta": (saved(STATE | {GAMMA: torch.ones(4, device="meta")}), [GAMMA]),
    "integers": (saved(STATE | {GAMMA: torch.ones(4, dtype=torch.int32)}), ["int32"]),
    "twice": (saved(STATE | {"final_norm/gamma": torch.ones(4)}), ["twice"]),
    "infinite": (saved(STATE | {GAMMA: torch.tensor([0, 1, torch.inf, 2])}), ["[2]", "inf"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused(case, refuses):
    content, words = MALFORMED[case]
    refuses(content, ".pt", *words)


def test_missing_torch_names_the_extra(refuses, monkeypatch):
    content = saved(STATE)
    monkeypatch.setitem(sys.modules, "torch", None)
    refuses(content, ".pt", "pip install mega-tvm[compile]")
