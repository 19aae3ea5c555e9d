// Chains whose residuals never leave the registers: one hidden layer of any width that fits, or two of at most 128 units; at
// most 32 outputs without an activation. float32.
//
// A warp takes one first sample and 8 second samples at a time, four nodes in one pass: two tiles of the matrix instruction.
// The first layer's residuals are evaluated straight into fragments; a second layer's products are taken 16 units at a time, so
// that their residuals become the fragments of the outputs' products at once. Weights are in shared memory; there is no block
// barrier once they are there.
// For hermite the nodes are the path's slopes at its two ends (kStencil 2: two groups of second samples side by side), and its
// midpoint (3).
#pragma once
#include "halves.cuh"

namespace lmn {
namespace {
namespace chained {

constexpr int kMostNodes = 64;       // interior nodes that fit the kernel's parameters
constexpr int kTiles = 2;            // of the matrix instruction in one pass
constexpr int kPass = 2 * kTiles;    // nodes
constexpr int kChainedOutputs = kEndOutputs;

// SiLU with |z| below this: a product of two terms 1 + exp(-z) is far from overflow, and exponentials at equally spaced nodes
// may be had by multiplication. Of a deeper layer, whose z may exceed that of its samples, exponents are cut off there: a SiLU
// is then wrong by |z| 2^-62, which kTinyUnit keeps below a float's rounding.
constexpr float kPairedLimit = 43, kPairedExponent = 62;

__device__ inline int smaller(int a, int b) { return a < b ? a : b; }

/// A node rule as parameters, and the layers. By value.
struct Chained {
  HalfLayer layers[3];             // hidden, and the last are the outputs
  ActivationKind kind;             // of the hidden layers, where the kernel is for any
  float alpha, beta;
  // What only fills up the last pass has weight 0: the last node once more, of uniform nodes the path's end.
  alignas(16) float t[kMostNodes];
  alignas(16) float w[kMostNodes];    // weights over `weight`
  alignas(16) float w_t[kMostNodes];  // weights times t - mean t
  int nodes, interior;             // a multiple of kPass, and how many of these count
  bool uniform;                    // nodes are equally spaced, and their weights are all `weight`
  float spacing, weight;
  float variance_t;
  Stencil<float> stencil;
  float bend[3][3];                // of the stencil: variance_t var(e) - te^2 is the sum of bend[v][u] value_v value_u, u <= v
  int samples, units, outputs;     // units: of work; in the block's copy where its own end
  const float4* ends;              // see write_end
  const float* scale;              // of the outputs
  float factor[kChainedOutputs];   // in the block's copy: from sums of products to scaled outputs, in the order of `ends`
  const float* z;                  // of the first layer, [samples, stride]
  std::int64_t stride, width;
  const RangeFlags* range;
  float* connectivity;
  std::int64_t* counts;
  std::int64_t apart;              // as Problem has it; the block's copy is of its own network
};

/// The activation of all hidden layers; kCount: any.
template <ActivationKind kKind_>
struct Curve {
  static constexpr ActivationKind kKind = kKind_;
  static constexpr bool kSilu = kKind == ActivationKind::kSilu;
};

/// How a unit of work is measured. careful: any z, and no residual where two samples agree in a hidden unit, where the
/// exponential's rounding would leave one; the others notice such samples, and leave them to it. uniform: nodes are equally
/// spaced and have one weight. A template's parameter, as a branch in an unrolled loop becomes instructions that are issued for
/// nothing.
enum class Way { careful, fast, uniform };

/// SiLU's residuals of one unit along one path, times the unit's scale. z and a are in units of -log2(e), so that ex2(z) is
/// exp(-z); inverse: 1 / scale, which goes into the reciprocal for nothing.
template <bool kFirst, Way kWay>
__device__ inline void silu_residuals(float z_i, float a_i, float z_j, float a_j, const float (&t)[kPass], float spacing,
                                      const float (&deviation)[kPass], float unscale, float inverse, float (&e)[kPass],
                                      bool& meets) {
  const float dz = z_j - z_i, da = a_j - a_i;
  if constexpr (kWay != Way::careful) meets |= dz == 0;
  float z[kPass], chord[kPass], power[kPass];
#pragma unroll
  for (int r = 0; r < kPass; ++r) {
    z[r] = fma(t[r], dz, z_i);
    if constexpr (!kFirst) z[r] = fma(deviation[r], unscale, z[r]);
    chord[r] = fma(t[r], da, a_i);
  }
  if constexpr (kFirst && kWay == Way::uniform) {
    const float ratio = exp2_fast(spacing * dz), squared = ratio * ratio;
    power[0] = exp2_fast(z[0]);
    power[1] = power[0] * ratio;
    power[2] = power[0] * squared;
    power[3] = power[1] * squared;
  } else {
#pragma unroll
    for (int r = 0; r < kPass; ++r) {
      power[r] = exp2_fast(kFirst || kWay == Way::careful ? z[r] : ::fminf(z[r], kPairedExponent));
    }
  }
  if constexpr (kWay == Way::careful) {
#pragma unroll
    for (int r = 0; r < kPass; ++r) {
      const float residual = fma(z[r], reciprocal(fma(power[r], inverse, inverse)), -chord[r]);
      const bool same = dz == 0 && (kFirst || deviation[r] == 0);
      e[r] = same ? 0.0f : residual;
    }
  } else {
#pragma unroll
    for (int r = 0; r < kPass; r += 2) {  // one reciprocal for two nodes
      const float second = fma(power[r + 1], inverse, inverse);
      const float both = reciprocal(fma(power[r], second, second));
      e[r] = fma(fma(z[r], power[r + 1], z[r]), both, -chord[r]);
      e[r + 1] = fma(fma(z[r + 1], power[r], z[r + 1]), both, -chord[r + 1]);
    }
  }
}

/// Residuals of two neighbouring units at a tile's two nodes as two registers of its fragment.
template <bool kSplit, int kUnits>
__device__ inline void to_fragment(const float (&e)[2][kPass], int tile, int first, std::uint32_t (&high)[kTiles][kUnits],
                                   std::uint32_t (&low)[kTiles][kUnits]) {
#pragma unroll
  for (int r = 2 * tile; r < 2 * tile + 2; ++r) {
    if constexpr (kSplit) {
      const float left = upper_half(e[0][r]), right = upper_half(e[1][r]);
      high[r / 2][first + r % 2] = to_halves(left, right);
      low[r / 2][first + r % 2] = to_halves(e[0][r] - left, e[1][r] - right);
    } else {
      high[r / 2][first + r % 2] = to_halves(e[0][r], e[1][r]);
    }
  }
}

/// sums[n] += fragment times two tiles of weights.
__device__ inline void multiply_tile(float (&sums)[4], const std::uint32_t (&a)[4], const uint4& w, int tile) {
  multiply_add_halves(sums, a, tile ? w.z : w.x, tile ? w.w : w.y);
}
__device__ inline void multiply_tile(float (&sums)[4], const std::uint32_t (&a)[2], const uint4& w, int tile) {
  multiply_add_halves(sums, a, tile ? w.z : w.x);
}

template <int kCount>
__device__ inline void read(float (&values)[kCount], const float* from) {
  if constexpr (kCount == 4) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
  } else {
    const float2 v = *reinterpret_cast<const float2*>(from);
    values[0] = v.x, values[1] = v.y;
  }
}
/// The same from the device's memory, which nothing writes meanwhile: pointers that come from shared memory do not say so.
template <int kCount>
__device__ inline void fetch(float (&values)[kCount], const float* from) {
  if constexpr (kCount == 4) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(from));
    values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
  } else {
    const float2 v = __ldg(reinterpret_cast<const float2*>(from));
    values[0] = v.x, values[1] = v.y;
  }
}

