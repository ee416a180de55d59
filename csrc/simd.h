// One vector of 16 lanes, whatever the registers are: a zmm, two ymm, or an array. Therefore every
// instruction set does the same operations in the same order, which is what makes results bit-equal
// across them; only the register tile of the GEMM differs.
//
// FASTDISTILL_ISA names the namespace, and with it all that is compiled for one instruction set. No
// inline function may be shared between two of them: the linker would keep one copy, perhaps that
// in AVX-512, for the whole program. Hence no std:: templates here, and C headers only.
//
// Each simd_*.h provides F32 (16 floats) and I32 (16 int32) with their arithmetic, loads and stores
// in every dtype, Table16 and Table32 (lookups in 16 entries), and for the GEMM a 16 x 16 transpose
// and dot products. simd_scalar.h says in plain C++ what each of them means.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu_kernels.h"

#ifdef _MSC_VER
#define FASTDISTILL_INLINE __forceinline
#define FASTDISTILL_NOINLINE __declspec(noinline)
#define FASTDISTILL_INLINE_LAMBDA
#else
#define FASTDISTILL_INLINE inline __attribute__((always_inline))
#define FASTDISTILL_NOINLINE __attribute__((noinline))
#define FASTDISTILL_INLINE_LAMBDA __attribute__((always_inline))
#endif

namespace fastdistill {
namespace FASTDISTILL_ISA {

template <int I>
struct Index {
  constexpr operator int() const { return I; }
};

// body(0) ... body(N - 1) with constants: arrays that are indexed by them live in registers, which
// compilers do not promise for a loop that they unroll themselves.
template <int N, int I = 0, class Body>
FASTDISTILL_INLINE void unrolled(const Body& body) {
  if constexpr (I < N) {
    body(Index<I>());
    unrolled<N, I + 1>(body);
  }
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill

#ifdef FASTDISTILL_AVX512
#include "simd_avx512.h"
#elif defined(FASTDISTILL_AVX2)
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif

namespace fastdistill {
namespace FASTDISTILL_ISA {

constexpr int kLanes = 16;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
inline F32 load_part(const T* p, int64_t n) {  // lanes from n on are 0
  T lanes[kLanes] = {};
  memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store_part(T* p, F32 v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// Calls body(p) with p typed as `dtype` says.
template <class Body>
inline void with_dtype(Dtype dtype, void* p, const Body& body) {
  if (dtype == kBf16) return body(static_cast<bf16*>(p));
  if (dtype == kFp16) return body(static_cast<fp16*>(p));
  return body(static_cast<float*>(p));
}

template <class Body>
inline void with_dtype(Dtype dtype, const void* p, const Body& body) {
  if (dtype == kBf16) return body(static_cast<const bf16*>(p));
  if (dtype == kFp16) return body(static_cast<const fp16*>(p));
  return body(static_cast<const float*>(p));
}

// body(i, thread) for i in [0, n), `chunk` of them at a time to whichever thread is free.
template <class Body>
inline void parallel_for(int threads, int64_t n, int64_t chunk, const Body& body) {
#ifdef _OPENMP
  const int team = static_cast<int>(min64(threads, ceil_div(n, chunk)));
  if (team > 1) {
#pragma omp parallel num_threads(team)
    {
      const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, chunk)
      for (int64_t i = 0; i < n; ++i) body(i, thread);
    }
    return;
  }
#endif
  (void)threads, (void)chunk;
  for (int64_t i = 0; i < n; ++i) body(i, 0);
}

// exp for x <= 0 (Cephes' expf: relative error below 2e-7); 0 for x < -87, where 2^n would leave
// the normal range. NaN stays NaN.
inline F32 exp_nonpositive(F32 x) {
  const F32 floor = splat(-87.0f);
  const F32 clamped = max(floor, x);  // max returns its second argument if one is NaN
  const I32 n = round_to_int(clamped * splat(1.44269504088896341f));
  const F32 nf = to_float(n);
  F32 r = mul_add(nf, splat(-0.693359375f), clamped);
  r = mul_add(nf, splat(2.12194440e-4f), r);
  F32 p = splat(1.9875691500e-4f);
  p = mul_add(p, r, splat(1.3981999507e-3f));
  p = mul_add(p, r, splat(8.3334519073e-3f));
  p = mul_add(p, r, splat(4.1665795894e-2f));
  p = mul_add(p, r, splat(1.6666665459e-1f));
  p = mul_add(p, r, splat(5.0000001201e-1f));
  p = mul_add(p, r * r, r) + splat(1.0f);
  return zero_if_less(p * pow2(n), x, floor);
}

// Cache-line aligned memory for the length of one call; null when there is none.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : raw_(malloc(static_cast<size_t>(bytes) + 64)) {}
  ~Scratch() { free(raw_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  uint8_t* data() const {
    if (!raw_) return nullptr;
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(raw_) + 63) & ~uintptr_t{63});
  }

 private:
  void* raw_;
};

inline int64_t round_up(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
