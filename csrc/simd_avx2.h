// 16 lanes in two ymm: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

namespace fastdistill {
namespace FASTDISTILL_ISA {

struct F32 {
  __m256 lo, hi;
};
struct I32 {
  __m256i lo, hi;
};

inline F32 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline I32 splat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline F32 operator+(F32 a, F32 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F32 operator-(F32 a, F32 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F32 operator*(F32 a, F32 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F32 mul_add(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline I32 operator+(I32 a, I32 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline I32 max(I32 a, I32 b) {
  return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}

inline F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline I32 round_to_int(F32 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline I32 abs_bits(F32 a) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(a.lo), mask),
          _mm256_and_si256(_mm256_castps_si256(a.hi), mask)};
}
inline F32 as_float(I32 bits) {
  return {_mm256_castsi256_ps(bits.lo), _mm256_castsi256_ps(bits.hi)};
}
inline F32 pow2(I32 n) {
  const I32 biased = n + splat(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased.lo, 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(biased.hi, 23))};
}
inline int32_t reduce_add(I32 a) {
  const __m256i s = _mm256_add_epi32(a.lo, a.hi);
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
inline int32_t reduce_max(I32 a) {
  const __m256i s = _mm256_max_epi32(a.lo, a.hi);
  __m128i t = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}

inline uint32_t ge_mask(F32 a, F32 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ)) |
                               _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)) << 8);
}
inline uint32_t gt_mask(F32 a, F32 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)) |
                               _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)) << 8);
}
// v, but 0 where a < b; NaN counts as not less.
inline F32 zero_if_less(F32 v, F32 a, F32 b) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), v.lo),
          _mm256_andnot_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ), v.hi)};
}
inline F32 zero_if_ge(F32 v, F32 a, F32 b) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), v.lo),
          _mm256_andnot_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ), v.hi)};
}

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store128(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
inline void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F32 load(const fp16* p) {
  return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))};
}
inline __m256 widen_bf16(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
}
inline F32 load(const bf16* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline void store(float* p, F32 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store(fp16* p, F32 a) {
  store128(p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  store128(p + 8, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __m256i bf16_bits(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i top = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, nan);
}
inline void store(bf16* p, F32 a) {
  const __m256i packed = _mm256_packus_epi32(bf16_bits(a.lo), bf16_bits(a.hi));
  store256(p, _mm256_permute4x64_epi64(packed, 0xd8));
}
inline I32 load_i8(const int8_t* p) {
  const __m128i b = load128(p);
  return {_mm256_cvtepi8_epi32(b), _mm256_cvtepi8_epi32(_mm_srli_si128(b, 8))};
}
inline void store_i8(int8_t* p, I32 a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  store128(p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

// The 32 nibbles of 16 bytes, in order, a byte each.
inline void split_nibbles(const uint8_t* bytes, __m128i* first, __m128i* second) {
  const __m128i b = load128(bytes), mask = _mm_set1_epi8(15);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(b, 4), mask), low = _mm_and_si128(b, mask);
  *first = _mm_unpacklo_epi8(high, low);
  *second = _mm_unpackhi_epi8(high, low);
}

inline void fence() {}  // nothing here is stored past the caches

// 16-bit entries as a table of low bytes and one of high bytes.
struct Table16 {
  explicit Table16(const void* entries) {
    const __m128i a = load128(entries), b = load128(static_cast<const char*>(entries) + 16);
    const __m128i mask = _mm_set1_epi16(255);
    low = _mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask));
    high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
  }
  template <bool streaming>
  void expand(const uint8_t* bytes, void* out) const {
    __m128i index[2];
    split_nibbles(bytes, &index[0], &index[1]);
    char* const p = static_cast<char*>(out);
    for (int i = 0; i < 2; ++i) {
      const __m128i l = _mm_shuffle_epi8(low, index[i]), h = _mm_shuffle_epi8(high, index[i]);
      store128(p + 32 * i, _mm_unpacklo_epi8(l, h));
      store128(p + 32 * i + 16, _mm_unpackhi_epi8(l, h));
    }
  }
  __m128i low, high;
};

struct Table32 {
  explicit Table32(const void* entries) : half(load(static_cast<const float*>(entries))) {}
  template <bool streaming>
  void expand(const uint8_t* bytes, void* out) const {
    __m128i index[2];
    split_nibbles(bytes, &index[0], &index[1]);
    float* const p = static_cast<float*>(out);
    for (int i = 0; i < 2; ++i) {
      _mm256_storeu_ps(p + 16 * i, at(index[i]));
      _mm256_storeu_ps(p + 16 * i + 8, at(_mm_srli_si128(index[i], 8)));
    }
  }
  __m256 at(__m128i index) const {  // vpermps reads 3 bits; the fourth chooses the half
    const __m256i i = _mm256_cvtepu8_epi32(index);
    const __m256 choose = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(half.lo, i),
                            _mm256_permutevar8x32_ps(half.hi, i), choose);
  }
  F32 half;
};

// ---- dot products: Weights holds 16 columns x 4 k, Acts 4 k of one row for all columns

struct ByteTable {
  explicit ByteTable(const int8_t* entries)
      : table(_mm256_broadcastsi128_si256(load128(entries))) {}
  I32 at_high(I32 a) const {
    return at_low({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)});
  }
  I32 at_low(I32 a) const {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_shuffle_epi8(table, _mm256_and_si256(a.lo, mask)),
            _mm256_shuffle_epi8(table, _mm256_and_si256(a.hi, mask))};
  }
  __m256i table;
};

