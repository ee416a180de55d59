// Sweeps over a slab of logits u [v, n], in which a token is a column. A thread takes a block of
// columns whole, so a result does not depend on the number of threads.
#pragma once

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {

constexpr int64_t kColumnBlock = 64;  // columns of a task: a cache line or more of each row
constexpr int64_t kPartialRows = 64;  // rows of a partial sum: the error grows with 64 + v / 64

template <class Body>
inline void each_column_vector(int threads, int64_t n, const Body& body) {
  parallel_for(threads, ceil_div(n, kColumnBlock), 1, [&](int64_t block, int) {
    const int64_t end = min64(n, (block + 1) * kColumnBlock);
    for (int64_t c = block * kColumnBlock; c < end; c += kLanes) body(c, min64(kLanes, end - c));
  });
}

template <class T>
inline F32 load_upto(const T* p, int64_t lanes) {
  return lanes == kLanes ? load(p) : load_part(p, lanes);
}
inline void store_upto(float* p, F32 v, int64_t lanes) {
  if (lanes == kLanes)
    store(p, v);
  else
    store_part(p, v, lanes);
}

// With z = u * inv_T: top = max(top, z of all rows); sums[i] = sum of e^(z - top) (z - top)^i.
template <int moments>
inline void sum_columns_of(int threads, const float* u, int64_t rows, int64_t n, int64_t stride,
                           float inv_T, float* top, float* sums) {
  each_column_vector(threads, n, [&](int64_t c, int64_t lanes) {
    const F32 factor = splat(inv_T);
    const auto z_of = [&](int64_t row) FASTDISTILL_INLINE_LAMBDA {
      return load_upto(u + row * stride + c, lanes) * factor;
    };
    F32 largest[2] = {load_upto(top + c, lanes), load_upto(top + c, lanes)};
    int64_t row = 0;
    for (; row + 1 < rows; row += 2) {
      largest[0] = max(z_of(row), largest[0]);
      largest[1] = max(z_of(row + 1), largest[1]);
    }
    if (row < rows) largest[0] = max(z_of(row), largest[0]);
    const F32 most = max(largest[0], largest[1]);
    F32 total[moments + 1];
    for (F32& sum : total) sum = splat(0.0f);
    for (int64_t start = 0; start < rows; start += kPartialRows) {
      F32 part[moments + 1];
      for (F32& sum : part) sum = splat(0.0f);
      for (row = start; row < min64(rows, start + kPartialRows); ++row) {
        // An absent logit squared would be infinite, and e^-1e4 is zero.
        const F32 d = max(splat(-1e4f), z_of(row) - most);  // NaN stays
        F32 term = exp_nonpositive(d);
        part[0] = part[0] + term;
        for (int i = 1; i <= moments; ++i) {
          term = term * d;
          part[i] = part[i] + term;
        }
      }
      for (int i = 0; i <= moments; ++i) total[i] = total[i] + part[i];
    }
    store_upto(top + c, most, lanes);
    for (int i = 0; i <= moments; ++i) store_upto(sums + i * n + c, total[i], lanes);
  });
}

inline void sum_columns(int threads, const float* u, int64_t rows, int64_t n, int64_t stride,
                        float inv_T, int moments, float* top, float* sums) {
  if (moments == 0) return sum_columns_of<0>(threads, u, rows, n, stride, inv_T, top, sums);
  if (moments == 1) return sum_columns_of<1>(threads, u, rows, n, stride, inv_T, top, sums);
  sum_columns_of<2>(threads, u, rows, n, stride, inv_T, top, sums);
}

// u = e^(u * inv_T - lse) * factor * (1 - (u * inv_cap)^2) in place; lse and factor are of the
// columns.
inline void softmax_columns(int threads, float* u, int64_t rows, int64_t n, int64_t stride,
                            float inv_T, float inv_cap, const float* lse, const float* factor) {
  each_column_vector(threads, n, [&](int64_t c, int64_t lanes) {
    const F32 scale = splat(inv_T), shift = load_upto(lse + c, lanes);
    const F32 times = load_upto(factor + c, lanes), over = splat(inv_cap), one = splat(1.0f);
    for (int64_t row = 0; row < rows; ++row) {
      float* const at = u + row * stride + c;
      const F32 x = load_upto(at, lanes);
      F32 y = exp_nonpositive(x * scale - shift) * times;
      if (inv_cap != 0) y = y * (one - (x * over) * (x * over));
      store_upto(at, y, lanes);
    }
  });
}

// sums += what rounding u to bf16 takes away, summed over each column.
inline void sum_remainders(int threads, const float* u, int64_t rows, int64_t n, int64_t stride,
                           float* sums) {
  each_column_vector(threads, n, [&](int64_t c, int64_t lanes) {
    F32 total = load_upto(sums + c, lanes);
    for (int64_t row = 0; row < rows; ++row) {
      const F32 x = load_upto(u + row * stride + c, lanes);
      bf16 half[kLanes];
      store(half, x);
      total = total + (x - load(half));
    }
    store_upto(sums + c, total, lanes);
  });
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
