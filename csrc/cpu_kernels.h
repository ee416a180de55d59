// What one instruction set provides. isa_*.cpp compile the same kernels (cpu_quant.h, cpu_gemm.h,
// cpu_topk.h) once each and fill in one table; bind.cpp picks a table at run time.
//
// Pointers are flat and row-major, sizes are checked by the Python callers, a null pointer means
// "absent". A kernel returns false when it cannot allocate its scratch memory.
#pragma once

#include <stdint.h>

#include "lut4.h"

#if defined(__x86_64__) || defined(_M_X64)
#define FASTDISTILL_X86_64 1
#endif

namespace fastdistill {

// Outputs and activations that are stored in 16 bits; the C++ types make overloads possible.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// Weights of a GEMM: [N, K] elements, with `scale` and `offset` [N, K / group].
struct GemmWeights {
  const void* data;     // uint8 [N, K/2] in LUT4 order, or int8 [N, K]
  const int8_t* codes;  // int8 [16], what a LUT4 index stands for; null for int8 data
  float unit;           // w = code * (unit * scale) + offset
  const float* scale;
  const float* offset;
  const float* bias;  // [N]
  int64_t group;
};

struct Kernels {
  void (*lut4_dequant)(int threads, const uint8_t* qdata, const float* scale, const float* offset,
                       const float* lut, void* out, Dtype out_dtype, int64_t count, int64_t block);
  void (*int8_dequant)(int threads, const int8_t* qdata, const float* scale, void* out,
                       Dtype out_dtype, int64_t count, int64_t block);
  void (*quantize_groups)(int threads, const void* x, Dtype x_dtype, int8_t* q, float* scale,
                          int32_t* sum, int64_t rows, int64_t cols, int64_t group);
  // out[m, n] = sum over k of x[m, k] * w[n, k], x quantized to int8 in groups of act_group.
  bool (*gemm)(int threads, const void* x, Dtype dtype, const GemmWeights& w, void* out, int64_t M,
               int64_t N, int64_t K, int64_t act_group);
  bool (*lse_topk)(int threads, const float* z, int64_t rows, int64_t cols, int64_t row_stride,
                   float inv_temperature, int64_t k, int64_t* ids, float* values, float* lse_rest);
  double (*peak)(int threads, int64_t repeats);  // operations done, all in registers
};

extern const Kernels kScalarKernels;
#ifdef FASTDISTILL_X86_64
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kVnniKernels;
#endif

}  // namespace fastdistill
