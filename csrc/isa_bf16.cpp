// The kernels for AVX512 with VNNI and BF16. System headers come before the pragma, so that no inline
// function of theirs is compiled for these instructions.
#include "cpu_kernels.h"

#ifdef FASTDISTILL_BF16_COMPILER
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
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"))), \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#endif

#define FASTDISTILL_ISA bf16_isa
#define FASTDISTILL_AVX512
#define FASTDISTILL_VNNI
#define FASTDISTILL_BF16
#include "cpu_bf16.h"
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
const Kernels kBf16Kernels = {
    bf16_isa::lut4_dequant,
    bf16_isa::int8_dequant,
    bf16_isa::quantize_groups,
    bf16_isa::gemm,
    bf16_isa::lse_topk,
    bf16_isa::sum_columns,
    bf16_isa::softmax_columns,
    bf16_isa::sum_remainders,
    bf16_isa::peak,
    {bf16_isa::bf16_gemm, bf16_isa::bf16_scratch},
};
}  // namespace fastdistill
#endif
