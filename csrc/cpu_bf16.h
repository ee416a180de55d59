// Products of bf16 operands with fp32 results: out[m, n] = (add ? out[m, n] : 0) + sum over k of
// a[m, k] * b[n, k].
//
// a and b become panels of pairs, [K/2][rows][2]: a pair is what one lane of the instruction takes.
// An fp32 operand is rounded to bf16 while it is packed; `kRemainder` packs what the rounding took
// away. A sum adds the products in ascending pairs of k, in each pair the odd k first (as vdpbf16ps
// does), so a result depends neither on the threads nor on how the rows are tiled.
#pragma once

#include "simd.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {

constexpr int kPairColumns = 32;       // columns of b in a panel, two vectors
constexpr int64_t kPairDepth = 1024;   // k of a block: its panels of a stay in an L2; fp32 only
constexpr int64_t kTilesAtOnce = 8;    // tiles of rows that share a pass over the panels of b

#ifdef FASTDISTILL_BF16
constexpr int kPairRows = 14;  // 28 accumulators, 2 panels of b, 1 broadcast: 31 of 32 registers

struct Pairs {
  __m512i v;
};
inline Pairs load_pairs(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Pairs splat_pair(uint32_t pair) { return {_mm512_set1_epi32(static_cast<int>(pair))}; }
FASTDISTILL_INLINE F32 dot(F32 sum, Pairs a, Pairs b) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}
inline I32 bits_of(F32 a) { return {_mm512_castps_si512(a.v)}; }
inline I32 pair_of(I32 low, I32 high) {  // both hold bf16 in the upper half of a lane
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_or_si512(_mm512_srli_epi32(low.v, 16), _mm512_and_si512(high.v, upper))};
}
inline F32 rounded(F32 a) {  // to bf16, and back
  const __m256i half = (__m256i)_mm512_cvtneps_pbh(a.v);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline void store_rounded(bf16* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
inline void store_pairs(uint32_t* p, I32 pairs) { _mm512_storeu_si512(p, pairs.v); }
inline __mmask16 mask_of(int64_t lanes) { return static_cast<__mmask16>((1u << lanes) - 1); }
inline F32 load_lanes(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(mask_of(n), p)}; }
inline F32 load_lanes(const bf16* p, int64_t n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(mask_of(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
#else
constexpr int kPairRows = 2;

struct Pairs {
  uint32_t v[16];
};
inline Pairs load_pairs(const uint32_t* p) {
  Pairs pairs;
  memcpy(pairs.v, p, sizeof pairs.v);
  return pairs;
}
inline Pairs splat_pair(uint32_t pair) {
  Pairs pairs;
  for (uint32_t& lane : pairs.v) lane = pair;
  return pairs;
}
// vdpbf16ps takes subnormal inputs for 0 and makes a subnormal result 0.
inline float flushed(float x) {
  return fabsf(x) < 0x1p-126f ? float_of(bits_of(x) & 0x80000000u) : x;
}
inline F32 dot(const F32& sum, const Pairs& a, const Pairs& b) {
  F32 r;
  for (int i = 0; i < 16; ++i) {
    const auto high = [](uint32_t pair) { return flushed(float_of(pair & 0xffff0000u)); };
    const auto low = [](uint32_t pair) { return flushed(float_of(pair << 16)); };
    r.v[i] = flushed(sum.v[i]);
    r.v[i] = flushed(fmaf(high(a.v[i]), high(b.v[i]), r.v[i]));
    r.v[i] = flushed(fmaf(low(a.v[i]), low(b.v[i]), r.v[i]));
  }
  return r;
}
inline I32 bits_of(const F32& a) {
  I32 r;
  memcpy(r.v, a.v, sizeof r.v);
  return r;
}
inline I32 pair_of(const I32& low, const I32& high) {
  I32 r;
  for (int i = 0; i < 16; ++i)
    r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(low.v[i]) >> 16 |
                                  (static_cast<uint32_t>(high.v[i]) & 0xffff0000u));
  return r;
}
inline F32 rounded(const F32& a) {
  F32 r;
  for (int i = 0; i < 16; ++i) {
    bf16 half;
    from_float(&half, flushed(a.v[i]));
    r.v[i] = to_float(half);
  }
  return r;
}
inline void store_rounded(bf16* p, const F32& a) { store(p, rounded(a)); }
inline void store_pairs(uint32_t* p, const I32& pairs) { memcpy(p, pairs.v, sizeof pairs.v); }
template <class T>
inline F32 load_lanes(const T* p, int64_t n) {  // lanes from n on are 0
  return load_part(p, n);
}
#endif

// 16 values of an operand as it is multiplied; the remainder of bf16 is 0.
inline F32 operand(const bf16* p, int64_t lanes, bool remainder) {
  return remainder ? splat(0.0f) : load_lanes(p, lanes);
}
inline F32 operand(const float* p, int64_t lanes, bool remainder) {
  const F32 x = load_lanes(p, lanes), high = rounded(x);
  return remainder ? rounded(x - high) : high;
}

// `n` <= 32 values of an operand in bf16, as they are multiplied.
inline void store_operand(bf16* to, const bf16* from, int64_t n, bool remainder) {
  if (remainder)
    memset(to, 0, static_cast<size_t>(n) * sizeof(bf16));
  else if (n == 32)
    memcpy(to, from, 64);
  else
    memcpy(to, from, static_cast<size_t>(n) * sizeof(bf16));
}
inline void store_operand(bf16* to, const float* from, int64_t n, bool remainder) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t lanes = min64(kLanes, n - i);
    store_rounded(to + i, remainder ? operand(from + i, lanes, true) : load_lanes(from + i, lanes));
  }
}

// out[k / 2][width] pairs of `rows` rows and `depth` k of an operand; rows from `rows` on, and the
// missing half of an odd depth, are 0. Writes up to 15 pairs beyond the end. One stride is 1.
template <class T>
inline void pack_pairs(const T* from, int64_t row_stride, int64_t k_stride, int64_t rows,
                       int64_t depth, int64_t width, bool remainder, uint32_t* out) {
  const int64_t steps = ceil_div(depth, 2);
  for (int64_t r = 0; r < width; r += kLanes) {
    const int64_t lanes = max64(0, min64(kLanes, rows - r));
    if (k_stride != 1) {
      const F32 zero = splat(0.0f);
      for (int64_t s = 0; s < steps; ++s) {
        const T* const p = from + r * row_stride + 2 * s * k_stride;
        const bool both = 2 * s + 1 < depth;
        const F32 low = operand(p, lanes, remainder);
        const F32 high = both ? operand(p + k_stride, lanes, remainder) : zero;
        store_pairs(out + s * width + r, pair_of(bits_of(low), bits_of(high)));
      }
      continue;
    }
    for (int64_t k = 0; k < depth; k += 32) {
      alignas(64) bf16 block[16][32];
      const int64_t some = min64(32, depth - k);
      if (lanes < kLanes || some < 32) memset(block, 0, sizeof block);
      for (int64_t i = 0; i < lanes; ++i)
        store_operand(block[i], from + (r + i) * row_stride + k, some, remainder);
      I32 dwords[16];
      transpose16(reinterpret_cast<const uint8_t*>(block), 64, 0, dwords);
      for (int64_t s = 0; s < ceil_div(some, 2); ++s)
        store_pairs(out + (k / 2 + s) * width + r, dwords[s]);
    }
  }
}

// out [R][columns] = or += R rows of pairs times a panel, over `steps` pairs of k.
template <int R, class T>
FASTDISTILL_NOINLINE void multiply_pairs(const uint32_t* a, const uint32_t* panel, int64_t steps,
                                         T* out, int64_t stride, int64_t columns, bool add) {
  F32 sum[R][2];
  unrolled<R>([&](auto r) FASTDISTILL_INLINE_LAMBDA {
    unrolled<2>([&](auto c) FASTDISTILL_INLINE_LAMBDA {
      const int64_t lanes = min64(kLanes, columns - kLanes * c);
      T* const to = out + r * stride + kLanes * c;
      sum[r][c] = !add || lanes <= 0 ? splat(0.0f)
                  : lanes == kLanes  ? load(to)
                                     : load_part(to, lanes);
    });
  });
  do {
    const Pairs b[2] = {load_pairs(panel), load_pairs(panel + kLanes)};
    unrolled<R>([&](auto r) FASTDISTILL_INLINE_LAMBDA {
      const Pairs row = splat_pair(a[r]);
      unrolled<2>([&](auto c) FASTDISTILL_INLINE_LAMBDA { sum[r][c] = dot(sum[r][c], row, b[c]); });
    });
    a += R;
    panel += kPairColumns;
  } while (--steps);
  unrolled<R>([&](auto r) FASTDISTILL_INLINE_LAMBDA {
    unrolled<2>([&](auto c) FASTDISTILL_INLINE_LAMBDA {
      const int64_t lanes = min64(kLanes, columns - kLanes * c);
      T* const to = out + r * stride + kLanes * c;
      if (lanes == kLanes)
        store(to, sum[r][c]);
      else if (lanes > 0)
        store_part(to, sum[r][c], lanes);
    });
  });
}

// multiply_pairs<rows>, rows in [1, R]
template <int R, class... Args>
inline void multiply_pair_rows(int64_t rows, Args... args) {
  if constexpr (R > 1)
    if (rows < R) return multiply_pair_rows<R - 1>(rows, args...);
  multiply_pairs<R>(args...);
}

// Rows in tiles of nearly equal height: 16 rows are 8 + 8, not 14 + 2.
struct RowTiles {
  explicit RowTiles(int64_t M) : count(ceil_div(M, kPairRows)), base(M / count), extra(M % count) {}
  int64_t first(int64_t t) const { return t * base + min64(t, extra); }
  int64_t rows(int64_t t) const { return base + (t < extra); }
  int64_t count, base, extra;
};

inline int64_t pair_steps(int64_t K) { return ceil_div(K, 2); }
inline int64_t own_pairs(int64_t K) {  // of a thread, with what pack_pairs writes beyond the end
  return kTilesAtOnce * kPairRows * pair_steps(K) + kLanes;
}

// Bytes of scratch memory that bf16_gemm needs.
inline int64_t bf16_scratch(int threads, int64_t N, int64_t K) {
  return 4 * (round_up(N) * pair_steps(K) + kLanes + threads * own_pairs(K));
}

template <class A, class T>
inline void bf16_gemm_typed(int threads, const A* a, int64_t a_row, int64_t a_k,
                            const bf16* b, int64_t b_row, int64_t b_k, T* out, int64_t out_stride, int64_t M,
                            int64_t N, int64_t K, bool remainder, bool add, uint32_t* scratch) {
  const int64_t panels = ceil_div(N, kPairColumns), steps = pair_steps(K);
  uint32_t* const owned = scratch + panels * kPairColumns * steps + kLanes;
  // A panel ends where the next begins: what is written beyond the end of one must not come later
  // than the next one. Each panel is a multiple of 16 wide, so nothing is.
  parallel_for(threads, panels, 1, [&](int64_t p, int) {
    const int64_t n = p * kPairColumns;
    pack_pairs(b + n * b_row, b_row, b_k, min64(kPairColumns, N - n), K, kPairColumns, false,
               scratch + n * steps);
  });
  const RowTiles tiles(M);
  const int64_t blocks = ceil_div(tiles.count, kTilesAtOnce);
  const int64_t parts = threads == 1 ? 1 : min64(panels, ceil_div(2 * threads, blocks));
  parallel_for(threads, blocks * parts, 1, [&](int64_t task, int thread) {
    uint32_t* const packed = owned + thread * own_pairs(K);
    const int64_t t0 = task / parts * kTilesAtOnce, t1 = min64(tiles.count, t0 + kTilesAtOnce);
    const int64_t part = task % parts;
    const int64_t p0 = panels * part / parts, p1 = panels * (part + 1) / parts;
    const int64_t block = sizeof(T) == 4 ? kPairDepth : K;  // bf16 is rounded once
    for (int64_t k = 0; k < K; k += block) {
      const int64_t depth = min64(block, K - k), deep = pair_steps(depth);
      for (int64_t t = t0; t < t1; ++t)
        pack_pairs(a + tiles.first(t) * a_row + k * a_k, a_row, a_k, tiles.rows(t), depth,
                   tiles.rows(t), remainder, packed + (tiles.first(t) - tiles.first(t0)) * deep);
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t n = p * kPairColumns;
        for (int64_t t = t0; t < t1; ++t)
          multiply_pair_rows<kPairRows>(
              tiles.rows(t), packed + (tiles.first(t) - tiles.first(t0)) * deep,
              scratch + n * steps + k / 2 * kPairColumns, deep,
              out + tiles.first(t) * out_stride + n, out_stride, min64(kPairColumns, N - n),
              add || k > 0);
      }
    }
  });
}

// body(a, out), with the pointers typed as their dtypes say.
template <class Body>
inline void with_operands(const Matrix& a, void* out, Dtype out_dtype, const Body& body) {
  const auto with_out = [&](auto* to) {
    if (a.dtype == kBf16)
      body(static_cast<const bf16*>(a.data), to);
    else
      body(static_cast<const float*>(a.data), to);
  };
  if (out_dtype == kBf16)
    with_out(static_cast<bf16*>(out));
  else
    with_out(static_cast<float*>(out));
}

inline void bf16_gemm(int threads, const Matrix& a, const Matrix& b, void* out, Dtype out_dtype,
                      int64_t out_stride, int64_t M, int64_t N, int64_t K, bool remainder, bool add,
                      void* scratch) {
  with_operands(a, out, out_dtype, [&](const auto* from_a, auto* to) {
    bf16_gemm_typed(threads, from_a, a.row_stride, a.k_stride, static_cast<const bf16*>(b.data),
                    b.row_stride, b.k_stride, to, out_stride, M, N, K, remainder, add,
                    static_cast<uint32_t*>(scratch));
  });
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
