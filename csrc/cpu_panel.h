// How the GEMM reads its weights. There is no second layout: a thread takes 32 columns
// n, expands their canonical rows into a panel [K/4][32][4 codes] that stays in its cache, and
// multiplies all activations by it.
//
// A dword of LUT4 holds k0..k7 of a column: its high nibbles are k 0 2 4 6, its low ones k 1 3 5 7.
// The activations are stored in that order (pack_row), so the expansion never has to interleave.
#pragma once

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {

constexpr int kColumns = 32;
constexpr int64_t kStepBytes = 2 * Weights::kBytes;  // of a panel, for 4 k

// emit(d, dword d of 16 rows) for `bytes` bytes of each; rows that are missing read as 0. `ahead`
// is how far from here memory will be wanted soon: sixteen strided streams are more than the
// hardware follows by itself.
template <class Emit>
FASTDISTILL_INLINE void transpose_rows(const uint8_t* src, int64_t stride, int64_t rows,
                                       int64_t bytes, int64_t ahead, const Emit& emit) {
  I32 dwords[16];
  for (int64_t b = 0; b < bytes; b += 64) {
    const int64_t n = min64(64, bytes - b);
    if (rows >= 16 && n == 64) {
      transpose16(src + b, stride, ahead, dwords);
      unrolled<16>([&](auto d) FASTDISTILL_INLINE_LAMBDA { emit(b / 4 + d, dwords[d]); });
    } else {
      uint8_t padded[16 * 64] = {};
      for (int64_t r = 0; r < min64(rows, 16); ++r)
        memcpy(padded + 64 * r, src + r * stride + b, static_cast<size_t>(n));
      transpose16(padded, 64, 0, dwords);
      for (int d = 0; d < n / 4; ++d) emit(b / 4 + d, dwords[d]);
    }
  }
}

// Columns [n0, n0 + 32) and k in [k0, k1) of the weights, plus `bias`.
template <int bias>
inline void fill_weights(const GemmWeights& w, int64_t N, int64_t K, int64_t n0, int64_t k0,
                         int64_t k1, uint8_t* panel) {
  const int64_t stride = w.codes ? K / 2 : K;
  const int64_t from = w.codes ? k0 / 2 : k0, bytes = w.codes ? (k1 - k0) / 2 : k1 - k0;
  for (int half = 0; half < 2; ++half) {
    const int64_t n = n0 + 16 * half;
    const uint8_t* const src = static_cast<const uint8_t*>(w.data) + n * stride + from;
    uint8_t* const to = panel + half * Weights::kBytes;
    if (w.codes) {
      int8_t codes[kLutSize];
      for (int i = 0; i < kLutSize; ++i) codes[i] = static_cast<int8_t>(w.codes[i] ^ bias);
      const ByteTable table(codes);
      transpose_rows(src, stride, N - n, bytes, kColumns * stride, [&](int64_t d, I32 nibbles) {
        store_weights(to + (2 * d) * kStepBytes, table.at_high(nibbles));
        store_weights(to + (2 * d + 1) * kStepBytes, table.at_low(nibbles));
      });
    } else {
      transpose_rows(src, stride, N - n, bytes, kColumns * stride, [&](int64_t d, I32 codes) {
        store_weights(to + d * kStepBytes, bias ? biased(codes) : codes);
      });
    }
  }
}

// Columns [n0, n0 + 32) of a [N, groups] matrix of scales, times `factor`, to [groups][32].
inline void fill_scales(const float* scale, float factor, int64_t N, int64_t groups, int64_t n0,
                        float* panel) {
  for (int half = 0; half < 2; ++half) {
    const int64_t n = n0 + 16 * half;
    float* const to = panel + 16 * half;
    transpose_rows(reinterpret_cast<const uint8_t*>(scale + n * groups), groups * 4, N - n,
                   groups * 4, kColumns * groups * 4, [&](int64_t g, I32 bits) {
                     store(to + g * kColumns, as_float(bits) * splat(factor));
                   });
  }
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
