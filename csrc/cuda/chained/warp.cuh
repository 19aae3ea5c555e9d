// What one warp of chained_kernel computes: the residuals of one or two hidden layers, the outputs' products, their moments and
// the sums of up to two paths for each lane. kernel.cuh sets the members and calls run.
#pragma once
#include "lane.cuh"

namespace lmn {
namespace {
namespace chained {

/// The sizes of one variant. kBlocks: blocks of 8 units in each of two hidden layers; 0: one hidden layer of any width.
template <class Curve, int kBlocks, int kStencil, bool kSplit>
struct Shape {
  static constexpr int kDepth = kBlocks > 0 ? 2 : 1, kFull = kBlocks / 2, kTail = kBlocks % 2, kSteps = kFull + kTail;
  static constexpr int kArrays = kStencil > 0 ? 3 : 2, kParts = kSplit ? 2 : 1;
  static constexpr int kPaths = kStencil == 2 ? kTiles : 1;  // paths of a lane
  // as many warps as their registers allow without a spill
  static constexpr int kMostWarps = kDepth == 1 ? (kStencil > 0 ? 20 : 16) : kSplit || kBlocks > 13 || kStencil > 0 ? 8 : 12;
  static constexpr int kMoments = kStencil > 0 ? 0 : 6;  // float4 of a lane
  static constexpr std::size_t kWarpBytes = kMoments * kWarp * sizeof(float4);
};

template <class Curve, int kBlocks, int kStencil, bool kSplit, Way kWay>
struct ChainedWarp {
  using S = Shape<Curve, kBlocks, kStencil, kSplit>;
  static constexpr int kParts = S::kParts, kPaths = S::kPaths, kArrays = S::kArrays, kDepth = S::kDepth;
  static constexpr int kStepFloats = kArrays * kStepUnits * kGroup;

  __device__ explicit ChainedWarp(const Chained& parameters) : p(parameters) {}

  const Chained& p;
  const uint4* weights;  // this lane's, in shared memory: into the second hidden layer, and into the outputs
  int lane, q;
  float4* moments;  // this lane's, in shared memory: [e, te, ee][2][lanes], four outputs each; read and written once in a pass
  unsigned first, second[kPaths];  // where the groups' records begin, in floats; the same in all hidden layers
  int row;                         // 4 times the first sample's place in its group, plus q
  int node;                        // first node of this pass
  float spacing;                   // spacing of the nodes
  mutable bool meets = false;      // whether the lane's two samples agree in some hidden unit; not set in the careful way
  bool more_outputs;               // whether there are more outputs than kStepUnits

  /// Where a lane's records of one layer begin: those of the first sample, of the second samples, and the units' scales.
  template <int kUnits>
  struct Records {
    const float *own, *other[kPaths], *units;
  };
  template <int kUnits>
  __device__ inline Records<kUnits> records_at(int l, int step) const {
    const float* const records = p.layers[l].records + unsigned(step) * kStepFloats;
    Records<kUnits> at;
    at.own = records + (first + kUnits * row);
#pragma unroll
    for (int path = 0; path < kPaths; ++path) at.other[path] = records + (second[path] + kUnits * lane);
    at.units = p.layers[l].units + step * 2 * kStepUnits + kUnits * q;
    return at;
  }
  __device__ static inline void advance(Records<4>& at) {
    at.own += kStepFloats;
#pragma unroll
    for (int path = 0; path < kPaths; ++path) at.other[path] += kStepFloats;
    at.units += 2 * kStepUnits;
  }

