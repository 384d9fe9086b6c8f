from __future__ import annotations

import json

import numpy as np
import pytest

from mega_tvm import verification, verify
from tests.verify.conftest import golden_npz

CHECK_KEYS = {
    "case", "entry", "against", "ok", "finite", "max_abs", "max_abs_allowed", "relative_rms",
    "relative_rms_allowed", "worst", "actual", "expected", "condition", "reason",
}  # fmt: skip


@pytest.fixture
def wrong_weights(monkeypatch):
    """Let the command take weights with one changed tensor for the artifact's own."""
    load = verification.load_checkpoint

    def changed(path, **options):
        checkpoint = load(path, **options)
        checkpoint.params["mega_block_2_ffn_down/kernel"][3, 5] += 0.01
        return checkpoint

    monkeypatch.setattr(verification, "load_checkpoint", changed)

    def digest(params):
        return load(golden_npz("tiny")).digest

    monkeypatch.setattr(verification, "params_digest", digest)


def test_success(tiny, tmp_path, capsys):
    result = tmp_path / "out.json"
    assert verify.main([str(tiny), "--json", str(result), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.index("config.hidden_size") < out.index("1/8 random 0") < out.index("max abs")
    assert "all checks are within tolerance" in out
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]  # nothing was left beside it
    report = json.loads(result.read_text())
    assert set(report) == {"schema", "ok", "settings", "checks", "skipped", "localization"}
    assert (report["schema"], report["ok"], report["localization"]) == (1, True, None)
    assert report["settings"]["config.laplace_attention"] is False
    assert report["settings"]["golden"] == [str(golden_npz("tiny"))]
    assert all(set(check) == CHECK_KEYS for check in report["checks"])
    assert all(check["max_abs"] <= check["max_abs_allowed"] for check in report["checks"])


def test_failure(tiny, wrong_weights, tmp_path, capsys):
    result = tmp_path / "out.json"
    assert verify.main([str(tiny), "--json", str(result)]) == 1
    out = capsys.readouterr().out
    assert "the first layer outside tolerance is mega_block_2_ffn_residual" in out
    assert "9 of 9 checks" not in out  # the stored output still agrees
    report = json.loads(result.read_text())
    assert report["ok"] is False
    found = report["localization"]
    assert (found["first_wrong"], found["entry"]) == ("mega_block_2_ffn_residual", "main")
    by_name = {layer["layer"]: layer["ok"] for layer in found["layers"]}
    assert by_name["mega_block_1_ffn_residual"] is True
    assert by_name["mega_block_2_ffn_residual"] is False


def test_json_on_standard_output(tiny, capsys):
    assert verify.main([str(tiny), "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ok"] is True
    assert "all checks are within tolerance" in captured.err


def test_stored_output_alone_differs(tiny, tmp_path, capsys):
    with np.load(golden_npz("tiny")) as stored:
        np.savez(
            tmp_path / "[b]g.npz",  # brackets are no markup
            __input__=stored["__input__"],
            __output__=-stored["__output__"],
        )
    assert verify.main([str(tiny), "--golden", str(tmp_path / "[b]g.npz")]) == 1
    out = capsys.readouterr().out
    assert "[b]g.npz" in out
    assert "agrees with the oracle, but not with a stored output" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--weights", "none.nx"], "none.nx"),
        (["--weights", "{odd}"], "contradicting option embed_dim"),
        (["--golden", "none.npz"], "none.npz"),
        (["--json", "no/such/dir/out.json"], "its directory is not there"),
    ],
    ids=["no_weights", "other_weights", "no_golden", "no_directory"],
)
def test_errors(tiny, capsys, arguments, says):
    odd = str(golden_npz("odd"))
    assert verify.main([str(tiny), *(a.replace("{odd}", odd) for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert says in captured.err
    assert not captured.out  # told before any work


def test_not_an_artifact(capsys):
    assert verify.main([str(golden_npz("tiny"))]) == 2
    assert "expected a compiled model" in capsys.readouterr().err


def test_json_that_cannot_be_written(tiny, tmp_path, capsys):
    (tmp_path / "out.json").mkdir()
    assert verify.main([str(tiny), "--json", str(tmp_path / "out.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_threads(tiny, threads, capsys):
    with pytest.raises(SystemExit) as stop:
        verify.main([str(tiny), "--threads", threads])
    assert stop.value.code == 2
    assert "positive integer" in capsys.readouterr().err
