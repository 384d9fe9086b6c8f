// Stands in for NVIDIA's header in generated CUDA C: what its prelude names of bfloat16.
#pragma once

using __nv_bfloat16 = nv_bfloat16;
using __nv_bfloat162 = nv_bfloat162;
static inline bool __hgt(nv_bfloat16 a, nv_bfloat16 b) { return (float)a > (float)b; }
static inline bool __hlt(nv_bfloat16 a, nv_bfloat16 b) { return (float)a < (float)b; }
static inline float __bfloat162float(nv_bfloat16 x) { return x; }
static inline nv_bfloat16 __float2bfloat16(float x) { return x; }
