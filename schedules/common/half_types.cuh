// CUDA C that kernels for float16 and bfloat16 call: what no intrinsic of TVM's tells so plainly.
//
// A half is an element of either type, 16 bits. Functions take a base and an index, both of halves or
// of registers, since TVM hands over buffers as bare pointers. The emulator of the tests has its own
// of the same names.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Two halves in a register, rounded to nearest even, and back.
template <class T> __device__ __forceinline__ unsigned mega_pack(float x, float y);
template <> __device__ __forceinline__ unsigned mega_pack<half>(float x, float y) {
  half2 pair = __floats2half2_rn(x, y);
  return *(unsigned*)&pair;
}
template <> __device__ __forceinline__ unsigned mega_pack<nv_bfloat16>(float x, float y) {
  nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *(unsigned*)&pair;
}
template <class T> __device__ __forceinline__ float2 mega_unpack(unsigned pair);
template <> __device__ __forceinline__ float2 mega_unpack<half>(unsigned pair) {
  return __half22float2(*(half2*)&pair);
}
// A bfloat16 is the upper half of a float32.
template <> __device__ __forceinline__ float2 mega_unpack<nv_bfloat16>(unsigned pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// 16 bytes from global to shared memory, asynchronously (PTX ISA, "cp.async"); zeros unless there.
template <class T>
__device__ __forceinline__ void mega_copy_async(T* to, int to_at, const T* from, int from_at, bool there) {
  unsigned address = (unsigned)__cvta_generic_to_shared(to + to_at);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
               :: "r"(address), "l"(from + (there ? from_at : 0)), "r"(there ? 16 : 0) : "memory");
}
// The same, at once, from any alignment: the first of 8 halves, and zeros.
template <class T>
__device__ __forceinline__ void mega_copy_halves(T* to, int to_at, const T* from, int from_at, int count) {
  const unsigned short* bits = (const unsigned short*)from + from_at;
  unsigned pair[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    unsigned low = 2 * i < count ? bits[2 * i] : 0, high = 2 * i + 1 < count ? bits[2 * i + 1] : 0;
    pair[i] = low | high << 16;
  }
  *(uint4*)(to + to_at) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}
__device__ __forceinline__ void mega_commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until at most `left` groups of this thread's copies are under way.
#define mega_wait_copies(left) asm volatile("cp.async.wait_group %0;\n" :: "n"(left) : "memory")

// 16 bytes of shared memory into registers.
template <class T>
__device__ __forceinline__ void mega_load_registers(unsigned* r, int at, const T* s, int s_at) {
  uint4 piece = *(const uint4*)(s + s_at);
  r[at] = piece.x, r[at + 1] = piece.y, r[at + 2] = piece.z, r[at + 3] = piece.w;
}
// 16 bytes of global memory as 8 float32.
template <class T>
__device__ __forceinline__ void mega_load_halves(float* r, const T* from, int from_at) {
  uint4 piece = *(const uint4*)(from + from_at);
  const unsigned pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 pair = mega_unpack<T>(pairs[i]);
    r[2 * i] = pair.x, r[2 * i + 1] = pair.y;
  }
}
template <class T>
__device__ __forceinline__ void mega_load_pair(float* r, const T* from, int from_at) {
  float2 pair = mega_unpack<T>(*(const unsigned*)(from + from_at));
  r[0] = pair.x, r[1] = pair.y;
}
template <class T>
__device__ __forceinline__ void mega_store_pair(T* s, int at, float x, float y) {
  *(unsigned*)(s + at) = mega_pack<T>(x, y);
}
// Four 8x8 matrices of halves; each lane gives the address of a row (PTX ISA, "ldmatrix").
template <class T>
__device__ __forceinline__ void mega_load_matrices(unsigned* r, int at, const T* s, int s_at) {
  unsigned address = (unsigned)__cvta_generic_to_shared(s + s_at);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[at]), "=r"(r[at + 1]), "=r"(r[at + 2]), "=r"(r[at + 3]) : "r"(address) : "memory");
}
template <class T>
__device__ __forceinline__ void mega_load_matrices_transposed(unsigned* r, int at, const T* s, int s_at) {
  unsigned address = (unsigned)__cvta_generic_to_shared(s + s_at);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[at]), "=r"(r[at + 1]), "=r"(r[at + 2]), "=r"(r[at + 3]) : "r"(address) : "memory");
}

// What registers alone do not tell is in the name: the type of their halves.
#define MEGA_OF_HALVES(dtype, T, ptx)                                                                              \
  /* c += a b, 16x16 times 16x8 (PTX ISA, "mma.m16n8k16"). */                                                      \
  __device__ __forceinline__ void mega_mma_##dtype(float* c, int at, const unsigned* a, int a_at,                  \
                                                   const unsigned* b, int b_at) {                                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ptx "." ptx ".f32 "                                               \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"                                        \
        : "+f"(c[at]), "+f"(c[at + 1]), "+f"(c[at + 2]), "+f"(c[at + 3])                                           \
        : "r"(a[a_at]), "r"(a[a_at + 1]), "r"(a[a_at + 2]), "r"(a[a_at + 3]), "r"(b[b_at]), "r"(b[b_at + 1]));     \
  }                                                                                                                \
  /* A 16x16 fragment of rows that are layer-normalized: a lane holds two rows, 8 apart. */                        \
  __device__ __forceinline__ void mega_normalize_##dtype(unsigned* a, int at, float mean, float scale,             \
                                                         float mean8, float scale8) {                              \
    mega_normalize_pair<T>(a + at, mean, scale), mega_normalize_pair<T>(a + at + 1, mean8, scale8);                \
    mega_normalize_pair<T>(a + at + 2, mean, scale), mega_normalize_pair<T>(a + at + 3, mean8, scale8);            \
  }
template <class T> __device__ __forceinline__ void mega_normalize_pair(unsigned* r, float mean, float scale) {
  float2 pair = mega_unpack<T>(*r);
  *r = mega_pack<T>((pair.x - mean) * scale, (pair.y - mean) * scale);
}
MEGA_OF_HALVES(float16, half, "f16")
MEGA_OF_HALVES(bfloat16, nv_bfloat16, "bf16")
#undef MEGA_OF_HALVES
