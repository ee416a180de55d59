// Tiles (AMX): 4 of them hold sums of 32 rows and 32 columns. HardwareTiles is the instructions,
// ModelTiles a model of them in plain C++ that computes the same bits on any CPU.
//
// Below them is the product of cpu_bf16.h; that of int8 is in cpu_tile_gemm.h. tdpbf16ps adds the
// products of even and of odd k separately over the 32 k of a tile, then both to the sum.
#pragma once

#include "cpu_bf16.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {

constexpr int kTileSize = 16;   // rows of a tile; a row has 16 pairs or 16 sums
constexpr int kTileBlock = 32;  // rows and columns of the 2 x 2 tiles of sums

#ifdef FASTDISTILL_AMX
// The numbers of tiles are literals: they are part of the instructions.
struct HardwareTiles {
  HardwareTiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
#ifdef __GNUC__
    __asm__ volatile("" ::"r"(&config) : "memory");  // its header says that 8 bytes are read
#endif
    _tile_loadconfig(&config);
  }
  ~HardwareTiles() { _tile_release(); }
  void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    barrier();
  }
  void load_sums(const float* p, int64_t stride) {  // the stride of a row in floats
    barrier();
    const float* const below = p + kTileSize * stride;
    _tile_loadd(0, p, stride * 4);
    _tile_loadd(1, p + kTileSize, stride * 4);
    _tile_loadd(2, below, stride * 4);
    _tile_loadd(3, below + kTileSize, stride * 4);
  }
  template <class Sum>
  void store_sums(Sum* p, int64_t stride, bool tall = true) {
    Sum* const below = p + kTileSize * stride;
    _tile_stored(0, p, stride * 4);
    _tile_stored(1, p + kTileSize, stride * 4);
    if (tall) {
      _tile_stored(2, below, stride * 4);
      _tile_stored(3, below + kTileSize, stride * 4);
    }
    barrier();
  }
  void multiply(const uint32_t* a, const uint32_t* b) {
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + kTileSize * kTileSize, 64);
    _tile_loadd(6, b, 4 * kPairColumns);
    _tile_loadd(7, b + kTileSize, 4 * kPairColumns);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  // 64 k of int8; the lower 16 rows only if `tall`.
  void multiply_int8(const uint8_t* a, const uint8_t* b, bool tall) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 4 * kPairColumns);
    _tile_loadd(7, b + 4 * kTileSize, 4 * kPairColumns);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if (!tall) return;
    _tile_loadd(5, a + 64 * kTileSize, 64);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }

 private:
  // GCC does not know that these instructions read and write memory.
  static void barrier() {
#ifdef __GNUC__
    __asm__ volatile("" ::: "memory");
#endif
  }
};
#else
struct ModelTiles {
  uint32_t sums[kTileBlock][kTileBlock];  // the bits of fp32 or int32
  void zero() { memset(sums, 0, sizeof sums); }
  void load_sums(const float* p, int64_t stride) {
    for (int i = 0; i < kTileBlock; ++i) memcpy(sums[i], p + i * stride, sizeof sums[i]);
  }
  template <class Sum>
  void store_sums(Sum* p, int64_t stride, bool tall = true) {
    for (int i = 0; i < rows(tall); ++i) memcpy(p + i * stride, sums[i], sizeof sums[i]);
  }
  void multiply(const uint32_t* a, const uint32_t* b) {
    for (int i = 0; i < kTileBlock; ++i)
      for (int j = 0; j < kTileBlock; ++j) {
        float even = 0, odd = 0;
        for (int s = 0; s < kTileSize; ++s) {
          const uint32_t x = a[kTileSize * i + s], y = b[kPairColumns * s + j];
          const auto high = [](uint32_t pair) { return flushed(float_of(pair & 0xffff0000u)); };
          const auto low = [](uint32_t pair) { return flushed(float_of(pair << 16)); };
          even = flushed(fmaf(low(x), low(y), even));
          odd = flushed(fmaf(high(x), high(y), odd));
        }
        const float sum = flushed(float_of(sums[i][j]));
        sums[i][j] = bits_of(flushed(sum + flushed(even + odd)));
      }
  }
  void multiply_int8(const uint8_t* a, const uint8_t* b, bool tall) {
    for (int i = 0; i < rows(tall); ++i)
      for (int s = 0; s < kTileSize; ++s)
        for (int j = 0; j < kTileBlock; ++j)
          for (int k = 0; k < 4; ++k) {
            const int x = static_cast<int8_t>(a[64 * i + 4 * s + k]);
            const int y = static_cast<int8_t>(b[4 * (kPairColumns * s + j) + k]);
            sums[i][j] += static_cast<uint32_t>(x * y);  // wraps, as the instruction does
          }
  }

 private:
  static int rows(bool tall) { return tall ? kTileBlock : kTileSize; }
};
#endif

