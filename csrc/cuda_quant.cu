// K5: LUT4 weights expanded to fp32, bf16, fp16, fp8-e4m3 or int8.  K6: rows quantized to 8 bits.
//
//   K5   w_i = lut[q_i] * scale[i / block] (+ offset[i / block])   (8 bits: * row_inv[i / cols])
//   K6   scale_r = amax_r / top,   q_ri = round(x_ri * (top / amax_r)),   top = 127 | 448
//
// Every product and every sum is rounded to fp32 by itself: __fmul_rn and __fadd_rn are never
// merged into an FMA, whatever the flags, so the CPU, Triton and PyTorch agree bit for bit.
//
// Bound of K5, NF4 in blocks of 64 to bf16: 1/2 byte of nibbles + 4/64 of scale + 2 of result =
// 2.5625 bytes per weight (nested: 2.516). 4096 x 14336 weights are 150.5 MB: 31.3 us at an H200's
// 4.8 TB/s, target 37. That is about 8 weights per cycle and SM. Each costs a shift, a shuffle, a
// product, a sum and half a conversion of 128 issue slots per cycle, and one of 32 shuffle lanes: a
// quarter to a third of either, so memory decides. K6 reads a row from HBM once and from L2 once: 3
// bytes per bf16 value.
//
// Why a warp's result is one store of 512 consecutive bytes: a thread takes the weights of ONE
// 16-byte store (4 fp32, 8 16-bit, 16 8-bit) and reads their 2, 4 or 8 bytes of nibbles, which lie
// next to its neighbor's. A 16-byte load per thread would read 32 weights, but its four stores
// would lie 64 bytes apart between lanes, each half of a 32-byte sector: twice the write
// transactions, where writes are four fifths of the bytes.
//
// Why the table is in the lanes of the warp: 16 entries, one per lane, are read by a shuffle, which
// takes its index modulo 16 in hardware (no mask), needs no barrier and has no bank conflicts. In
// registers a dynamic index would mean local memory, in constant memory a replay per entry.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lut4.h"

namespace fastdistill {
namespace {

constexpr int kFp8 = 3, kInt8 = 4;  // after lut4.h's three
constexpr int kThreads = 256;
constexpr int kPieces = 4;  // 16-byte stores per thread: all their loads go before the first use
constexpr unsigned kWarp = ~0u;
constexpr uint32_t kInfBits = 0x7f800000;

using Fp8 = __nv_fp8_storage_t;  // unsigned char

// n / d for n < up_to, by a multiplication: floor(2n m / 2^64) with m = ceil(2^63 / d). That is
// above n / d by less than n / 2^63, and n / d is at least 1 / d below the next integer: exact
// while n d <= 2^63.
struct Divisor {
  uint64_t m = 0;  // d >= up_to: every quotient is 0

  Divisor(int64_t d, int64_t up_to, const char* too_large) {
    constexpr uint64_t top = uint64_t(1) << 63;
    if (d >= up_to) return;
    if (uint64_t(up_to) > top / d) throw std::invalid_argument(too_large);
    m = (top - 1) / d + 1;
  }

  __device__ int64_t into(int64_t n) const { return __umul64hi(2 * n, m); }
};

struct Scale {
  const float* scale;

  __device__ float of(int64_t b) const { return __ldg(scale + b); }
};

// bitsandbytes' double quantization: a byte per block, looked up and scaled in blocks of its own.
struct NestedScale {
  const uint8_t* absmax;
  const float *code, *nested, *offset;
  Divisor nested_block;

  __device__ float of(int64_t b) const {
    const float product = __fmul_rn(__ldg(code + absmax[b]), __ldg(nested + nested_block.into(b)));
    return __fadd_rn(product, __ldg(offset));
  }
};

template <class S>
struct Weights {
  const uint8_t* qdata;
  S scale;
  const float *offset, *lut, *row_inv;  // offset and row_inv may be absent

