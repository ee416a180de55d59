// K1: LUT4 and int8 weights to fp32, bf16 or fp16. K2: activations to int8 in groups.
#pragma once

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {

// Table and bit pattern of each output type: a dequantized block is 16 values, so they are computed
// and rounded once per block, and every weight is then a lookup of finished bits. That costs less
// than converting each weight, and it is exact because equal nibbles have equal results.
template <class T>
struct Output {
  using Table = Table16;
};
template <>
struct Output<float> {
  using Table = Table32;
};

// Where a result no longer fits a last-level cache, storing past it saves reading what is written.
constexpr int64_t kCacheBytes = 24 << 20;

// body(block index, begin, end) over the parts of blocks, in spans large enough for a thread to
// keep its own stream of memory. `begin` of a span is even, that of a run inside it need not be.
template <class Body>
inline void for_each_run(int threads, int64_t count, int64_t block, const Body& body) {
  constexpr int64_t kSpan = 1 << 15;
  parallel_for(threads, ceil_div(count, kSpan), 1, [&](int64_t span, int) {
    const int64_t end = min64(count, (span + 1) * kSpan);
    int64_t begin = span * kSpan, b = begin / block;
    for (int64_t next = (b + 1) * block; begin < end; begin = next, next += block, ++b)
      body(b, begin, min64(next, end));
    fence();
  });
}

template <bool streaming, class T>
inline void lut4_run(const uint8_t* qdata, F32 values, T* out, int64_t begin, int64_t end) {
  T entries[kLutSize];
  store(entries, values);
  int64_t i = begin;
  if ((i & 1) && i < end) {
    out[i] = entries[lut4_at(qdata, i)];
    ++i;
  }
  const typename Output<T>::Table table(entries);
  for (; i + 32 <= end; i += 32) table.template expand<streaming>(qdata + i / 2, out + i);
  for (; i < end; ++i) out[i] = entries[lut4_at(qdata, i)];
}

inline void lut4_dequant(int threads, const uint8_t* qdata, const float* scale, const float* offset,
                         const float* lut, void* out, Dtype out_dtype, int64_t count,
                         int64_t block) {
  with_dtype(out_dtype, out, [&](auto* to) {
    const bool streaming = count * static_cast<int64_t>(sizeof *to) > kCacheBytes;
    for_each_run(threads, count, block, [&](int64_t b, int64_t begin, int64_t end) {
      F32 values = load(lut) * splat(scale[b]);
      if (offset) values = values + splat(offset[b]);
      if (streaming)
        lut4_run<true>(qdata, values, to, begin, end);
      else
        lut4_run<false>(qdata, values, to, begin, end);
    });
  });
}

inline void int8_dequant(int threads, const int8_t* qdata, const float* scale, void* out,
                         Dtype out_dtype, int64_t count, int64_t block) {
  with_dtype(out_dtype, out, [&](auto* to) {
    for_each_run(threads, count, block, [&](int64_t b, int64_t begin, int64_t end) {
      const F32 s = splat(scale[b]);
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) store(to + i, to_float(load_i8(qdata + i)) * s);
      if (i == end) return;
      int8_t rest[kLanes] = {};
      memcpy(rest, qdata + i, static_cast<size_t>(end - i));
      store_part(to + i, to_float(load_i8(rest)) * s, end - i);
    });
  });
}

// Quantizes one group, returns the sum of its codes.
//
// The largest magnitude is found on the bits, where NaN > inf > every number. A group that holds
// one of those gets scale NaN, so that every output it takes part in is NaN. A group whose
// 127 / amax overflows (amax < 3.8e-37) counts as zero.
template <class T>
inline int32_t quantize_group(const T* x, int64_t n, int8_t* q, float* scale) {
  const int64_t whole = n / kLanes * kLanes;
  I32 top = splat(0);
  for (int64_t i = 0; i < whole; i += kLanes) top = max(top, abs_bits(load(x + i)));
  if (whole < n) top = max(top, abs_bits(load_part(x + whole, n - whole)));
  const int32_t bits = reduce_max(top);
  float amax;
  memcpy(&amax, &bits, sizeof amax);

  constexpr int32_t kInf = 0x7f800000;
  const float inverse = 127.0f / amax;
  if (bits >= kInf || !(inverse <= 3.402823466e38f)) {
    *scale = bits >= kInf ? NAN : 0.0f;
    memset(q, 0, static_cast<size_t>(n));
    return 0;
  }
  *scale = amax / 127.0f;
  const F32 factor = splat(inverse);
  I32 sum = splat(0);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const I32 codes = round_to_int(load(x + i) * factor);
    store_i8(q + i, codes);
    sum = sum + codes;
  }
  if (whole < n) {
    int8_t rest[kLanes];
    const I32 codes = round_to_int(load_part(x + whole, n - whole) * factor);
    store_i8(rest, codes);
    memcpy(q + whole, rest, static_cast<size_t>(n - whole));
    sum = sum + codes;
  }
  return reduce_add(sum);
}

inline void quantize_groups(int threads, const void* x, Dtype x_dtype, int8_t* q, float* scale,
                            int32_t* sum, int64_t rows, int64_t cols, int64_t group) {
  const int64_t groups = rows * (cols / group);  // flat, since groups do not cross rows
  with_dtype(x_dtype, x, [&](const auto* from) {
    parallel_for(threads, groups, max64(1, 8192 / group), [&](int64_t g, int) {
      const int32_t s = quantize_group(from + g * group, group, q + g * group, scale + g);
      if (sum) sum[g] = s;
    });
  });
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