// out[d] = dword d of 8 rows
inline void transpose8(const uint8_t* src, int64_t stride, __m256i* out) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = load256(src + i * stride);
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    a[4 * i] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    out[j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x20);
    out[4 + j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x31);
  }
}

// Always inlined: GCC 12 takes a function that only prefetches for one without effect.
FASTDISTILL_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

// out[d] = dword d of the 16 rows that start at src, src + stride, ...; fetches what lies `ahead`.
inline void transpose16(const uint8_t* src, int64_t stride, int64_t ahead, I32* out) {
  for (int r = 0; r < 16; ++r) prefetch(src + r * stride + ahead);
  for (int half = 0; half < 2; ++half) {
    __m256i upper[8], lower[8];
    transpose8(src + 32 * half, stride, upper);
    transpose8(src + 32 * half + 8 * stride, stride, lower);
    for (int d = 0; d < 8; ++d) out[8 * half + d] = {upper[d], lower[d]};
  }
}

// Ends a loop's accumulator: what follows may move it to memory, the loop must not.
#ifdef __GNUC__
inline void pin(I32& a) { __asm__ volatile("" : "+x"(a.lo), "+x"(a.hi)); }
#else
inline void pin(I32&) {}
#endif

// vpmaddwd: exact products of 16-bit pairs. Four bytes b0..b3 become the pairs (b0, b2), (b1, b3),
// which two shifts make. vpmaddubsw would be twice as fast but saturates.
constexpr int kWeightBias = 0;
constexpr int kTileVectors = 1;
constexpr int kTileRows = 4;  // 8 accumulators, 4 weights, 2 broadcasts: 14 of 16 registers
constexpr int kActBytes = 2;

struct Weights {
  static constexpr int kBytes = 128;
  I32 even, odd;
};
struct Acts {
  __m256i even, odd;
};
inline Weights load_weights(const uint8_t* p) {
  return {{load256(p), load256(p + 32)}, {load256(p + 64), load256(p + 96)}};
}
inline I32 biased(I32 codes) { return codes; }
inline void store_weights(uint8_t* p, I32 codes) {
  store256(p, _mm256_srai_epi16(_mm256_slli_epi16(codes.lo, 8), 8));
  store256(p + 32, _mm256_srai_epi16(_mm256_slli_epi16(codes.hi, 8), 8));
  store256(p + 64, _mm256_srai_epi16(codes.lo, 8));
  store256(p + 96, _mm256_srai_epi16(codes.hi, 8));
}
inline Acts load_acts(const uint8_t* p) {
  int32_t pairs[2];
  memcpy(pairs, p, sizeof pairs);
  return {_mm256_set1_epi32(pairs[0]), _mm256_set1_epi32(pairs[1])};
}
inline void store_acts(uint8_t* p, const int8_t* four) {
  const int16_t wide[4] = {four[0], four[2], four[1], four[3]};
  memcpy(p, wide, sizeof wide);
}
inline I32 dot(I32 sum, Weights w, Acts a) {
  sum.lo = _mm256_add_epi32(sum.lo, _mm256_madd_epi16(w.even.lo, a.even));
  sum.hi = _mm256_add_epi32(sum.hi, _mm256_madd_epi16(w.even.hi, a.even));
  return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(w.odd.lo, a.odd)),
          _mm256_add_epi32(sum.hi, _mm256_madd_epi16(w.odd.hi, a.odd))};
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