  // Every fp32 number, -0 too, stays itself when -0 is added.
  __device__ float offset_of(int64_t b) const { return offset ? __ldg(offset + b) : -0.0f; }
  __device__ float inverse_of(int64_t row) const { return __ldg(row_inv + row); }
};

__device__ float2 rounded(float a, float b, float) { return make_float2(a, b); }
__device__ __nv_bfloat162 rounded(float a, float b, __nv_bfloat16) {
  return __floats2bfloat162_rn(a, b);
}
__device__ __half2 rounded(float a, float b, __half) { return __floats2half2_rn(a, b); }
__device__ __nv_fp8x2_storage_t rounded(float a, float b, Fp8) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}
// The conversion to int maps NaN to 0 and saturates.
__device__ char2 rounded(float a, float b, signed char) {
  return make_char2(max(-127, min(127, __float2int_rn(a))), max(-127, min(127, __float2int_rn(b))));
}

__device__ float widened(float x) { return x; }
__device__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widened(__half x) { return __half2float(x); }

template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

// Rounded in pairs: the conversions are instructions with two results.
template <class T, int N>
__device__ Vector<T, N> narrowed(const float (&w)[N]) {
  Vector<T, N> out;
  if constexpr (N == 1) {
    const auto pair = rounded(w[0], 0.0f, T());
    memcpy(&out, &pair, sizeof(T));
  } else {
#pragma unroll
    for (int e = 0; e < N; e += 2) {
      const auto pair = rounded(w[e], w[e + 1], T());
      memcpy(out.at + e, &pair, sizeof(pair));
    }
  }
  return out;
}

template <int Bytes>
struct NibblesOf;
template <>
struct NibblesOf<2> { using Word = unsigned short; };
template <>
struct NibblesOf<4> { using Word = unsigned int; };
template <>
struct NibblesOf<8> { using Word = unsigned long long; };

// Pieces of one 16-byte store each; a piece lies in one block and, for 8 bits, in one row.
template <class Out, class S>
__global__ void __launch_bounds__(kThreads)
    expand_pieces(Weights<S> w, Vector<Out, 16 / sizeof(Out)>* out, int64_t pieces, Divisor block,
                  Divisor cols) {
  constexpr int N = 16 / sizeof(Out);
  using Word = typename NibblesOf<N / 2>::Word;
  const float entry = __ldg(w.lut + threadIdx.x % kLutSize);
  const int64_t first = blockIdx.x * int64_t(kThreads * kPieces) + threadIdx.x;
  Word q[kPieces];
  float scale[kPieces], offset[kPieces], inverse[kPieces];
#pragma unroll
  for (int j = 0; j < kPieces; j++) {
    // Lanes after the end repeat the last piece: a shuffle needs the whole warp.
    const int64_t i = min(first + j * kThreads, pieces - 1);
    const int64_t b = block.into(i);
    q[j] = __ldcs(reinterpret_cast<const Word*>(w.qdata) + i);  // never read again
    scale[j] = w.scale.of(b);
    offset[j] = w.offset_of(b);
    if constexpr (sizeof(Out) == 1) inverse[j] = w.row_inv ? w.inverse_of(cols.into(i)) : 1.0f;
  }
#pragma unroll
  for (int j = 0; j < kPieces; j++) {
    float x[N];
#pragma unroll
    for (int e = 0; e < N; e++) {
      const int nibble = int(q[j] >> 4 * (e ^ 1));  // the even element of a byte is its high half
      const float looked_up = __shfl_sync(kWarp, entry, nibble, kLutSize);
      x[e] = __fadd_rn(__fmul_rn(looked_up, scale[j]), offset[j]);
      if constexpr (sizeof(Out) == 1) x[e] = __fmul_rn(x[e], inverse[j]);
    }
    const int64_t i = first + j * kThreads;
    if (i < pieces) out[i] = narrowed<Out>(x);
  }
}

// Any block, any alignment, any length: one weight per thread.
template <class Out, class S>
__global__ void __launch_bounds__(kThreads)
    expand_each(Weights<S> w, Out* out, int64_t begin, int64_t count, Divisor block, Divisor cols) {
  const int64_t i = begin + blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (i >= count) return;
  const int64_t b = block.into(i);
  float x[1] = {__fmul_rn(__ldg(w.lut + lut4_at(w.qdata, i)), w.scale.of(b))};
  x[0] = __fadd_rn(x[0], w.offset_of(b));
  if (sizeof(Out) == 1 && w.row_inv) x[0] = __fmul_rn(x[0], w.inverse_of(cols.into(i)));
  out[i] = narrowed<Out>(x).at[0];
}

__device__ uint32_t largest_of_block(uint32_t value) {
  __shared__ uint32_t of_warp[kThreads / 32];
  value = __reduce_max_sync(kWarp, value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(kWarp, of_warp[threadIdx.x % (kThreads / 32)]);
}

// One block per row; the second reading comes from L2.
template <class Out, int N, class In>
__global__ void __launch_bounds__(kThreads)
    quantize_row(const In* x, Out* q, float* scale, int64_t cols, float top) {
  const auto* row = reinterpret_cast<const Vector<In, N>*>(x + blockIdx.x * cols);
  auto* row_q = reinterpret_cast<Vector<Out, N>*>(q + blockIdx.x * cols);
  // As integers, magnitudes of floats keep their order, with infinity and then NaN on top.
  uint32_t bits = 0;
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < cols / N; i += kThreads) {
    const Vector<In, N> v = row[i];
#pragma unroll
    for (int e = 0; e < N; e++) bits = max(bits, __float_as_uint(widened(v.at[e])) & 0x7fffffff);
  }
  bits = largest_of_block(bits);
  const float amax = __uint_as_float(bits);
  // Above this, top / amax is finite. A row below it (1.4e-36) counts as zeros.
  const bool usable = bits < kInfBits && amax > top * 0x1p-128f;
  const float factor = __fdiv_rn(top, usable ? amax : 1.0f);
  if (threadIdx.x == 0) {
    const float otherwise = bits < kInfBits ? 0.0f : __uint_as_float(0x7fc00000);
    scale[blockIdx.x] = usable ? __fdiv_rn(amax, top) : otherwise;
  }
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < cols / N; i += kThreads) {
    const Vector<In, N> v = row[i];
    float y[N];
#pragma unroll
    for (int e = 0; e < N; e++) y[e] = usable ? __fmul_rn(widened(v.at[e]), factor) : 0.0f;
    row_q[i] = narrowed<Out>(y);
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

unsigned grid(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  expect(blocks <= INT_MAX, "expected fewer elements: the grid would exceed 2^31 - 1 blocks");
  return static_cast<unsigned>(blocks);
}

void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error) + " (" +
                             cudaGetErrorName(error) + ")");
  }
}

