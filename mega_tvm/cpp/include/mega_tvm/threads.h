// How many threads a call uses: TVM keeps one pool per calling thread.

#ifndef MEGA_TVM_THREADS_H_
#define MEGA_TVM_THREADS_H_

#include <sched.h>
#include <tvm/ffi/tvm_ffi.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "artifact.h"

namespace tvm::runtime::threading {
// libtvm_runtime.so exports them.
void SetMaxConcurrency(int value);
int NumThreads();
}  // namespace tvm::runtime::threading

namespace mega_tvm {

// CPUs that this process may use.
inline int available_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

// Lets the calling thread's next parallel loops use this many threads.
inline void use_threads(int threads) {
  namespace threading = tvm::runtime::threading;
  struct Pool {
    pid_t process = 0;
    int threads = 0;
  };
  thread_local Pool pool;
  if (threads > 1 && (pool.threads != threads || pool.process != getpid())) {
    if (pool.threads && pool.process != getpid()) {
      throw Error(
          "this process was forked by a thread that had run a model on several threads, which are "
          "gone; use num_threads=1, or run the model in another thread than the one that forks");
    }
    // A pool keeps the size that it starts with, of which a call uses a part.
    threading::SetMaxConcurrency(std::max(threads, available_cpus()));
    threading::NumThreads();  // starts it
    constexpr int kSpecifyThreadShareAllCore = -3;  // as many threads as CPUs are named
    tvm::ffi::Array<tvm::ffi::String> names;
    for (int i = 0; i < threads; ++i) names.push_back(std::to_string(i));
    static const auto configure =
        tvm::ffi::Function::GetGlobalRequired("runtime.config_threadpool");
    configure(kSpecifyThreadShareAllCore, threads, names);
    if (threading::NumThreads() != threads) {
      throw Error("other code had started this thread's TVM pool, smaller than " +
                  std::to_string(threads) + " threads; call the model from a new thread");
    }
    pool = {getpid(), threads};
  }
  // Always, since another user of TVM in this thread may have changed it.
  threading::SetMaxConcurrency(threads);
}

// Returns the number of threads that calls may use. To be called before the first pool starts.
inline int prepare_threads(int threads) {
  if (threads < 1) throw Error("num_threads must be positive, found " + std::to_string(threads));
  if (threads > 1) {
    // Bound threads would also widen the caller's own CPU set. Workers sleep 1 ms after a call.
    setenv("TVM_BIND_THREADS", "0", /*overwrite=*/0);
    setenv("TVM_THREAD_POOL_SPIN_COUNT", "2000", /*overwrite=*/0);
  }
  return std::min(threads, available_cpus());
}

}  // namespace mega_tvm

#endif  // MEGA_TVM_THREADS_H_
