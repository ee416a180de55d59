// K3: out[m, n] = bias[n] + sum over groups g of float(acc_g) * (sx[m, g] * sw[n, g])
//
// acc_g is the exact int32 dot product of the group's int8 codes and sw = unit * scale; with an
// offset each group also adds (sx * (sum of the activation codes)) * offset. Groups are summed in
// ascending order in fp32 without FMA, so a result depends neither on the instruction set, nor on
// the threads, nor on the other rows of the batch.
//
// gemm_typed is the loop over panels of weights. Its Core multiplies a tile of rows by a panel:
// VectorCore in vector registers, TileCore (cpu_tile_gemm.h) with AMX.
#pragma once

#include "cpu_panel.h"
#include "cpu_quant.h"

namespace fastdistill {
namespace FASTDISTILL_ISA {

constexpr int64_t kPanelBytes = 256 << 10;      // of weights: a quarter of an L2
constexpr int64_t kSmallPanelBytes = 16 << 10;  // half an L1, for a panel that few rows read

struct ActGroup {
  float scale;
  float scaled_sum;  // scale * (sum of the codes)
  int32_t start;     // of the accumulators: takes back the bias that the weights are stored with
};

// Rows of x in tiles of nearly equal height: 16 rows are 8 + 8, not 14 + 2. Tile t starts at row
// first(t) of the ActGroups too, where they are [G][rows].
struct Tiling {
  Tiling(int64_t M, int64_t most) : count(ceil_div(M, most)), base(M / count), extra(M % count) {}
  int64_t first(int64_t t) const { return t * base + min64(t, extra); }
  int64_t rows(int64_t t) const { return base + (t < extra); }
  int64_t count, base, extra;
};

// Quantizes a row of x. Four codes of group g, from its k number i on, go to place(g, i).
template <class T, class Place>
inline void pack_row(const T* x, int64_t K, int64_t group, bool nibble_order, int64_t rows,
                     ActGroup* act_group, int8_t* codes, const Place& place) {
  for (int64_t g = 0; g < K / group; ++g, act_group += rows) {
    const int32_t sum = quantize_group(x + g * group, group, codes, &act_group->scale);
    act_group->scaled_sum = act_group->scale * static_cast<float>(sum);
    act_group->start = -kWeightBias * sum;
    for (int64_t i = 0; i < group; i += 8) {
      const int8_t* c = codes + i;
      const int8_t even_odd[8] = {c[0], c[2], c[4], c[6], c[1], c[3], c[5], c[7]};
      if (nibble_order) c = even_odd;
      store_acts(place(g, i), c);
      store_acts(place(g, i + 4), c + 4);
    }
  }
}

// The sum of a row's groups, with the next one.
FASTDISTILL_INLINE F32 add_group(F32 sum, I32 acc, const ActGroup& act, F32 scale,
                                 const float* offset) {
  sum = sum + to_float(acc) * (splat(act.scale) * scale);
  return offset ? sum + splat(act.scaled_sum) * load(offset) : sum;
}

// sums [R][32] += R rows of activations times the weights of one group of `steps` times 4 k.
//
// A function of its own, never inlined: in a loop over groups the compiler would keep the sums in
// registers from one group to the next, and spill the accumulators for them.
template <int R>
FASTDISTILL_NOINLINE void multiply_group(const uint8_t* acts, const ActGroup* act_groups,
                                         const uint8_t* weights, const float* scale,
                                         const float* offset, int64_t steps, float* sums) {
  for (int v = 0; v < 2; v += kTileVectors) {
    I32 acc[R][kTileVectors];
    unrolled<R>([&](auto r) FASTDISTILL_INLINE_LAMBDA {
      unrolled<kTileVectors>([&](auto c) FASTDISTILL_INLINE_LAMBDA {
        acc[r][c] = splat(act_groups[r].start);
      });
    });
    const uint8_t *w = weights + v * Weights::kBytes, *a = acts;
    int64_t left = steps;
    do {
      Weights column[kTileVectors];
      unrolled<kTileVectors>([&](auto c) FASTDISTILL_INLINE_LAMBDA {
        column[c] = load_weights(w + c * Weights::kBytes);
      });
      unrolled<R>([&](auto r) FASTDISTILL_INLINE_LAMBDA {
        const Acts row = load_acts(a + r * 4 * kActBytes);
        unrolled<kTileVectors>([&](auto c) FASTDISTILL_INLINE_LAMBDA {
          acc[r][c] = dot(acc[r][c], column[c], row);
        });
      });
      w += kStepBytes;
      a += R * 4 * kActBytes;
    } while (--left);
    unrolled<R>([&](auto r) FASTDISTILL_INLINE_LAMBDA {
      unrolled<kTileVectors>([&](auto c) FASTDISTILL_INLINE_LAMBDA { pin(acc[r][c]); });
    });
    unrolled<R>([&](auto r) FASTDISTILL_INLINE_LAMBDA {
      unrolled<kTileVectors>([&](auto c) FASTDISTILL_INLINE_LAMBDA {
        const int at = 16 * (v + c);
        float* const sum = sums + r * kColumns + at;
        store(sum, add_group(load(sum), acc[r][c], act_groups[r], load(scale + at),
                             offset ? offset + at : nullptr));
      });
    });
  }
}

// The same for the groups [g0, g1) of a tile, to which `weights` belongs; the other pointers are to
// group 0. A group of weights is `ratio` groups of activations.
template <int R>
inline void multiply(const uint8_t* acts, const ActGroup* act_groups, const uint8_t* weights,
                     const float* scale, const float* offset, int64_t g0, int64_t g1, int64_t steps,
                     int64_t ratio, float* sums) {
  int64_t of_weights = g0 / ratio, left = ratio - g0 % ratio;
  for (int64_t g = g0; g < g1; ++g) {
    multiply_group<R>(acts + g * steps * R * 4 * kActBytes, act_groups + g * R, weights,
                      scale + of_weights * kColumns,
                      offset ? offset + of_weights * kColumns : nullptr, steps, sums);
    weights += steps * kStepBytes;
    if (--left == 0) {
      left = ratio;
      ++of_weights;
    }
  }
}

// multiply<rows>, rows in [1, R]
template <int R, class... Args>
inline void multiply_rows(int64_t rows, Args... args) {
  if constexpr (R > 1)
    if (rows < R) return multiply_rows<R - 1>(rows, args...);
  multiply<R>(args...);
}

struct VectorCore {
  static constexpr int64_t kRows = kTileRows;  // of a tile, at most
  static constexpr int kBias = kWeightBias;    // that weights are stored with
  static constexpr int64_t kBeyond = 0;        // bytes that are read beyond the end of a panel
  struct State {};                             // of a thread

