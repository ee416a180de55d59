// 16 lanes in one zmm: AVX512 F, BW, DQ, VL, with VNNI where FASTDISTILL_VNNI is set.
//
// bf16 is rounded with integers although AVX512_BF16 has an instruction: that one flushes
// subnormals, and results must be the same on every CPU.
#pragma once

#include <immintrin.h>

namespace fastdistill {
namespace FASTDISTILL_ISA {

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};

inline F32 splat(float x) { return {_mm512_set1_ps(x)}; }
inline I32 splat(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 mul_add(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }

inline F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32 round_to_int(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline I32 abs_bits(F32 a) {
  return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))};
}
inline F32 as_float(I32 bits) { return {_mm512_castsi512_ps(bits.v)}; }
inline F32 pow2(I32 n) {
  const __m512i biased = _mm512_add_epi32(n.v, _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
inline int32_t reduce_add(I32 a) { return _mm512_reduce_add_epi32(a.v); }
inline int32_t reduce_max(I32 a) { return _mm512_reduce_max_epi32(a.v); }

inline uint32_t ge_mask(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline uint32_t gt_mask(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
// v, but 0 where a < b; NaN counts as not less.
inline F32 zero_if_less(F32 v, F32 a, F32 b) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), v.v)};
}
inline F32 zero_if_ge(F32 v, F32 a, F32 b) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NGE_UQ), v.v)};
}

inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32 load(const fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F32 load(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
inline void store(fp16* p, F32 a) {
  const __m256i h = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
}
inline void store(bf16* p, F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i top = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(top, _mm512_set1_epi32(0x40));
  const __m512i r = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
inline I32 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline I32 load_i8(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_i8(int8_t* p, I32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

// Before anybody else reads what was stored with `streaming`.
inline void fence() { _mm_sfence(); }

template <bool streaming>
inline void store_line(void* out, __m512i v) {
  if (streaming && reinterpret_cast<uintptr_t>(out) % 64 == 0)
    _mm512_stream_si512(static_cast<__m512i*>(out), v);
  else
    _mm512_storeu_si512(out, v);
}

// 32 weights from 16 bytes. As 16-bit lanes the nibbles need no unpacking: vpermw reads the low 5
// bits of a lane, and a table that is there twice makes the fifth irrelevant.
struct Table16 {
  explicit Table16(const void* entries)
      : twice(_mm512_broadcast_i64x4(
            _mm256_loadu_si256(static_cast<const __m256i*>(entries)))) {}
  template <bool streaming>
  void expand(const uint8_t* bytes, void* out) const {
    const __m512i b =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
    store_line<streaming>(out, _mm512_permutexvar_epi16(index, twice));
  }
  __m512i twice;
};

struct Table32 {
  explicit Table32(const void* entries) : table(_mm512_loadu_ps(entries)) {}
  template <bool streaming>
  void expand(const uint8_t* bytes, void* out) const {
    // Each byte lands in two neighboring lanes, the first of which wants its high nibble.
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    const __m512i shift = _mm512_set1_epi64(4);
    const __m512i first = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(b, b)), shift);
    const __m512i second = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(b, b)), shift);
    float* const p = static_cast<float*>(out);
    store_line<streaming>(p, _mm512_castps_si512(_mm512_permutexvar_ps(first, table)));
    store_line<streaming>(p + 16, _mm512_castps_si512(_mm512_permutexvar_ps(second, table)));
  }
  __m512 table;
};

// ---- dot products: Weights holds 16 columns x 4 k, Acts 4 k of one row for all columns

struct ByteTable {
  explicit ByteTable(const int8_t* entries)
      : table(_mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)))) {}
  I32 at_high(I32 a) const { return at_low({_mm512_srli_epi16(a.v, 4)}); }
  I32 at_low(I32 a) const {
    return {_mm512_shuffle_epi8(table, _mm512_and_si512(a.v, _mm512_set1_epi8(15)))};
  }
  __m512i table;
};

// Always inlined: GCC 12 takes a function that only prefetches for one without effect.
FASTDISTILL_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

