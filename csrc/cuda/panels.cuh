// The float32 kernel for any depth, widths, outputs, activations, nodes and sums, for paths and for their polynomials.
//
// A unit of work is one first sample i and a group of 8 second ones. Two nodes of its 8 paths are a tile of the matrix
// instruction; the residuals of one layer at several tiles are a panel of fragments, in shared memory where they fit. A warp
// takes 32 units of a layer at kTiles tiles at a time. Weights come straight from L2, asked for a step ahead: no two warps of a
// set of tiles want the same ones, so no barrier is needed but one between layers.
// Many outputs: a warp takes 32 of them at all nodes and keeps their moments in registers. Few outputs behind a wide layer
// (kStraight): the last residuals go from the accumulators into the outputs' products and are in no panel.
#pragma once
#include "halves.cuh"

namespace lmn {
namespace {
namespace panels {

constexpr int kPanelWarps = 12;                         // of a multiprocessor: 168 registers each thread
constexpr int kPanelThreads = kPanelWarps * kWarp;
constexpr int kChunkSteps = 2;                          // of 16 units, that a warp takes at a time
constexpr int kChunkUnits = kChunkSteps * kStepUnits;
constexpr int kLaneOutputs = 4 * kChunkSteps;           // of a chunk
constexpr int kStraightOutputs = 32;                    // at most, for kStraight
constexpr int kMoments = 3;
constexpr int kPathTiles = 5, kFewTiles = 2;            // of a warp: 19 nodes are twice five tiles; slopes, and the midpoint

constexpr std::size_t kStaticShared = 4096;             // of the kernel's own at most, beside what it is launched with

struct Panels {
  Problem<float> problem;
  Stencil<float> stencil;
  std::int64_t units;          // of work
  int tiles, pass_tiles;       // of a path, and of them in one pass
  int hidden;                  // layers whose residuals the products after them take
  int output_steps, chunks;    // of outputs
  int second_panel;            // where it begins, in fragments
  int partial_sums;            // kStraight: where the warps' sums of outputs begin
  std::int64_t block_fragments;
  uint4* panels;               // [blocks][block_fragments]; null: in shared memory
  float* moments;              // [blocks][chunks][kLaneOutputs][kMoments][lanes], where they do not stay in registers
  float* kept;                 // [blocks][slots][pass_tiles][kept_steps][8][lanes], residuals that are added to later ones
  std::int64_t block_kept;
  int kept_steps;
};

/// The same number or pointer, of which the compiler does not know that. What is read there is read again, in place of
/// being kept in registers through the products, where there are none to spare.
__device__ inline int afresh(int value) {
#if !defined(LMN_EMULATED)
  asm volatile("" : "+r"(value));
#endif
  return value;
}
template <class T>
__device__ inline const T* afresh(const T* from) {
#if !defined(LMN_EMULATED)
  asm volatile("" : "+l"(from));
#endif
  return from;
}

/// What a warp is at, in shared memory: in registers it would live through the products. All lanes write the same.
struct Work {
  std::int64_t unit;      // its number
  int i, group;           // first sample; eight second ones
  int first_tile, here;   // of the pass; tiles in it
  int layer, task;        // what it makes; a part of that
  int in_products;        // 1 where the products are the outputs' residuals
};
__device__ inline Work& work_of_warp() {
  __shared__ Work works[kPanelWarps];
  return works[afresh(int(threadIdx.x)) / kWarp];
}
/// Moves one of the numbers on.
template <class T>
__device__ inline void advance(T Work::*number, std::int64_t by) {
  const T next = T(work_of_warp().*number + by);
  __syncwarp();  // all lanes have read it
  work_of_warp().*number = next;
}
__device__ inline int lane_here() { return afresh(int(threadIdx.x)) % kWarp; }

/// What an array of the nodes has of a path's tile; the nodes are an even number.
__device__ inline float2 at_tile(const float* array, int tile) { return reinterpret_cast<const float2*>(array)[tile]; }

__device__ inline void take4(float (&to)[4], const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// ---- products ----

/// Sums of a warp's chunk: of step g and tile m of its set at [g * kTiles + m], of two tiles of 8 units.
template <int kTiles> using Sums = float[kTiles * kChunkSteps][2][4];

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

/// Where the panel of a hidden layer begins, [parts][pass_tiles][steps][lanes] from there on.
__device__ inline int panel_begin(const Panels& p, int l) { return l % 2 ? p.second_panel : 0; }

/// The memory of a block: the device's, or shared memory.
template <bool kShared>
__device__ inline uint4* block_memory(const Panels& p) {
  return kShared ? reinterpret_cast<uint4*>(dynamic_shared())
                 : in_network(p.panels, p.problem.apart) + blockIdx.x * p.block_fragments;
}

__device__ inline const Layer<float>* layer_here(const Panels& p) {
  return afresh(p.problem.own_layers() + work_of_warp().layer);
}

/// Weights, that no kernel writes while this one runs.
__device__ inline uint4 take_weights(const uint4* from) {
#if defined(LMN_EMULATED)
  return *from;
#else
  return __ldg(from);
#endif
}

/// The products of the layer's weights with the panel before it. Weights are asked for kAhead steps before their turn. As
/// many sets of registers and one take turns, so that none is moved; with two parts there are too few for so long a loop.
template <int kTiles, bool kSplit, int kAhead, bool kShared>
__device__ inline void multiply_chunk_in(Sums<kTiles>& sums, const Panels& p, int set_tile, int first_step) {
  constexpr int kParts = kSplit ? 2 : 1, kSets = kAhead + 1, kTurns = kSplit ? 1 : kSets;
  const Layer<float>* const layer = layer_here(p);
  const int steps = layer[-1].half.steps.all(), all_steps = layer->half.steps.all();
  const int lane = lane_here(), here = work_of_warp().here;
  const uint4* from = reinterpret_cast<const uint4*>(layer->half.weights) + (first_step * steps * kWarp + lane);
  static_assert(kChunkSteps == 2);
  const int row = first_step + 1 < all_steps ? steps * kWarp : 0;  // a step beyond the last one is the last one again
  const int low = all_steps * steps * kWarp;
  const int part = p.pass_tiles * steps * kWarp;
  const uint4* at[kTiles];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const int tile = set_tile + m < here ? set_tile + m : here - 1;
    at[m] = block_memory<kShared>(p) + (panel_begin(p, work_of_warp().layer - 1) + tile * steps * kWarp + lane);
  }
  uint4 w[kSets][kChunkSteps][kParts] = {};  // not to be alive before, for all that the compiler sees
  const auto ask = [&](uint4 (&to)[kChunkSteps][kParts], int step) {
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
          float(&to)[2][4] = sums[g * kTiles + m];
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

// ---- residuals ----

/// Residuals of two neighbouring units at a tile's two nodes as two registers of its fragment, whose bits take the place of the
/// units' sums, those of the lower halves behind them. e: [node][unit].
template <bool kSplit>
__device__ inline void pack(float (&sums)[4], const float (&e)[2][2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if constexpr (kSplit) {
      const float high[2] = {upper_half(e[r][0]), upper_half(e[r][1])};
      sums[r] = __uint_as_float(to_halves(high[0], high[1]));
      sums[2 + r] = __uint_as_float(to_halves(e[r][0] - high[0], e[r][1] - high[1]));
    } else {
      sums[r] = __uint_as_float(to_halves(e[r][0], e[r][1]));
    }
  }
}
template <bool kSplit>
__device__ inline Fragment<kSplit> fragment_of(const float (&tile)[2][4]) {
  Fragment<kSplit> fragment;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    fragment.high[n] = __float_as_uint(tile[n / 2][n % 2]);
    if constexpr (kSplit) fragment.low[n] = __float_as_uint(tile[n / 2][2 + n % 2]);
  }
  return fragment;
}

/// Where a lane's values of one step of a layer are at the two samples, array after array, and the units' scales.
struct Ends {
  const float *first, *second, *scales;
};
constexpr int kArrayFloats = kWarp * 4;
__device__ inline Ends ends_of(const HalfLayer& half, int step) {
  const Work& work = work_of_warp();
  const int lane = lane_here();
  const std::int64_t at = half.step_floats(step);
  return {half.records + work.i / kGroup * half.group_floats() + at + (work.i % kGroup * 4 + lane % 4) * 4,
          half.records + work.group * half.group_floats() + at + lane * 4,
          half.units + (step * 2 * kStepUnits + 4 * (lane % 4))};
}
__device__ inline void take2(float (&to)[2], const float* from) {
  const float2 v = *reinterpret_cast<const float2*>(from);
  to[0] = v.x, to[1] = v.y;
}

/// Two neighbouring units of a lane: what they have at both samples, and their scales.
struct UnitsOfLane {
  float z[2], a[2], z_second[2], a_second[2], scale[2], unscale[2];
};
__device__ inline void take_units(UnitsOfLane& units, const Ends& ends, int first) {
  take2(units.z, ends.first + (kZ * kArrayFloats + first)), take2(units.a, ends.first + (kA * kArrayFloats + first));
  take2(units.z_second, ends.second + (kZ * kArrayFloats + first));
  take2(units.a_second, ends.second + (kA * kArrayFloats + first));
  take2(units.scale, ends.scales + first), take2(units.unscale, ends.scales + (kStepUnits + first));
}

/// ReLU makes an output of what rounding leaves of 0: of a z of at most this much, where deviations were added to the chord.
__device__ inline float rounding_of_zero(float first, float second) {
  return larger(absolute(first), absolute(second)) * (kRoundedUlps * Epsilon<float>::value);
}
/// An activation's residual at z, times the unit's scale. sum: of the products; chord: of the activation, scaled.
template <ActivationKind kKind>
__device__ inline float curve_residual(float z, float rounded, float alpha, float beta, float sum, float scale, float chord) {
  if (kKind == ActivationKind::kRelu && absolute(z) <= rounded) z = 0;
  // Some activations are finite at what no half could hold.
  return fma(sum, 0.0f, fma(activate<kKind, float>(z, alpha, beta), scale, -chord));
}

// SiLU's exponents are cut off here, so that a product of two terms 1 + exp(-z) is no overflow. It is then wrong by |z| 2^-62,
// which kTinyUnit keeps below a float's rounding.
constexpr float kPairedExponent = 62;

/// The residuals of an activation of little code at all tiles of a chunk as fragments. SiLU by the fast exponential, and one
/// reciprocal for two nodes: where samples agree in a unit and nothing deviates, what these leave is not a residual: it is 0.
template <ActivationKind kKind, int kTiles, bool kSplit>
__device__ inline void short_residuals(const Panels& p, Sums<kTiles>& sums, int set_tile, int first_step) {
  constexpr bool kSilu = kKind == ActivationKind::kSilu;
  constexpr float kToBinary = kSilu ? -1.4426950408889634f : 1.0f;
  const HalfLayer& half = layer_here(p)->half;
  const float alpha = layer_here(p)->alpha, beta = layer_here(p)->beta;
  const int steps = half.steps.all();
  const Work& work = work_of_warp();
  const int here = work.here, first_tile = work.first_tile + set_tile;
  const bool deviates = work.layer > 0;
  Ends ends = ends_of(half, first_step);
  const int step_floats = int(half.step_floats(1));
  float2 t[kTiles];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) t[m] = at_tile(p.problem.nodes.t, set_tile + m < here ? first_tile + m : first_tile);
#pragma unroll
  for (int n = 0; n < 2 * kChunkSteps; ++n) {  // two units at a time: registers
    const int g = n / 2, x = n % 2;
    if (first_step + g >= steps) break;
    if (n > 0 && x == 0) ends.first += step_floats, ends.second += step_floats, ends.scales += 2 * kStepUnits;
    UnitsOfLane units;
    take_units(units, ends, 2 * x);
    float z[2], dz[2], da[2], inverse[2], rounded[2];
    bool agree = false;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      // z in units of -log2(e), so that 2^z is exp(-z); the scale goes into the reciprocal for nothing.
      z[u] = units.z[u] * kToBinary, dz[u] = units.z_second[u] * kToBinary - z[u], da[u] = units.a_second[u] - units.a[u];
      units.unscale[u] *= kToBinary, inverse[u] = reciprocal(units.scale[u]) * kToBinary;
      agree = agree || (dz[u] == 0 && z[u] != 0);
      rounded[u] = deviates ? rounding_of_zero(units.z[u], units.z_second[u]) : -1.0f;
    }
    if constexpr (kSilu) agree = __any_sync(kAllLanes, agree);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if (set_tile + m >= here) break;
      float(&sum)[4] = sums[g * kTiles + m][x];  // [node][unit]
      float e[2][2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        if constexpr (kSilu) {
          const float point = fma(sum[u], units.unscale[u], fma(t[m].x, dz[u], z[u]));
          const float next = fma(sum[2 + u], units.unscale[u], fma(t[m].y, dz[u], z[u]));
          const float power = exp2_fast(::fminf(point, kPairedExponent));
          const float next_power = exp2_fast(::fminf(next, kPairedExponent));
          const float term = fma(next_power, inverse[u], inverse[u]);
          const float both = reciprocal(fma(power, term, term));
          e[0][u] = fma(fma(point, next_power, point), both, -fma(t[m].x, da[u], units.a[u]));
          e[1][u] = fma(fma(next, power, next), both, -fma(t[m].y, da[u], units.a[u]));
        } else {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float here_t = r == 0 ? t[m].x : t[m].y;
            const float value = fma(sum[2 * r + u], units.unscale[u], fma(here_t, dz[u], z[u]));
            e[r][u] = curve_residual<kKind>(value, rounded[u], alpha, beta, sum[2 * r + u], units.scale[u],
                                            fma(here_t, da[u], units.a[u]));
          }
        }
      }
      if (kSilu && agree) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (dz[c % 2] == 0 && sum[c] == 0) e[c / 2][c % 2] = 0;
        }
      }
      pack<kSplit>(sum, e);
    }
  }
}

