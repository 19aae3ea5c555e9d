// Products of a layer's weights with the panel of residuals before it, by the matrix instruction on halves. A warp calls
// multiply_chunk for one chunk of units at one set of tiles. The panel must be complete, so a block barrier comes before.
#pragma once
#include "state.cuh"

namespace lmn {
namespace {
namespace panels {

/// The sums of a warp's chunk. The sums of step g and tile m are at [g * kTiles + m]; the next index is one of two tiles of 8
/// units.
template <int kTiles>
using Sums = float[kTiles * kChunkSteps][2][4];

template <int kTiles>
__device__ inline void clear(Sums<kTiles>& sums) {
#pragma unroll
  for (int n = 0; n < kTiles * kChunkSteps; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[n][0][c] = sums[n][1][c] = 0;
  }
}

template <bool kSplit>
struct Fragment {
  std::uint32_t high[4], low[kSplit ? 4 : 1];
};

template <bool kSplit>
__device__ inline void multiply_fragment(float (&first)[4], float (&second)[4], const Fragment<kSplit>& a, const uint4& w,
                                         const uint4& w_low) {
  if constexpr (kSplit) {
    multiply_add_halves(first, a.low, w.x, w.y);
    multiply_add_halves(second, a.low, w.z, w.w);
    multiply_add_halves(first, a.high, w_low.x, w_low.y);
    multiply_add_halves(second, a.high, w_low.z, w_low.w);
  }
  multiply_add_halves(first, a.high, w.x, w.y);
  multiply_add_halves(second, a.high, w.z, w.w);
}

/// Where the panel of a hidden layer begins. From there on it is [parts][pass_tiles][steps][lanes].
__device__ inline int panel_begin(const Panels& p, int l) { return l % 2 ? p.second_panel : 0; }

/// The block's memory for panels: global memory or shared memory.
template <bool kShared>
__device__ inline uint4* block_memory(const Panels& p) {
  return kShared ? reinterpret_cast<uint4*>(dynamic_shared())
                 : in_network(p.panels, p.problem.apart) + blockIdx.x * p.block_fragments;
}

__device__ inline const Layer<float>* layer_here(const Panels& p) {
  return afresh(p.problem.own_layers() + work_of_warp().layer);
}

/// Loads weights by the read-only path: no kernel writes them while this one runs.
__device__ inline uint4 take_weights(const uint4* from) {
#if defined(LMN_EMULATED)
  return *from;
#else
  return __ldg(from);
#endif
}

/// The products of the layer's weights with the panel before it. Weights are loaded kAhead steps before their use. kAhead + 1
/// sets of registers take turns, so no set has to be moved. With two parts (kSplit) there are too few registers for such a long
/// loop, and the sets are moved.
template <int kTiles, bool kSplit, int kAhead, bool kShared>
__device__ inline void multiply_chunk_in(Sums<kTiles>& sums, const Panels& p, int set_tile, int first_step) {
  constexpr int kParts = kSplit ? 2 : 1, kSets = kAhead + 1, kTurns = kSplit ? 1 : kSets;
  const Layer<float>* const layer = layer_here(p);
  const int steps = layer[-1].half.steps.all(), all_steps = layer->half.steps.all();
  const int lane = lane_here(), here = work_of_warp().here;
  const uint4* from = reinterpret_cast<const uint4*>(layer->half.weights) + (first_step * steps * kWarp + lane);
  static_assert(kChunkSteps == 2);
  const int row = first_step + 1 < all_steps ? steps * kWarp : 0;  // a step beyond the last one repeats the last one
  const int low = all_steps * steps * kWarp;
  const int part = p.pass_tiles * steps * kWarp;
  const uint4* at[kTiles];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const int tile = set_tile + m < here ? set_tile + m : here - 1;
    at[m] = block_memory<kShared>(p) + (panel_begin(p, work_of_warp().layer - 1) + tile * steps * kWarp + lane);
  }
  uint4 w[kSets][kChunkSteps][kParts] = {};  // initialised, so that the compiler does not see values of an earlier call as live
  const auto ask = [&](uint4(&to)[kChunkSteps][kParts], int step) {
#pragma unroll
    for (int g = 0; g < kChunkSteps; ++g) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) to[g][part] = take_weights(from + g * row + part * low + step * kWarp);
    }
  };
#pragma unroll
  for (int turn = 0; turn < kAhead; ++turn) {
    if (turn < steps) ask(w[turn], turn);
  }
  clear<kTiles>(sums);
  int left = steps;
#pragma unroll 1
  do {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (turn >= left) break;
      if (turn + kAhead < left) ask(w[(turn + kAhead) % kSets], turn + kAhead);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        Fragment<kSplit> a;
        const uint4 high = at[m][turn * kWarp];
        a.high[0] = high.x, a.high[1] = high.y, a.high[2] = high.z, a.high[3] = high.w;
        if constexpr (kSplit) {
          const uint4 rest = at[m][turn * kWarp + part];
          a.low[0] = rest.x, a.low[1] = rest.y, a.low[2] = rest.z, a.low[3] = rest.w;
        }
#pragma unroll
        for (int g = 0; g < kChunkSteps; ++g) {
          float (&to)[2][4] = sums[g * kTiles + m];
          multiply_fragment<kSplit>(to[0], to[1], a, w[turn][g][0], w[turn][g][kParts - 1]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) at[m] += kTurns * kWarp;
    from += kTurns * kWarp;
    if constexpr (kTurns < kSets) {
#pragma unroll
      for (int n = 0; n < kAhead * kChunkSteps * kParts; ++n) {
        w[n / (kChunkSteps * kParts)][n / kParts % kChunkSteps][n % kParts] =
            w[n / (kChunkSteps * kParts) + 1][n / kParts % kChunkSteps][n % kParts];
      }
    }
    left -= kTurns;
  } while (left > 0);
}

template <int kTiles, bool kSplit, int kAhead, bool kAlwaysShared>
__device__ inline void multiply_chunk(Sums<kTiles>& sums, const Panels& p, int set_tile, int first_step) {
  if (!kAlwaysShared && p.panels) {
    multiply_chunk_in<kTiles, kSplit, kAhead, false>(sums, p, set_tile, first_step);
  } else {
    multiply_chunk_in<kTiles, kSplit, kAhead, true>(sums, p, set_tile, first_step);
  }
}

}  // namespace panels
}  // namespace
}  // namespace lmn
