// CUDA C on a CPU: what generated kernels use of CUDA, in terms of the engine.
//
// The compiler instruments every memory access (-fsanitize=thread); the engine has the hooks. What is
// not defined here does not compile, so that nothing is emulated wrongly in silence.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __align__(bytes) alignas(bytes)
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define EMU_VECTOR(type, name, bytes)                                        \
  struct alignas(bytes) name##2 { type x, y; };                              \
  struct alignas(2 * bytes) name##4 { type x, y, z, w; };                    \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; }    \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTOR(float, float, 8)
EMU_VECTOR(int, int, 8)
EMU_VECTOR(unsigned, uint, 8)

using half = _Float16;
// Rounds to nearest even, as a GPU does; all arithmetic is that of float.
struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float x) {
    uint32_t wide;
    memcpy(&wide, &x, 4);
    bits = x != x ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  operator float() const {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
  }
};
struct alignas(4) half2 { half x, y; };  // TVM writes out its own vectors of 4
struct alignas(4) nv_bfloat162 {
  nv_bfloat16 x, y;
  nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) : x(x), y(y) {}
};

struct EmuIndex { unsigned x, y, z; };
extern "C" {
EmuIndex emu_thread_index() __attribute__((const));
EmuIndex emu_block_index() __attribute__((const));
void* emu_shared(uint64_t offset, uint64_t bytes) __attribute__((const));
void* emu_dynamic_shared() __attribute__((const));
void emu_barrier(int line);
uint32_t emu_warp(int operation, uint32_t mask, uint32_t value, int lane, int width, int line);
void emu_collective(int operation, void* data, int line);
void emu_copy_async(void* to, const void* from, bool there);
void emu_commit_copies();
void emu_wait_copies(int left);
}
#define threadIdx emu_thread_index()
#define blockIdx emu_block_index()
#define __syncthreads() emu_barrier(__LINE__)

enum { EMU_ACTIVE, EMU_SYNC, EMU_INDEX, EMU_UP, EMU_DOWN, EMU_XOR, EMU_MMA, EMU_MATRICES };
#define __activemask() emu_warp(EMU_ACTIVE, 0, 0, 0, 32, __LINE__)
#define __syncwarp() ((void)emu_warp(EMU_SYNC, ~0u, 0, 0, 32, __LINE__))
template <class T>
static inline T emu_shuffle(int operation, uint32_t mask, T value, int lane, int width, int line) {
  static_assert(sizeof(T) == 4, "shuffles of 4 bytes only");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = emu_warp(operation, mask, bits, lane, width, line);
  memcpy(&value, &bits, 4);
  return value;
}
#define __shfl_sync(m, v, l, w) emu_shuffle(EMU_INDEX, m, v, l, w, __LINE__)
#define __shfl_up_sync(m, v, l, w) emu_shuffle(EMU_UP, m, v, l, w, __LINE__)
#define __shfl_down_sync(m, v, l, w) emu_shuffle(EMU_DOWN, m, v, l, w, __LINE__)
#define __shfl_xor_sync(m, v, l, w) emu_shuffle(EMU_XOR, m, v, l, w, __LINE__)

#include "device_half.h"

static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline int min(int a, int b) { return a < b ? a : b; }

template <unsigned long... I> struct EmuList {};
template <unsigned long N, unsigned long... I> struct EmuCount : EmuCount<N - 1, N - 1, I...> {};
template <unsigned long... I> struct EmuCount<0, I...> { using list = EmuList<I...>; };
template <class T> struct EmuPlain { using type = T; };
template <class T> struct EmuPlain<const T> { using type = T; };
template <class... A, unsigned long... I>
__attribute__((no_sanitize("thread"))) static void emu_call(void (*f)(A...), void** a, EmuList<I...>) {
  f(*(typename EmuPlain<A>::type*)a[I]...);
}
#define EMU_KERNEL(kernel)                                                                      \
  extern "C" __attribute__((visibility("default"), no_sanitize("thread"))) void emu_kernel_##kernel(void** a) { \
    emu_run(kernel, a);                                                                         \
  }                                                                                             \
  extern "C" __attribute__((visibility("default"))) unsigned emu_sizes_##kernel(unsigned* s) {  \
    return emu_argument_sizes(kernel, s);                                                       \
  }
// Sizes of a kernel's arguments, for a graph that keeps them; returns their number.
template <class... A>
__attribute__((no_sanitize("thread"))) static unsigned emu_argument_sizes(void (*)(A...), unsigned* s) {
  unsigned count = 0;
  ((void)(s[count++] = sizeof(A)), ...);
  return count;
}
template <class... A>
__attribute__((no_sanitize("thread"))) static void emu_run(void (*f)(A...), void** a) {
  emu_call(f, a, typename EmuCount<sizeof...(A)>::list{});
}
