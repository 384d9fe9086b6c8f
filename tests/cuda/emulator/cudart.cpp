// libcudart.so.13: the CUDA runtime functions that TVM calls, on the engine. Streams are in order
// because every call is finished when it returns. Launches into a captured stream are kept and not run;
// what CUDA forbids meanwhile is refused.
#include <stdlib.h>
#include <string.h>

#include "engine.h"

namespace {
enum { kOk = 0, kInvalidValue = 1, kOutOfMemory = 2, kNotSupported = 801, kCaptureUnsupported = 900 };
constexpr size_t kNameBytes = 256;

long setting(const char* name, long usual) {
  const char* value = getenv(name);
  return value ? atol(value) : usual;
}
size_t allocated;
}  // namespace

EXPORT int cudaGetDeviceCount(int* count) { return *count = setting("EMULATED_DEVICES", 1), kOk; }
EXPORT int cudaGetDevice(int* device) { return *device = 0, kOk; }
EXPORT int cudaSetDevice(int device) { return device ? kInvalidValue : kOk; }
EXPORT int cudaGetLastError() { return kOk; }
EXPORT int cudaPeekAtLastError() { return kOk; }
EXPORT const char* cudaGetErrorName(int error) {
  return error == kOk ? "cudaSuccess" : error == kOutOfMemory ? "cudaErrorMemoryAllocation" : "cudaError";
}
EXPORT const char* cudaGetErrorString(int error) { return cudaGetErrorName(error); }
EXPORT int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  if (device >= setting("EMULATED_DEVICES", 1)) return 101;
  long arch = setting("EMULATED_ARCH", 80);
  switch (attribute) {
    case 1: *value = 1024; break;                    // threads of a block
    case 2: case 3: *value = 1024; break;            // in x, in y
    case 4: *value = 64; break;                      // in z
    case 8: *value = 48 << 10; break;                // shared memory of a block
    case 10: *value = 32; break;                     // warp
    case 12: *value = 65536; break;                  // registers of a block
    case 13: *value = 1000000; break;                // kHz
    case 16: *value = 108; break;                    // multiprocessors
    case 38: *value = 40 << 20; break;               // L2
    case 75: *value = arch / 10; break;
    case 76: *value = arch % 10; break;
    default: *value = 0;
  }
  return kOk;
}
EXPORT int cudaGetDeviceProperties(void* properties, int) {
  memset(properties, 0, kNameBytes);
  strcpy((char*)properties, "emulated GPU");
  return kOk;
}
EXPORT int cudaMemGetInfo(size_t* available, size_t* total) { return *available = *total = size_t(8) << 30, kOk; }
EXPORT int cudaMalloc(void** out, size_t bytes) {
  if (emu_capturing()) return kCaptureUnsupported;
  if ((allocated += bytes) > (size_t)setting("EMULATED_MEMORY", 8l << 30)) return allocated -= bytes, kOutOfMemory;
  return (*out = emu_malloc(bytes)) ? kOk : kOutOfMemory;
}
EXPORT int cudaFree(void* p) { return emu_capturing() ? kCaptureUnsupported : emu_free(p) ? kOk : kInvalidValue; }
EXPORT int cudaMallocHost(void** out, size_t bytes) { return (*out = malloc(bytes)) ? kOk : kOutOfMemory; }
EXPORT int cudaFreeHost(void* p) { return free(p), kOk; }
EXPORT int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) { return emu_capturing() ? kCaptureUnsupported : (memmove(to, from, bytes), kOk); }
EXPORT int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, void*) { return memmove(to, from, bytes), kOk; }
#define DONE(name) EXPORT int name() { return kOk; }
EXPORT int cudaStreamCreate(void** stream) { return *stream = nullptr, kOk; }
EXPORT int cudaStreamCreateWithFlags(void** stream, unsigned) { return *stream = nullptr, kOk; }
// An event is the engine's clock when it was recorded, in nanoseconds.
EXPORT int cudaEventCreate(uint64_t** event) { return *event = new uint64_t(0), kOk; }
EXPORT int cudaEventDestroy(uint64_t* event) { return delete event, kOk; }
EXPORT int cudaEventRecord(uint64_t* event, void*) { return *event = emu_clock(), kOk; }
EXPORT int cudaEventElapsedTime(float* milliseconds, uint64_t* from, uint64_t* to) {
  return *milliseconds = (*to - *from) / 1e6f, kOk;
}
EXPORT int cudaStreamSynchronize(void*) { return emu_capturing() ? kCaptureUnsupported : kOk; }
DONE(cudaStreamDestroy) DONE(cudaStreamWaitEvent)
DONE(cudaEventSynchronize)
EXPORT int cudaStreamBeginCapture(void*, int) { return emu_begin_capture(), kOk; }
EXPORT int cudaStreamEndCapture(void*, void** graph) { return *graph = emu_end_capture(), kOk; }
EXPORT int cudaGraphInstantiate(void** out, void* graph, uint64_t) { return *out = emu_copy_graph(graph), kOk; }
EXPORT int cudaGraphLaunch(void* graph, void*) { return emu_launch_graph(graph) ? kOk : kInvalidValue; }
EXPORT int cudaGraphDestroy(void* graph) { return emu_free_graph(graph), kOk; }
EXPORT int cudaGraphExecDestroy(void* graph) { return emu_free_graph(graph), kOk; }
