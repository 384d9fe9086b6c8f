"""The benchmark on a GPU: what of it runs without one, on the CPU and by a made-up clock."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from mega_tvm.bench.__main__ import main
from mega_tvm.bench.cuda import CudaCeilings, measure_ceilings, run, why_no_device
from mega_tvm.bench.cuda_command import document, print_rows
from mega_tvm.bench.cuda_peers import PEERS

NO_DEVICE = why_no_device()


class Clock:
    """Runs each call, and says that every one took a microsecond longer than the one before."""

    def __init__(self) -> None:
        self.last = 0
        self.evicted = 0

    def times(self, call, count, before=None) -> list[int]:
        for _ in range(min(count, 2)):
            if before is not None:
                before()
                self.evicted += 1
            call()
        self.last += 1000
        return [self.last] * count


@pytest.mark.skipif(NO_DEVICE is None, reason="there is a CUDA device here")
def test_no_device_is_refused_plainly(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cuda"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "--device cuda: " in said and "--device cpu measures on this machine's CPU" in said
    assert str(NO_DEVICE) in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory"], "--memory is for --device cpu"),
        (["--csv", "run.csv"], "--csv is for --device cpu"),
        (["--threads", "2"], "--threads is for --device cpu"),
        (["--peers", "jax"], "unknown peer 'jax' of --device cuda; known: mega_tvm, torch-eager"),
        (["--workloads", "huge"], "unknown workload 'huge'"),
    ],
    ids=["memory", "csv", "threads", "peer", "workload"],
)
def test_options_that_do_not_fit(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cuda", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_rows_of_a_run(tiny) -> None:
    """On the CPU: every model that can run there answers right, and the report holds all."""
    ceilings, clock = CudaCeilings(fma_gflops=1e4, fp16_gflops=1e5, copy_gb_per_s=1e3), Clock()
    rows = run(
        [tiny()],
        ["mega_tvm", "torch-eager", "torch-eager-graph"],
        clock,
        ceilings,
        lambda workload, peer: f"measure {workload.name} {peer}",
        rounds=3,
        cold=True,
        device="cpu",
    )
    timed = {row.name: row for row in rows if row.warm}
    assert list(timed) == ["mega_tvm", "torch-eager", "torch-eager, pruned"]
    for row in timed.values():
        assert row.error < 2e-5 and row.cold and row.fma_share > 0 and row.copy_share > 0
        assert row.warm.calls == 3 * 50
    assert clock.evicted > 0
    # The contestant that goes first changes from round to round: so does who is fastest.
    assert len({row.warm.minimum_us for row in timed.values()}) == 3
    skipped = [row for row in rows if row.skipped]
    if not torch.cuda.is_available():  # a graph needs a GPU, and its row says so
        assert [row.peer for row in skipped] == ["torch-eager-graph"] * 2
    out = io.StringIO()
    print_rows(Console(file=out, width=160), rows, ceilings, True)
    said = out.getvalue()
    assert "cold median us" in said and "fastest peer hand-pruned: torch-eager" in said
    assert "ceilings: fp32 product 10000 GFLOP/s" in said and "measure tiny mega_tvm" in said
    assert all(f"{row.name} skipped: " in said for row in skipped)
    data = document(rows, ceilings, {"gpu": "none"})
    assert data["rows"][0]["warm"]["minimum_us"] > 0 and data["ceilings"]["copy_gb_per_s"] == 1e3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_a_half_type(tiny, dtype) -> None:
    """PyTorch's module in that type, on the CPU; rates are shares of the tensor cores' peak."""
    ceilings = CudaCeilings(fma_gflops=1e4, fp16_gflops=1e5, copy_gb_per_s=1e3)
    rows = {
        kind: run(
            [tiny()], ["torch-eager"], Clock(), ceilings, lambda w, p: "",
            rounds=1, cold=False, dtype=kind, device="cpu",
        )[0]
        for kind in ("float32", dtype)
    }  # fmt: skip
    row, wide = rows[dtype], rows["float32"]
    assert row.form == dtype and row.warm and 2e-5 < row.error < 8e-2
    assert row.fma_share == pytest.approx(row.gflops / 1e5)
    assert row.weight_gb_per_s * row.warm.minimum_us == pytest.approx(
        wide.weight_gb_per_s * wide.warm.minimum_us / 2
    )
    out = io.StringIO()
    print_rows(Console(file=out, width=160), [row], ceilings, False)
    assert "of fp16 peak" in out.getvalue()


def test_a_half_type_is_for_gpus(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--dtype", "bfloat16"])
    assert stopped.value.code == 2
    assert "--dtype bfloat16 is for --device cuda" in capsys.readouterr().err


def test_a_wrong_peer_is_skipped(tiny, monkeypatch) -> None:
    def wrong(workload, params, pruned, device, dtype):
        return lambda x: torch.ones(workload.batch, workload.config.hidden_size)

    monkeypatch.setitem(PEERS, "wrong", wrong)
    ceilings = CudaCeilings(1.0, 1.0, 1.0)
    rows = run(
        [tiny()], ["wrong"], Clock(), ceilings, lambda w, p: "", rounds=1, cold=False, device="cpu"
    )
    assert all("wrong output, error" in row.skipped and row.warm is None for row in rows)


def test_ceilings_are_rates() -> None:
    """64-cubed products and a copy of a MiB, at 1, 2, .. us a batch of runs."""
    found = measure_ceilings(Clock(), "cpu", size=64, bytes_=1 << 20)
    assert found.copy_gb_per_s == pytest.approx(2 * (1 << 20) / 1e-6 / 1e9)
    assert found.fma_gflops == pytest.approx(2 * 64**3 / 2e-6 / 1e9)
    assert found.fp16_gflops == pytest.approx(2 * 64**3 / 3e-6 / 1e9)


@pytest.mark.gpu
@pytest.mark.skipif(NO_DEVICE is not None, reason=f"no CUDA device here: {NO_DEVICE}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_on_a_gpu(dtype, tmp_path, capsys) -> None:
    path = tmp_path / "run.json"
    arguments = [
        "--dtype",
        dtype,
        "--workloads",
        "small",
        "--rounds",
        "3",
        "--cold",
        "--json",
        str(path),
    ]
    assert main(["--device", "cuda", *arguments]) == 0
    said = capsys.readouterr().out
    assert " skipped: " not in said
    assert all(name in said for name in PEERS)
