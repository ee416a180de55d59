// The kernels for any CPU, in whatever the compiler's baseline is.
#define FASTDISTILL_ISA scalar
#include "cpu_bf16.h"
#include "cpu_columns.h"
#include "cpu_gemm.h"
#include "cpu_quant.h"
#include "cpu_tile_gemm.h"
#include "cpu_tiles.h"
#include "cpu_topk.h"

namespace fastdistill {
const Kernels kScalarKernels = {
    scalar::lut4_dequant,
    scalar::int8_dequant,
    scalar::quantize_groups,
    scalar::gemm,
    scalar::lse_topk,
    scalar::sum_columns,
    scalar::softmax_columns,
    scalar::sum_remainders,
    nullptr,
    {scalar::bf16_gemm, scalar::bf16_scratch},
};
const Kernels kTileModel = {
    scalar::lut4_dequant,
    scalar::int8_dequant,
    scalar::quantize_groups,
    scalar::tile_gemm_int8,
    scalar::lse_topk,
    scalar::sum_columns,
    scalar::softmax_columns,
    scalar::sum_remainders,
    nullptr,
    {scalar::tile_gemm, scalar::tile_scratch},
};
}  // namespace fastdistill