// out[K/32][32 rows][16 pairs] of `rows` rows and `depth` k; what is missing is 0.
template <class T>
inline void pack_tile_rows(const T* from, int64_t row_stride, int64_t k_stride, int64_t rows,
                           int64_t depth, bool remainder, uint32_t* out) {
  for (int64_t k = 0; k < depth; k += 2 * kTileSize, out += kTileBlock * kTileSize) {
    const int64_t some = min64(2 * kTileSize, depth - k);
    if (k_stride == 1) {
      memset(out, 0, kTileBlock * kTileSize * 4);
      bf16* const to = reinterpret_cast<bf16*>(out);
      for (int64_t i = 0; i < rows; ++i)
        store_operand(to + 2 * kTileSize * i, from + i * row_stride + k, some, remainder);
      continue;
    }
    alignas(64) uint32_t pairs[kTileSize * kTileBlock + kLanes] = {};
    pack_pairs(from + k * k_stride, row_stride, k_stride, rows, some, kTileBlock, remainder, pairs);
    for (int half = 0; half < 2; ++half) {
      I32 dwords[16];
      transpose16(reinterpret_cast<const uint8_t*>(pairs + kTileSize * half), 4 * kTileBlock, 0,
                  dwords);
      for (int i = 0; i < kTileSize; ++i)
        store_pairs(out + (half * kTileSize + i) * kTileSize, dwords[i]);
    }
  }
}

inline int64_t tile_steps(int64_t K) { return ceil_div(K, 2 * kTileSize); }
constexpr int64_t kBlocksAtOnce = 4;  // of 32 rows, that share a pass over the panels of b

inline int64_t own_tile_pairs(int64_t K) {
  return kBlocksAtOnce * kTileBlock * kTileSize * tile_steps(K);
}

inline int64_t tile_scratch(int threads, int64_t N, int64_t K) {
  return 4 * (round_up(N) * kTileSize * tile_steps(K) + kLanes + threads * own_tile_pairs(K));
}

template <class Tiles, class A, class T>
inline void tile_gemm_typed(int threads, const A* a, int64_t a_row, int64_t a_k, const bf16* b,
                            int64_t b_row, int64_t b_k, T* out, int64_t out_stride, int64_t M,
                            int64_t N, int64_t K, bool remainder, bool add, uint32_t* scratch) {
  const int64_t panels = ceil_div(N, kPairColumns), steps = tile_steps(K);
  const int64_t panel_pairs = kPairColumns * kTileSize * steps;
  uint32_t* const owned = scratch + panels * panel_pairs + kLanes;
  parallel_for(threads, panels, 1, [&](int64_t p, int) {
    uint32_t* const panel = scratch + p * panel_pairs;
    const int64_t n = p * kPairColumns, filled = kPairColumns * pair_steps(K);
    memset(panel + filled, 0, static_cast<size_t>(panel_pairs - filled) * 4);
    pack_pairs(b + n * b_row, b_row, b_k, min64(kPairColumns, N - n), K, kPairColumns, false,
               panel);
  });
  const int64_t rows_at_once = kBlocksAtOnce * kTileBlock, blocks = ceil_div(M, rows_at_once);
  const int64_t parts = threads == 1 ? 1 : min64(panels, ceil_div(2 * threads, blocks));
  parallel_for(threads, blocks * parts, 1, [&](int64_t task, int thread) {
    Tiles tiles;
    uint32_t* const packed = owned + thread * own_tile_pairs(K);
    const int64_t m0 = task / parts * rows_at_once, m1 = min64(M, m0 + rows_at_once);
    const int64_t part = task % parts;
    for (int64_t m = m0; m < m1; m += kTileBlock)
      pack_tile_rows(a + m * a_row, a_row, a_k, min64(kTileBlock, M - m), K, remainder,
                     packed + (m - m0) * kTileSize * steps);
    for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; ++p)
      for (int64_t m = m0; m < m1; m += kTileBlock) {
        const int64_t n = p * kPairColumns;
        const int64_t rows = min64(kTileBlock, M - m), columns = min64(kPairColumns, N - n);
        const bool whole = sizeof(T) == 4 && rows == kTileBlock && columns == kPairColumns;
        T* const to = out + m * out_stride + n;
        alignas(64) float edge[kTileBlock * kPairColumns] = {};
        float* const sums = whole ? reinterpret_cast<float*>(to) : edge;
        const int64_t stride = whole ? out_stride : kPairColumns;
        for (int64_t i = 0; add && !whole && i < rows; ++i)
          for (int64_t c = 0; c < columns; c += kLanes)
            store(edge + i * kPairColumns + c,
                  load_part(to + i * out_stride + c, min64(kLanes, columns - c)));
        if (add)
          tiles.load_sums(sums, stride);
        else
          tiles.zero();
        for (int64_t s = 0; s < steps; ++s)
          tiles.multiply(packed + (m - m0) * kTileSize * steps + s * kTileBlock * kTileSize,
                         scratch + p * panel_pairs + s * kTileSize * kPairColumns);
        tiles.store_sums(sums, stride);
        for (int64_t i = 0; !whole && i < rows; ++i)
          for (int64_t c = 0; c < columns; c += kLanes)
            store_part(to + i * out_stride + c, load(edge + i * kPairColumns + c),
                       min64(kLanes, columns - c));
      }
  });
}

#ifdef FASTDISTILL_AMX
using TilesHere = HardwareTiles;
#else
using TilesHere = ModelTiles;
#endif

inline void tile_gemm(int threads, const Matrix& a, const Matrix& b, void* out, Dtype out_dtype,
                      int64_t out_stride, int64_t M, int64_t N, int64_t K, bool remainder, bool add,
                      void* scratch) {
  with_operands(a, out, out_dtype, [&](const auto* from_a, auto* to) {
    tile_gemm_typed<TilesHere>(threads, from_a, a.row_stride, a.k_stride,
                               static_cast<const bf16*>(b.data), b.row_stride, b.k_stride, to,
                               out_stride, M, N, K, remainder, add,
                               static_cast<uint32_t*>(scratch));
  });
}

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
