"""``python -m mega_tvm.bench`` as a user runs it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mega_tvm.bench.__main__ import main


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mega_tvm.bench", *arguments], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("bench")
    outputs = [f"--{kind}={folder / f'run.{kind}'}" for kind in ("json", "csv")]
    done = bench(
        "--workloads=small",
        "--seq-len=5",
        "--peers=torch-eager,onnxruntime",
        "--rounds=2",
        "--turn-ms=1",
        "--limit=1",
        "--cold",
        "--memory",
        *outputs,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_help_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--threads" in bench("--help").stdout
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "t1024-laplace: B=1 T=1024 laplace" in listed and "peer openvino:" in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "tensorflow"], "unknown peer 'tensorflow'"),
        (["--workloads", "huge"], "unknown workload 'huge'"),
        (["--threads", "4096"], "--threads must be 1 to"),
        (["--json", "/nonexistent/run.json"], "no such directory: /nonexistent"),
    ],
    ids=["peer", "workload", "threads", "folder"],
)
def test_wrong_arguments_are_refused_by_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_output_reproduces_rows(finished: tuple[str, Path]) -> None:
    text, _ = finished
    assert "machine: " in text and "ceilings, 1 threads" in text
    assert (
        "python -m mega_tvm.bench --workloads small --peers mega_tvm,torch-eager --threads 1 "
        "--seq-len 5 --rounds 2 --turn-ms 1 --limit 1 --cold --memory"
    ) in text


def test_json_holds_the_run(finished: tuple[str, Path]) -> None:
    data = json.loads((finished[1] / "run.json").read_text())
    assert data.keys() == {
        "schema",
        "time",
        "hardware",
        "versions",
        "settings",
        "ceilings",
        "rows",
        "ratios",
    }
    assert data["schema"] == 1 and data["versions"]["torch"]
    assert data["hardware"]["cores_used"] == [min(data["hardware"]["cores_used"])]
    eager = [row for row in data["rows"] if row["peer"] == "torch-eager"]
    assert [row["pruned"] for row in eager] == [False, True]
    for row in eager:
        assert row["workload"] == "small-B1-T5" and not row["skipped"]
        assert 0 < row["warm"]["minimum_us"] <= row["warm"]["median_us"]
        assert row["cold"]["calls"] >= 2 and row["error"] < 2e-5
        assert row["memory"]["call_bytes"] >= 0 and row["fma_share"] > 0


def test_csv_has_hardware_in_each_row(finished: tuple[str, Path]) -> None:
    with (finished[1] / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert all(row["cpu"] and row["versions"] and row["fma_gflops"] for row in rows)
    assert float(rows[0]["warm_minimum_us"]) > 0


@pytest.mark.parametrize("lengths", [(5,), (2, 3, 4)], ids=["bars", "lines"])
def test_plot_is_drawn(finished: tuple[str, Path], lengths: tuple[int, ...]) -> None:
    pytest.importorskip("matplotlib")
    from mega_tvm.bench.plot import plot

    data = json.loads((finished[1] / "run.json").read_text())
    base, rows = data["settings"]["workloads"][0], data["rows"]
    data["settings"]["workloads"] = [{**base, "name": f"T{T}", "seq_len": T} for T in lengths]
    data["rows"] = [{**row, "workload": f"T{T}"} for T in lengths for row in rows]
    path = finished[1] / f"{len(lengths)}.png"
    plot(path, data)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_plot_without_times_is_refused() -> None:
    pytest.importorskip("matplotlib", reason="extra: bench")
    from mega_tvm.bench.plot import plot

    with pytest.raises(ValueError, match="nothing to plot"):
        plot(Path("unused.png"), {"settings": {"workloads": []}, "rows": []})
