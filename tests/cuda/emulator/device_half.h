// The functions of schedules/common/half_types.cuh on the engine: asynchronous copies, and what a warp
// does together on fragments of matrices (layouts as in the PTX ISA). A half is a float16 or a
// bfloat16.
#pragma once

struct EmuMma { float* c; const uint32_t *a, *b; float (*widen)(uint16_t half); };
struct EmuMatrices { alignas(16) uint16_t row[8]; uint32_t* result; bool transposed; };
template <class T> struct alignas(4) EmuPair { T at[2]; };
template <class T> struct alignas(16) EmuPiece { T at[8]; };
struct alignas(16) EmuRegisters { uint32_t at[4]; };

#define mega_copy_async(to, to_at, from, from_at, there) emu_copy_async((to) + (to_at), (from) + (from_at), there)
template <class T>
static __forceinline__ void mega_copy_halves(T* to, int to_at, const T* from, int from_at, int count) {
  EmuPiece<T> piece;
  for (int i = 0; i < 8; i++) piece.at[i] = i < count ? from[from_at + i] : (T)0.0f;
  *(EmuPiece<T>*)(to + to_at) = piece;
}
#define mega_commit_copies() emu_commit_copies()
#define mega_wait_copies(left) emu_wait_copies(left)

template <class T>
static __forceinline__ void mega_load_registers(uint32_t* r, int at, const T* s, int s_at) {
  EmuRegisters piece = *(const EmuRegisters*)(s + s_at);
  for (int i = 0; i < 4; i++) r[at + i] = piece.at[i];
}
template <class T>
static __forceinline__ void mega_load_halves(float* r, const T* from, int from_at) {
  EmuPiece<T> piece = *(const EmuPiece<T>*)(from + from_at);
  for (int i = 0; i < 8; i++) r[i] = (float)piece.at[i];
}
template <class T>
static __forceinline__ void mega_load_pair(float* r, const T* from, int from_at) {
  EmuPair<T> pair = *(const EmuPair<T>*)(from + from_at);
  for (int i = 0; i < 2; i++) r[i] = (float)pair.at[i];
}
template <class T>
static __forceinline__ uint32_t mega_pack(float x, float y) {
  T pair[2] = {(T)x, (T)y};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}
template <class T>
static __forceinline__ void mega_store_pair(T* s, int at, float x, float y) {
  *(uint32_t*)(s + at) = mega_pack<T>(x, y);
}
static __forceinline__ void emu_load_matrices(uint32_t* r, const void* s, bool transposed, int line) {
  EmuMatrices lane;
  *(EmuRegisters*)lane.row = *(const EmuRegisters*)s;
  lane.result = r, lane.transposed = transposed;
  emu_collective(EMU_MATRICES, &lane, line);
}
#define mega_load_matrices(r, at, s, s_at) emu_load_matrices((r) + (at), (s) + (s_at), false, __LINE__)
#define mega_load_matrices_transposed(r, at, s, s_at) emu_load_matrices((r) + (at), (s) + (s_at), true, __LINE__)

template <class T> __attribute__((no_sanitize("thread"))) static float emu_widen(uint16_t bits) {
  T half;
  memcpy(&half, &bits, 2);
  return (float)half;
}
template <class T>
static __forceinline__ void emu_mma(float* c, const uint32_t* a, const uint32_t* b, int line) {
  EmuMma lane = {c, a, b, emu_widen<T>};
  emu_collective(EMU_MMA, &lane, line);
}
#define mega_mma_float16(c, at, a, a_at, b, b_at) emu_mma<half>((c) + (at), (a) + (a_at), (b) + (b_at), __LINE__)
#define mega_mma_bfloat16(c, at, a, a_at, b, b_at) emu_mma<nv_bfloat16>((c) + (at), (a) + (a_at), (b) + (b_at), __LINE__)

template <class T>
static __forceinline__ void emu_normalize(uint32_t* a, const float* mean, const float* scale) {
  for (int i = 0; i < 4; i++) {
    float low = emu_widen<T>(a[i]), high = emu_widen<T>(a[i] >> 16), m = mean[i % 2], s = scale[i % 2];
    a[i] = mega_pack<T>((low - m) * s, (high - m) * s);
  }
}
#define EMU_NORMALIZE(dtype, T)                                                                                       \
  static __forceinline__ void mega_normalize_##dtype(uint32_t* a, int at, float m, float s, float m8, float s8) {      \
    float mean[] = {m, m8}, scale[] = {s, s8};                                                                        \
    emu_normalize<T>(a + at, mean, scale);                                                                            \
  }
EMU_NORMALIZE(float16, half)
EMU_NORMALIZE(bfloat16, nv_bfloat16)
