// 16 lanes in an array: plain C++, for CPUs without AVX2 and as the reading copy of simd_*.h. The
// compiler turns most of these loops into the baseline's vectors.
#pragma once

namespace fastdistill {
namespace FASTDISTILL_ISA {

struct F32 {
  float v[16];
};
struct I32 {
  int32_t v[16];
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// r.v[i] = the expression, for every lane
#define FASTDISTILL_LANES(Result, expression)        \
  Result r;                                          \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r

inline F32 splat(float x) { FASTDISTILL_LANES(F32, x); }
inline I32 splat(int32_t x) { FASTDISTILL_LANES(I32, x); }
inline F32 operator+(const F32& a, const F32& b) { FASTDISTILL_LANES(F32, a.v[i] + b.v[i]); }
inline F32 operator-(const F32& a, const F32& b) { FASTDISTILL_LANES(F32, a.v[i] - b.v[i]); }
inline F32 operator*(const F32& a, const F32& b) { FASTDISTILL_LANES(F32, a.v[i] * b.v[i]); }
// Fused on the other instruction sets; only exp uses it.
inline F32 mul_add(const F32& a, const F32& b, const F32& c) {
  FASTDISTILL_LANES(F32, a.v[i] * b.v[i] + c.v[i]);
}
// As on x86: the second argument when one is NaN.
inline F32 max(const F32& a, const F32& b) {
  FASTDISTILL_LANES(F32, a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
inline I32 operator+(const I32& a, const I32& b) { FASTDISTILL_LANES(I32, a.v[i] + b.v[i]); }
inline I32 max(const I32& a, const I32& b) {
  FASTDISTILL_LANES(I32, a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}

inline F32 to_float(const I32& a) { FASTDISTILL_LANES(F32, static_cast<float>(a.v[i])); }
// To nearest even for |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low mantissa bits.
inline I32 round_to_int(const F32& a) {
  FASTDISTILL_LANES(I32, static_cast<int32_t>(bits_of(a.v[i] + 12582912.0f) - 0x4b400000u));
}
inline I32 abs_bits(const F32& a) {
  FASTDISTILL_LANES(I32, static_cast<int32_t>(bits_of(a.v[i]) & 0x7fffffffu));
}
inline F32 as_float(const I32& bits) {
  FASTDISTILL_LANES(F32, float_of(static_cast<uint32_t>(bits.v[i])));
}
inline F32 pow2(const I32& n) {
  FASTDISTILL_LANES(F32, float_of(static_cast<uint32_t>(n.v[i] + 127) << 23));
}
inline int32_t reduce_add(const I32& a) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += a.v[i];
  return sum;
}
inline int32_t reduce_max(const I32& a) {
  int32_t top = a.v[0];
  for (int i = 1; i < 16; ++i) top = a.v[i] > top ? a.v[i] : top;
  return top;
}

inline uint32_t ge_mask(const F32& a, const F32& b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
  return mask;
}
inline uint32_t gt_mask(const F32& a, const F32& b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(a.v[i] > b.v[i]) << i;
  return mask;
}
// v, but 0 where a < b; NaN counts as not less.
inline F32 zero_if_less(const F32& v, const F32& a, const F32& b) {
  FASTDISTILL_LANES(F32, a.v[i] < b.v[i] ? 0.0f : v.v[i]);
}
inline F32 zero_if_ge(const F32& v, const F32& a, const F32& b) {
  FASTDISTILL_LANES(F32, a.v[i] >= b.v[i] ? 0.0f : v.v[i]);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // inf and NaN; a signaling NaN becomes quiet
    const uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return float_of(sign | 0x7f800000u | quiet | (magnitude & 0x3ffu) << 13);
  }
  // Scaling by 2^112 moves the exponent's bias from 15 to 127 and normalizes subnormals as it goes.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline void from_float(float* p, float x) { *p = x; }
inline void from_float(bf16* p, float x) {
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  p->bits = static_cast<uint16_t>(
      nan ? (bits >> 16 | 0x40u) : ((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16));
}
inline void from_float(fp16* p, float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: 0.5 has the fp16 subnormals' spacing, 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

template <class T>
inline F32 load(const T* p) {
  FASTDISTILL_LANES(F32, to_float(p[i]));
}
template <class T>
inline void store(T* p, const F32& a) {
  for (int i = 0; i < 16; ++i) from_float(p + i, a.v[i]);
}
inline I32 load_i8(const int8_t* p) { FASTDISTILL_LANES(I32, p[i]); }
inline I32 load_i32(const int32_t* p) { FASTDISTILL_LANES(I32, p[i]); }
inline void store_i8(int8_t* p, const I32& a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

inline void fence() {}  // nothing here is stored past the caches

template <class T>
struct Table {
  explicit Table(const void* source) { memcpy(entries, source, sizeof entries); }
  template <bool streaming>
  void expand(const uint8_t* bytes, void* out) const {
    T* const p = static_cast<T*>(out);
    for (int i = 0; i < 16; ++i) {
      p[2 * i] = entries[bytes[i] >> 4];
      p[2 * i + 1] = entries[bytes[i] & 15];
    }
  }
  T entries[16];
};
using Table16 = Table<uint16_t>;
using Table32 = Table<float>;

// ---- dot products: Weights holds 16 columns x 4 k, Acts 4 k of one row for all columns

struct ByteTable {
  explicit ByteTable(const int8_t* source) { memcpy(entries, source, sizeof entries); }
  I32 at_high(const I32& a) const { return at(a, 4); }
  I32 at_low(const I32& a) const { return at(a, 0); }
  I32 at(const I32& a, int shift) const {
    I32 r;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(a.v);
    int8_t* to = reinterpret_cast<int8_t*>(r.v);
    for (int i = 0; i < 64; ++i) to[i] = entries[from[i] >> shift & 15];
    return r;
  }
  int8_t entries[16];
};

// out[d] = dword d of the 16 rows that start at src, src + stride, ...; others fetch what is ahead.
inline void transpose16(const uint8_t* src, int64_t stride, int64_t, I32* out) {
  for (int row = 0; row < 16; ++row)
    for (int d = 0; d < 16; ++d) memcpy(&out[d].v[row], src + row * stride + 4 * d, 4);
}

inline void pin(I32&) {}

constexpr int kWeightBias = 0;
constexpr int kTileVectors = 1;
constexpr int kTileRows = 1;
constexpr int kActBytes = 1;

struct Weights {
  static constexpr int kBytes = 64;
  int8_t v[64];
};
struct Acts {
  int8_t v[4];
};
inline Weights load_weights(const uint8_t* p) {
  Weights w;
  memcpy(w.v, p, sizeof w.v);
  return w;
}
// Codes with kWeightBias added, as store_weights wants them.
inline I32 biased(const I32& codes) { return codes; }
inline void store_weights(uint8_t* p, const I32& codes) { memcpy(p, codes.v, sizeof codes.v); }
inline Acts load_acts(const uint8_t* p) {
  Acts a;
  memcpy(a.v, p, sizeof a.v);
  return a;
}
inline void store_acts(uint8_t* p, const int8_t* four) { memcpy(p, four, 4); }
inline I32 dot(const I32& sum, const Weights& w, const Acts& a) {
  FASTDISTILL_LANES(I32, sum.v[i] + w.v[4 * i] * a.v[0] + w.v[4 * i + 1] * a.v[1] +
                             w.v[4 * i + 2] * a.v[2] + w.v[4 * i + 3] * a.v[3]);
}

#undef FASTDISTILL_LANES

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