/// 1 - r2 of an output that ordinary_share does not know, a NaN where it is unresolved; and 1 where it is constant. Not inline,
/// as there are few.
__device__ __noinline__ float2 share_of_odd(float chord, Moments<float> m, float4 first, float4 second, float variance_t) {
  const Share<float> share =
      share_of_output<float, float>(chord, m, larger(absolute(first.x), absolute(second.x)), 0.0f, first.z + second.z,
                                    variance_t, Epsilon<float>::value);
  const bool hides = share.constant > 0 && first.w + second.w > 0;
  return make_float2(hides || share.unresolved > 0 ? NAN : share.nonlinear, share.constant);
}

/// kBlocks: blocks of 8 units of each of two hidden layers; 0: one hidden layer, of any number.
template <class Curve, int kBlocks, int kStencil, bool kSplit>
struct Shape {
  static constexpr int kDepth = kBlocks > 0 ? 2 : 1, kFull = kBlocks / 2, kTail = kBlocks % 2, kSteps = kFull + kTail;
  static constexpr int kArrays = kStencil > 0 ? 3 : 2, kParts = kSplit ? 2 : 1;
  static constexpr int kPaths = kStencil == 2 ? kTiles : 1;  // of a lane
  // As many as their registers leave room for, without one that is spilled.
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
  const uint4* weights;         // shared, this lane's: into the second hidden layer, and into the outputs
  int lane, q;
  float4* moments;              // shared, [e, te, ee][2][lanes], this lane's: four outputs each; touched once in a pass
  unsigned first, second[kPaths];  // where the groups' records begin, in floats; in all hidden layers alike
  int row;                         // 4 times the first sample's place in its group, and q
  int node;                        // the first of this pass
  float spacing;                   // of the nodes
  mutable bool meets = false;      // whether the lane's two samples agree in some hidden unit; not in the careful way
  bool more_outputs;               // than kStepUnits