  VectorCore(int64_t, int64_t K, int64_t group) : K(K), group(group) {}
  int64_t bytes(const Tiling& tiling) const { return tiling.first(tiling.count) * K * kActBytes; }
  uint8_t* tile(uint8_t* acts, const Tiling& tiling, int64_t t) const {
    return acts + tiling.first(t) * K * kActBytes;
  }
  void clear(uint8_t*) const {}
  // A tile is [K/4][rows][4 codes].
  uint8_t* place(uint8_t* tile, int64_t rows, int64_t r, int64_t g, int64_t i) const {
    return tile + ((g * group + i) * rows + 4 * r) * kActBytes;
  }
  void multiply_tile(State&, int64_t rows, const uint8_t* tile, const ActGroup* act_groups,
                     const uint8_t* panel, const float* scale, const float* offset, int64_t g0,
                     int64_t g1, int64_t ratio, float* sums) const {
    multiply_rows<kTileRows>(rows, tile, act_groups, panel, scale, offset, g0, g1, group / 4, ratio,
                             sums);
  }
  int64_t K, group;
};

template <class T>
inline void finish_row(const float* sums, const float* bias, T* out, int64_t n) {
  for (int at = 0; at < n; at += kLanes) {
    const int64_t lanes = min64(kLanes, n - at);
    F32 sum = load(sums + at);
    if (bias) sum = sum + load_part(bias + at, lanes);
    if (lanes == kLanes)
      store(out + at, sum);
    else
      store_part(out + at, sum, lanes);
  }
}

template <class Core, class T>
inline bool gemm_typed(int threads, const void* x, const GemmWeights& w, T* out, int64_t M,
                       int64_t N, int64_t K, int64_t group) {
  const Core core(M, K, group);
  const Tiling tiling(M, Core::kRows);
  const int64_t groups = K / group, blocks = ceil_div(N, kColumns);
  // K in blocks whose panel fits; the sums are carried over, so the order of summation is the same.
  const int64_t fits = M <= 64 ? kSmallPanelBytes : kPanelBytes;
  const int64_t k_block = min64(K, max64(group, fits / kStepBytes * 4 / group * group));

  const int64_t acts_bytes = round_up(core.bytes(tiling));
  const int64_t groups_bytes = round_up(M * groups * static_cast<int64_t>(sizeof(ActGroup)));
  const int64_t panel_bytes = k_block / 4 * kStepBytes + Core::kBeyond;
  const int64_t scale_bytes = K / w.group * kColumns * 4;
  const int64_t sums_bytes = M * kColumns * 4, codes_bytes = round_up(group);
  const int64_t own = panel_bytes + 2 * scale_bytes + sums_bytes + codes_bytes;
  const Scratch scratch(acts_bytes + groups_bytes + threads * own);
  uint8_t* const acts = scratch.data();
  if (!acts) return false;
  ActGroup* const act_groups = reinterpret_cast<ActGroup*>(acts + acts_bytes);
  uint8_t* const owned = acts + acts_bytes + groups_bytes;

  parallel_for(threads, tiling.count, 1, [&](int64_t t, int thread) {
    int8_t* const codes = reinterpret_cast<int8_t*>(owned + (thread + 1) * own - codes_bytes);
    const int64_t first = tiling.first(t), rows = tiling.rows(t);
    uint8_t* const tile = core.tile(acts, tiling, t);
    core.clear(tile);
    for (int64_t r = 0; r < rows; ++r)
      pack_row(static_cast<const T*>(x) + (first + r) * K, K, group, w.codes != nullptr, rows,
               act_groups + first * groups + r, codes,
               [&](int64_t g, int64_t i) { return core.place(tile, rows, r, g, i); });
  });

  // Few columns and many rows: several threads share a block of columns, each filling its panel.
  const int64_t wanted = ceil_div(2 * threads, blocks);
  const int64_t parts = threads == 1 ? 1 : min64(tiling.count, wanted);
  const int64_t tasks = blocks * parts;
  // Few rows: memory decides, so a thread takes neighboring weights, which it prefetched.
  const int64_t chunk = M <= 64 ? ceil_div(tasks, 2 * threads) : 1;
  parallel_for(threads, tasks, chunk, [&](int64_t task, int thread) {
    typename Core::State state;
    uint8_t* const panel = owned + thread * own;
    float* const scale = reinterpret_cast<float*>(panel + panel_bytes);
    float* const offset = reinterpret_cast<float*>(panel + panel_bytes + scale_bytes);
    float* const sums = reinterpret_cast<float*>(panel + panel_bytes + 2 * scale_bytes);
    const int64_t n0 = task / parts * kColumns, part = task % parts;
    const int64_t t0 = tiling.count * part / parts, t1 = tiling.count * (part + 1) / parts;

    fill_scales(w.scale, w.unit, N, K / w.group, n0, scale);
    if (w.offset) fill_scales(w.offset, 1.0f, N, K / w.group, n0, offset);
    for (int64_t k0 = 0; k0 < K; k0 += k_block) {
      const int64_t k1 = min64(K, k0 + k_block);
      fill_weights<Core::kBias>(w, N, K, n0, k0, k1, panel);
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t first = tiling.first(t), rows = tiling.rows(t);
        float* const sum = sums + first * kColumns;
        if (k0 == 0) memset(sum, 0, static_cast<size_t>(rows) * kColumns * 4);
        core.multiply_tile(state, rows, core.tile(acts, tiling, t), act_groups + first * groups,
                           panel, scale, w.offset ? offset : nullptr, k0 / group, k1 / group,
                           w.group / group, sum);
        if (k1 < K) continue;
        for (int64_t r = 0; r < rows; ++r)
          finish_row(sum + r * kColumns, w.bias ? w.bias + n0 : nullptr,
                     out + (first + r) * N + n0, min64(kColumns, N - n0));
      }
    }
  });
  return true;
}

template <class Core>
inline bool gemm_with(int threads, const void* x, Dtype dtype, const GemmWeights& w, void* out,
                      int64_t M, int64_t N, int64_t K, int64_t act_group) {
  bool done = false;
  with_dtype(dtype, out, [&](auto* to) {
    done = gemm_typed<Core>(threads, x, w, to, M, N, K, act_group);
  });
  return done;
}

inline bool gemm(int threads, const void* x, Dtype dtype, const GemmWeights& w, void* out,
                 int64_t M, int64_t N, int64_t K, int64_t act_group) {
  return gemm_with<VectorCore>(threads, x, dtype, w, out, M, N, K, act_group);
}

#ifdef FASTDISTILL_VNNI
// What gemm could reach at most: its register tile with nothing to load, in operations (2 per
// multiply-add).
inline double peak(int threads, int64_t repeats) {
  parallel_for(threads, threads, 1, [&](int64_t, int) {
    I32 acc[kTileRows][kTileVectors];
    const Weights column{splat(0x01020304).v};
    const Acts row{splat(0x04030201).v};
    unrolled<kTileRows>([&](auto r) FASTDISTILL_INLINE_LAMBDA {
      acc[r][0] = splat(2 * r), acc[r][1] = splat(2 * r + 1);  // equal chains would become one
    });
    int64_t left = repeats;
    do {
      unrolled<kTileRows>([&](auto r) FASTDISTILL_INLINE_LAMBDA {
        acc[r][0] = dot(acc[r][0], column, row), acc[r][1] = dot(acc[r][1], column, row);
      });
    } while (--left);
    unrolled<kTileRows>([&](auto r) FASTDISTILL_INLINE_LAMBDA { pin(acc[r][0]), pin(acc[r][1]); });
  });
  return 2.0 * 4 * kLanes * kTileRows * kTileVectors * static_cast<double>(repeats) * threads;
}
#endif

}  // namespace FASTDISTILL_ISA
}  // namespace fastdistill
