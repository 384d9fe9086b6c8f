// Stands in for NVIDIA's header in generated CUDA C: what its prelude names of halves.
#pragma once

using __half = half;
using __half2 = half2;
static inline bool __hgt(half a, half b) { return a > b; }
static inline bool __hlt(half a, half b) { return a < b; }
static inline float __half2float(half x) { return (float)x; }
static inline half __float2half(float x) { return (half)x; }
