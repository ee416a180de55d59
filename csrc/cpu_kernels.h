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
// Compilers that know AVX512-BF16 and AMX by the names that isa_bf16.cpp and isa_amx.cpp use.
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 11)
#define FASTDISTILL_BF16_COMPILER 1
#endif
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

// An operand of a product: element [row, k] is data[row * row_stride + k * k_stride].
struct Matrix {
  const void* data;
  Dtype dtype;  // bf16; of `a` also fp32, which is rounded to it
  int64_t row_stride, k_stride;  // one of them is 1
};

// out[m, n] = or += sum over k of a[m, k] * b[n, k], in fp32 and rounded once if `out` is bf16. With
// `remainder`, a stands for what its rounding to bf16 took away.
struct ProductKernels {
  void (*gemm)(int threads, const Matrix& a, const Matrix& b, void* out, Dtype out_dtype,
               int64_t out_stride, int64_t M, int64_t N, int64_t K, bool remainder, bool add,
               void* scratch);
  int64_t (*scratch)(int threads, int64_t N, int64_t K);  // bytes of `scratch`
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
  // Of z = u * inv_T, u [rows, n]: top[c] = max(top[c], z of column c) and sums [moments + 1, n],
  // sums[i][c] = sum of e^(z - top) (z - top)^i; moments at most 2.
  void (*sum_columns)(int threads, const float* u, int64_t rows, int64_t n, int64_t stride,
                      float inv_T, int moments, float* top, float* sums);
  // u = e^(u * inv_T - lse) * factor * (1 - (u * inv_cap)^2) in place, lse and factor [n].
  void (*softmax_columns)(int threads, float* u, int64_t rows, int64_t n, int64_t stride,
                          float inv_T, float inv_cap, const float* lse, const float* factor);
  // sums [n] += u - bf16(u), summed over the rows of u [rows, n].
  void (*sum_remainders)(int threads, const float* u, int64_t rows, int64_t n, int64_t stride,
                         float* sums);
  double (*peak)(int threads, int64_t repeats);  // int8 operations done, or null
  ProductKernels bf16;  // null without instructions for it
};

extern const Kernels kScalarKernels;
extern const Kernels kTileModel;  // kScalarKernels with a model of AMX's tiles
#ifdef FASTDISTILL_X86_64
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kVnniKernels;
#ifdef FASTDISTILL_BF16_COMPILER
extern const Kernels kBf16Kernels;
extern const Kernels kAmxKernels;
#endif
#endif

}  // namespace fastdistill
