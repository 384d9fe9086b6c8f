"""Loading a model and its first call in a fresh process, from the file that one would deploy.

Each library starts from what it loads fastest: a compiled library, an ONNX file, OpenVINO's own
format. Importing the library is told apart: a process does it once, for any number of models.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .peers import Form, Model
from .peers.plain import Plan
from .workloads import Params, Workload

TIMEOUT_S = 300

# What a child runs. Each part is timed; `path`, `threads` and `settings` are the request's.
_CHILD = """
import json, sys, time
import numpy as np
path, array, threads, settings, imports, load = json.loads(sys.argv[1])
x, names = np.load(array), {"path": path, "threads": threads, "settings": settings}
times = [time.perf_counter()]
for part in (imports, load):
    exec(part, names)
    times.append(time.perf_counter())
for _ in range(2):
    y = names["call"](x)
    times.append(time.perf_counter())
assert np.isfinite(y).all()
print(json.dumps([1e3 * (b - a) for a, b in zip(times, times[1:])]))
"""

_MEGA_TVM = (
    "import mega_tvm; load = mega_tvm.load",
    "call = load(path, num_threads=threads)",
)
_ONNXRUNTIME = (
    "import onnxruntime as ort",
    """
options = ort.SessionOptions()
options.intra_op_num_threads = threads
options.inter_op_num_threads = 1
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
call = lambda x: session.run(None, {"x": x})[0]
""",
)
_OPENVINO = (
    "import openvino as ov",
    """
request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
def call(x):
    request.set_input_tensor(ov.Tensor(x, shared_memory=True))
    request.infer()
    return request.get_output_tensor().data.copy()
""",
)


@dataclasses.dataclass(frozen=True)
class FirstCall:
    """Milliseconds of a fresh process, of the run whose loading and first call took least."""

    import_ms: float
    load_ms: float
    first_ms: float
    second_ms: float


def _save_mega_tvm(model: Model, plan: Plan, params: Params, folder: Path) -> Path:
    library: Path = model.library  # type: ignore[attr-defined]
    return library


def _save_onnx(model: Model, plan: Plan, params: Params, folder: Path) -> Path:
    from .peers.plain_onnx import build

    path = folder / "onnxruntime.onnx"
    path.write_bytes(build(plan, params).SerializeToString())
    return path


def _save_openvino(model: Model, plan: Plan, params: Params, folder: Path) -> Path:
    import openvino as ov

    from .peers.openvino import build_model

    path = folder / "openvino.xml"
    ov.save_model(build_model(plan, params), path, compress_to_fp16=False)
    return path


_Save = Callable[[Model, Plan, Params, Path], Path]
LOADERS: Mapping[str, tuple[_Save, str, str]] = {
    "mega_tvm": (_save_mega_tvm, *_MEGA_TVM),
    "onnxruntime": (_save_onnx, *_ONNXRUNTIME),
    "openvino": (_save_openvino, *_OPENVINO),
}


def measure_first_call(
    peer: str,
    model: Model,
    workload: Workload,
    params: Params,
    form: Form,
    pruned: bool,
    threads: int,
    x: npt.NDArray[Any],
    folder: Path,
    repeats: int,
) -> FirstCall:
    """Save a model, and load and call it in processes that inherit this one's environment.

    Parameters
    ----------
    peer : str
        A name in `LOADERS`.
    model : callable
        As the peer prepared it in this process.
    workload, params, form, pruned, threads
        What it was prepared from.
    x : array
        The input.
    folder : Path
        Takes the files.
    repeats : int
        Processes; files are in the system's cache after the first.

    Returns
    -------
    FirstCall

    Raises
    ------
    RuntimeError
        If a process fails; the message is the end of what it wrote.
    """
    save, imports, load = LOADERS[peer]
    path = save(model, Plan.of(workload, form, pruned), params, folder)
    array = folder / "x.npy"
    np.save(array, x)
    settings: dict[str, Any] = {}
    if peer == "openvino":
        from .peers.openvino import settings as openvino_settings

        settings = openvino_settings(threads)
    request = json.dumps([str(path), str(array), threads, settings, imports, load])
    best: FirstCall | None = None
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, request],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        if done.returncode != 0:
            raise RuntimeError(f"first call of {peer}: {done.stderr.strip()[-400:]}")
        found = FirstCall(*json.loads(done.stdout.splitlines()[-1]))
        if best is None or found.load_ms + found.first_ms < best.load_ms + best.first_ms:
            best = found
    assert best is not None
    return best
