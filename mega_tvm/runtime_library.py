"""Finds and loads ``libtvm_runtime.so``, and sets how many threads a call uses.

TVM keeps one thread pool per calling thread. It starts at the first parallel loop that may use
more than one thread, and its size is fixed then. So a pool starts with one thread for each CPU of
the process, of which a call uses as many as its model asks for; the others sleep. A call that asks
for one thread runs its loops in place and starts no pool.

A fork copies the pool of the forking thread, but not its workers, and TVM cannot give that pool up:
its destructor, and its reset, wait for ever on a condition variable where they slept. So in a
forked child a *stand-in*, a thread with a pool of its own, runs such calls, and the child ends
without destructors.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import ctypes
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm_ffi

from mega_tvm.errors import IncompatibleArtifactError, MegaError
from mega_tvm.permissions import warn_if_writable_by_all

LIBRARY = "libtvm_runtime.so"
VARIABLE = "MEGA_TVM_RUNTIME"

# tvm::runtime::threading::{SetMaxConcurrency(int), NumThreads()}: exported, without a packed form.
# TVM_NUM_THREADS would do the same for the whole process and for every child of it.
_SET_MAX_CONCURRENCY = "_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"
_NUM_THREADS = "_ZN3tvm7runtime9threading10NumThreadsEv"
# ThreadGroup::AffinityMode: as many threads as CPUs are named.
_SPECIFY_THREAD_SHARE_ALL_CORE = -3
# Yields of a worker before it sleeps: measured 1 ms, which spans the serial gaps within a call.
# TVM's default, 300000, keeps a core busy for over 150 ms after each call. Waking takes some 30 us.
_SPIN_COUNT = "2000"
# Runs ``(function, *arguments)`` in another thread, and returns its result.
StandIn = Callable[..., Any]


class RuntimeLibrary:
    """The loaded runtime library.

    Parameters
    ----------
    path : Path
    version : str or None
        TVM's version, where it is known.
    """

    def __init__(self, path: Path, version: str | None) -> None:
        self.path = path
        self.version = version
        try:
            library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise IncompatibleArtifactError(
                f"{path}: TVM's runtime library cannot be loaded: {error}"
            ) from error
        try:
            # PyDLL keeps the GIL: this call is one store, made before each run.
            set_max_concurrency = ctypes.PyDLL(str(path))[_SET_MAX_CONCURRENCY]
            num_threads = library[_NUM_THREADS]
        except AttributeError as error:
            raise IncompatibleArtifactError(
                f"{path}: not the runtime library of TVM 0.27: {error}"
            ) from error
        set_max_concurrency.argtypes = (ctypes.c_int,)
        set_max_concurrency.restype = None
        num_threads.argtypes = ()
        num_threads.restype = ctypes.c_int
        self._set_max_concurrency = set_max_concurrency
        self._num_threads = num_threads
        self._configure = tvm_ffi.get_global_func("runtime.config_threadpool")
        self._local = threading.local()
        self._ends_early = False
        os.register_at_fork(after_in_child=self._after_fork)
        atexit.register(self._at_exit)

    def use_threads(self, count: int) -> StandIn | None:
        """Let the calling thread's next parallel loops use this many threads.

        Returns
        -------
        callable or None
            What must run those loops in place of the calling thread, if there is such a thing:
            in a forked process whose pool has lost its workers.

        Raises
        ------
        MegaError
            If its pool was started smaller by other code.
        """
        if count > 1:
            state = getattr(self._local, "state", None)
            if state is not None and state[0] != os.getpid():
                return self._stand_in(count)
            if state is None or state[1] != count:
                self._resize_pool(count)
        # Always, since another user of TVM in this thread may have changed it.
        self._set_max_concurrency(count)
        return None

    def _stand_in(self, count: int) -> StandIn:
        """Return what runs a function in a thread whose pool this process started."""
        if getattr(self._local, "stand_in_of", None) != os.getpid():  # a parent's is gone too
            self._local.executor = concurrent.futures.ThreadPoolExecutor(1, "mega_tvm-stand-in")
            self._local.stand_in_of = os.getpid()
        executor: concurrent.futures.Executor = self._local.executor

        def run(function: Callable[..., Any], *arguments: Any) -> Any:
            self.use_threads(count)
            return function(*arguments)

        def stand_in(*call: Any) -> Any:
            try:
                future = executor.submit(run, *call)
            except RuntimeError as error:  # no more threads, or the interpreter ends
                raise MegaError(
                    f"this process was forked by a thread that had run a model on several threads; "
                    f"another thread to run it cannot start: {error}; use num_threads=1"
                ) from error
            return future.result()

        return stand_in

    def _resize_pool(self, count: int) -> None:
        # Read when the pool starts. Bound threads would also widen the caller's own CPU set.
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", _SPIN_COUNT)
        self._set_max_concurrency(max(count, available_cpus()))
        self._num_threads()  # starts this thread's pool
        self._configure(_SPECIFY_THREAD_SHARE_ALL_CORE, count, [str(i) for i in range(count)])
        if (found := self._num_threads()) != count:
            raise MegaError(
                f"expected a pool of {count} threads, found {found}: other code had started this "
                "thread's TVM pool before; call the model from a new thread"
            )
        self._local.state = (os.getpid(), count)

    def _after_fork(self) -> None:
        self._ends_early = hasattr(self._local, "state")

    def _at_exit(self) -> None:
        """End a forked child that would hang in its pool's destructor."""
        if not self._ends_early:
            return
        if "logging" in sys.modules:  # its handler was registered before, and is due after this one
            sys.modules["logging"].shutdown()
        with contextlib.suppress(OSError, ValueError):  # closed streams
            sys.stdout.flush()
            print(
                "mega_tvm: this process ends with status 1 in place of a hang: it was forked by a "
                "thread that had run a model on several threads. End it by os._exit, as "
                "multiprocessing does, or run the model only in other threads than the one that "
                "forks (warmup does)",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)  # the interpreter does not tell which status was meant