/// Residuals of unit u of a step at a tile's two nodes, from the products; sums with earlier values too.
template <bool kPolynomial>
__device__ inline void slow_residuals(const Panels& p, int tile, int step, int u, float& first,
                                      float& second) {
  const Layer<float>& layer = *layer_here(p);
  const bool deviates = work_of_warp().layer > 0;
  const HalfLayer& half = layer.half;
  const int lane = lane_here();
  const float* const unit = half.units + step * 2 * kStepUnits + 4 * (lane % 4) + u;
  const float unscale = unit[kStepUnits];
  float scale = unit[0];
  float deviation[2] = {0, 0};
  if (deviates) deviation[0] = first * unscale, deviation[1] = second * unscale;
  const auto join = [&](int value, float (&residual)[2]) {
    const std::int64_t slot = std::int64_t(p.pass_tiles) * p.kept_steps * 8 * kWarp;
    float* const kept = in_network(p.kept, p.problem.apart) + blockIdx.x * p.block_kept +
                        (std::int64_t(tile) * p.kept_steps + step) * 8 * kWarp + 2 * u * kWarp + lane;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (layer.added[value] >= 0) residual[r] += kept[layer.added[value] * slot + r * kWarp];
      if (layer.kept[value] >= 0) kept[layer.kept[value] * slot + r * kWarp] = residual[r];
    }
  };
  if (p.kept) join(0, deviation);
  float e[2] = {deviation[0], deviation[1]};
  if (!half.records) {
    scale = 1;
  } else if (layer.kind == ActivationKind::kIdentity) {
    e[0] *= scale, e[1] *= scale;
  } else {
    const Ends ends = ends_of(half, step);
    const float z_first = ends.first[kZ * kArrayFloats + u], z_second = ends.second[kZ * kArrayFloats + u];
    const float a_first = ends.first[kA * kArrayFloats + u], a_second = ends.second[kA * kArrayFloats + u];
    if (kPolynomial && tile == 0) {
      const float z_chord = z_second - z_first, a_chord = a_second - a_first;
      e[0] = fma(ends.first[kSlope * kArrayFloats + u], z_chord + deviation[0], -a_chord);
      e[1] = fma(ends.second[kSlope * kArrayFloats + u], z_chord + deviation[1], -a_chord);
    } else {
      float t[2] = {0.5f, 0.5f};  // a polynomial's is the midpoint
      if constexpr (!kPolynomial) {
        const float2 both = at_tile(p.problem.nodes.t, work_of_warp().first_tile + tile);
        t[0] = both.x, t[1] = both.y;
      }
      with_kind(layer.kind, [&](auto kind) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float z = on_chord(z_first, z_second, t[r]) + deviation[r];
          if constexpr (kind.value == ActivationKind::kRelu) {  // which makes an output of what rounding leaves of 0
            const float largest = larger(absolute(z_first), absolute(z_second));
            if (deviates && absolute(z) <= largest * (kRoundedUlps * Epsilon<float>::value)) z = 0;
          }
          const float a = activate<kind.value, float>(z, layer.alpha, layer.beta);
          e[r] = fma(a, scale, -on_chord(a_first, a_second, t[r]));
        }
      });
      // Some activations are finite at what no half could hold.
      e[0] = fma(deviation[0], 0.0f, e[0]), e[1] = fma(deviation[1], 0.0f, e[1]);
    }
  }
  if (p.kept && (layer.added[1] >= 0 || layer.kept[1] >= 0)) {
    const float inverse = 1 / scale;
    e[0] *= inverse, e[1] *= inverse;
    join(1, e);
    e[0] *= scale, e[1] *= scale;
  }
  first = e[0], second = e[1];
}