template <class Out, class S>
void expand(const Weights<S>& w, void* out, int64_t count, int64_t block, int64_t cols,
            cudaStream_t stream) {
  constexpr int64_t N = 16 / sizeof(Out);
  const bool rows_fit = sizeof(Out) > 1 || !w.row_inv || cols % N == 0;
  const bool in_pieces = block % 32 == 0 && rows_fit && aligned(w.qdata) && aligned(out);
  const auto over = [=, row = w.row_inv ? cols : count](int64_t unit) {
    return std::pair(Divisor(block / unit, count / unit, "block: expected count * block < 2^63"),
                     Divisor(row / unit, count / unit, "cols: expected count * cols < 2^63"));
  };
  const int64_t pieces = in_pieces ? count / N : 0, begin = pieces * N;
  if (pieces > 0) {
    const auto [blocks, rows] = over(N);
    expand_pieces<Out><<<grid(pieces, kThreads * kPieces), kThreads, 0, stream>>>(
        w, static_cast<Vector<Out, N>*>(out), pieces, blocks, rows);
  }
  if (begin < count) {
    const auto [blocks, rows] = over(1);
    expand_each<<<grid(count - begin, kThreads), kThreads, 0, stream>>>(
        w, static_cast<Out*>(out), begin, count, blocks, rows);
  }
}

