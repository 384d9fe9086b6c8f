"""Whether this process can run a compiled model: its CPU, and the versions of what it needs."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from typing import Any

from mega_tvm.errors import IncompatibleArtifactError


def check_cpu(name: str, manifest: Mapping[str, Any]) -> None:
    """Refuse a model for another CPU; ask the system for AMX tiles where one needs them.

    Raises
    ------
    IncompatibleArtifactError
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise IncompatibleArtifactError(
            f"{name}: expected an x86-64 CPU, found {platform.machine()}; "
            "compile the model for this machine"
        )
    needed = manifest["target"]["cpu_features"]
    found = _cpu_flags()
    if missing := [feature for feature in needed if feature not in found]:
        raise IncompatibleArtifactError(
            f"{name}: compiled for {manifest['target']['name']}, but this CPU lacks "
            f"{', '.join(missing)}; compile the model for this machine (--target native there), "
            "or for a target that has less"
        )
    if "amx_tile" in needed:
        _request_amx(name)


def _cpu_flags() -> set[str]:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def _request_amx(name: str) -> None:
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), for the whole process.
    arguments = (ctypes.c_long(number) for number in (158, 0x1023, 18))
    if ctypes.CDLL(None, use_errno=True).syscall(*arguments) != 0:
        raise IncompatibleArtifactError(
            f"{name}: uses AMX tiles, which this kernel does not grant "
            f"({os.strerror(ctypes.get_errno())}); Linux 5.16 or newer is needed"
        )


def check_version(name: str, package: str, expected: str, found: str) -> None:
    """Refuse a model that was compiled with another release of a package.

    Raises
    ------
    IncompatibleArtifactError
    """
    # Releases that differ in their first two numbers may differ in their binary interface.
    if expected.split(".")[:2] != found.split(".")[:2]:
        raise IncompatibleArtifactError(
            f"{name}: compiled with {package} {expected}, found {found}; "
            f"install {package}=={expected}, or compile the model again"
        )
