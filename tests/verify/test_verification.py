from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from mega_tvm.errors import ArtifactError, WeightsError
from mega_tvm.verification import prepare, run
from mega_tvm.verify import VerificationError, verify_artifact
from mega_tvm.verify_inputs import INPUTS
from mega_tvm.weights import load_checkpoint, save_checkpoint
from tests.runtime.conftest import PRELUDE
from tests.verify.conftest import SEED_CONFIG, golden_npz

CASES = {
    "tiny": {},
    "tiny_laplace": {},
    "odd": {},
    "low_variance": {"layer_norm": "axon-0.8.0"},
}


def tampered(path, name, change):
    """Compare an artifact with weights of which one tensor was changed; digests are not checked."""
    subject = prepare(path)
    params = {**subject.params, name: change(subject.params[name])}
    return run(dataclasses.replace(subject, params=params))


@pytest.mark.parametrize("case", CASES)
def test_golden_model(artifact, case):
    report = verify_artifact(artifact(case, **CASES[case]))
    assert report.ok
    assert report.localization is None
    assert not report.skipped
    # Every kind of input, and the golden one against the oracle and the stored output.
    assert [c.case for c in report.checks] == [*INPUTS, f"{case}.npz", f"{case}.npz"]
    assert [c.against for c in report.checks[-2:]] == ["stored output", "oracle"]
    assert all(check.condition == 1 for check in report.checks)


def test_seeded_weights_and_every_entry(unfused):
    report = verify_artifact(unfused)
    assert report.ok
    assert {check.entry for check in report.checks} == {"main_b1_t1", "main_b1_t5"}
    assert len(report.checks) == 2 * len(INPUTS)


def test_explicit_weights_and_threads(tiny):
    report = verify_artifact(tiny, weights=golden_npz("tiny"), num_threads=2)
    assert report.ok


@pytest.mark.parametrize(
    ("case", "tensor", "layer"),
    [
        ("tiny", "input_projection/bias", "input_projection"),
        ("tiny", "mega_block_1_ema/mega_block_1_ema_alpha", "mega_block_1_ema_residual"),
        ("tiny", "mega_block_1_gattn_q/kernel", "mega_block_1_gattn_compute"),
        ("tiny", "mega_block_1_gattn_out/bias", "mega_block_1_attn_residual"),
        ("tiny", "mega_block_1_ffn_up/kernel", "mega_block_1_ffn_mul"),
        # The last block's attention is rewritten: its gate is a kernel behind it.
        ("tiny", "mega_block_2_gattn_v/bias", "mega_block_2_attn_residual"),
        ("tiny", "mega_block_2_ffn_down/kernel", "mega_block_2_ffn_residual"),
        ("tiny", "final_norm/gamma", "final_norm"),
        ("tiny_laplace", "mega_block_1_ema/mega_block_1_ema_alpha", "mega_block_1_ema_residual"),
        ("tiny_laplace", "mega_block_2_gattn_v/bias", "mega_block_2_gattn_compute"),
        ("tiny_laplace", "mega_block_2_ffn_down/kernel", "mega_block_2_ffn_residual"),
    ],
)
def test_names_the_first_wrong_layer(artifact, case, tensor, layer):
    report = tampered(artifact(case), tensor, lambda values: values * np.float32(1.02))
    assert not report.ok
    assert report.localization.first_wrong == layer
    assert report.localization.message == f"the first layer outside tolerance is {layer}"


def test_a_single_changed_weight_is_found(tiny):
    def change(values):
        values = values.copy()
        values[7, 5] += 1e-3
        return values

    report = tampered(tiny, "mega_block_2_ffn_down/kernel", change)
    assert report.localization.first_wrong == "mega_block_2_ffn_residual"


def test_last_block_is_compared_at_its_last_row(tiny):
    report = tampered(tiny, "final_norm/beta", lambda values: values + 1)
    shapes = {layer.name: layer.parity.shape for layer in report.localization.layers}
    assert shapes["mega_block_2_ema_residual"] == (2, 16, 64)
    assert shapes["mega_block_2_ffn_residual"] == (2, 1, 64)
    assert list(shapes) == [
        "input_projection",
        *(
            f"mega_block_1_{part}"
            for part in (
                "ema_residual",
                "gattn_compute",
                "attn_residual",
                "ffn_mul",
                "ffn_residual",
            )
        ),
        *(
            f"mega_block_2_{part}"
            for part in ("ema_residual", "attn_residual", "ffn_mul", "ffn_residual")
        ),
        "final_norm",
    ]


def test_kernels_that_are_no_layers_are_said_to_be(unfused):
    report = tampered(unfused, "final_norm/gamma", lambda values: values + 1)
    assert not report.ok
    assert report.localization.first_wrong is None
    assert "cannot be told" in report.localization.message
    assert "switched off: fuse_residual" in report.localization.message


def test_output_wrong_behind_right_layers(tiny, edited):
    # Without the final norm's kernel in the manifest, every layer before it is right.
    def hide(manifest):
        manifest["kernels"] = [
            k for k in manifest["kernels"] if not (k["spec"] or {}).get("affine")
        ]

    report = tampered(edited(tiny, hide), "final_norm/gamma", lambda values: values * 2)
    assert report.localization.layers
    assert report.localization.first_wrong is None
    assert "every layer that can be compared is within tolerance" in report.localization.message


def test_not_finite_fails(tiny):
    report = tampered(tiny, "final_norm/beta", lambda values: values + np.float32(np.nan))
    assert not report.ok
    assert report.to_dict()["checks"][0]["max_abs"] is None