_loaded: RuntimeLibrary | None = None
_lock = threading.Lock()
# Another thread may hold it when this one forks.
os.register_at_fork(
    before=lambda: _lock.acquire(),
    after_in_parent=lambda: _lock.release(),
    after_in_child=lambda: _lock.release(),
)


def runtime_library(beside: Path) -> RuntimeLibrary:
    """Return the process's runtime library, loaded at the first call.

    One that is loaded already, by ``import tvm`` for instance, is used as it is: a second copy
    would register every function twice. Else the order is the variable ``MEGA_TVM_RUNTIME`` (a
    file, or a directory that holds it), the artifact's directory, and an installed ``apache-tvm``.

    Parameters
    ----------
    beside : Path
        The artifact's directory.

    Raises
    ------
    IncompatibleArtifactError
        If none is found, or it cannot be used.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            found = _mapped()
            if found is None:
                found = _find(beside)
                advice = f"set {VARIABLE} to another copy"
                warn_if_writable_by_all(found[0], os.stat(found[0]), advice)
            _loaded = RuntimeLibrary(*found)
        return _loaded


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def _mapped() -> tuple[Path, str | None] | None:
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            # address permissions offset device inode path
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and os.path.basename(fields[5]) == LIBRARY:
                return Path(fields[5]), getattr(sys.modules.get("tvm"), "__version__", None)
    return None


def _find(beside: Path) -> tuple[Path, str | None]:
    if named := os.environ.get(VARIABLE):
        path = Path(os.path.abspath(named))
        if path.is_dir():
            path /= LIBRARY
        if not path.is_file():
            raise IncompatibleArtifactError(
                f"{VARIABLE} names {named!r}, where there is no {LIBRARY}"
            )
        return path, None
    if (beside / LIBRARY).is_file():
        return beside / LIBRARY, None
    if (installed := installed_runtime()) is not None:
        return installed
    raise IncompatibleArtifactError(
        f"TVM's runtime library, {LIBRARY}, is not found: {VARIABLE} is not set, there is none in "
        f"{beside}, and apache-tvm is not installed here; copy it from tvm/lib of the apache-tvm "
        f"0.27 wheel to the model's directory, or set {VARIABLE} to its path"
    )


def installed_runtime() -> tuple[Path, str] | None:
    """Return the runtime library of an installed ``apache-tvm``, and its version."""
    # Metadata, since `import tvm` takes seconds and loads the compiler.
    try:
        distribution = importlib.metadata.distribution("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(f"tvm/lib/{LIBRARY}")))
    return (path, distribution.version) if path.is_file() else None
