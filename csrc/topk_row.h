// The result of the vector sweeps of K4 (cpu_topk.h) for a row, and the scalar work after. It is
// compiled once for the baseline CPU (topk_row.cpp), so it may use std:: algorithms.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fastdistill {

// Orders by value, larger first, then by id, lower first, when sorted from high to low. `value`
// must not be NaN; -0 must have been made +0, or it would sort below it.
inline uint64_t topk_key(float value, int64_t id) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

// A row split at a threshold that at least k entries reach.
struct TopkRow {
  float threshold;
  uint64_t* above;      // keys of the entries > threshold
  int64_t above_count;
  int64_t* equal;       // ids of the first k entries == threshold, ascending
  int64_t equal_count;  // of all of them
  double below_sum;     // sum of exp(y - below_reference) over the others; NaN if the row holds one
  float below_reference;
};

// The k-th largest of n values, -inf if there are fewer. Reorders them.
float kth_largest(float* values, int64_t n, int64_t k);

// Ids and values of the k largest, returns the log-sum-exp of everything else.
float finish_topk(TopkRow& row, int64_t k, int64_t* ids, float* values);

}  // namespace fastdistill