  /// Residuals of one step of a layer as fragments. deviation(unit, node) is in units of the products.
  template <int kUnits, bool kFirst, class Deviation>
  __device__ inline void make_fragments(const Records<kUnits>& at, const Deviation& deviation,
                                        std::uint32_t (&high)[kTiles][kUnits], std::uint32_t (&low)[kTiles][kUnits]) const {
    constexpr int kArray = kWarp * kUnits;
    float t[kPass] = {};
    if constexpr (kStencil == 0) read(t, p.t + node);
    float scale[kUnits], unscale[kUnits] = {};
    fetch(scale, at.units);
    if constexpr (!kFirst) fetch(unscale, at.units + 4 * kUnits);
#pragma unroll
    for (int path = 0; path < kPaths; ++path) {
      if (kDepth == 2 && path > 0) __syncwarp();  // as after a step, see outputs_at_nodes
      float own[kArrays][kUnits], other[kArrays][kUnits];
#pragma unroll
      for (int array = 0; array < kArrays; ++array) fetch(own[array], at.own + array * kArray);
#pragma unroll
      for (int array = 0; array < kArrays; ++array) fetch(other[array], at.other[path] + array * kArray);
#pragma unroll
      for (int x = 0; x < kUnits; x += 2) {
        float e[2][kPass];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int n = x + b;
          if constexpr (kStencil == 0) {
            float d[kPass];
#pragma unroll
            for (int r = 0; r < kPass; ++r) d[r] = deviation(n, r);
            at_nodes<kFirst>(t, own[kZ][n], own[kA][n], other[kZ][n], other[kA][n], d, unscale[n], scale[n], e[b]);
          } else {
            const float dz = other[kZ][n] - own[kZ][n], da = other[kA][n] - own[kA][n];
#pragma unroll
            for (int end = 0; end < 2; ++end) {
              const int r = 2 * path + end;
              const float z = kFirst ? dz : fma(deviation(n, r), unscale[n], dz);
              e[b][r] = fma(end == 0 ? own[kSlope][n] : other[kSlope][n], z, -da);
            }
            if constexpr (kStencil == 3) {
              const float z = fma(0.5f, dz, own[kZ][n]), chord = fma(0.5f, da, own[kA][n]);
              const float middle = kFirst ? z : fma(deviation(n, 2), unscale[n], z);
              with_kind(p.kind, [&](auto kind) {
                e[b][2] = fma(activate<kind.value, float>(middle, p.alpha, p.beta), scale[n], -chord);
              });
              e[b][3] = 0;
            }
          }
        }
        // With two paths each has one tile; a single path has both tiles.
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (kPaths == 1 || tile == path) to_fragment<kSplit>(e, tile, x, high, low);
        }
      }
    }
  }

  template <bool kFirst>
  __device__ inline void at_nodes(const float (&t)[kPass], float z_i, float a_i, float z_j, float a_j,
                                  const float (&deviation)[kPass], float unscale, float scale, float (&e)[kPass]) const {
    if constexpr (Curve::kSilu) {
      const float step = kDepth == 1 ? spacing : p.spacing;  // with two layers no register is free for the spacing
      silu_residuals<kFirst, kWay>(z_i, a_i, z_j, a_j, t, step, deviation, unscale, scale, e, meets);
    } else {
      static_assert(kFirst);
#pragma unroll
      for (int r = 0; r < kPass; ++r) {
        const float z = on_chord(z_i, z_j, t[r]);
        e[r] = fma(activate<Curve::kKind, float>(z, p.alpha, p.beta), scale, -on_chord(a_i, a_j, t[r]));
      }
    }
  }

