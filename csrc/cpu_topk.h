// K4: the k largest of y = z * inv_temperature, and the log-sum-exp of all the others.
//
// Sweep 1 finds a threshold that at least k entries reach: the k-th largest of a few hundred
// interleaved bucket maxima. Sweep 2 collects the few entries that reach it (1.2 k of them when
// large ones are spread evenly) and sums exp(y - threshold) over those below. The rest is never a
// difference 1 - sum, and never relative to the row's maximum, so a tail of e^-80 keeps its digits.
#pragma once

#include "simd.h"
#include "topk_row.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {

constexpr int kBuckets = 4 * kLanes;  // per segment of a row
// Fewer than this from a whole tail may be missing entries that exp flushed to 0.
constexpr double kFaint = 1e-26;

// y of the n <= 16 entries from z on; the missing lanes are -inf.
inline F32 scaled(const float* z, int64_t n, F32 inv_temperature) {
  if (n >= kLanes) return load(z) * inv_temperature;
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? z[i] : -INFINITY;
  return load(lanes) * inv_temperature;
}

// Segments of which at least 4 k buckets come together, none of them shorter than 4 vectors each.
inline int64_t segments_of(int64_t cols, int64_t k) {
  return min64(ceil_div(4 * k, kBuckets), cols / (4 * kBuckets));
}

inline float find_threshold(const float* z, int64_t cols, F32 inv_temperature, int64_t k,
                            float* maxima) {
  const int64_t segments = segments_of(cols, k), strips = cols / kBuckets;
  for (int64_t s = 0; s < segments; ++s) {
    F32 top[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    for (int64_t i = strips * s / segments; i < strips * (s + 1) / segments; ++i)
      for (int j = 0; j < 4; ++j)  // NaN is dropped: max returns its second argument
        top[j] = max(load(z + i * kBuckets + j * kLanes) * inv_temperature, top[j]);
    for (int j = 0; j < 4; ++j) store(maxima + s * kBuckets + j * kLanes, top[j]);
  }
  return kth_largest(maxima, segments * kBuckets, k) + 0.0f;
}

inline void collect(F32 y, uint32_t lanes, int64_t first, int64_t k, TopkRow* row) {
  float values[kLanes];
  store(values, y + splat(0.0f));  // -0 becomes 0
  for (int i = 0; i < kLanes; ++i) {
    if (!(lanes >> i & 1)) continue;
    if (values[i] > row->threshold) {
      row->above[row->above_count++] = topk_key(values[i], first + i);
    } else {
      if (row->equal_count < k) row->equal[row->equal_count] = first + i;
      ++row->equal_count;
    }
  }
}

// Sum of exp(y - reference) over the entries below the threshold. `row` null: nothing is collected.
inline double sweep(const float* z, int64_t cols, F32 inv_temperature, float threshold,
                    float reference, int64_t k, TopkRow* row) {
  constexpr int64_t kStrip = 64 * kLanes;  // short fp32 sums keep the error of a long row at 1e-7
  const F32 limit = splat(threshold), origin = splat(reference);
  double total = 0;
  for (int64_t begin = 0; begin < cols; begin += kStrip) {
    const int64_t end = min64(cols, begin + kStrip);
    F32 sum = splat(0.0f);
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t n = min64(kLanes, end - i);
      const F32 y = scaled(z + i, n, inv_temperature);
      sum = sum + zero_if_ge(exp_nonpositive(y - origin), y, limit);
      const uint32_t reached = ge_mask(y, limit) & ((1u << n) - 1);
      if (reached && row) collect(y, reached, i, k, row);
    }
    float lanes[kLanes];
    store(lanes, sum);
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
  }
  return total;
}

inline float largest_below(const float* z, int64_t cols, float inv_temperature, float threshold) {
  float top = -INFINITY;
  for (int64_t i = 0; i < cols; ++i) {
    const float y = z[i] * inv_temperature;
    if (y < threshold && y > top) top = y;
  }
  return top;
}

inline bool lse_topk(int threads, const float* z, int64_t rows, int64_t cols, int64_t row_stride,
                     float inv_temperature, int64_t k, int64_t* ids, float* values,
                     float* lse_rest) {
  // Room for every entry to be a candidate, as in a sorted row; only what is used gets touched.
  const int64_t maxima_bytes = segments_of(cols, k) * kBuckets * 4;
  const int64_t own = round_up(cols * 8 + k * 8 + maxima_bytes);
  const Scratch scratch(threads * own);
  if (!scratch.data()) return false;
  parallel_for(threads, rows, 1, [&](int64_t r, int thread) {
    uint64_t* const above = reinterpret_cast<uint64_t*>(scratch.data() + thread * own);
    int64_t* const equal = reinterpret_cast<int64_t*>(above + cols);
    const float* const p = z + r * row_stride;
    const F32 inv = splat(inv_temperature);
    const float t = find_threshold(p, cols, inv, k, reinterpret_cast<float*>(equal + k));
    TopkRow row{t, above, 0, equal, 0, 0.0, t};
    row.below_sum = sweep(p, cols, inv, t, t, k, &row);
    if (row.below_sum < kFaint && row.above_count + row.equal_count < cols) {
      row.below_reference = largest_below(p, cols, inv_temperature, t);
      row.below_sum = row.below_reference == -INFINITY
                          ? 0.0
                          : sweep(p, cols, inv, t, row.below_reference, k, nullptr);
    }
    lse_rest[r] = finish_topk(row, k, ids + r * k, values + r * k);
  });
  return true;
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