  /// Where a lane's records of one layer begin: the first sample's, the second samples', and the units' scales.
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

  /// Residuals of one step of a layer as fragments; deviation(unit, node) in units of the products.
  template <int kUnits, bool kFirst, class Deviation>
  __device__ inline void make_fragments(const Records<kUnits>& at, const Deviation& deviation,
                                        std::uint32_t (&high)[kTiles][kUnits],
                                        std::uint32_t (&low)[kTiles][kUnits]) const {
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
        // Two paths have a tile each, one path has both.
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
      const float step = kDepth == 1 ? spacing : p.spacing;  // with two layers there is no register left for it
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
    constexpr int kInto = kDepth == 2 ? kParts * S::kSteps * S::kSteps * kWarp : 0;  // a second hidden layer
    const uint4* const w = weights + (kInto + step * kWarp);
    const int block = more_outputs ? steps * kWarp : 0, part = steps * kWarp + block;
    uint4 high_of[2], low_of[2];
    const auto load = [&](int c) {
      high_of[c] = low_of[c] = w[c * block];
      if constexpr (kSplit) low_of[c] = w[part + c * block];
    };
    load(0);
    if (kDepth == 1) load(1);  // else there are no registers left; behind the branch its products wait for it
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

  /// One step of the second layer, of kUnits units a lane: products, residuals, and from these the outputs' products.
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

  /// The outputs' residuals in units of their products, at the nodes t.
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
        __syncwarp();  // else the compiler asks for all steps' records at once, and has no registers left
      }
      if constexpr (S::kTail) make_fragments<2, true>(records_at<2>(0, S::kFull), none, high.tail, low.tail);
      __syncwarp();
      clear(y);
#pragma unroll 1
      for (int step = 0; step < S::kFull; ++step) second_step<4>(step, high, low, y);
      if constexpr (S::kTail) second_step<2>(S::kFull, high, low, y);
    }
  }

  /// Sums over a lane's outputs of one path. In units of the products, of an output of the lane: moments_of(n); and
  /// te_and_bend(n, te, bend), what ordinary_share wants of them.
  template <class TeAndBend, class MomentsOf>
  __device__ inline PairSums add_outputs(int i, int j, const TeAndBend& te_and_bend, const MomentsOf& moments_of) const {
    // Outputs side by side, so that they do not wait for their ends one after the other.
    constexpr int kSide = 2;
    [[maybe_unused]] constexpr int kAtOnce = kStencil > 0 ? 8 / kSide : 1;  // moments in shared memory may be counted through
    const float4 *const at_i = p.ends + i * kChainedOutputs + q, *const at_j = p.ends + j * kChainedOutputs + q;
    float nonlinear = 0;  // of eight outputs at most
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
        const bool is_output = kStepUnits * (n / 4) + 4 * q + n % 4 < p.outputs;  // else its ends may be anything
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

  /// Adds four outputs' residuals at the nodes of this pass to their moments. kEqual: all have the weight 1.
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

  /// Sums over a lane's outputs, for each of its paths from sample i to j + 8 path. False: another way has to be taken.
  __device__ inline bool run(int i, int j, PairSums (&sums)[kPaths]) {
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

/// The block's copy of the kernel's parameters, at the beginning of its shared memory; behind it the weights.
__device__ inline Chained& shared_parameters() { return *reinterpret_cast<Chained*>(dynamic_shared()); }
constexpr std::size_t kParameterBytes = (sizeof(Chained) + 15) / 16 * 16;

/// Makes the block's copy one of its network. A thread.
__device__ inline void move_to_network(const Chained& p, int depth) {
  Chained& own = shared_parameters();
  for (int l = 0; l <= depth; ++l) {
    HalfLayer& layer = own.layers[l];
    layer.records = in_network_if(layer.records, p.apart), layer.units = in_network_if(layer.units, p.apart);
    layer.weights = in_network_if(layer.weights, p.apart);
  }
  own.ends = in_network(p.ends, p.apart), own.scale = in_network(p.scale, p.apart);
  own.z = in_network(p.z, p.apart), own.range = in_network(p.range, p.apart);
  own.connectivity = in_network(p.connectivity, std::int64_t(p.samples) * p.samples * std::int64_t(sizeof(float)));
  own.counts = in_network(p.counts, 2 * std::int64_t(sizeof(std::int64_t)));
}

/// False: nothing was stored, another way has to be taken.
template <class Curve, int kBlocks, int kStencil, bool kSplit, Way kWay>
__device__ inline bool chained_unit(int i, int block) {
  using S = Shape<Curve, kBlocks, kStencil, kSplit>;
  using W = ChainedWarp<Curve, kBlocks, kStencil, kSplit, kWay>;
  const Chained& p = shared_parameters();
  const uint4* memory = reinterpret_cast<const uint4*>(dynamic_shared() + kParameterBytes);
  W warp(p);
  warp.lane = int(threadIdx.x) % kWarp;
  warp.q = warp.lane % 4;
  warp.row = 4 * int(i % kGroup) + warp.q;
  const int last_group = (p.samples - 1) / kGroup;
  const unsigned floats = unsigned(p.layers[0].group_floats());
  warp.first = unsigned(i / kGroup) * floats;
#pragma unroll
  for (int path = 0; path < S::kPaths; ++path) {
    warp.second[path] = unsigned(smaller(block * S::kPaths + path, last_group)) * floats;
  }
  warp.more_outputs = p.outputs > kStepUnits;
  warp.spacing = p.spacing;
  warp.weights = memory + warp.lane;
  // Two of a step's fragments are one uint4.
  for (int l = 0; l < S::kDepth; ++l) memory += S::kParts * p.layers[l + 1].part_fragments(p.layers[l].steps) / 2;
  warp.moments = const_cast<float4*>(reinterpret_cast<const float4*>(memory)) + warp.lane;
  warp.moments += threadIdx.x / kWarp * (S::kMoments * kWarp);
  PairSums sums[S::kPaths];
  const int j = block * S::kPaths * kGroup + warp.lane / 4;
  if (!warp.run(i, j, sums)) return false;
#pragma unroll
  for (int path = 0; path < S::kPaths; ++path) {
    PairSums total;
    total.nonlinear = warp_sum(sums[path].nonlinear, 4);
    total.constants = warp_sum(sums[path].constants, 4);
    const int second = j + kGroup * path;
    if (warp.q == 0 && i < second && second < p.samples) {
      store_entry(p.connectivity, p.counts, total, p.z, p.stride, p.width, p.samples, p.outputs, i, second);
    }
  }
  return true;
}

/// Not inline: with more than one way in the kernel the compiler keeps addresses of one alive through the other, and runs
/// out of registers. A function's parameters would be in memory, so it reads the block's copy of the kernel's.
template <class Curve, int kBlocks, int kStencil, bool kSplit, Way kWay>
__device__ __noinline__ bool one_unit(int i, int block) {
  return chained_unit<Curve, kBlocks, kStencil, kSplit, kWay>(i, block);
}

template <class Curve, int kBlocks, int kStencil, bool kSplit>
__global__ void __launch_bounds__(Shape<Curve, kBlocks, kStencil, kSplit>::kMostWarps * kWarp, 1)
    chained_kernel(const __grid_constant__ Chained p) {
  using S = Shape<Curve, kBlocks, kStencil, kSplit>;
  for (unsigned n = threadIdx.x; n < sizeof(Chained) / sizeof(unsigned); n += blockDim.x) {
    reinterpret_cast<unsigned*>(&shared_parameters())[n] = reinterpret_cast<const unsigned*>(&p)[n];
  }
  {
    uint4* to = reinterpret_cast<uint4*>(dynamic_shared() + kParameterBytes);
    for (int l = 0; l < S::kDepth; ++l) {
      const uint4* const from = in_network(reinterpret_cast<const uint4*>(p.layers[l + 1].weights), p.apart);
      const std::int64_t count = S::kParts * p.layers[l + 1].part_fragments(p.layers[l].steps) / 2;
      for (std::int64_t n = threadIdx.x; n < count; n += blockDim.x) to[n] = from[n];
      to += count;
    }
  }
  __syncthreads();
  // A block's units side by side, so that nearly all of them have the same second samples, which then stay in its cache.
  if (threadIdx.x == 0) {
    shared_parameters().units = int(std::int64_t(blockIdx.x + 1) * p.units / gridDim.x);
    move_to_network(p, S::kDepth);
  }
  if (threadIdx.x < kChainedOutputs) {
    const int n = int(threadIdx.x) / 4, k = kStepUnits * (n / 4) + 4 * (int(threadIdx.x) % 4) + n % 4;
    const float* const units = in_network(p.layers[S::kDepth].units, p.apart) + n / 4 * 2 * kStepUnits + kStepUnits;
    shared_parameters().factor[threadIdx.x] = k < p.outputs ? in_network(p.scale, p.apart)[k] * units[k % kStepUnits] : 0.0f;
  }
  __syncthreads();
  [[maybe_unused]] bool careful = true;
  if constexpr (Curve::kSilu && kStencil == 0) {
    const RangeFlags& range = *in_network(p.range, p.apart);
    careful = !(__uint_as_float(unsigned(range.largest_z)) < kPairedLimit) || range.careful != 0;
  }
  const int warps = int(blockDim.x) / kWarp;
  const int begin = int(std::int64_t(blockIdx.x) * p.units / gridDim.x);
  for (int n = begin + int(threadIdx.x) / kWarp; n < shared_parameters().units; n += warps) {
    __syncwarp();  // the lanes that have stored an entry are back
    int i, block;
    find_unit(n, S::kPaths * kGroup, i, block);
    if constexpr (Curve::kSilu && kStencil == 0) {
      bool done = false;
      if (!careful) {
        done = p.uniform ? one_unit<Curve, kBlocks, kStencil, kSplit, Way::uniform>(i, block)
                         : one_unit<Curve, kBlocks, kStencil, kSplit, Way::fast>(i, block);
      }
      if (done) continue;
    }
    one_unit<Curve, kBlocks, kStencil, kSplit, Way::careful>(i, block);
  }
}

// ---- the choice ----

/// A kernel for a chain, and what it wants; null: none of these.
struct Kernel {
  void (*run)(Chained) = nullptr;
  int warps = 0, paths = 0;  // at most so many warps; of a lane
  std::size_t warp_bytes = 0;
  Dialect dialect{};
};

template <class Curve, int kBlocks, int kStencil>
Kernel kernel_of(bool halves_alone) {
  using Alone = Shape<Curve, kBlocks, kStencil, false>;
  using Split = Shape<Curve, kBlocks, kStencil, true>;
  const Dialect dialect{true, kBlocks, Curve::kSilu && kStencil == 0, kStencil > 0, true};
  if (halves_alone) {
    return {chained_kernel<Curve, kBlocks, kStencil, false>, Alone::kMostWarps, Alone::kPaths, Alone::kWarpBytes, dialect};
  }
  return {chained_kernel<Curve, kBlocks, kStencil, true>, Split::kMostWarps, Split::kPaths, Split::kWarpBytes, dialect};
}

/// The kernel for two hidden layers.
template <class Curve, int kStencil>
Kernel kernel_for(const PathConnectivity<float>& op) {
  const std::int64_t widest = op.widths[0] > op.widths[1] ? op.widths[0] : op.widths[1];
  if (widest <= 64) return kernel_of<Curve, 8, kStencil>(op.halves_alone);
  if (widest <= 104) return kernel_of<Curve, 13, kStencil>(op.halves_alone);
  if constexpr (kStencil == 0) {  // else too few registers
    if (widest <= 128) return kernel_of<Curve, 16, kStencil>(op.halves_alone);
  }
  return {};
}

/// Bytes of parameters and weights in shared memory.
inline std::size_t common_bytes(const PathConnectivity<float>& op, const Kernel& kernel) {
  std::int64_t fragments = 0;
  for (int l = 1; l <= op.layers; ++l) {
    fragments += std::int64_t(half_steps(op, kernel.dialect, l).all()) * half_steps(op, kernel.dialect, l - 1).all() * kWarp;
  }
  return std::size_t(fragments) * (op.halves_alone ? 1 : 2) * sizeof(uint4) + kParameterBytes;
}

/// The kernel with as many warps as shared memory has room for, in fours, one for each scheduler; none where it has no room for
/// half of them.
inline Kernel if_it_fits(const PathConnectivity<float>& op, Kernel kernel) {
  const int most = kernel.warps;
  const auto fits = [&] { return common_bytes(op, kernel) + std::size_t(kernel.warps) * kernel.warp_bytes <= shared_limit(); };
  while (kernel.run && 2 * kernel.warps > most && !fits()) kernel.warps -= 4;
  return kernel.run && 2 * kernel.warps >= most && fits() ? kernel : Kernel{};
}

inline std::size_t workspace(const PathConnectivity<float>& op, const Kernel& kernel) {
  Arena arena{nullptr};
  return half_workspace(op, make_half_plan(op, kernel.dialect, arena), arena);
}

constexpr std::int64_t kChainedSamples = 1 << 16;  // of which there are fewer than 2^31 units of work

/// Whether one of these kernels takes all of a problem but for its activations, widths and shared memory.
inline bool takes(const PathConnectivity<float>& op) {
  return op.layers >= 1 && op.layers <= 2 && !op.skips && op.activations[op.layers].kind == ActivationKind::kIdentity &&
         op.widths[op.layers] <= kChainedOutputs && op.nodes.interior <= kMostNodes && op.samples <= kChainedSamples &&
         op.samples * padded(op.widths[0]) < std::int64_t(1) << 30;
}

/// apart: bytes between the workspaces of two networks.
inline const char* enqueue(const PathConnectivity<float>& op, const Kernel& kernel, const Stencil<float>& stencil,
                           std::size_t apart, CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.workspace), std::int64_t(apart)};
  HalfPlan plan = make_half_plan(op, kernel.dialect, arena);
  Chained chained{};
  const char* error = enqueue_half_samples(op, plan, arena, stream, [&](int l, const Layer<float>& layer) {
    chained.layers[l] = layer.half;
    if (l > 0) return;
    chained.z = layer.z, chained.stride = layer.stride, chained.width = layer.width;
    chained.kind = layer.kind, chained.alpha = layer.kind == ActivationKind::kRelu ? 0.0f : layer.alpha;
    chained.beta = layer.beta;
  });
  if (error) return error;
  const Problem<float>& problem = plan.problem;
  const double spacing = spacing_of(op.nodes);
  chained.spacing = float(spacing);
  // Exponentials at equally spaced nodes come from multiplication, also for the node that fills up a pass. That node may not lie
  // beyond the path's end: no sample bounds the exponential there.
  chained.uniform = spacing > 0 && (op.nodes.interior % kPass == 0 || op.nodes.interior % kPass == kPass - 1);
  for (int m = 0; m < op.nodes.interior; ++m) chained.uniform &= op.nodes.weights[m] == op.nodes.weights[0];
  chained.weight = chained.uniform ? float(op.nodes.weights[0]) : 1.0f;
  chained.nodes = int(blocks_of(op.nodes.interior, kPass)) * kPass;
  chained.interior = op.nodes.interior;
  for (int m = 0; m < chained.nodes; ++m) {
    const bool inside = m < op.nodes.interior;
    const double last = chained.uniform ? 1.0 : op.nodes.t[op.nodes.interior - 1];
    const double t = inside ? op.nodes.t[m] : last, weight = inside ? op.nodes.weights[m] : 0.0;
    chained.t[m] = float(t);
    chained.w[m] = chained.uniform ? float(inside) : float(weight);
    chained.w_t[m] = float(weight * (t - op.nodes.mean_t));
  }
  chained.variance_t = float(op.nodes.variance_t);
  chained.stencil = stencil;
  const Stencil<double> exact = make_stencil<double>(op.nodes, stencil.size == 3);
  for (int v = 0; v < 3; ++v) {
    for (int u = 0; u <= v; ++u) {
      const double bend = op.nodes.variance_t * (exact.ee[v][u] - exact.e[v] * exact.e[u]) - exact.te[v] * exact.te[u];
      chained.bend[v][u] = float(u < v ? 2 * bend : bend);
    }
  }
  chained.samples = int(problem.samples);
  chained.units = int(count_units(problem.samples, kernel.paths * kGroup));
  chained.outputs = int(problem.outputs);
  chained.ends = problem.ends, chained.scale = problem.scale;
  chained.range = problem.range;
  chained.connectivity = problem.connectivity, chained.counts = problem.counts;
  chained.apart = problem.apart;
  const std::int64_t blocks =
      at_most(blocks_of(chained.units, kernel.warps), device_attribute(cudaDevAttrMultiProcessorCount));
  const std::size_t shared = common_bytes(op, kernel) + std::size_t(kernel.warps) * kernel.warp_bytes;
  return launch(kernel.run, Grid(blocks, op.networks), kernel.warps * kWarp, shared, stream, chained);
}

}  // namespace chained
}  // namespace
}  // namespace lmn