  /// y += the fragments of one step times the outputs' weights.
  template <int kUnits>
  __device__ inline void add_to_outputs(int step, int steps, const std::uint32_t (&high)[kTiles][kUnits],
                                        const std::uint32_t (&low)[kTiles][kUnits], float (&y)[kTiles][4][4]) const {
    // size of the weights into a second hidden layer
    constexpr int kInto = kDepth == 2 ? kParts * S::kSteps * S::kSteps * kWarp : 0;
    const uint4* const w = weights + (kInto + step * kWarp);
    const int block = more_outputs ? steps * kWarp : 0, part = steps * kWarp + block;
    uint4 high_of[2], low_of[2];
    const auto load = [&](int c) {
      high_of[c] = low_of[c] = w[c * block];
      if constexpr (kSplit) low_of[c] = w[part + c * block];
    };
    load(0);
    // With two layers no registers are free for an early load. The load comes after the branch, and its products wait for it.
    if (kDepth == 1) load(1);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (c == 1 && !more_outputs) break;
      if (kDepth == 2 && c == 1) load(1);
      const uint4 &w_high = high_of[c], &w_low = low_of[c];
#pragma unroll
      for (int term = kSplit ? 0 : 2; term < 3; ++term) {  // small terms first
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            multiply_tile(y[m][2 * c + n], term == 0 ? low[m] : high[m], term == 1 ? w_low : w_high, n);
          }
        }
      }
    }
  }

  struct Fragments {
    std::uint32_t full[S::kFull > 0 ? S::kFull : 1][kTiles][4], tail[kTiles][2];
  };

  /// One step of the second layer, with kUnits units for each lane: products, their residuals, and the outputs' products with
  /// these.
  template <int kUnits>
  __device__ inline void second_step(int step, const Fragments& high, const Fragments& low, float (&y)[kTiles][4][4]) const {
    float sums[kTiles][kUnits / 2][4] = {};
    constexpr int kPart = S::kSteps * S::kSteps * kWarp;
    const uint4* const w = weights + step * S::kSteps * kWarp;
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      const uint4 w_high = w[s * kWarp];
      uint4 w_low = w_high;
      if constexpr (kSplit) w_low = w[kPart + s * kWarp];
#pragma unroll
      for (int term = kSplit ? 0 : 2; term < 3; ++term) {
        const Fragments& a = term == 0 ? low : high;
        const uint4& b = term == 1 ? w_low : w_high;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int n = 0; n < kUnits / 2; ++n) {
            if (s < S::kFull) {
              multiply_tile(sums[m][n], a.full[s < S::kFull ? s : 0][m], b, n);
            } else {
              multiply_tile(sums[m][n], a.tail[m], b, n);
            }
          }
        }
      }
    }
    std::uint32_t next_high[kTiles][kUnits], next_low[kTiles][kUnits];
    const auto deviation = [&](int n, int r) { return sums[r / 2][n / 2][2 * (r % 2) + n % 2]; };
    make_fragments<kUnits, false>(records_at<kUnits>(1, step), deviation, next_high, next_low);
    add_to_outputs<kUnits>(step, S::kSteps, next_high, next_low, y);
  }

  __device__ static inline void clear(float (&y)[kTiles][4][4]) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) y[m][n][c] = 0;
      }
    }
  }

  /// The outputs' residuals at the nodes of this pass, in units of their products.
  __device__ inline void outputs_at_nodes(float (&y)[kTiles][4][4]) const {
    const auto none = [](int, int) { return 0.0f; };
    if constexpr (kDepth == 1) {
      const Steps steps = p.layers[0].steps;
      clear(y);
      Records<4> at = records_at<4>(0, 0);
#pragma unroll 1
      for (int s = 0; s < steps.full; ++s) {
        std::uint32_t high[kTiles][4], low[kTiles][4];
        make_fragments<4, true>(at, none, high, low);
        add_to_outputs<4>(s, steps.all(), high, low, y);
        advance(at);
      }
      if (steps.tail) {
        std::uint32_t high[kTiles][2], low[kTiles][2];
        make_fragments<2, true>(records_at<2>(0, steps.full), none, high, low);
        add_to_outputs<2>(steps.full, steps.all(), high, low, y);
      }
    } else {
      Fragments high, low;
#pragma unroll
      for (int s = 0; s < S::kFull; ++s) {
        make_fragments<4, true>(records_at<4>(0, s), none, high.full[s], low.full[s]);
        __syncwarp();  // otherwise the compiler loads all steps' records at once, and no registers are left
      }
      if constexpr (S::kTail) make_fragments<2, true>(records_at<2>(0, S::kFull), none, high.tail, low.tail);
      __syncwarp();
      clear(y);
#pragma unroll 1
      for (int step = 0; step < S::kFull; ++step) second_step<4>(step, high, low, y);
      if constexpr (S::kTail) second_step<2>(S::kFull, high, low, y);
    }
  }

  /// Sums over a lane's outputs of one path. moments_of(n) gives the moments of the lane's output n in units of the products;
  /// te_and_bend(n, te, bend) gives the two numbers that ordinary_share needs.
  template <class TeAndBend, class MomentsOf>
  __device__ inline PairSums<false> add_outputs(int i, int j, const TeAndBend& te_and_bend, const MomentsOf& moments_of) const {
    // Outputs that the loop takes at a time, so that the loads of their ends overlap.
    constexpr int kSide = 2;
    // moments in shared memory allow a loop that is not unrolled
    [[maybe_unused]] constexpr int kAtOnce = kStencil > 0 ? 8 / kSide : 1;
    const float4 *const at_i = p.ends + i * kChainedOutputs + q, *const at_j = p.ends + j * kChainedOutputs + q;
    float nonlinear = 0;  // a sum of at most eight outputs
    int constants = 0;
#pragma unroll kAtOnce
    for (int begin = 0; begin < 8; begin += kSide) {
      if (begin == 4 && !more_outputs) break;
      float4 first[kSide], second[kSide];
#pragma unroll
      for (int b = 0; b < kSide; ++b) first[b] = __ldg(at_i + 4 * (begin + b)), second[b] = __ldg(at_j + 4 * (begin + b));
      float chord[kSide];
      bool odd[kSide], any_odd = false;
#pragma unroll
      for (int b = 0; b < kSide; ++b) {
        const int n = begin + b;
        const bool is_output = kStepUnits * (n / 4) + 4 * q + n % 4 < p.outputs;  // the ends of other outputs may hold anything
        chord[b] = (second[b].x - first[b].x) + (second[b].y - first[b].y);
        float te, bend, share;
        te_and_bend(n, te, bend);
        const bool ordinary =
            ordinary_share(te, bend, p.factor[4 * n + q], chord[b], ::fmaxf(absolute(first[b].x), absolute(second[b].x)),
                           first[b].z + second[b].z, p.variance_t, share);
        nonlinear += is_output && ordinary ? share : 0.0f;
        odd[b] = is_output && !ordinary;
        any_odd |= odd[b];
      }
      if (!any_odd) continue;
#pragma unroll
      for (int b = 0; b < kSide; ++b) {
        if (!odd[b]) continue;
        const Moments<float> m = moments_of(begin + b);
        const float factor = p.factor[4 * (begin + b) + q];
        const Moments<float> scaled{m.e * factor, m.te * factor, m.ee * factor * factor};
        const float2 share = share_of_odd(chord[b], scaled, first[b], second[b], p.variance_t);
        nonlinear += share.x;
        constants += share.y > 0 ? 1 : 0;
      }
    }
    return {double(nonlinear), constants};
  }

  /// Adds four outputs' residuals at the nodes of this pass to their moments. kEqual: all these nodes have the weight 1.
  template <bool kEqual>
  __device__ inline void add_pass(const float (&y)[kTiles][4][4], int half) const {
    float e[4], te[4], ee[4], w[kPass] = {}, w_t[kPass];
    float4* const at = moments + half * kWarp;
    read(e, reinterpret_cast<const float*>(at));
    read(te, reinterpret_cast<const float*>(at + 2 * kWarp));
    read(ee, reinterpret_cast<const float*>(at + 4 * kWarp));
    if constexpr (!kEqual) read(w, p.w + node);
    read(w_t, p.w_t + node);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int r = 0; r < kPass; ++r) {
        const float value = y[r / 2][2 * half + n / 2][2 * (r % 2) + n % 2];
        const float weighted = kEqual ? value : value * w[r];
        e[n] += weighted;
        te[n] = fma(w_t[r], value, te[n]);
        ee[n] = fma(weighted, value, ee[n]);
      }
    }
    at[0] = make_float4(e[0], e[1], e[2], e[3]);
    at[2 * kWarp] = make_float4(te[0], te[1], te[2], te[3]);
    at[4 * kWarp] = make_float4(ee[0], ee[1], ee[2], ee[3]);
  }

  /// Sums over a lane's outputs, for each of its paths from sample i to sample j + 8 path. False: the unit has to be measured
  /// in another way.
  __device__ inline bool run(int i, int j, PairSums<false> (&sums)[kPaths]) {
    if constexpr (kStencil == 0) {
#pragma unroll
      for (int n = 0; n < 6; ++n) moments[n * kWarp] = make_float4(0, 0, 0, 0);
#pragma unroll 1
      for (node = 0; node < p.nodes; node += kPass) {
        float y[kTiles][4][4];
        outputs_at_nodes(y);
        if (kWay != Way::careful && node == 0 && __any_sync(kAllLanes, meets && i < j && j < p.samples)) return false;
        const bool equal = kWay == Way::uniform && node + kPass <= p.interior;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half == 1 && !more_outputs) break;
          if (equal) {
            add_pass<true>(y, half);
          } else {
            add_pass<false>(y, half);
          }
        }
      }
      const auto moments_of = [&](int n) {
        const float* const from = reinterpret_cast<const float*>(moments + n / 4 * kWarp) + n % 4;
        constexpr int kNext = 4 * 2 * kWarp;
        return Moments<float>{from[0] * p.weight, from[kNext], from[2 * kNext] * p.weight};
      };
      const auto te_and_bend = [&](int n, float& te, float& bend) {
        const Moments<float> m = moments_of(n);
        te = m.te, bend = bend_of(m, p.variance_t);
      };
      sums[0] = add_outputs(i, smaller(j, p.samples - 1), te_and_bend, moments_of);
    } else {
      float y[kTiles][4][4];
      outputs_at_nodes(y);
#pragma unroll
      for (int path = 0; path < kPaths; ++path) {
        const auto value = [&](int n, int v) {
          const int r = v < 2 ? 2 * path + v : 2;
          return y[r / 2][n / 2][2 * (r % 2) + n % 2];
        };
        const auto moments_of = [&](int n) {
          float values[kStencil];
#pragma unroll
          for (int v = 0; v < kStencil; ++v) values[v] = value(n, v);
          return stencil_moments<kStencil>(p.stencil, values);
        };
        const auto te_and_bend = [&](int n, float& te, float& bend) {
          te = bend = 0;
#pragma unroll
          for (int v = 0; v < kStencil; ++v) {
            float sum = p.bend[v][v] * value(n, v);
#pragma unroll
            for (int u = 0; u < v; ++u) sum = fma(p.bend[v][u], value(n, u), sum);
            te = fma(p.stencil.te[v], value(n, v), te);
            bend = fma(sum, value(n, v), bend);
          }
        };
        sums[path] = add_outputs(i, smaller(j + kGroup * path, p.samples - 1), te_and_bend, moments_of);
      }
    }
    return true;
  }
};

}  // namespace chained
}  // namespace
}  // namespace lmn
