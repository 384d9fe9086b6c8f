"""One measured candidate, as a line of MetaSchedule's database.

A record is MetaSchedule's own `TuningRecord`, so that TVM reads a log as well. What its format has
no field for stands in its trace, as annotations of the root block, which scheduling ignores:

``tuning.made_by``
    The versions, see `mega_tvm.tuning.versions`.
``tuning.hand_ps``
    Only on a confirmed record, which a compile may use: the hand schedule's time in picoseconds,
    measured turn by turn with it.
``tuning.error``
    Only on a candidate that failed: why.

The target's ``num-cores`` is the number of threads that ran. A GPU's target has none, and counts as
one; its ``arch`` is that of the device.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tvm import tirx
from tvm.s_tir.meta_schedule.arg_info import ArgInfo
from tvm.s_tir.meta_schedule.database import TuningRecord, Workload
from tvm.target import Target

from schedules.common.spec import OP_ATTR, SPEC_ATTR
from schedules.common.storage import STORAGE_ATTR

from ..cuda.target import CudaTarget
from ..targets import CpuTarget
from .space import Space, read_trace
from .versions import made_by

# What MetaSchedule writes as the time of a candidate that failed.
FAILED = 1e10
_MADE_BY, _HAND, _ERROR = "tuning.made_by", "tuning.hand_ps", "tuning.error"


class KernelKey(NamedTuple):
    """What a kernel is, as its PrimFunc's attributes state it.

    ``storage`` is the types of its tensors as JSON, empty where all are float32.
    """

    op: str
    spec: str
    storage: str


def kernel_key(func: tirx.PrimFunc) -> KernelKey:
    """Return the key of a naive kernel."""
    storage = str(func.attrs[STORAGE_ATTR]) if STORAGE_ATTR in func.attrs else ""
    return KernelKey(str(func.attrs[OP_ATTR]), str(func.attrs[SPEC_ATTR]), storage)


@dataclasses.dataclass(frozen=True)
class TargetKey:
    """What a record's target must have in common with a compile's.

    Of a GPU ``mcpu`` is the arch, such as ``sm_90``: a record holds for the one that it was
    measured on, and so for no target of several.
    """

    kind: str
    mcpu: str
    mattr: tuple[str, ...]

    @classmethod
    def of(cls, target: CpuTarget | CudaTarget) -> TargetKey:
        """Return a resolved target's key."""
        if isinstance(target, CudaTarget):
            return cls("cuda", "+".join(f"sm_{arch}" for arch in target.archs), ())
        return cls("llvm", target.mcpu, tuple(sorted(target.mattr)))

    @classmethod
    def from_json(cls, target: Mapping[str, Any]) -> TargetKey:
        """Return the key of a target as JSON."""
        mattr = target.get("mattr", ())
        if target["kind"] == "cuda" and "arch" in target:  # TVM's
            return cls("cuda", str(target["arch"]), ())
        return cls(str(target["kind"]), str(target["mcpu"]), tuple(sorted(map(str, mattr))))

    def to_json(self) -> dict[str, Any]:
        """Return the key as JSON."""
        return {"kind": self.kind, "mcpu": self.mcpu, "mattr": list(self.mattr)}

    def __str__(self) -> str:
        return " ".join([self.mcpu, *self.mattr])


@dataclasses.dataclass(frozen=True)
class Record:
    """A measured candidate of a kernel.

    Parameters
    ----------
    workload_json : str
        The naive kernel, a line of the database of workloads.
    record_json : str
        The rest, as MetaSchedule writes it.
    key : KernelKey
    decisions : mapping of str to int
    seconds : float or None
        Time of one call; None if the candidate failed.
    target : TargetKey
    threads : int
    made_by : str
    hand_seconds : float or None
        Of a confirmed record: the hand schedule's time, measured beside it.
    error : str or None
        Why the candidate failed.
    """

    workload_json: str
    record_json: str
    key: KernelKey
    decisions: Mapping[str, int]
    seconds: float | None
    target: TargetKey
    threads: int
    made_by: str
    hand_seconds: float | None
    error: str | None

    @classmethod
    def make(
        cls,
        space: Space,
        decisions: Mapping[str, int],
        target: Target,
        seconds: float | None,
        *,
        hand_seconds: float | None = None,
        error: str | None = None,
    ) -> Record:
        """Return the record of a candidate; ``target`` has the threads as its ``num-cores``."""
        func = space.workload["main"]
        key = kernel_key(func)
        sch = space.schedule(decisions)
        root = sch.get_sblock("root")
        sch.annotate(root, _MADE_BY, made_by(key.op, str(target.kind.name)))
        if hand_seconds is not None:
            sch.annotate(root, _HAND, round(hand_seconds * 1e12))
        if error is not None:
            sch.annotate(root, _ERROR, _plain(error))
        workload = Workload(space.workload)
        run_secs = [FAILED if seconds is None else seconds]
        info = ArgInfo.from_prim_func(func)
        record = TuningRecord(sch.trace, workload, run_secs, target, info).as_json()
        return cls.parse(key, json.dumps(workload.as_json()), json.dumps(record))

    @classmethod
    def parse(cls, key: KernelKey, workload_json: str, record_json: str) -> Record:
        """Read a record.

        Raises
        ------
        ValueError, TypeError, LookupError
            If it is damaged.
        """
        trace, run_secs, target, _ = json.loads(record_json)
        decisions, notes = read_trace(trace)
        seconds = min(map(float, run_secs))
        if not seconds > 0:
            raise ValueError(f"a time of {seconds} s")
        hand, error = notes.get(_HAND), notes.get(_ERROR)
        return cls(
            workload_json,
            record_json,
            key,
            decisions,
            seconds if seconds < FAILED else None,
            TargetKey.from_json(target),
            1 if target["kind"] == "cuda" else int(target["num-cores"]),
            str(notes[_MADE_BY]).strip('"'),
            None if hand is None else int(hand) / 1e12,
            None if error is None else str(error).strip('"'),
        )

    @property
    def gain(self) -> float:
        """How many times as fast as the hand schedule a confirmed record is."""
        return (self.hand_seconds or 0.0) / (self.seconds or FAILED)

    def load(self) -> TuningRecord:
        """Return MetaSchedule's record."""
        workload = Workload.from_json(json.loads(self.workload_json))
        return TuningRecord.from_json(json.loads(self.record_json), workload)


def read_workload(line: str) -> KernelKey:
    """Return the key of the kernel in a line of the database of workloads.

    Raises
    ------
    Exception
        If it is damaged: TVM raises errors of many kinds.
    """
    return kernel_key(Workload.from_json(json.loads(line)).mod["main"])


def _plain(text: str) -> str:
    """Return text that TVM's trace can quote: one line of printable ASCII without quotes."""
    line = " ".join(text.split()).replace('"', "'").replace("\\", "/")
    return line.encode("ascii", "replace").decode()[:200]
