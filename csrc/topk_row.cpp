#include "topk_row.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace fastdistill {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

float value_of(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits = bits >> 31 ? bits & 0x7fffffffu : ~bits;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

int64_t id_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

}  // namespace

float kth_largest(float* values, int64_t n, int64_t k) {
  if (n < k) return -kInf;
  std::nth_element(values, values + (k - 1), values + n, std::greater<float>());
  return values[k - 1];
}

float finish_topk(TopkRow& row, int64_t k, int64_t* ids, float* values) {
  const int64_t top = std::min(k, row.above_count);
  uint64_t* const cut = row.above + top;
  uint64_t* const end = row.above + row.above_count;
  if (cut != end) std::nth_element(row.above, cut, end, std::greater<uint64_t>());
  std::sort(row.above, cut, std::greater<uint64_t>());

  for (int64_t i = 0; i < top; ++i) {
    ids[i] = id_of(row.above[i]);
    values[i] = value_of(row.above[i]);
  }
  const int64_t level = std::min(k - top, row.equal_count);
  for (int64_t i = 0; i < level; ++i) ids[top + i] = row.equal[i], values[top + i] = row.threshold;
  for (int64_t i = top + level; i < k; ++i) ids[i] = 0, values[i] = kNaN;  // a row with NaN

  // The rest, relative to its largest member: what is left above, then the level, then below.
  if (std::isnan(row.below_sum)) return kNaN;
  const int64_t level_left = row.equal_count - level;
  float reference = row.below_sum > 0 ? row.below_reference : -kInf;
  if (level_left > 0) reference = row.threshold;
  for (const uint64_t* key = cut; key != end; ++key)
    reference = std::max(reference, value_of(*key));
  if (std::isinf(reference)) return reference;  // nothing left but -inf, or an inf is left

  const auto weight = [&](float y) { return std::exp(static_cast<double>(y) - reference); };
  double sum = 0;
  if (row.below_sum > 0) sum += row.below_sum * weight(row.below_reference);
  if (level_left > 0) sum += static_cast<double>(level_left) * weight(row.threshold);
  for (const uint64_t* key = cut; key != end; ++key) sum += weight(value_of(*key));
  return static_cast<float>(reference + std::log(sum));
}

}  // namespace fastdistill
