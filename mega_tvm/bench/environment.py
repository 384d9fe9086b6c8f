"""The process a benchmark runs in: threads pinned before any library is loaded, and the machine."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARKER = "MEGA_TVM_BENCH_THREADS"
# Above this load another process takes time from a measured one.
QUIET_LOAD = 0.3
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def thread_environment(threads: int) -> dict[str, str]:
    """Return the variables that fix every library's thread count to ``threads``."""
    count = str(threads)
    names = (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "TVM_NUM_THREADS",
        "NPROC",  # XLA's pool, under its older and its newer name
        "PJRT_NPROC",
    )
    found = dict.fromkeys(names, count)
    found["TVM_BIND_THREADS"] = "0"  # affinity is set here, once for all libraries
    flags = os.environ.get("XLA_FLAGS", "")
    if threads == 1 and "xla_cpu_multi_thread_eigen" not in flags:
        flags += " --xla_cpu_multi_thread_eigen=false"
    found["XLA_FLAGS"] = flags.strip()
    found["JAX_PLATFORMS"] = "cpu"
    found[MARKER] = count
    return found


def pin(threads: int, arguments: Sequence[str], module: str = "mega_tvm.bench") -> None:
    """Bind this process to ``threads`` cores and restart it with `thread_environment`.

    Most libraries read their thread count when they are loaded, and this package's parents may
    have loaded some: a fresh process is the one reliable way. Returns in the restarted process.

    Parameters
    ----------
    threads : int
    arguments : sequence of str
        The command line of ``python -m MODULE``, given to the new process.
    module : str

    Raises
    ------
    ValueError
        If there are fewer cores.
    """
    if os.environ.get(MARKER) == str(threads):
        return
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise ValueError(f"--threads must be 1 to {len(cores)} on this machine; got {threads}")
    os.sched_setaffinity(0, cores[:threads])
    environment = {**os.environ, **thread_environment(threads)}
    command = [sys.executable, "-m", module, *arguments]
    os.execve(sys.executable, command, environment)


def hardware() -> dict[str, Any]:
    """Describe the machine: model name, the features that matter, cores, caches, memory, load."""
    info = _proc_fields("/proc/cpuinfo")
    flags = info.get("flags", "").split()
    memory = _proc_fields("/proc/meminfo").get("MemTotal", "0 kB")
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "features": [name for name in FEATURES if name in flags],
        "cores": os.cpu_count(),
        "cores_used": sorted(os.sched_getaffinity(0)),
        "l3_bytes": last_level_cache(),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "loadavg": [round(value, 2) for value in os.getloadavg()],
    }


def last_level_cache() -> int:
    """Return the size of the largest cache in bytes, or 32 MiB where the system does not tell."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KMG])", file.read_text().strip()):
            sizes.append(int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=32 << 20)


def _proc_fields(path: str) -> dict[str, str]:
    """Return the ``name : value`` lines of a file of /proc, the first of each name."""
    found: dict[str, str] = {}
    try:
        text = Path(path).read_text()
    except OSError:
        return found
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found
