"""The GPU that a tuning measures on, here or in a fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm

from ..cuda.lowering import device_arch, device_present
from ..cuda.target import CudaTarget, resolve_cuda, target_of_arch
from ..errors import TuningError

if TYPE_CHECKING:
    from .worker_main import Tracker

_ASKING_LIMIT_S = 60


def tuned_target(name: str, tracker: Tracker | None) -> CudaTarget:
    """Resolve the target of a tuning, which is of one arch: that of the device.

    Parameters
    ----------
    name : str
        ``cuda``, whatever the device is; or ``cuda-sm_90`` and the like.
    tracker : Tracker or None
        The fleet, or None for this machine.

    Raises
    ------
    TuningError
        If there is no device, or it is of another arch.
    TargetError
        If the name is no CUDA target's, or the device is not supported.
    """
    named = resolve_cuda(name)
    if name != "cuda" and len(named.archs) > 1:
        raise TuningError(
            f"target {name} is of several archs, and a kernel is measured on one device: tune for "
            f"one of them, such as cuda-sm_{named.archs[-1]}, into a log of its own"
        )
    if tracker is not None:
        # Of a named target each server is checked when it is asked for.
        return target_of_arch(_arch_of_fleet(tracker)) if name == "cuda" else named
    if not device_present():
        raise TuningError(
            "no CUDA device here; give --tracker HOST:PORT --key K, the address of a TVM tracker "
            "and the key of servers on machines with a GPU, or tune on such a machine"
        )
    here = target_of_arch(device_arch())
    if name != "cuda" and named.archs != here.archs:
        raise TuningError(
            f"target {name}: this machine's GPU ({tvm.cuda(0).device_name}) is "
            f"sm_{device_arch()}: tune for {here.name}, or on a fleet with --tracker and --key"
        )
    return here


class UnfitServerError(RuntimeError):
    """A server cannot run candidates of this target, whichever they are."""


def check_server(session: Any, target: CudaTarget) -> None:
    """Refuse a server that has no GPU, or one of another arch.

    Raises
    ------
    UnfitServerError
    """
    arch = _arch_of(session)
    if target_of_arch(arch).archs != target.archs:
        raise UnfitServerError(
            f"the RPC server's GPU is sm_{arch}, and candidates are {target.name}"
        )


def _arch_of(session: Any) -> int:
    device = session.cuda(0)
    if not device.exist:
        raise UnfitServerError("the RPC server has no GPU")
    return int(str(device.compute_version).replace(".", ""))


def _arch_of_fleet(tracker: Tracker) -> int:
    where = f"tracker {tracker.host}:{tracker.port}"
    try:
        devices = tvm.rpc.connect_tracker(tracker.host, tracker.port)
        keys = {str(server["key"]) for server in devices.summary()["server_info"]}
        if f"server:{tracker.key}" not in keys:
            found = ", ".join(sorted(key.removeprefix("server:") for key in keys)) or "none"
            raise TuningError(
                f"{where} knows no server with key {tracker.key!r} (its keys: {found}); start one "
                f"on a machine with a GPU: python -m tvm.exec.rpc_server --tracker "
                f"{tracker.host}:{tracker.port} --key {tracker.key}"
            )
        return _arch_of(devices.request(tracker.key, session_timeout=_ASKING_LIMIT_S))
    except (RuntimeError, OSError) as error:
        raise TuningError(
            f"{where}: no GPU is to be had by key {tracker.key!r}: {error}; name the arch, such "
            "as --target cuda-sm_90, to tune without asking"
        ) from error