/// Residuals of a layer with one activation, without earlier values, at all tiles of a chunk as fragments. Two units at two
/// nodes after the others, and the registers move on: unrolled, the code of all activations would be large.
template <ActivationKind kKind, int kTiles, bool kSplit>
__device__ inline void curve_residuals(const Panels& p, Sums<kTiles>& sums, int set_tile, int first_step) {
  static_assert(kChunkSteps == 2);
  const Layer<float>& layer = *layer_here(p);
  const float alpha = layer.alpha, beta = layer.beta;
  const int steps = layer.half.steps.all();
#pragma unroll 1
  for (int n = 0; n < 2 * kChunkSteps; ++n) {
    const int step = first_step + n / 2 < steps ? first_step + n / 2 : steps - 1;
    UnitsOfLane units;
    take_units(units, ends_of(layer.half, step), n % 2 * 2);
    float rounded[2], dz[2], da[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      rounded[u] = work_of_warp().layer > 0 ? rounding_of_zero(units.z[u], units.z_second[u]) : -1.0f;
      dz[u] = units.z_second[u] - units.z[u], da[u] = units.a_second[u] - units.a[u];
    }
#pragma unroll 1
    for (int m = 0; m < kTiles; ++m) {
      const int tile = set_tile + m < work_of_warp().here ? set_tile + m : set_tile;
      const float2 both = at_tile(p.problem.nodes.t, work_of_warp().first_tile + tile);
      float done[4], e[2][2];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int u = c % 2;
        const float sum = sums[0][0][c], t = c < 2 ? both.x : both.y;
        const float z = fma(sum, units.unscale[u], fma(t, dz[u], units.z[u]));
        e[c / 2][u] = curve_residual<kKind>(z, rounded[u], alpha, beta, sum, units.scale[u], fma(t, da[u], units.a[u]));
      }
      pack<kSplit>(done, e);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int next = 0; next + 1 < kTiles; ++next) sums[next][0][c] = sums[next + 1][0][c];
        if (kSplit || c < 2) sums[kTiles - 1][0][c] = done[c];
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float done = sums[m][0][c];
        sums[m][0][c] = sums[m][1][c], sums[m][1][c] = sums[kTiles + m][0][c];
        sums[kTiles + m][0][c] = sums[kTiles + m][1][c], sums[kTiles + m][1][c] = done;
      }
    }
  }
}

