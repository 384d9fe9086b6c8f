"""Peak memory of one contestant's calls, taken in a process of its own.

1. The child prepares the model, gives freed memory back, and maps in every page of every mapped
   file, so that neither library code nor weights in a library count as memory of the calls.
2. It resets the kernel's peak (``/proc/self/clear_refs``), makes a few calls, and reports the peak
   over the resident memory before them: what a call needs beyond the loaded model.

Run as ``python -m mega_tvm.bench.memory``, with a request in JSON on standard input.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from reference import MegaConfig

from .peers import PEERS, Form
from .workloads import Workload, random_input, random_params

CALLS = 3
TIMEOUT_S = 900
_MADV_POPULATE_READ = 22
_RESET_PEAK = "5"


def peak_memory(
    peer: str, workload: Workload, threads: int, pruned: bool, form: Form
) -> dict[str, int]:
    """Measure one contestant in a child process that inherits this one's threads.

    Returns
    -------
    dict
        ``call_bytes``: peak during calls over the loaded model; ``loaded_bytes``: resident memory
        of the loaded model over the same process before it was prepared, libraries included.

    Raises
    ------
    RuntimeError
        If the child fails; the message is the end of what it wrote.
    """
    request = {
        "peer": peer,
        "workload": workload.to_dict(),
        "threads": threads,
        "pruned": pruned,
        "form": dataclasses.asdict(form),
    }
    done = subprocess.run(
        [sys.executable, "-m", "mega_tvm.bench.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode != 0:
        raise RuntimeError(f"memory of {peer}: {done.stderr.strip()[-400:] or done.returncode}")
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure(request: dict[str, Any]) -> dict[str, int]:
    fields = dict(request["workload"])
    fields["config"] = MegaConfig.from_dict(fields["config"])
    workload = Workload(**fields)
    x, params = random_input(workload), random_params(workload.config)
    before = _status("VmRSS")
    model = PEERS[request["peer"]].prepare(
        workload, params, request["threads"], request["pruned"], Form(**request["form"])
    )
    _settle()
    loaded = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    for _ in range(CALLS):
        model(x)
    peak = _status("VmHWM")
    return {"call_bytes": max(0, peak - loaded), "loaded_bytes": loaded - before}


def _settle() -> None:
    gc.collect()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.malloc_trim(0)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, _, inode, *_ = line.split()
        if inode != "0" and permissions.startswith("r"):
            begin, end = (int(part, 16) for part in span.split("-"))
            # A refusal (a device, an old kernel) leaves those pages to the calls: no harm.
            libc.madvise(begin, end - begin, _MADV_POPULATE_READ)


def _status(field: str) -> int:
    """Return a field of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
