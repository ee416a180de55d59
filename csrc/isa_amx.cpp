// The kernels for AVX512 with VNNI and BF16, with the products of AMX. System headers come before the
// pragma, so that no inline function of theirs is compiled for these instructions.
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
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16"))), \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16")
#endif

#define FASTDISTILL_ISA amx
#define FASTDISTILL_AVX512
#define FASTDISTILL_VNNI
#define FASTDISTILL_BF16
#define FASTDISTILL_AMX
#include "cpu_columns.h"
#include "cpu_quant.h"
#include "cpu_tile_gemm.h"
#include "cpu_tiles.h"
#include "cpu_topk.h"

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

namespace fastdistill {
const Kernels kAmxKernels = {
    amx::lut4_dequant,
    amx::int8_dequant,
    amx::quantize_groups,
    amx::tile_gemm_int8,
    amx::lse_topk,
    amx::sum_columns,
    amx::softmax_columns,
    amx::sum_remainders,
    amx::tile_peak,
    {amx::tile_gemm, amx::tile_scratch},
};
}  // namespace fastdistill
#endif
