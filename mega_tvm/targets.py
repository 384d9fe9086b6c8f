"""The names of targets, and what a machine must have to run what is compiled for them."""

from __future__ import annotations

import dataclasses
import functools
import os

from tvm.target import Target

from .cuda.archs import runs_on
from .cuda.lowering import device_arch, device_present
from .cuda.target import CudaTarget, resolve_cuda
from .errors import TargetError

# Microarchitecture levels and processors whose features archspec knows, by LLVM's name of them.
_ARCHSPEC_NAMES = {
    "x86-64-v3": "x86_64_v3",
    "x86-64-v4": "x86_64_v4",
    "sapphirerapids": "sapphirerapids",
}
# archspec's name of a feature, where the kernel has another one.
_KERNEL_NAMES = {"sse3": "pni", "lzcnt": "abm"}
# Features beyond a level that LLVM may use, by the kernel's name of the flag and LLVM's.
_EXTRA_FEATURES = {
    "avx512_bf16": "avx512bf16",
    "avx512_vnni": "avx512vnni",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512_fp16": "avx512fp16",
    "amx_tile": "amx-tile",
    "amx_bf16": "amx-bf16",
    "amx_int8": "amx-int8",
    "avx_vnni": "avxvnni",
}


@dataclasses.dataclass(frozen=True)
class CpuTarget:
    """A resolved CPU target.

    Parameters
    ----------
    name : str
        As the user gave it.
    mcpu : str
        LLVM's name of the processor or level.
    mattr : tuple of str
        Features beyond it, as LLVM writes them (``+avx512bf16``).
    cpu_features : tuple of str
        Flags that a CPU must show in ``/proc/cpuinfo`` to run the code, sorted.
    num_cores : int
        Cores that schedules plan for.
    """

    name: str
    mcpu: str
    mattr: tuple[str, ...]
    cpu_features: tuple[str, ...]
    num_cores: int

    def tvm_target(self) -> Target:
        """Return TVM's target."""
        options: dict[str, object] = {
            "kind": "llvm",
            "mcpu": self.mcpu,
            "num-cores": self.num_cores,
            # TVM tells LLVM that accesses through different buffers never alias. In a run function
            # (`mega_tvm.aot`) kernels are inlined and their buffers share one workspace: LLVM then
            # reads what a kernel before had left there. Without these hints nothing got slower
            # (the default model: 2805 us both ways).
            "cl-opt": ["-enable-tbaa:bool=0"],
        }
        if self.mattr:
            options["mattr"] = list(self.mattr)
        return Target(options)

    def describe(self) -> dict[str, object]:
        """Return the manifest's field about the target."""
        return {
            "name": self.name,
            "kind": "llvm",
            "mcpu": self.mcpu,
            "mattr": list(self.mattr),
            "cpu_features": list(self.cpu_features),
        }


def resolve_target(name: str) -> CpuTarget | CudaTarget:
    """Resolve a target's name.

    Parameters
    ----------
    name : str
        ``native`` takes this machine's features from its CPU flags, never from a model name, which
        virtual machines are known to misreport. ``cuda`` and what starts with it: see
        `resolve_cuda`.

    Raises
    ------
    TargetError
        If the name is unknown, or this machine is below x86-64-v3.
    """
    cores = os.cpu_count() or 1
    if name == "native":
        flags = _machine_flags()
        level = next(
            (mcpu for mcpu in ("x86-64-v4", "x86-64-v3") if _features(mcpu) <= flags), None
        )
        if level is None:
            missing = sorted(_features("x86-64-v3") - flags)
            raise TargetError(
                "target 'native' needs at least x86-64-v3 (AVX2 and FMA); this machine's CPU lacks "
                + ", ".join(missing)
            )
        extra = sorted(flags & set(_EXTRA_FEATURES) - _features(level))
        return CpuTarget(
            name=name,
            mcpu=level,
            mattr=tuple(f"+{_EXTRA_FEATURES[flag]}" for flag in extra),
            cpu_features=tuple(sorted(_features(level) | set(extra))),
            num_cores=cores,
        )
    if name in _ARCHSPEC_NAMES:
        return CpuTarget(name, name, (), tuple(sorted(_features(name))), cores)
    if name.startswith("cuda"):
        return resolve_cuda(name)
    known = ", ".join(["native", *_ARCHSPEC_NAMES, "cuda"])
    raise TargetError(f"unknown target {name!r}; known targets: {known}")


def with_threads(target: CpuTarget | CudaTarget, threads: int) -> CpuTarget | CudaTarget:
    """Return a target whose schedules plan for so many threads of a CPU."""
    if isinstance(target, CudaTarget):
        return target
    return dataclasses.replace(target, num_cores=threads)


@functools.cache
def _features(mcpu: str) -> set[str]:
    import archspec.cpu

    features = archspec.cpu.TARGETS[_ARCHSPEC_NAMES[mcpu]].features
    return {_KERNEL_NAMES.get(feature, feature) for feature in features}


@functools.cache
def _machine_flags() -> set[str]:
    import cpuinfo

    return set(cpuinfo.get_cpu_info().get("flags", ()))


def machine_runs(target: CpuTarget | CudaTarget) -> bool:
    """Whether this machine's CPU or GPU has all that a target's code needs."""
    if isinstance(target, CudaTarget):
        return device_present() and runs_on(device_arch(), target.archs, target.ptx)
    return set(target.cpu_features) <= _machine_flags()
