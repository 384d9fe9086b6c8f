"""A tuning log: what was measured for one target, in a directory.

| file | holds |
|---|---|
| ``database_workload.json``, ``database_tuning_record.json`` | MetaSchedule's JSON database |
| ``metadata.json`` | format, target, SHA-256 of the two files, and the tunings that wrote it |
| ``.lock`` | held by who writes |

TVM's own ``JSONDatabase`` reads such a directory, but it appends without a lock, refuses a file
with one damaged line, and knows nothing of targets and versions. Here a writer takes the lock,
reads what others wrote meanwhile, and replaces each file by a rename; a reader needs no lock, since
the digests in the metadata tell it whether it saw a change half done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

from ..errors import TuningError
from .record import KernelKey, Record, TargetKey, read_workload

FORMAT_VERSION = 1
WORKLOADS, RECORDS, METADATA = (
    "database_workload.json",
    "database_tuning_record.json",
    "metadata.json",
)
LOCK_SECONDS = 60.0
# A writer renames three files in about a millisecond.
_READS, _READ_PAUSE_S = 5, 0.02


@dataclasses.dataclass(frozen=True)
class TuningLog:
    """A log as it was read.

    Parameters
    ----------
    directory : Path
    target : TargetKey
    records : tuple of Record
        In the order in which they were measured.
    runs : tuple of dict
        The tunings that wrote it: date, device, versions, seed, threads, trials.
    problems : tuple of str
        What was skipped, and why: one line each.
    """

    directory: Path
    target: TargetKey
    records: tuple[Record, ...] = ()
    runs: tuple[dict[str, Any], ...] = ()
    problems: tuple[str, ...] = ()


def is_log(directory: Path) -> bool:
    """Whether a directory holds a log."""
    return (directory / METADATA).is_file()


def read_target(directory: Path) -> TargetKey:
    """Return a log's target without reading its records.

    Raises
    ------
    TuningError
        If there is no log, or its metadata are damaged.
    """
    return _target(directory, _metadata(directory))


def read_log(directory: Path) -> TuningLog:
    """Read a log; damaged lines are skipped and named.

    Raises
    ------
    TuningError
        If there is no log, its metadata are damaged, or it is of a newer format.
    """
    problems: list[str] = []
    for attempt in range(_READS):
        metadata = _metadata(directory)
        workload_text, record_text = _bytes(directory / WORKLOADS), _bytes(directory / RECORDS)
        if metadata["sha256"] == _digests(workload_text, record_text):
            break
        if attempt + 1 < _READS:
            time.sleep(_READ_PAUSE_S)
    else:
        problems.append(f"{directory}: the files are not as they were written (SHA-256 differs)")
    workloads = dict(_workloads(directory / WORKLOADS, workload_text, problems))
    target = _target(directory, metadata)
    records = tuple(_records(directory / RECORDS, record_text, workloads, target, problems))
    return TuningLog(directory, target, records, tuple(metadata["runs"]), tuple(problems))


def update_log(
    directory: Path, target: TargetKey, change: Callable[[TuningLog], TuningLog]
) -> TuningLog:
    """Change a log, or begin one, while no one else writes to it.

    Parameters
    ----------
    directory : Path
        Made where it does not exist.
    target : TargetKey
    change : callable
        Takes the log as it is now, returns it as it shall be.

    Raises
    ------
    TuningError
        If it cannot be read or written, is of another target, or another process holds the lock.
    """
    with _locked(directory):
        log = read_log(directory) if is_log(directory) else TuningLog(directory, target)
        if log.target != target:
            raise TuningError(
                f"{directory}: is a log of target {log.target}, not of {target}; give each target "
                "a directory of its own"
            )
        log = change(log)
        _write(log)
    return log


def append(
    directory: Path, target: TargetKey, records: Iterable[Record], run: dict[str, Any]
) -> None:
    """Add records to a log; ``run`` replaces what it told of itself before, by its ``id``."""

    def change(log: TuningLog) -> TuningLog:
        runs = [*(other for other in log.runs if other.get("id") != run["id"]), run]
        return dataclasses.replace(log, records=(*log.records, *records), runs=tuple(runs))

    update_log(directory, target, change)


def merge_logs(sources: Sequence[Path], directory: Path) -> TuningLog:
    """Put logs of one target together into a directory; what is there already stays.

    Raises
    ------
    TuningError
        As `update_log`; all sources are read before anything is written.
    """
    logs = [read_log(source) for source in sources]

    def change(log: TuningLog) -> TuningLog:
        everything = [log, *logs]
        records = {(r.workload_json, r.record_json): r for each in everything for r in each.records}
        runs = {str(run.get("id")): run for each in everything for run in each.runs}
        return dataclasses.replace(
            log,
            records=tuple(records.values()),
            runs=tuple(runs.values()),
            problems=tuple(problem for each in everything for problem in each.problems),
        )

    for log in logs[1:]:
        if log.target != logs[0].target:
            raise TuningError(
                f"{log.directory} is a log of target {log.target}, {logs[0].directory} one of "
                f"{logs[0].target}: logs of different targets cannot be merged"
            )
    return update_log(directory, logs[0].target, change)


def keep_best(directory: Path) -> TuningLog:
    """Drop all records but the best of each kernel, thread count and set of versions.

    A confirmed record is better than one that is not.
    """

    def change(log: TuningLog) -> TuningLog:
        best: dict[tuple[Any, ...], Record] = {}
        for record in log.records:
            case = (record.key, record.threads, record.made_by)
            if record.seconds is not None and _rank(record) > _rank(best.get(case)):
                best[case] = record
        return dataclasses.replace(log, records=tuple(best.values()))

    return update_log(directory, read_target(directory), change)


def best_confirmed(records: Iterable[Record]) -> Record | None:
    """Return the confirmed record that is furthest ahead of the hand schedule."""
    confirmed = [r for r in records if r.hand_seconds is not None and r.seconds is not None]
    return max(confirmed, key=lambda record: record.gain, default=None)


def _rank(record: Record | None) -> tuple[float, float]:
    if record is None or record.seconds is None:
        return (-1.0, 0.0)
    return (record.gain, -record.seconds)


def _workloads(
    path: Path, text: bytes, problems: list[str]
) -> Iterator[tuple[int, tuple[KernelKey, str]]]:
    for index, line in enumerate(_split(text)):
        try:
            yield index, (read_workload(line), line)
        except Exception as error:  # TVM raises errors of many kinds
            problems.append(_damaged(path, index, error))


def _records(
    path: Path,
    text: bytes,
    workloads: dict[int, tuple[KernelKey, str]],
    target: TargetKey,
    problems: list[str],
) -> Iterator[Record]:
    for index, line in enumerate(_split(text)):
        try:
            workload, body = json.loads(line)
            if workload not in workloads:
                raise ValueError(f"its workload, line {workload + 1}, is missing or damaged")
            key, workload_json = workloads[workload]
            record = Record.parse(key, workload_json, json.dumps(body))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            problems.append(_damaged(path, index, error))
            continue
        if record.target != target:
            problems.append(f"{path}:{index + 1}: made for another target ({record.target})")
            continue
        yield record


def _damaged(path: Path, index: int, error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0][:100]
    return f"{path}:{index + 1}: damaged ({type(error).__name__}: {reason})"


def _split(text: bytes) -> list[str]:
    return [line for line in text.decode("utf-8", "replace").split("\n") if line.strip()]


def _metadata(directory: Path) -> dict[str, Any]:
    path = directory / METADATA
    if not path.is_file():
        raise TuningError(f"{directory}: holds no tuning log (there is no {METADATA})")
    try:
        metadata = json.loads(_bytes(path))
        version = metadata["format_version"]
        if not isinstance(metadata["sha256"], dict) or not isinstance(metadata["runs"], list):
            raise TypeError("sha256 must be an object and runs a list")
    except (ValueError, TypeError, LookupError) as error:
        raise TuningError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise TuningError(
            f"{path}: format {version!r}; this version of mega_tvm reads format {FORMAT_VERSION}"
        )
    return dict(metadata)


def _target(directory: Path, metadata: dict[str, Any]) -> TargetKey:
    try:
        return TargetKey.from_json(metadata["target"])
    except (TypeError, LookupError, AttributeError) as error:
        raise TuningError(f"{directory / METADATA}: damaged (no target: {error})") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise TuningError(f"{path}: cannot be read: {error.strerror}") from error


def _write(log: TuningLog) -> None:
    workloads = dict.fromkeys(record.workload_json for record in log.records)
    places = {line: index for index, line in enumerate(workloads)}
    lines = [f"[{places[r.workload_json]}, {r.record_json}]" for r in log.records]
    texts = {
        WORKLOADS: "".join(f"{line}\n" for line in workloads).encode(),
        RECORDS: "".join(f"{line}\n" for line in lines).encode(),
    }
    metadata = {
        "format_version": FORMAT_VERSION,
        "target": log.target.to_json(),
        "sha256": _digests(*texts.values()),
        "runs": list(log.runs),
    }
    texts[METADATA] = (json.dumps(metadata, indent=2) + "\n").encode()
    for name, text in texts.items():
        aside = log.directory / f".{name}.{os.getpid()}"
        try:
            aside.write_bytes(text)
            os.replace(aside, log.directory / name)
        except OSError as error:
            raise TuningError(f"{log.directory / name}: cannot be written: {error}") from error
        finally:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(directory / ".lock", timeout=LOCK_SECONDS):
            yield
    except filelock.Timeout:
        raise TuningError(
            f"{directory}: another process has been writing to the log for {LOCK_SECONDS:.0f} s; "
            f"if none is running, remove {directory / '.lock'}"
        ) from None
    except OSError as error:
        raise TuningError(f"{directory}: cannot be written: {error}") from error


def _digests(workloads: bytes, records: bytes) -> dict[str, str]:
    texts = {WORKLOADS: workloads, RECORDS: records}
    return {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