/// Residuals of any layer at all tiles of a chunk, in place of its sums: one unit at two nodes after the other, and the
/// registers move on.
template <int kTiles, bool kPolynomial>
__device__ inline void any_residuals(const Panels& p, Sums<kTiles>& sums, int set_tile, int first_step) {
  constexpr int kCount = kTiles * kChunkSteps;
#pragma unroll 1
  for (int n = 0; n < kCount; ++n) {
    const int step = first_step + n / kTiles, tile = set_tile + n % kTiles;
    float e[2][4];  // [node][unit]
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int u = 0; u < 4; ++u) e[r][u] = sums[0][u / 2][2 * r + u % 2];
    }
    if (tile < work_of_warp().here && step < layer_here(p)->half.steps.all()) {
#pragma unroll 1
      for (int u = 0; u < 4; ++u) {
        float first = e[0][0], second = e[1][0];
        slow_residuals<kPolynomial>(p, tile, step, u, first, second);
#pragma unroll
        for (int next = 0; next < 3; ++next) e[0][next] = e[0][next + 1], e[1][next] = e[1][next + 1];
        e[0][3] = first, e[1][3] = second;
      }
    }
#pragma unroll
    for (int next = 0; next + 1 < kCount; ++next) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[next][0][c] = sums[next + 1][0][c], sums[next][1][c] = sums[next + 1][1][c];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int u = 0; u < 4; ++u) sums[kCount - 1][u / 2][2 * r + u % 2] = e[r][u];
    }
  }
}

/// Activations whose residuals curve_residuals takes. Of others the code is large, or there are none, or see short_residuals.
template <ActivationKind kKind>
constexpr bool kIsCurve = kKind == ActivationKind::kLeakyRelu || kKind == ActivationKind::kElu ||
                          kKind == ActivationKind::kGelu || kKind == ActivationKind::kGeluTanh ||
                          kKind == ActivationKind::kTanh || kKind == ActivationKind::kSigmoid;

/// Residuals of the layer that the warp is at, as fragments in place of its sums.
template <int kTiles, bool kSplit, bool kPolynomial>
__device__ inline void residuals_of(const Panels& p, Sums<kTiles>& sums, int set_tile, int first_step) {
  if (!kPolynomial && !p.kept) {
    const ActivationKind kind = layer_here(p)->kind;
    // The fast exponential's relative error grows with |z|: what is left of a unit that is all but off needs the other one.
    if (kind == ActivationKind::kSilu && !afresh(&in_network(p.problem.range, p.problem.apart)->careful)[0]) {
      return short_residuals<ActivationKind::kSilu, kTiles, kSplit>(p, sums, set_tile, first_step);
    }
    if (kind == ActivationKind::kRelu) {
      return short_residuals<ActivationKind::kRelu, kTiles, kSplit>(p, sums, set_tile, first_step);
    }
    bool is_done = false;
    with_kind(kind, [&](auto constant) {
      constexpr ActivationKind kKind = constant.value;
      if constexpr (kIsCurve<kKind>) {
        curve_residuals<kKind, kTiles, kSplit>(p, sums, set_tile, first_step);
        is_done = true;
      }
    });
    if (is_done) return;
  }
  any_residuals<kTiles, kPolynomial>(p, sums, set_tile, first_step);
#pragma unroll
  for (int n = 0; n < kTiles * kChunkSteps; ++n) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const float(&of)[4] = sums[n][x];
      const float e[2][2] = {{of[0], of[1]}, {of[2], of[3]}};
      pack<kSplit>(sums[n][x], e);
    }
  }
}

// ---- outputs ----