// out[d] = dword d of the 16 rows that start at src, src + stride, ...; fetches what lies `ahead`.
inline void transpose16(const uint8_t* src, int64_t stride, int64_t ahead, I32* out) {
  __m512i quad[16];  // quad[4i + j]: dword j of each quarter, rows 4i to 4i + 3
  unrolled<4>([&](auto i) FASTDISTILL_INLINE_LAMBDA {
    const uint8_t* const p = src + 4 * i * stride;
    const uint8_t* const next = p + ahead;
    for (int r = 0; r < 4; ++r) prefetch(next + r * stride);
    const __m512i r0 = _mm512_loadu_si512(p), r1 = _mm512_loadu_si512(p + stride);
    const __m512i r2 = _mm512_loadu_si512(p + 2 * stride), r3 = _mm512_loadu_si512(p + 3 * stride);
    const __m512i a = _mm512_unpacklo_epi32(r0, r1), b = _mm512_unpackhi_epi32(r0, r1);
    const __m512i c = _mm512_unpacklo_epi32(r2, r3), d = _mm512_unpackhi_epi32(r2, r3);
    quad[4 * i] = _mm512_unpacklo_epi64(a, c);
    quad[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
    quad[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
    quad[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
  });
  unrolled<4>([&](auto j) FASTDISTILL_INLINE_LAMBDA {  // a 4 x 4 transpose of the quarters
    const __m512i a = quad[j], b = quad[4 + j], c = quad[8 + j], d = quad[12 + j];
    const __m512i even_low = _mm512_shuffle_i32x4(a, b, 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(c, d, 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(a, b, 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(c, d, 0xdd);
    out[j].v = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    out[4 + j].v = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    out[8 + j].v = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    out[12 + j].v = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  });
}

// Ends a loop's accumulator: what follows may move it to memory, the loop must not.
#ifdef __GNUC__
inline void pin(I32& a) { __asm__ volatile("" : "+v"(a.v)); }
#else
inline void pin(I32&) {}
#endif

constexpr int kTileVectors = 2;  // a tile is kTileRows x (16 * kTileVectors) accumulators

#ifdef FASTDISTILL_VNNI

// vpdpbusd multiplies unsigned by signed: weights are stored plus 128, and an accumulator starts at
// -128 * (sum of the activations).
constexpr int kWeightBias = 128;
constexpr int kTileRows = 14;  // 28 accumulators, 2 weights, 1 broadcast: 31 of 32 registers
constexpr int kActBytes = 1;

struct Weights {
  static constexpr int kBytes = 64;
  __m512i v;
};
struct Acts {
  __m512i v;
};
inline Weights load_weights(const uint8_t* p) { return {_mm512_load_si512(p)}; }
inline I32 biased(I32 codes) { return {_mm512_xor_si512(codes.v, _mm512_set1_epi8(-128))}; }
inline void store_weights(uint8_t* p, I32 codes) { _mm512_store_si512(p, codes.v); }
inline Acts load_acts(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return {_mm512_set1_epi32(four)};
}
inline void store_acts(uint8_t* p, const int8_t* four) { memcpy(p, four, 4); }
// Written out and pinned, because GCC 12 sees the intrinsic's views of one register as two: left to
// itself it stores every accumulator in every step, which makes the loop four times slower.
#ifdef __GNUC__
inline I32 dot(I32 sum, Weights w, Acts a) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(w.v), "v"(a.v));
  return sum;
}
#else
inline I32 dot(I32 sum, Weights w, Acts a) { return {_mm512_dpbusd_epi32(sum.v, w.v, a.v)}; }
#endif

#else

// vpmaddwd: exact products of 16-bit pairs. Four bytes b0..b3 become the pairs (b0, b2), (b1, b3),
// which two shifts make.
constexpr int kWeightBias = 0;
constexpr int kTileRows = 12;
constexpr int kActBytes = 2;

struct Weights {
  static constexpr int kBytes = 128;
  __m512i even, odd;
};
struct Acts {
  __m512i even, odd;
};
inline Weights load_weights(const uint8_t* p) {
  return {_mm512_load_si512(p), _mm512_load_si512(p + 64)};
}
inline I32 biased(I32 codes) { return codes; }
inline void store_weights(uint8_t* p, I32 codes) {
  _mm512_store_si512(p, _mm512_srai_epi16(_mm512_slli_epi16(codes.v, 8), 8));
  _mm512_store_si512(p + 64, _mm512_srai_epi16(codes.v, 8));
}
inline Acts load_acts(const uint8_t* p) {
  int32_t pairs[2];
  memcpy(pairs, p, sizeof pairs);
  return {_mm512_set1_epi32(pairs[0]), _mm512_set1_epi32(pairs[1])};
}
inline void store_acts(uint8_t* p, const int8_t* four) {
  const int16_t wide[4] = {four[0], four[2], four[1], four[3]};
  memcpy(p, wide, sizeof wide);
}
inline I32 dot(I32 sum, Weights w, Acts a) {
  const __m512i even = _mm512_madd_epi16(w.even, a.even), odd = _mm512_madd_epi16(w.odd, a.odd);
  return {_mm512_add_epi32(sum.v, _mm512_add_epi32(even, odd))};
}

#endif

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