template <class S>
void expand(const char* name, const Weights<S>& w, void* out, int kind, int64_t count,
            int64_t block, int64_t cols, void* stream) {
  expect(count >= 0, "count: expected a number >= 0");
  expect(block >= 1, "block: expected a number >= 1");
  expect(!w.row_inv || cols >= 1, "cols: expected a number >= 1 with row_inv");
  expect(!w.row_inv || kind == kFp8 || kind == kInt8, "row_inv: expected with 8-bit results only");
  const auto s = static_cast<cudaStream_t>(stream);
  switch (kind) {
    case kFp32: expand<float>(w, out, count, block, cols, s); break;
    case kBf16: expand<__nv_bfloat16>(w, out, count, block, cols, s); break;
    case kFp16: expand<__half>(w, out, count, block, cols, s); break;
    case kFp8: expand<Fp8>(w, out, count, block, cols, s); break;
    case kInt8: expand<signed char>(w, out, count, block, cols, s); break;
    default: expect(false, "out_kind: expected 0 fp32, 1 bf16, 2 fp16, 3 fp8-e4m3fn or 4 int8");
  }
  if (count > 0) check_launch(name);
}

template <class In>
void quantize(const In* x, void* q, int kind, float* scale, int64_t rows, int64_t cols,
              cudaStream_t stream) {
  constexpr int N = 16 / sizeof(In);
  const unsigned blocks = grid(rows, 1);
  const auto run = [&](auto* out, float top) {
    using Out = std::remove_pointer_t<decltype(out)>;
    if (cols % N == 0 && aligned(x) && aligned(q)) {
      quantize_row<Out, N><<<blocks, kThreads, 0, stream>>>(x, out, scale, cols, top);
    } else {
      quantize_row<Out, 1><<<blocks, kThreads, 0, stream>>>(x, out, scale, cols, top);
    }
  };
  if (kind == kFp8) {
    run(static_cast<Fp8*>(q), 448.0f);
  } else {
    run(static_cast<signed char*>(q), 127.0f);
  }
}

}  // namespace

void lut4_dequant(const void* qdata, const float* scale, const float* offset, const float* lut,
                  void* out, int out_kind, int64_t count, int64_t block, int64_t cols,
                  const float* row_inv, void* stream) {
  const Weights<Scale> w{static_cast<const uint8_t*>(qdata), {scale}, offset, lut, row_inv};
  expand("lut4_dequant", w, out, out_kind, count, block, cols, stream);
}

void lut4_dequant_nested(const void* qdata, const void* absmax, const float* code,
                         const float* nested_absmax, const float* nested_offset,
                         int64_t nested_block, const float* offset, const float* lut, void* out,
                         int out_kind, int64_t count, int64_t block, int64_t cols,
                         const float* row_inv, void* stream) {
  expect(nested_block >= 1, "nested_block: expected a number >= 1");
  const NestedScale scale{static_cast<const uint8_t*>(absmax), code, nested_absmax, nested_offset,
                          Divisor(nested_block, std::max(count, int64_t(0)),
                                  "nested_block: expected count * nested_block < 2^63")};
  const Weights<NestedScale> w{static_cast<const uint8_t*>(qdata), scale, offset, lut, row_inv};
  expand("lut4_dequant_nested", w, out, out_kind, count, block, cols, stream);
}

void quantize_rows(const void* x, int x_dtype, void* q, int q_kind, float* scale, int64_t rows,
                   int64_t cols, void* stream) {
  expect(rows >= 0 && cols >= 0, "rows, cols: expected numbers >= 0");
  expect(q_kind == kFp8 || q_kind == kInt8, "q_kind: expected 3 fp8-e4m3fn or 4 int8");
  if (rows == 0) return;
  const auto run = [=](auto* rows_x) {
    quantize(rows_x, q, q_kind, scale, rows, cols, static_cast<cudaStream_t>(stream));
  };
  switch (x_dtype) {
    case kFp32: run(static_cast<const float*>(x)); break;
    case kBf16: run(static_cast<const __nv_bfloat16*>(x)); break;
    case kFp16: run(static_cast<const __half*>(x)); break;
    default: expect(false, "x_dtype: expected 0 fp32, 1 bf16 or 2 fp16");
  }
  check_launch("quantize_rows");
}

std::vector<int> cuda_archs() {
  std::vector<int> archs = {__CUDA_ARCH_LIST__};  // nvcc's own list: 800, 890, ...
  for (int& arch : archs) arch /= 10;
  return archs;
}

std::string cuda_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

}  // namespace fastdistill