/// Adds a lane's four outputs of a step. moments: in the units of the products, or of the residuals times their scales.
__device__ inline void add_four(PairSums& sums, const Problem<float>& of_first, bool in_products, int step,
                                const Moments<float> (&moments)[4]) {
  const Problem<float> problem = of_network(of_first);
  const int lane = lane_here();
  const std::int64_t k = std::int64_t(step) * kStepUnits + 4 * (lane % 4);
  if (k >= problem.outputs) return;
  const Layer<float>& layer = *afresh(problem.layers + problem.last);
  const float vanishing = never_zero(layer.kind) ? Vanishing<float>::value : 0.0f;
  const Work& work = work_of_warp();
  const std::int64_t i = work.i, j = at_most(std::int64_t(work.group) * kGroup + lane / 4, problem.samples - 1);
  float y[8], y_low[8], rounding[8], scale[4];  // of i, of j
  if (problem.outputs % 4 == 0) {
    const auto both = [&](float (&to)[8], const float* from) {
      float four[4];
      take4(four, from + i * problem.outputs + k);
#pragma unroll
      for (int c = 0; c < 4; ++c) to[c] = four[c];
      take4(four, from + j * problem.outputs + k);
#pragma unroll
      for (int c = 0; c < 4; ++c) to[4 + c] = four[c];
    };
    both(y, problem.y), both(y_low, problem.y_low), both(rounding, problem.rounding);
    take4(scale, problem.scale + k);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const std::int64_t output = at_most(k + c, problem.outputs - 1);
      const std::int64_t at_i = i * problem.outputs + output, at_j = j * problem.outputs + output;
      y[c] = problem.y[at_i], y[4 + c] = problem.y[at_j];
      y_low[c] = problem.y_low[at_i], y_low[4 + c] = problem.y_low[at_j];
      rounding[c] = problem.rounding[at_i], rounding[4 + c] = problem.rounding[at_j];
      scale[c] = problem.scale[output];
    }
  }
  // What brings a moment to units of the chord.
  const float* const unit = layer.half.units + step * 2 * kStepUnits + 4 * (lane % 4);
  float factor[4] = {1, 1, 1, 1};
  if (in_products) {
    take4(factor, unit + kStepUnits);
  } else if (layer.half.records) {
    take4(factor, unit);
#pragma unroll
    for (int c = 0; c < 4; ++c) factor[c] = reciprocal(factor[c]);  // a power of two
  }
  float nonlinear = 0;
  bool ordinary = true;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    factor[c] *= scale[c];
    float share = 0;
    const float first = absolute(y[c]), second = absolute(y[4 + c]);
    const bool plain = ordinary_share(moments[c].te, bend_of(moments[c], problem.nodes.variance_t), factor[c],
                                      (y[4 + c] - y[c]) + (y_low[4 + c] - y_low[c]),
                                      ::fmaxf(first, second), fma(rounding[c], rounding[c], rounding[4 + c] * rounding[4 + c]),
                                      problem.nodes.variance_t, share) &&
                       ::fminf(first, second) >= vanishing * scale[c];
    if (k + c < problem.outputs) ordinary = ordinary && plain, nonlinear += share;
  }
  if (ordinary) {
    sums.nonlinear += double(nonlinear);
    return;
  }
  Moments<float> next[4] = {moments[0], moments[1], moments[2], moments[3]};
#pragma unroll 1
  for (int c = 0; c < 4 && k + c < problem.outputs; ++c) {
    const float f = factor[0], unit_scale = problem.scale[k + c];
    const Moments<float> m{next[0].e * f, next[0].te * f, next[0].ee * f * f};
    add_output(sums, problem.y, problem.y_low, problem.rounding, problem.outputs, i, j, k + c, m, unit_scale,
               vanishing * unit_scale, problem.nodes.variance_t);
#pragma unroll
    for (int n = 0; n < 3; ++n) next[n] = next[n + 1], factor[n] = factor[n + 1];
  }
}

/// Between passes a lane's moments wait in the workspace.
template <int kCount>
__device__ inline void load_moments(Moments<float> (&moments)[kCount], const float* from) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    const float* const at = from + n * kMoments * kWarp;
    moments[n] = {at[0], at[kWarp], at[2 * kWarp]};
  }
}
template <int kCount>
__device__ inline void store_moments(const Moments<float> (&moments)[kCount], float* to) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    float* const at = to + n * kMoments * kWarp;
    at[0] = moments[n].e, at[kWarp] = moments[n].te, at[2 * kWarp] = moments[n].ee;
  }
}

// ---- the kernel ----

