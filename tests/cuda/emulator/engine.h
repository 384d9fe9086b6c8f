// What the engine offers to the driver's and the CUDA runtime's functions, and to kernels.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

struct EmuIndex { unsigned x, y, z; };
enum { EMU_ACTIVE, EMU_SYNC, EMU_INDEX, EMU_UP, EMU_DOWN, EMU_XOR, EMU_MMA, EMU_MATRICES };

// What a lane brings to a product of fragments, and to a load of four matrices.
struct EmuMma { float* c; const uint32_t *a, *b; float (*widen)(uint16_t half); };
struct EmuMatrices { alignas(16) uint16_t row[8]; uint32_t* result; bool transposed; };

__attribute__((visibility("default"))) void* emu_malloc(size_t bytes);
__attribute__((visibility("default"))) bool emu_free(void* begin);
void* emu_kernel(void* library, const char* image, const char* name);
void emu_allow_dynamic(void* handle, size_t bytes);
__attribute__((visibility("default"))) uint64_t emu_clock();
__attribute__((visibility("default"))) bool emu_capturing();
__attribute__((visibility("default"))) void emu_begin_capture();
__attribute__((visibility("default"))) void* emu_end_capture();
__attribute__((visibility("default"))) void* emu_copy_graph(void* graph);
__attribute__((visibility("default"))) void emu_free_graph(void* graph);
__attribute__((visibility("default"))) bool emu_launch_graph(void* graph);
bool emu_launch(void* handle, EmuIndex grid, EmuIndex block, size_t dynamic, void** values);
