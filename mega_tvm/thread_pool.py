"""Sets how many threads a call uses, and keeps TVM's pools alive across forks.

TVM keeps one thread pool per calling thread. It starts at the first parallel loop that may use
more than one thread, and its size is fixed then. So a pool starts with one thread for each CPU of
the process, of which a call uses as many as its model asks for; the others sleep. A call that asks
for one thread runs its loops in place and starts no pool.

A fork copies the pool of the forking thread, but not its workers. TVM can reset a pool, and
destroys it when its thread ends; in the child both wait for ever: destroying the condition variable
on which a worker slept waits until that worker has left, and it never will. So the child resets the
pool at once, while the forking thread is alone, and meanwhile TVM's library destroys condition
variables by doing nothing (glibc's hold nothing that could leak), and takes mutexes without waiting
for a worker that may have held one. The child's pool is then like its parent's, and it ends like
any process.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import tvm_ffi

from mega_tvm.errors import IncompatibleArtifactError, MegaError
from mega_tvm.import_slots import import_slots, replaced

# tvm::runtime::threading::{SetMaxConcurrency(int), NumThreads(), ResetThreadPool()}: exported,
# without a packed form. TVM_NUM_THREADS would do the first for the whole process and its children.
_SET_MAX_CONCURRENCY = "_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"
_NUM_THREADS = "_ZN3tvm7runtime9threading10NumThreadsEv"
_RESET = "_ZN3tvm7runtime9threading15ResetThreadPoolEv"
# What a pool without workers must not call: ~condition_variable of libstdc++, or, where that is
# linked in, what it calls; and the lock of a queue.
_DESTROY = ("_ZNSt18condition_variableD1Ev", "pthread_cond_destroy")
_LOCK = "pthread_mutex_lock"
_NOTHING = "pthread_condattr_destroy"  # glibc's does nothing and returns 0
# ThreadGroup::AffinityMode: as many threads as CPUs are named.
_SPECIFY_THREAD_SHARE_ALL_CORE = -3
# Yields of a worker before it sleeps: measured 1 ms, which spans the serial gaps within a call.
# TVM's default, 300000, keeps a core busy for over 150 ms after each call. Waking takes some 30 us.
_SPIN_COUNT = "2000"


class ThreadPools:
    """The pools of TVM's runtime library: each calling thread has one.

    Parameters
    ----------
    path : Path
        The loaded library.

    Raises
    ------
    IncompatibleArtifactError
        If it lacks what TVM 0.27 has.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # PyDLL keeps the GIL: the first is one store, made before each run; at a fork nothing else
        # may run.
        library = ctypes.PyDLL(str(path))
        try:
            self._set_max_concurrency = library[_SET_MAX_CONCURRENCY]
            self._num_threads = ctypes.CDLL(str(path))[_NUM_THREADS]
            self._reset = library[_RESET]
        except AttributeError as error:
            raise IncompatibleArtifactError(
                f"{path}: not the runtime library of TVM 0.27: {error}"
            ) from error
        self._set_max_concurrency.argtypes = (ctypes.c_int,)
        self._set_max_concurrency.restype = None
        self._num_threads.argtypes = self._reset.argtypes = ()
        self._num_threads.restype = ctypes.c_int
        self._reset.restype = None
        self._configure = tvm_ffi.get_global_func("runtime.config_threadpool")
        self._local = threading.local()  # its `count`: threads that the pool is set to
        self._slots: list[int] = []
        os.register_at_fork(after_in_child=self._after_fork)

    def use(self, count: int) -> None:
        """Let the calling thread's next parallel loops use this many threads.

        Raises
        ------
        MegaError
            If its pool was started smaller by other code.
        """
        if count > 1 and getattr(self._local, "count", None) != count:
            self._resize(count)
        # Always, since another user of TVM in this thread may have changed it.
        self._set_max_concurrency(count)

    def _resize(self, count: int) -> None:
        self._find_slots()
        # Read when the pool starts. Bound threads would also widen the caller's own CPU set.
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", _SPIN_COUNT)
        self._set_max_concurrency(max(count, available_cpus()))
        self._num_threads()  # starts this thread's pool
        self._local.count = 0
        self._configure(_SPECIFY_THREAD_SHARE_ALL_CORE, count, [str(i) for i in range(count)])
        if (found := self._num_threads()) != count:
            raise MegaError(
                f"expected a pool of {count} threads, found {found}: other code had started this "
                "thread's TVM pool before; call the model from a new thread"
            )
        self._local.count = count

    def _find_slots(self) -> None:
        """Find what `_after_fork` replaces, before there is a pool that needs it."""
        if self._slots:
            return
        address = ctypes.cast(self._reset, ctypes.c_void_p).value or 0
        slots = import_slots(address, (*_DESTROY, _LOCK))
        if _LOCK not in slots or len(slots) < 2:
            raise IncompatibleArtifactError(
                f"{self._path}: not the runtime library of TVM 0.27: its thread pool would hang in "
                "forked processes; use num_threads=1, or the library of the apache-tvm wheel"
            )
        self._slots = list(slots.values())

    def _after_fork(self) -> None:
        """Give the child's one thread workers again, if it had some."""
        if not hasattr(self._local, "count"):
            return
        del self._local.count
        nothing = ctypes.cast(ctypes.CDLL(None)[_NOTHING], ctypes.c_void_p).value or 0
        with replaced(self._slots, nothing):
            self._reset()


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))
