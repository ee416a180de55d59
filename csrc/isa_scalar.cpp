// The kernels for any CPU, in whatever the compiler's baseline is.
#define FASTDISTILL_ISA scalar
#include "cpu_gemm.h"
#include "cpu_quant.h"
#include "cpu_topk.h"

namespace fastdistill {
const Kernels kScalarKernels = {scalar::lut4_dequant, scalar::int8_dequant, scalar::quantize_groups,
                                scalar::gemm,         scalar::lse_topk,     nullptr};
}  // namespace fastdistill