// Persistent blocks; a unit of work at a time to a block, a chunk of units or outputs at a set of tiles to a warp.
// kPolynomial: the stencil's residuals in place of the nodes'; then all tiles are one set and one pass.
template <int kTiles, bool kSplit, bool kStraight, bool kPolynomial>
__global__ void __launch_bounds__(kPanelThreads, 1) panels_kernel(Panels p) {
  static_assert(!kStraight || !kPolynomial);
  constexpr bool kAlwaysShared = kTiles > kFewTiles;  // 64-bit addresses of panels take too many registers for more
  constexpr int kAhead = kSplit ? 1 : 2, kOutputsAhead = kSplit ? 0 : 1;  // moments take the registers
  __shared__ PairSums totals[kPanelWarps][kGroup];  // of a warp's outputs
  static_assert(sizeof(totals) + kPanelWarps * sizeof(Work) <= kStaticShared);
  const Problem<float>& problem = p.problem;
  const auto warp_here = [] { return afresh(int(threadIdx.x)) / kWarp; };
  const int warps = int(blockDim.x) / kWarp;
  const auto add_total = [&](PairSums sums, bool is_first) {
    const int lane = lane_here();
    PairSums& total = totals[warp_here()][lane / 4];
    sums.nonlinear = warp_sum(sums.nonlinear, 4);
    sums.constants = warp_sum(sums.constants, 4);
    if (lane % 4 > 0) return;
    total = is_first ? sums : PairSums{total.nonlinear + sums.nonlinear, total.constants + sums.constants};
  };
  const auto sets_here = [] { return (work_of_warp().here + kTiles - 1) / kTiles; };
  const auto layer_chunks = [&] { return (layer_here(p)->half.steps.all() + kChunkSteps - 1) / kChunkSteps; };
  // Of a task: its first tile in the pass, its first step.
  const auto set_of_task = [&] { return work_of_warp().task % sets_here() * kTiles; };
  const auto step_of_task = [&] { return work_of_warp().task / sets_here() * kChunkSteps; };
  const auto is_last = [&] { return work_of_warp().first_tile + p.pass_tiles >= p.tiles; };
  for (work_of_warp().unit = blockIdx.x; work_of_warp().unit < p.units; advance(&Work::unit, gridDim.x)) {
    {
      std::int64_t i, group;
      find_unit(work_of_warp().unit, std::int64_t(kGroup), i, group);
      work_of_warp().i = int(i), work_of_warp().group = int(group);
    }
    for (work_of_warp().first_tile = 0; work_of_warp().first_tile < p.tiles;
         advance(&Work::first_tile, p.pass_tiles)) {
      if (work_of_warp().first_tile > 0) __syncthreads();  // the pass before has done with the panels
      const int left = p.tiles - work_of_warp().first_tile;
      work_of_warp().here = left < p.pass_tiles ? left : p.pass_tiles;
      for (work_of_warp().layer = 0; work_of_warp().layer < p.hidden - kStraight; advance(&Work::layer, 1)) {
        for (work_of_warp().task = warp_here(); work_of_warp().task < sets_here() * layer_chunks();
             advance(&Work::task, warps)) {
          Sums<kTiles> sums;
          if (work_of_warp().layer > 0) {
            multiply_chunk<kTiles, kSplit, kAhead, kAlwaysShared>(sums, p, set_of_task(), step_of_task());
          } else {
            clear<kTiles>(sums);
          }
          residuals_of<kTiles, kSplit, kPolynomial>(p, sums, set_of_task(), step_of_task());
          const int set_tile = set_of_task(), first_step = step_of_task(), steps = layer_here(p)->half.steps.all();
          const int here = work_of_warp().here, part = p.pass_tiles * steps * kWarp;
          uint4* const memory = kAlwaysShared || !p.panels ? block_memory<true>(p) : block_memory<false>(p);
          uint4* to = memory + (panel_begin(p, work_of_warp().layer) + (set_tile * steps + first_step) * kWarp + lane_here());
#pragma unroll
          for (int m = 0; m < kTiles; ++m, to += steps * kWarp) {
            if (set_tile + m >= here) break;
#pragma unroll
            for (int g = 0; g < kChunkSteps; ++g) {
              if (first_step + g >= steps) break;
              const Fragment<kSplit> e = fragment_of<kSplit>(sums[g * kTiles + m]);
              to[g * kWarp] = make_uint4(e.high[0], e.high[1], e.high[2], e.high[3]);
              if constexpr (kSplit) to[g * kWarp + part] = make_uint4(e.low[0], e.low[1], e.low[2], e.low[3]);
            }
          }
        }
        __syncthreads();  // the panel is there
      }
      if constexpr (kStraight) {
        work_of_warp().layer = p.hidden - 1;
        const int own_sums = kTiles * p.output_steps * 2 * kWarp;
        // The warps' sums, [warps][kTiles][output_steps][2][lanes].
        const auto partial = [&] { return reinterpret_cast<float4*>(block_memory<true>(p) + p.partial_sums) + lane_here(); };
        if (p.hidden == 1) __syncthreads();  // the first warp has read the sums before
        for (int at = 0; at < own_sums; at += kWarp) partial()[warp_here() * own_sums + at] = make_float4(0, 0, 0, 0);
        // The outputs' products with a chunk of residuals.
        const auto emit = [&](const Sums<kTiles>& residuals, int first_step) {
          __syncwarp();
          Fragment<kSplit> fragments[kTiles * kChunkSteps];
#pragma unroll
          for (int n = 0; n < kTiles * kChunkSteps; ++n) fragments[n] = fragment_of<kSplit>(residuals[n]);
          const Layer<float>* const layer = afresh(problem.own_layers() + problem.last);
          const int steps = layer[-1].half.steps.all(), low = p.output_steps * steps * kWarp;
          const int count = steps - first_step < kChunkSteps ? steps - first_step : kChunkSteps;  // of steps
          const uint4* weights = reinterpret_cast<const uint4*>(layer->half.weights) + (first_step * kWarp + lane_here());
          float4* to = partial() + warp_here() * own_sums;
#pragma unroll 1
          for (int out = 0; out < p.output_steps; ++out, weights += steps * kWarp, to += 2 * kWarp) {
            uint4 w[kChunkSteps], w_low[kChunkSteps];
#pragma unroll
            for (int g = 0; g < kChunkSteps; ++g) {
              w[g] = w_low[g] = take_weights(weights + (g < count ? g * kWarp : 0));
              if constexpr (kSplit) w_low[g] = take_weights(weights + (g < count ? g * kWarp + low : low));
            }
            float y[kTiles][2][4];
#pragma unroll
            for (int n = 0; n < 2 * kTiles; ++n) {
              take4(y[n / 2][n % 2], reinterpret_cast<const float*>(to + (n / 2 * p.output_steps * 2 + n % 2) * kWarp));
            }
#pragma unroll
            for (int g = 0; g < kChunkSteps; ++g) {
              if (g > 0 && g >= count) break;
#pragma unroll
              for (int m = 0; m < kTiles; ++m) {
                multiply_fragment<kSplit>(y[m][0], y[m][1], fragments[g * kTiles + m], w[g], w_low[g]);
              }
            }
#pragma unroll
            for (int n = 0; n < 2 * kTiles; ++n) {
              const float(&v)[4] = y[n / 2][n % 2];
              to[(n / 2 * p.output_steps * 2 + n % 2) * kWarp] = make_float4(v[0], v[1], v[2], v[3]);
            }
          }
        };
        // A warp stays with a set of tiles.
        const auto sharing = [&] { return warps / sets_here(); };
        work_of_warp().task = warp_here() < sharing() * sets_here() ? warp_here() : layer_chunks() * sets_here();
        for (; work_of_warp().task < layer_chunks() * sets_here(); advance(&Work::task, sharing() * sets_here())) {
          Sums<kTiles> sums;
          if (work_of_warp().layer > 0) {
            multiply_chunk<kTiles, kSplit, kAhead, kAlwaysShared>(sums, p, set_of_task(), step_of_task());
          } else {
            clear<kTiles>(sums);
          }
          residuals_of<kTiles, kSplit, kPolynomial>(p, sums, set_of_task(), step_of_task());
          emit(sums, step_of_task());
        }
        __syncthreads();
        const int tile_items = p.output_steps * 2;
        for (int item = warp_here(); item < work_of_warp().here * tile_items; item += warps) {
          const int set = item / tile_items / kTiles;
          float4* const at = partial() + set * own_sums + (item - set * kTiles * tile_items) * kWarp;
          float4 total = *at;
          for (int other = 1; other < sharing(); ++other) {
            const float4 more = at[other * sets_here() * own_sums];
            total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
          }
          *at = total;
        }
        __syncthreads();
        if (warp_here() > 0) continue;  // with the next pass
        for (int out = 0; out < p.output_steps; ++out) {
          float* const waiting = in_network(p.moments, problem.apart) + lane_here() +
                                 (std::int64_t(blockIdx.x) * p.chunks * kChunkSteps + out) * 4 * kMoments * kWarp;
          Moments<float> moments[4] = {};
          if (work_of_warp().first_tile > 0) load_moments(moments, waiting);
          for (int tile = 0; tile < work_of_warp().here; ++tile) {
            const int set = tile / kTiles;
            const float2 w = at_tile(problem.nodes.w, work_of_warp().first_tile + tile);
            const float2 w_t = at_tile(problem.nodes.w_t, work_of_warp().first_tile + tile);
            const float4* const from =
                partial() + set * own_sums + ((tile - set * kTiles) * p.output_steps + out) * 2 * kWarp;
#pragma unroll
            for (int x = 0; x < 2; ++x) {
              float e[4];
              take4(e, reinterpret_cast<const float*>(from + x * kWarp));
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                add_moments(moments[2 * x + c % 2], e[c], c < 2 ? w.x : w.y, c < 2 ? w_t.x : w_t.y);
              }
            }
          }
          if (!is_last()) {
            store_moments(moments, waiting);
            continue;
          }
          PairSums pair_sums;
          add_four(pair_sums, problem, true, out, moments);
          add_total(pair_sums, out == 0);
        }
      } else {
        if (p.hidden == 0) __syncthreads();  // the totals before are read
        work_of_warp().layer = problem.last;
        work_of_warp().in_products = problem.ends_linear && !(p.kept && layer_here(p)->added[0] >= 0);
        for (work_of_warp().task = warp_here(); work_of_warp().task < p.chunks; advance(&Work::task, warps)) {
          const auto first_step = [] { return work_of_warp().task * kChunkSteps; };
          const auto waiting = [&] {
            const std::int64_t place = std::int64_t(blockIdx.x) * p.chunks + work_of_warp().task;
            return in_network(p.moments, problem.apart) + place * kLaneOutputs * kMoments * kWarp + lane_here();
          };
          Moments<float> moments[kLaneOutputs] = {};
          if (work_of_warp().first_tile > 0) load_moments(moments, waiting());
          for (int set_tile = 0; set_tile < work_of_warp().here; set_tile += kTiles) {
            Sums<kTiles> sums;
            if (problem.last > 0) {
              multiply_chunk<kTiles, kSplit, kOutputsAhead, kAlwaysShared>(sums, p, set_tile, first_step());
            } else {
              clear<kTiles>(sums);
            }
            if (!work_of_warp().in_products) {
              store_moments(moments, waiting());  // registers for this are not there
              any_residuals<kTiles, kPolynomial>(p, sums, set_tile, first_step());
              load_moments(moments, waiting());
            }
            if constexpr (kPolynomial) {
#pragma unroll
              for (int output = 0; output < kLaneOutputs; ++output) {
                const int g = output / 4, x = output / 2 % 2, b = output % 2;
                const float value[3] = {sums[g * kTiles][x][b], sums[g * kTiles][x][2 + b],
                                        sums[g * kTiles + kTiles - 1][x][b]};
                moments[output] = p.stencil.size == 3 ? stencil_moments<3>(p.stencil, value)
                                                      : stencil_moments<2>(p.stencil, value);
              }
            } else {
              const int first_tile = work_of_warp().first_tile, here = work_of_warp().here;
#pragma unroll
              for (int m = 0; m < kTiles; ++m) {
                if (set_tile + m >= here) break;
                const float2 w = at_tile(problem.nodes.w, first_tile + set_tile + m);
                const float2 w_t = at_tile(problem.nodes.w_t, first_tile + set_tile + m);
#pragma unroll
                for (int output = 0; output < kLaneOutputs; ++output) {
                  const float(&e)[4] = sums[output / 4 * kTiles + m][output / 2 % 2];
                  add_moments(moments[output], e[output % 2], w.x, w_t.x);
                  add_moments(moments[output], e[2 + output % 2], w.y, w_t.y);
                }
              }
            }
          }
          if (!is_last()) {
            store_moments(moments, waiting());
            continue;
          }
          PairSums pair_sums;
#pragma unroll
          for (int g = 0; g < kChunkSteps; ++g) {
            const Moments<float> four[4] = {moments[4 * g], moments[4 * g + 1], moments[4 * g + 2], moments[4 * g + 3]};
            const int step = first_step() + g;
            if (step < p.output_steps) add_four(pair_sums, problem, work_of_warp().in_products, step, four);
          }
          add_total(pair_sums, work_of_warp().task == warp_here());
        }
      }
    }
    if constexpr (!kStraight) __syncthreads();  // the totals are there, and all have done with the panels
    if (warp_here() > 0) continue;
    const int lane = lane_here();
    PairSums pair_sums;
    for (int other = 0; other < (kStraight ? 1 : p.chunks < warps ? p.chunks : warps); ++other) {
      pair_sums.nonlinear += totals[other][lane / 4].nonlinear;
      pair_sums.constants += totals[other][lane / 4].constants;
    }
    const std::int64_t i = work_of_warp().i, j = std::int64_t(work_of_warp().group) * kGroup + lane / 4;
    if (lane % 4 == 0 && i < j && j < problem.samples) {
      const Layer<float>& first = problem.own_layers()[0];
      store_entry(problem.own_connectivity(), problem.own_counts(), pair_sums, first.z, first.stride, first.width,
                  problem.samples, problem.outputs, i, j);
    }
  }
}

