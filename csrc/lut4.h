// LUT4, the 4-bit weight format (DESIGN.md): shared by the CPU and the CUDA kernels.
//
//   qdata  uint8 [N, K/2]  element 2i in the HIGH nibble of byte i, 2i+1 in the LOW one
//   scale  fp32  [N, K/g]  one per block of g elements; offset fp32 [N, K/g] may be absent
//   lut    fp32  [16]
//   w = lut[q] * scale + offset: the product rounded to fp32, then the sum rounded to fp32 (no
//   FMA), then ONE rounding to the output dtype.
//
// Blocks run over the flattened tensor: they cross rows where K % g != 0, and a tensor of an odd
// number of elements leaves the low nibble of its last byte unused.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FASTDISTILL_HD __host__ __device__
#else
#define FASTDISTILL_HD
#endif

namespace fastdistill {

// The numbers that cross the Python boundary.
enum Dtype : int { kFp32 = 0, kBf16 = 1, kFp16 = 2 };

constexpr int kLutSize = 16;

// The 4-bit index of flat element i.
FASTDISTILL_HD inline int lut4_at(const uint8_t* qdata, int64_t i) {
  const int byte = qdata[i >> 1];
  return (i & 1) ? byte & 15 : byte >> 4;
}

}  // namespace fastdistill
