// libcuda.so.1: the driver functions that TVM's CUDA runtime calls, on the engine.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine.h"

namespace {
enum { kOk = 0, kInvalidValue = 1, kInvalidImage = 200, kNoBinary = 209, kNotFound = 500, kNotSupported = 801, kCaptureUnsupported = 900 };
constexpr int kMaxDynamicSharedSize = 8, kMostDynamicShared = 227 << 10;

struct Module {
  void* library;
  char path[32];
};

// CUlaunchConfig of CUDA 12 and 13.
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, dynamic_bytes;
  void *stream, *attributes;
  unsigned attribute_count;
};
}  // namespace

// An image is "EMULATED", its length, and a shared library.
EXPORT int cuModuleLoadData(Module** out, const char* image) {
  if (emu_capturing()) return kCaptureUnsupported;
  if (memcmp(image, "EMULATED", 8)) return kNoBinary;
  uint64_t bytes;
  memcpy(&bytes, image + 8, 8);
  Module* module = new Module{nullptr, "/tmp/emulated-XXXXXX"};
  int file = mkstemp(module->path);
  bool written = file >= 0 && write(file, image + 16, bytes) == (ssize_t)bytes;
  if (file >= 0) close(file);
  if (written) module->library = dlopen(module->path, RTLD_NOW | RTLD_LOCAL);
  if (!module->library) {
    fprintf(stderr, "emulator: %s\n", dlerror());
    return kInvalidImage;
  }
  *out = module;
  return kOk;
}
EXPORT int cuModuleUnload(Module* module) {
  unlink(module->path);
  return kOk;
}
EXPORT int cuModuleGetFunction(void** out, Module* module, const char* name) {
  *out = emu_kernel(module->library, module->path, name);
  return *out ? kOk : kNotFound;
}
EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute == kMaxDynamicSharedSize) {
    if (value > kMostDynamicShared) return kInvalidValue;
    emu_allow_dynamic(function, value);
  }
  return kOk;
}
EXPORT int cuLaunchKernelEx(const LaunchConfig* c, void* function, void** values, void**) {
  EmuIndex grid{c->grid_x, c->grid_y, c->grid_z}, block{c->block_x, c->block_y, c->block_z};
  return emu_launch(function, grid, block, c->dynamic_bytes, values) ? kOk : kInvalidValue;
}
EXPORT int cuDriverGetVersion(int* version) {
  const char* value = getenv("EMULATED_DRIVER");
  return *version = value ? atoi(value) : 13000, kOk;
}
EXPORT int cuGetErrorName(int error, const char** name) {
  static char text[32];
  snprintf(text, sizeof text, "CUDA_ERROR(%d)", error);
  *name = text;
  return kOk;
}
EXPORT int cuGetErrorString(int error, const char** name) { return cuGetErrorName(error, name); }
EXPORT int cuDeviceGetName(char* name, int bytes, int) {
  snprintf(name, bytes, "emulated GPU");
  return kOk;
}
EXPORT int cuTensorMapEncodeTiled() { return kNotSupported; }
