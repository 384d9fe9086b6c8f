"""The names of CUDA targets."""

from __future__ import annotations

import dataclasses
import re

from tvm.target import Target

from ..errors import TargetError
from .archs import runs_on

# GPU generations with cp.async and tensor cores for float16 and bfloat16, by compute capability.
ARCHS = (80, 86, 87, 89, 90, 100, 120)
# What plain `cuda` holds machine code for: A100, RTX 30, RTX 40 and L4, H100. Newer GPUs compile
# the PTX when the file is first loaded there.
DEFAULT_ARCHS = (80, 86, 89, 90)
DEFAULT_PTX = 90

# Every GPU has these, or more of them.
_MAX_THREADS = 1024
_SHARED_MEMORY = 48 * 1024


@dataclasses.dataclass(frozen=True)
class CudaTarget:
    """A resolved CUDA target.

    Parameters
    ----------
    name : str
        As the user gave it.
    archs : tuple of int
        Compute capabilities to compile machine code for, ascending: 80 is ``sm_80``.
    ptx : int or None
        Compute capability of the PTX that newer GPUs compile when they load the file.
    """

    name: str
    archs: tuple[int, ...]
    ptx: int | None

    def tvm_target(self) -> Target:
        """Return TVM's target; CUDA C is generated for the lowest arch, and runs on all."""
        return Target(
            {
                "kind": "cuda",
                "arch": f"sm_{self.archs[0]}",
                "max_threads_per_block": _MAX_THREADS,
                "max_shared_memory_per_block": _SHARED_MEMORY,
                "thread_warp_size": 32,
            },
            host={"kind": "llvm"},
        )

    def describe(self) -> dict[str, object]:
        """Return the manifest's field about the target."""
        return {
            "name": self.name,
            "kind": "cuda",
            "mcpu": None,
            "mattr": [],
            "cpu_features": [],
            "archs": [f"sm_{arch}" for arch in self.archs],
            "cuda_graph": True,
            "ptx": None if self.ptx is None else f"compute_{self.ptx}",
        }


def resolve_cuda(name: str) -> CudaTarget:
    """Resolve the name of a CUDA target: ``cuda``, ``cuda-sm_90``, ``cuda-sm_80+sm_90``.

    Raises
    ------
    TargetError
        If the name is of another form, or names an arch that is not known.
    """
    if name == "cuda":
        return CudaTarget(name, DEFAULT_ARCHS, DEFAULT_PTX)
    known = ", ".join(f"sm_{arch}" for arch in ARCHS)
    form = f"expected cuda, or cuda- and archs joined by +, such as cuda-sm_80+sm_90, of {known}"
    if not (match := re.fullmatch(r"cuda-(sm_\d+(?:\+sm_\d+)*)", name)):
        raise TargetError(f"unknown target {name!r}: {form}")
    archs = [int(part.removeprefix("sm_")) for part in match[1].split("+")]
    if unknown := [arch for arch in archs if arch not in ARCHS]:
        raise TargetError(f"target {name!r} names sm_{unknown[0]}, which is not supported: {form}")
    if len(set(archs)) < len(archs):
        raise TargetError(f"target {name!r} names an arch twice: {form}")
    return CudaTarget(name, tuple(sorted(archs)), None)


def target_of_arch(arch: int) -> CudaTarget:
    """Return the target whose machine code a GPU of this compute capability runs best.

    Raises
    ------
    TargetError
        If no code that can be compiled runs there.
    """
    fit = [known for known in ARCHS if runs_on(arch, [known], None)]
    if not fit:
        supported = ", ".join(f"sm_{known}" for known in ARCHS)
        raise TargetError(f"a GPU of sm_{arch} is not supported; supported: {supported}")
    return resolve_cuda(f"cuda-sm_{max(fit)}")
