// mega_tvm.h: loads and runs compiled models from C++17.
//
//   mega_tvm::Model model("model.so", /*num_threads=*/2);
//   model.run({1, 60, 287}, x, y);  // x [1, 60, 287] -> y [1, 256]: any shape that the model runs
//
//   mega_tvm::Stream stream(model, /*batch=*/1, /*max_len=*/300);
//   stream.step(x_t, y);  // x_t [1, 287] -> y [1, 256]: the output for all frames so far
//
//   mega_tvm::Window window(model, /*batch=*/1);
//   window.push(x_t, y);  // x_t [1, 287] -> y [1, 256]: a full run on the last frames
//
// Needs the headers of tvm-ffi and dlpack, libtvm_ffi.so and libtvm_runtime.so: a bundle holds them
// all. A compiled model is code: load what you trust. Lengths are checked here, digests are not;
// `sha256sum --check SHA256SUMS` does, or mega_tvm.load in Python.

#ifndef MEGA_TVM_H_
#define MEGA_TVM_H_

#include "mega_tvm/model.h"
#include "mega_tvm/stream.h"
#include "mega_tvm/window.h"

#endif  // MEGA_TVM_H_
