// The kernels for AVX512 F, BW, DQ and VL. System headers come before the pragma, so that no inline
// function of theirs is compiled for these instructions.
#include "cpu_kernels.h"

#ifdef FASTDISTILL_X86_64
#if defined(__GNUC__) && !defined(__clang__)
// GCC PR105593: its own headers write `__m512i y = y` for a register whose content does not matter.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define FASTDISTILL_ISA avx512
#define FASTDISTILL_AVX512
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
const Kernels kAvx512Kernels = {
    avx512::lut4_dequant,
    avx512::int8_dequant,
    avx512::quantize_groups,
    avx512::gemm,
    avx512::lse_topk,
    avx512::sum_columns,
    avx512::softmax_columns,
    avx512::sum_remainders,
    nullptr,
    {nullptr, nullptr},
};
}  // namespace fastdistill
#endif