def test_digest_mismatch_names_both(tiny, tmp_path):
    checkpoint = load_checkpoint(golden_npz("tiny"))
    params = {**checkpoint.params, "final_norm/beta": checkpoint.params["final_norm/beta"] + 1}
    save_checkpoint(tmp_path / "other.npz", checkpoint.config, params)
    with pytest.raises(VerificationError) as error:
        verify_artifact(tiny, weights=tmp_path / "other.npz")
    other = load_checkpoint(tmp_path / "other.npz").digest
    assert checkpoint.digest in str(error.value)
    assert other in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "file", "path": "/nowhere/model.nx"}, "/nowhere/model.nx.*give a checkpoint"),
        ({"kind": "memory"}, "weights in memory.*--weights"),
        ({"kind": "module", "class": "Classifier"}, r"module \(Classifier\).*when it is compiled"),
        ({"kind": "seed", "seed": 1}, "seed 1 has digest"),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_origin_of_weights(tiny, edited, change, says):
    path = edited(tiny, lambda manifest: manifest["weights"].update(change))
    with pytest.raises(VerificationError, match=says):
        verify_artifact(path)


def test_weights_in_memory_can_be_given(tiny, edited):
    path = edited(tiny, lambda manifest: manifest["weights"].update(kind="memory"))
    assert verify_artifact(path, weights=golden_npz("tiny")).ok


def test_module_without_a_mega(tiny, edited):
    with pytest.raises(VerificationError, match="module"):
        verify_artifact(edited(tiny, lambda manifest: manifest.update(config=None)))


def test_missing_files(tiny, tmp_path):
    with pytest.raises(VerificationError, match=r"none\.npz.*not there"):
        verify_artifact(tiny, weights=tmp_path / "none.npz")
    with pytest.raises(VerificationError, match=r"none\.npz"):
        verify_artifact(tiny, golden=[tmp_path / "none.npz"])
    with pytest.raises(ArtifactError, match=r"none\.so"):
        verify_artifact(tmp_path / "none.so")


def test_weights_of_another_model(tiny):
    with pytest.raises(WeightsError, match="contradicting option embed_dim"):
        verify_artifact(tiny, weights=golden_npz("odd"))


def test_unknown_dtype(tiny, edited):
    with pytest.raises(VerificationError, match="no tolerance is known for dtype int8"):
        verify_artifact(edited(tiny, lambda manifest: manifest.update(dtype="int8")))


def test_golden_file_with_a_wrong_output(tiny, tmp_path):
    x = np.load(golden_npz("tiny"))["__input__"]
    y = np.load(golden_npz("tiny"))["__output__"]
    np.savez(tmp_path / "g.npz", __input__=x, __output__=y + 1e-3)
    report = verify_artifact(tiny, golden=[tmp_path / "g.npz"])
    wrong = [(c.case, c.against) for c in report.checks if not c.parity.ok]
    assert wrong == [("g.npz", "stored output")]
    assert report.localization is None  # the artifact does what its weights say


def test_golden_file_is_compared_once(tiny):
    report = verify_artifact(tiny, golden=[golden_npz("tiny")])
    assert [c.case for c in report.checks].count("tiny.npz") == 2


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"__input__": np.zeros((2, 9, 32), "f4")}, "holds no array __output__"),
        (
            {"__input__": np.zeros((2, 9, 32), "f4"), "__output__": np.zeros((2, 64), "f4")},
            r"\[2, 9, 32\].*fit no entry; expected an input of shape \[2, 16, 32\]",
        ),
        (
            {"__input__": np.zeros((2, 16, 32), "i4"), "__output__": np.zeros((2, 64), "f4")},
            "__input__ is int32; expected float32",
        ),
    ],
    ids=["no_output", "other_shape", "integers"],
)
def test_unusable_golden_file(tiny, tmp_path, arrays, says):
    np.savez(tmp_path / "g.npz", **arrays)
    with pytest.raises(VerificationError, match=says):
        verify_artifact(tiny, golden=[tmp_path / "g.npz"])


def test_golden_file_that_is_none(tiny, tmp_path):
    np.save(tmp_path / "g.npy", np.zeros(3))
    (tmp_path / "g.npz").write_text("text")
    for name in ("g.npy", "g.npz"):
        with pytest.raises(VerificationError, match=r"cannot be read as a \.npz file"):
            verify_artifact(tiny, golden=[tmp_path / name])


def test_golden_input_beside_weights_that_fits_no_entry_is_left_out(unfused, edited, tmp_path):
    from mega_tvm.model_source import resolve_model

    params = resolve_model(SEED_CONFIG, seed=3).checkpoint.params
    extra = {"__input__": np.zeros((9, 9, 16), "f4"), "__output__": np.zeros((9, 16), "f4")}
    np.savez(tmp_path / "w.npz", **params, **extra)
    report = verify_artifact(unfused, weights=tmp_path / "w.npz")
    assert report.ok
    assert [s.case for s in report.skipped] == ["w.npz"]
    assert "no entry" in report.skipped[0].reason


def test_needs_neither_compiler_nor_torch(tiny):
    script = PRELUDE + (
        "import sys, dataclasses\n"
        "from mega_tvm.verification import prepare, run\n"
        "subject = prepare(sys.argv[1])\n"
        "params = {name: value * 1.02 for name, value in subject.params.items()}\n"
        "wrong = run(dataclasses.replace(subject, params=params))\n"
        "print(run(subject).ok, wrong.localization.first_wrong)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["True", "input_projection"], done.stderr
