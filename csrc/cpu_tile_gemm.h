// K3 with tiles (AMX): tdpbssd adds the exact products of 64 k to 32 x 32 sums in int32.
//
// The panel of cpu_panel.h is what the instruction takes for W: [K/4][32][4 codes]. A tile of
// activations is [G][steps of 64 k][32 or 16 rows][64 codes]. Its missing rows are 0, and so are the
// k between the end of a group and the next step; the weights they meet belong to the next group.
#pragma once

#include "cpu_gemm.h"
#include "cpu_tiles.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {

constexpr int64_t kStepDepth = 4 * kTileSize;  // k of a tile of int8
static_assert(kColumns == kTileBlock && kStepBytes == 4 * kPairColumns, "the panel is for tiles");

template <class Tiles>
struct TileCore {
  static constexpr int64_t kRows = kTileBlock;
  static constexpr int kBias = 0;
  static constexpr int64_t kBeyond = (kTileSize - 1) * kStepBytes;
  using State = Tiles;

  TileCore(int64_t M, int64_t K, int64_t group)
      : group(group),
        groups(K / group),
        steps(ceil_div(group, kStepDepth)),
        tall(M > kTileSize),
        step_bytes((tall ? kTileBlock : kTileSize) * kStepDepth) {}
  int64_t tile_bytes() const { return groups * steps * step_bytes; }
  int64_t bytes(const Tiling& tiling) const { return tiling.count * tile_bytes(); }
  uint8_t* tile(uint8_t* acts, const Tiling&, int64_t t) const { return acts + t * tile_bytes(); }
  void clear(uint8_t* tile) const { memset(tile, 0, static_cast<size_t>(tile_bytes())); }
  uint8_t* place(uint8_t* tile, int64_t, int64_t r, int64_t g, int64_t i) const {
    return tile + (g * steps + i / kStepDepth) * step_bytes + r * kStepDepth + i % kStepDepth;
  }
  void multiply_tile(Tiles& tiles, int64_t rows, const uint8_t* tile, const ActGroup* act_groups,
                     const uint8_t* panel, const float* scale, const float* offset, int64_t g0,
                     int64_t g1, int64_t ratio, float* sums) const {
    alignas(64) int32_t products[2][kTileBlock * kColumns];
    // The tiles multiply a group while vector registers scale the one before it.
    for (int64_t g = g0; g <= g1; ++g) {
      if (g < g1) {
        tiles.zero();
        for (int64_t s = 0; s < steps; ++s)
          tiles.multiply_int8(tile + (g * steps + s) * step_bytes,
                              panel + ((g - g0) * group + s * kStepDepth) / 4 * kStepBytes, tall);
      }
      if (g > g0) {
        const int64_t at = (g - 1) / ratio * kColumns;
        add_products(rows, products[(g - 1) % 2], act_groups + (g - 1) * rows, scale + at,
                     offset ? offset + at : nullptr, sums);
      }
      if (g < g1) tiles.store_sums(products[g % 2], kColumns, tall);
    }
  }

 private:
  static void add_products(int64_t rows, const int32_t* products, const ActGroup* act_groups,
                           const float* scale, const float* offset, float* sums) {
    for (int c = 0; c < kColumns; c += kLanes) {
      const F32 of_weights = load(scale + c);
      for (int64_t r = 0; r < rows; ++r) {
        float* const sum = sums + r * kColumns + c;
        store(sum, add_group(load(sum), load_i32(products + r * kColumns + c), act_groups[r],
                             of_weights, offset ? offset + c : nullptr));
      }
    }
  }

  int64_t group, groups, steps;
  bool tall;
  int64_t step_bytes;
};

inline bool tile_gemm_int8(int threads, const void* x, Dtype dtype, const GemmWeights& w, void* out,
                           int64_t M, int64_t N, int64_t K, int64_t act_group) {
  return gemm_with<TileCore<TilesHere>>(threads, x, dtype, w, out, M, N, K, act_group);
}

#ifdef FASTDISTILL_AMX
// As `peak`, with tiles: its operands are in the L1, and loading them takes less time.
inline double tile_peak(int threads, int64_t repeats) {
  parallel_for(threads, threads, 1, [&](int64_t, int) {
    alignas(64) const uint8_t codes[kTileBlock * kStepDepth] = {1, 2, 3};
    HardwareTiles tiles;
    tiles.zero();
    for (int64_t i = 0; i < repeats; ++i) tiles.multiply_int8(codes, codes, true);
  });
  return 2.0 * kTileBlock * kTileBlock * kStepDepth * static_cast<double>(repeats) * threads;
}
#endif

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
