// The kernels for AVX2, FMA and F16C. System headers come before the pragma, so that no inline
// function of theirs is compiled for these instructions.
#include "cpu_kernels.h"

#ifdef FASTDISTILL_X86_64
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c"))), \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define FASTDISTILL_ISA avx2
#define FASTDISTILL_AVX2
#include "cpu_columns.h"
#include "cpu_gemm.h"
#include "cpu_quant.h"
#include "cpu_topk.h"

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

namespace fastdistill {
const Kernels kAvx2Kernels = {
    avx2::lut4_dequant,
    avx2::int8_dequant,
    avx2::quantize_groups,
    avx2::gemm,
    avx2::lse_topk,
    avx2::sum_columns,
    avx2::softmax_columns,
    avx2::sum_remainders,
    nullptr,
    {nullptr, nullptr},
};
}  // namespace fastdistill
#endif
