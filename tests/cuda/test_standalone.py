"""A process without nvcc, without the compiler and without anything in PATH runs a library."""

from __future__ import annotations

from tests.cuda.devices import on_every_device
from tests.standalone import REFUSE_COMPILER, bare_environment

SCRIPT = (
    REFUSE_COMPILER
    + """
def refuse(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        raise RuntimeError(f"{event}: loading needs no other program")
sys.addaudithook(refuse)
library, x, y = sys.argv[1:]
model = mega_tvm.load(library)
np.save(y, model(np.load(x)))
print("nvrtc" in open("/proc/self/maps").read())
"""
)


@on_every_device
def test_nothing_is_compiled_where_it_runs() -> None:
    import subprocess
    import sys
    import tempfile
    from pathlib import Path

    import numpy as np

    import mega_tvm
    from tests.cuda import device
    from tests.cuda.emulator import activate
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd")
    environment = bare_environment("CUDA_", "LD_PRELOAD")
    if not device.is_real():
        environment["LD_PRELOAD"] = " ".join(map(str, activate.libraries()))
    with tempfile.TemporaryDirectory() as folder:
        x, y = Path(folder) / "x.npy", Path(folder) / "y.npy"
        np.save(x, golden.x)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path), str(x), str(y)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "False"
        np.testing.assert_array_equal(np.load(y), mega_tvm.load(path)(golden.x))