// ---- the plan ----

constexpr int kMostSets = 2;
constexpr int kNarrowSteps = 16;  // of a layer with fewer chunks than a block of all warps has warps

/// How the kernel runs, and everything but the layers that it needs.
struct PanelPlan {
  Panels panels{};
  std::int64_t blocks = 0;
  int threads = 0;
  std::size_t shared = 0;
  bool straight = false;
};

inline PanelPlan make_panel_plan(const PathConnectivity<float>& op, const HalfPlan& half, const Stencil<float>& stencil,
                                 Arena& arena, bool straight = true) {
  PanelPlan plan;
  Panels& panels = plan.panels;
  const Problem<float>& problem = half.problem;
  const bool polynomial = stencil.size > 0;
  const int set = polynomial ? kFewTiles : kPathTiles, parts = problem.halves_alone ? 1 : 2;
  const int slots = assign_slots(op).count;
  const auto steps = [&](int l) { return std::int64_t(half_steps(op, half.dialect, l).all()); };
  panels.stencil = stencil;
  panels.tiles = int(blocks_of(polynomial ? stencil.size : op.nodes.interior, 2));
  panels.hidden = op.layers;
  panels.units = count_units(op.samples, kGroup);
  const std::int64_t output_steps = steps(op.layers), chunks = blocks_of(output_steps, kChunkSteps);
  panels.output_steps = int(output_steps), panels.chunks = int(chunks);
  plan.straight = straight && problem.ends_linear && !polynomial && slots == 0 && problem.outputs <= kStraightOutputs &&
                  steps(op.layers - 1) > kNarrowSteps;
  std::int64_t widest[2] = {0, 0};  // of the layers in each panel, in steps
  for (int l = 0; l < panels.hidden - plan.straight; ++l) {
    if (steps(l) > widest[l % 2]) widest[l % 2] = steps(l);
  }
  const auto fragments = [&](int tiles, int warps) {
    const std::int64_t panel_fragments = std::int64_t(parts) * tiles * kWarp;
    panels.second_panel = int(panel_fragments * widest[0]);
    panels.partial_sums = int(panel_fragments * (widest[0] + widest[1]));
    return panels.partial_sums + (plan.straight ? std::int64_t(warps) * set * output_steps * 2 * kWarp : 0);
  };
  const std::int64_t whole = std::int64_t(device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  const std::int64_t reserved = device_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  const std::int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int most = int(at_most(panels.tiles, kMostSets * set));
  int resident = 0;
  const auto take = [&](int tiles, int count) {  // if as many blocks of a multiprocessor have room
    const std::int64_t bytes = fragments(tiles, kPanelWarps / count) * std::int64_t(sizeof(uint4));
    if (resident || bytes + std::int64_t(kStaticShared) > std::int64_t(shared_limit()) ||
        count * (bytes + std::int64_t(kStaticShared) + reserved) > whole) {
      return;
    }
    resident = count, panels.pass_tiles = tiles, plan.shared = std::size_t(bytes);
  };
  // Small blocks wait less for one another. But where weights are read again with every pass, few passes come first.
  const bool narrow = widest[0] <= kNarrowSteps && widest[1] <= kNarrowSteps && !plan.straight;
  const int fewer = polynomial ? most : int(at_most(most, set));
  for (int count = 3; narrow && count > 0; --count) take(most, count), take(fewer, count);
  for (int count = 3; count > 0; --count) take(most, count);
  for (int count = 3; count > 0; --count) take(fewer, count);
  for (int tiles = fewer - 1; tiles > 1; --tiles) take(polynomial ? most : tiles, 1);
  const bool in_shared = resident > 0;
  if (!in_shared && plan.straight) return make_panel_plan(op, half, stencil, arena, false);
  if (!in_shared) resident = 3, panels.pass_tiles = most;
  plan.threads = kPanelThreads / resident;
  plan.blocks = at_most(panels.units, resident * multiprocessors);
  panels.block_fragments = fragments(panels.pass_tiles, kPanelWarps / resident);
  panels.panels = in_shared ? nullptr : arena.take<uint4>(plan.blocks * panels.block_fragments);
  if (panels.pass_tiles < panels.tiles || !problem.ends_linear || slots > 0) {
    panels.moments = arena.take<float>(plan.blocks * chunks * kLaneOutputs * kMoments * kWarp);
  }
  if (slots > 0) {
    std::int64_t most_steps = 0;
    for (int l = 0; l <= op.layers; ++l) most_steps = steps(l) > most_steps ? steps(l) : most_steps;
    panels.kept_steps = int(most_steps);
    panels.block_kept = slots * panels.pass_tiles * most_steps * 8 * kWarp;
    panels.kept = arena.take<float>(plan.blocks * panels.block_kept);
  }
  return plan;
}

template <int kTiles, bool kStraight, bool kPolynomial>
const char* launch_panels(const PanelPlan& plan, std::int64_t networks, CUstream_st* stream) {
  const Grid grid(plan.blocks, networks);
  if (plan.panels.problem.halves_alone) {
    return launch(panels_kernel<kTiles, false, kStraight, kPolynomial>, grid, plan.threads, plan.shared, stream, plan.panels);
  }
  return launch(panels_kernel<kTiles, true, kStraight, kPolynomial>, grid, plan.threads, plan.shared, stream, plan.panels);
}

/// All of an op, or of its polynomials. apart: bytes between the workspaces of two networks.
template <bool kPolynomial>
const char* enqueue_by_panels(const PathConnectivity<float>& op, const Stencil<float>& stencil, std::size_t apart,
                              CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.workspace), std::int64_t(apart)};
  HalfPlan half = make_half_plan(op, Dialect{false, 0, false, kPolynomial}, arena);
  PanelPlan plan = make_panel_plan(op, half, stencil, arena);
  if (plan.blocks == 0) return "no CUDA device";
  for (int l = 1; l <= op.layers; ++l) {  // 32-bit places of its weights
    const std::int64_t before = half_steps(op, half.dialect, l - 1).all();
    if (before * half_steps(op, half.dialect, l).all() * kWarp > 0x3fffffff) return "a layer too wide for the kernel";
  }
  // Nodes go in pairs: an odd one out has the same node beside it, without weight.
  std::vector<double> t(op.nodes.t, op.nodes.t + op.nodes.interior);
  std::vector<double> weights(op.nodes.weights, op.nodes.weights + op.nodes.interior);
  if (op.nodes.interior % 2 == 1) t.push_back(t.back()), weights.push_back(0);
  PathNodes nodes = op.nodes;
  nodes.t = t.data(), nodes.weights = weights.data(), nodes.interior = std::int32_t(t.size());
  const char* error = store_nodes(nodes, half.nodes, half.problem.nodes, stream);
  if (!error) error = enqueue_half_samples(op, half, arena, stream, [](int, const Layer<float>&) {});
  if (error) return error;
  plan.panels.problem = half.problem;
  if constexpr (kPolynomial) {
    return launch_panels<kFewTiles, false, true>(plan, op.networks, stream);
  } else {
    if (plan.panels.panels) return launch_panels<kFewTiles, false, false>(plan, op.networks, stream);
    return plan.straight ? launch_panels<kPathTiles, true, false>(plan, op.networks, stream)
                         : launch_panels<kPathTiles, false, false>(plan, op.networks, stream);
  }
}

inline std::size_t workspace_by_panels(const PathConnectivity<float>& op, const Stencil<float>& stencil) {
  Arena arena{nullptr};
  const HalfPlan half = make_half_plan(op, Dialect{false, 0, false, stencil.size > 0}, arena);
  make_panel_plan(op, half, stencil, arena);
  return half_workspace(op, half, arena);
}

}  // namespace panels
}  // namespace
}  // namespace lmn
