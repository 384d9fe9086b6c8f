// The functions of schedules/common/cuda_device_code.py on the engine: asynchronous copies, and what
// a warp does together on fragments of matrices (layouts as in the PTX ISA).
#pragma once

struct EmuMma { float* c; const uint32_t *a, *b; };
struct EmuMatrices { alignas(16) half row[8]; uint32_t* result; bool transposed; };
struct alignas(16) EmuPiece { half at[8]; };
struct alignas(16) EmuRegisters { uint32_t at[4]; };

#define mega_copy_async(to, to_at, from, from_at, there) emu_copy_async((to) + (to_at), (from) + (from_at), there)
static __forceinline__ void mega_copy_halves(half* to, int to_at, const half* from, int from_at, int count) {
  EmuPiece piece;
  for (int i = 0; i < 8; i++) piece.at[i] = i < count ? from[from_at + i] : (half)0.0f;
  *(EmuPiece*)(to + to_at) = piece;
}
#define mega_commit_copies() emu_commit_copies()
#define mega_wait_copies(left) emu_wait_copies(left)

static __forceinline__ void mega_load_registers(uint32_t* r, int at, const half* s, int s_at) {
  EmuRegisters piece = *(const EmuRegisters*)(s + s_at);
  for (int i = 0; i < 4; i++) r[at + i] = piece.at[i];
}
static __forceinline__ void mega_load_halves(float* r, const half* from, int from_at) {
  EmuPiece piece = *(const EmuPiece*)(from + from_at);
  for (int i = 0; i < 8; i++) r[i] = (float)piece.at[i];
}
static __forceinline__ void mega_load_pair(float* r, const half* from, int from_at) {
  half2 pair = *(const half2*)(from + from_at);
  r[0] = (float)pair.x, r[1] = (float)pair.y;
}
static __forceinline__ void emu_load_matrices(uint32_t* r, const half* s, bool transposed, int line) {
  EmuMatrices lane;
  *(EmuPiece*)lane.row = *(const EmuPiece*)s;
  lane.result = r, lane.transposed = transposed;
  emu_collective(EMU_MATRICES, &lane, line);
}
#define mega_load_matrices(r, at, s, s_at) emu_load_matrices((r) + (at), (s) + (s_at), false, __LINE__)
#define mega_load_matrices_transposed(r, at, s, s_at) emu_load_matrices((r) + (at), (s) + (s_at), true, __LINE__)
static __forceinline__ void emu_mma(float* c, const uint32_t* a, const uint32_t* b, int line) {
  EmuMma lane = {c, a, b};
  emu_collective(EMU_MMA, &lane, line);
}
#define mega_mma(c, at, a, a_at, b, b_at) emu_mma((c) + (at), (a) + (a_at), (b) + (b_at), __LINE__)

static __forceinline__ uint32_t mega_pack(float x, float y) {
  half pair[2] = {(half)x, (half)y};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}
static __forceinline__ void mega_store_pair(half* s, int at, float x, float y) {
  *(uint32_t*)(s + at) = mega_pack(x, y);
}
static __forceinline__ void emu_normalize_pair(uint32_t* r, float mean, float scale) {
  half pair[2];
  memcpy(pair, r, 4);
  *r = mega_pack(((float)pair[0] - mean) * scale, ((float)pair[1] - mean) * scale);
}
static __forceinline__ void mega_normalize(uint32_t* a, int at, float mean, float scale, float mean8, float scale8) {
  for (int i = 0; i < 4; i++) emu_normalize_pair(a + at + i, i % 2 ? mean8 : mean, i % 2 ? scale8 : scale);
}
