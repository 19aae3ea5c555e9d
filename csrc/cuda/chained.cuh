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
constexpr int kChainedOutputs = 32;

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
  alignas(16) float t[kMostNodes];
  float w[kMostNodes], w_t[kMostNodes];
  int nodes, interior;             // a multiple of kPass, and how many of these count
  float spacing;                   // of the nodes; 0: they are not equally spaced
  float variance_t;
  Stencil<float> stencil;
  int samples, units, outputs;
  const float *y, *y_low, *rounding, *scale;
  const float* z;                  // of the first layer, [samples, stride]
  std::int64_t stride, width;
  const RangeFlags* range;
  float* connectivity;
  std::int64_t* counts;
};

/// The activation of all hidden layers; kCount: any.
template <ActivationKind kKind_>
struct Curve {
  static constexpr ActivationKind kKind = kKind_;
  static constexpr bool kSilu = kKind == ActivationKind::kSilu;
};

/// SiLU's residuals of one unit along one path, times the unit's scale. z and a are in units of -log2(e), so that ex2(z) is
/// exp(-z); inverse: 1 / scale, which goes into the reciprocal for nothing.
/// kCareful: any z; and no residual where the ends agree, where the exponential's rounding would leave one.
template <bool kFirst, bool kCareful>
__device__ inline void silu_residuals(float z_i, float a_i, float z_j, float a_j, const float (&t)[kPass], float spacing,
                                      const float (&deviation)[kPass], float unscale, float inverse, float (&e)[kPass]) {
  const float dz = z_j - z_i, da = a_j - a_i;
  float z[kPass], chord[kPass], power[kPass];
#pragma unroll
  for (int r = 0; r < kPass; ++r) {
    z[r] = fma(t[r], dz, z_i);
    if constexpr (!kFirst) z[r] = fma(deviation[r], unscale, z[r]);
    chord[r] = fma(t[r], da, a_i);
  }
  if (kFirst && !kCareful && spacing != 0) {
    const float ratio = exp2_fast(spacing * dz), squared = ratio * ratio;
    power[0] = exp2_fast(z[0]);
    power[1] = power[0] * ratio;
    power[2] = power[0] * squared;
    power[3] = power[1] * squared;
  } else {
#pragma unroll
    for (int r = 0; r < kPass; ++r) {
      power[r] = exp2_fast(kFirst || kCareful ? z[r] : ::fminf(z[r], kPairedExponent));
    }
  }
  if constexpr (kCareful) {
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

/// kBlocks: blocks of 8 units of each of two hidden layers; 0: one hidden layer, of any number.
template <class Curve, int kBlocks, int kStencil, bool kSplit>
struct Shape {
  static constexpr int kDepth = kBlocks > 0 ? 2 : 1, kFull = kBlocks / 2, kTail = kBlocks % 2, kSteps = kFull + kTail;
  static constexpr int kArrays = kStencil > 0 ? 3 : 2, kParts = kSplit ? 2 : 1;
  static constexpr int kPaths = kStencil == 2 ? kTiles : 1;  // of a lane
  // As many as their registers leave room for, without one that is spilled.
  static constexpr int kWarpsOf = kDepth == 1 ? (kStencil > 0 ? 16 : 12) : kSplit || kBlocks > 13 || kStencil > 0 ? 8 : 12;
  static constexpr int kThreadsOf = kWarpsOf * kWarp;
  static constexpr std::size_t kMomentBytes = kStencil > 0 ? 0 : 8 * 3 * kThreadsOf * sizeof(float);
};

template <class Curve, int kBlocks, int kStencil, bool kSplit, bool kCareful>
struct ChainedWarp {
  using S = Shape<Curve, kBlocks, kStencil, kSplit>;
  static constexpr int kParts = S::kParts, kPaths = S::kPaths, kArrays = S::kArrays, kDepth = S::kDepth;

  __device__ explicit ChainedWarp(const Chained& parameters) : p(parameters) {}

  const Chained& p;
  const uint4* weights;         // shared: into the second hidden layer, and into the outputs
  int lane, q;
  float* moments;               // shared, [8 outputs][3][threads], this thread's: they are touched once in a pass
  unsigned first, second[kPaths];  // where the groups' records begin, in floats; in all hidden layers alike
  int row;                         // 4 times the first sample's place in its group, and q
  int node;                        // the first of this pass

  /// Residuals of one step of a layer as fragments; deviation(unit, node) in units of the products.
  template <int kUnits, bool kFirst, class Deviation>
  __device__ inline void make_fragments(int l, int step, const Deviation& deviation, std::uint32_t (&high)[kTiles][kUnits],
                                        std::uint32_t (&low)[kTiles][kUnits]) const {
    constexpr unsigned kArray = kWarp * kUnits;
    float t[kPass] = {};
    if constexpr (kStencil == 0) read(t, p.t + node);
    const float* const records = p.layers[l].records + unsigned(step) * (kArrays * kStepUnits * kGroup);
    const float* const units = p.layers[l].units + step * 2 * kStepUnits + kUnits * q;
#pragma unroll
    for (int path = 0; path < kPaths; ++path) {
      if (path > 0) __syncwarp();  // as after a step, see outputs_at_nodes
      float own[kArrays][kUnits], other[kArrays][kUnits];
#pragma unroll
      for (int array = 0; array < kArrays; ++array) read(own[array], records + (first + array * kArray + kUnits * row));
#pragma unroll
      for (int array = 0; array < kArrays; ++array) {
        read(other[array], records + (second[path] + array * kArray + kUnits * lane));
      }
#pragma unroll
      for (int x = 0; x < kUnits; x += 2) {
        float e[2][kPass], scale[2], unscale[2] = {};
        read(scale, units + x);
        if constexpr (!kFirst) read(unscale, units + (4 * kUnits + x));
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int n = x + b;
          if constexpr (kStencil == 0) {
            float d[kPass];
#pragma unroll
            for (int r = 0; r < kPass; ++r) d[r] = deviation(n, r);
            at_nodes<kFirst>(t, own[kZ][n], own[kA][n], other[kZ][n], other[kA][n], d, unscale[b], scale[b], e[b]);
          } else {
            const float dz = other[kZ][n] - own[kZ][n], da = other[kA][n] - own[kA][n];
#pragma unroll
            for (int end = 0; end < 2; ++end) {
              const int r = 2 * path + end;
              const float z = kFirst ? dz : fma(deviation(n, r), unscale[b], dz);
              e[b][r] = fma(end == 0 ? own[kSlope][n] : other[kSlope][n], z, -da);
            }
            if constexpr (kStencil == 3) {
              const float z = fma(0.5f, dz, own[kZ][n]), chord = fma(0.5f, da, own[kA][n]);
              const float middle = kFirst ? z : fma(deviation(n, 2), unscale[b], z);
              with_kind(p.kind, [&](auto kind) {
                e[b][2] = fma(activate<kind.value, float>(middle, p.alpha, p.beta), scale[b], -chord);
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

  __device__ inline bool more_outputs() const { return p.outputs > kStepUnits; }
  __device__ inline Moments<float> load(int n) const {
    const float* const from = moments + n * 3 * S::kThreadsOf;
    return {from[0], from[S::kThreadsOf], from[2 * S::kThreadsOf]};
  }
  __device__ inline void store(int n, const Moments<float>& sums) const {
    float* const to = moments + n * 3 * S::kThreadsOf;
    to[0] = sums.e, to[S::kThreadsOf] = sums.te, to[2 * S::kThreadsOf] = sums.ee;
  }

  template <bool kFirst>
  __device__ inline void at_nodes(const float (&t)[kPass], float z_i, float a_i, float z_j, float a_j,
                                  const float (&deviation)[kPass], float unscale, float scale, float (&e)[kPass]) const {
    if constexpr (Curve::kSilu) {
      silu_residuals<kFirst, kCareful>(z_i, a_i, z_j, a_j, t, p.spacing, deviation, unscale, scale, e);
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
    const uint4* const w = weights + (kInto + step * kWarp + lane);
    const int part = p.layers[kDepth].steps.all() * steps * kWarp;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (c == 1 && !more_outputs()) break;
      const uint4 w_high = w[c * steps * kWarp];
      uint4 w_low = w_high;
      if constexpr (kSplit) w_low = w[part + c * steps * kWarp];
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
    const uint4* const w = weights + step * S::kSteps * kWarp + lane;
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
    make_fragments<kUnits, false>(1, step, deviation, next_high, next_low);
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
#pragma unroll 1
      for (int s = 0; s < steps.full; ++s) {
        std::uint32_t high[kTiles][4], low[kTiles][4];
        make_fragments<4, true>(0, s, none, high, low);
        add_to_outputs<4>(s, steps.all(), high, low, y);
      }
      if (steps.tail) {
        std::uint32_t high[kTiles][2], low[kTiles][2];
        make_fragments<2, true>(0, steps.full, none, high, low);
        add_to_outputs<2>(steps.full, steps.all(), high, low, y);
      }
    } else {
      Fragments high, low;
#pragma unroll
      for (int s = 0; s < S::kFull; ++s) {
        make_fragments<4, true>(0, s, none, high.full[s], low.full[s]);
        __syncwarp();  // else the compiler asks for all steps' records at once, and has no registers left
      }
      if constexpr (S::kTail) make_fragments<2, true>(0, S::kFull, none, high.tail, low.tail);
      __syncwarp();
      clear(y);
#pragma unroll 1
      for (int step = 0; step < S::kFull; ++step) second_step<4>(step, high, low, y);
      if constexpr (S::kTail) second_step<2>(S::kFull, high, low, y);
    }
  }

  /// Sums over a lane's outputs of one path; moments_of(output of the lane, factor of the products).
  template <class MomentsOf>
  __device__ inline PairSums add_outputs(int i, int j, const MomentsOf& moments_of) const {
    [[maybe_unused]] constexpr int kAtOnce = kStencil > 0 ? 8 : 1;  // moments in shared memory may be counted through
    PairSums sums;
#pragma unroll kAtOnce
    for (int n = 0; n < 8; ++n) {
      const int k = kStepUnits * (n / 4) + 4 * q + n % 4;
      if (k >= p.outputs) continue;
      const float factor = p.scale[k] * p.layers[kDepth].units[n / 4 * 2 * kStepUnits + kStepUnits + k % kStepUnits];
      add_output(sums, p.y, p.y_low, p.rounding, p.outputs, i, j, k, moments_of(n, factor), p.scale[k], 0.0f, p.variance_t);
    }
    return sums;
  }

  /// Sums over a lane's outputs, for each of its paths from sample i to j + 8 path.
  __device__ inline void run(int i, int j, PairSums (&sums)[kPaths]) {
    if constexpr (kStencil == 0) {
#pragma unroll
      for (int n = 0; n < 8; ++n) store(n, Moments<float>{0, 0, 0});
#pragma unroll 1
      for (node = 0; node < p.nodes; node += kPass) {
        float y[kTiles][4][4];
        outputs_at_nodes(y);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          if (n == 4 && !more_outputs()) break;
          Moments<float> sums = load(n);
#pragma unroll
          for (int r = 0; r < kPass; ++r) {
            if (node + r >= p.interior) break;  // others only fill up the pass, and may be infinite
            add_moments(sums, y[r / 2][n / 2][2 * (r % 2) + n % 2], p.w[node + r], p.w_t[node + r]);
          }
          store(n, sums);
        }
      }
      sums[0] = add_outputs(i, smaller(j, p.samples - 1), [&](int n, float factor) {
        const Moments<float> m = load(n);
        return Moments<float>{m.e * factor, m.te * factor, m.ee * factor * factor};
      });
    } else {
      float y[kTiles][4][4];
      outputs_at_nodes(y);
#pragma unroll
      for (int path = 0; path < kPaths; ++path) {
        sums[path] = add_outputs(i, smaller(j + kGroup * path, p.samples - 1), [&](int n, float factor) {
          float values[kStencil];
#pragma unroll
          for (int v = 0; v < kStencil; ++v) {
            const int r = v < 2 ? 2 * path + v : 2;
            values[v] = y[r / 2][n / 2][2 * (r % 2) + n % 2] * factor;
          }
          return stencil_moments<kStencil>(p.stencil, values);
        });
      }
    }
  }
};

/// Whether two different samples of a warp's paths agree in some unit.
template <int kDepth>
__device__ inline bool paths_meet(const Chained& p, int i, int group) {
  const int lane = int(threadIdx.x) % kWarp;
  const int j = group * kGroup + lane / 4;
  bool meets = false;
#pragma unroll
  for (int l = 0; l < kDepth; ++l) {
    const HalfLayer& layer = p.layers[l];
    const float* const first = layer.records + i / kGroup * layer.group_floats();
    const float* const second = layer.records + group * layer.group_floats();
    const int own = 4 * int(i % kGroup) + lane % 4;
    for (int s = 0; s < layer.steps.full; ++s) {
      float a[4], b[4];
      read(a, first + layer.step_floats(s) + 4 * own);
      read(b, second + layer.step_floats(s) + 4 * lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) meets |= a[n] == b[n] && a[n] != 0;
    }
    if (layer.steps.tail) {
      float a[2], b[2];
      read(a, first + layer.step_floats(layer.steps.full) + 2 * own);
      read(b, second + layer.step_floats(layer.steps.full) + 2 * lane);
      meets |= (a[0] == b[0] && a[0] != 0) || (a[1] == b[1] && a[1] != 0);
    }
  }
  return meets && i < j && j < p.samples;
}

/// The block's copy of the kernel's parameters, at the beginning of its shared memory; behind it the weights.
__device__ inline Chained& shared_parameters() { return *reinterpret_cast<Chained*>(dynamic_shared()); }
constexpr std::size_t kParameterBytes = (sizeof(Chained) + 15) / 16 * 16;

template <class Curve, int kBlocks, int kStencil, bool kSplit, bool kCareful>
__device__ inline void chained_unit(int i, int block) {
  using S = Shape<Curve, kBlocks, kStencil, kSplit>;
  using W = ChainedWarp<Curve, kBlocks, kStencil, kSplit, kCareful>;
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
  // Two of a step's fragments are one uint4.
  warp.weights = memory;
  for (int l = 0; l < S::kDepth; ++l) memory += S::kParts * p.layers[l + 1].part_fragments(p.layers[l].steps) / 2;
  warp.moments = const_cast<float*>(reinterpret_cast<const float*>(memory)) + threadIdx.x;
  PairSums sums[S::kPaths];
  const int j = block * S::kPaths * kGroup + warp.lane / 4;
  warp.run(i, j, sums);
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
}

/// Not inline: with a fast and a careful one in the kernel the compiler keeps addresses of one alive through the other, and runs
/// out of registers. A function's parameters would be in memory, so it reads the block's copy of the kernel's.
template <class Curve, int kBlocks, int kStencil, bool kSplit, bool kCareful>
__device__ __noinline__ void one_unit(int i, int block) {
  chained_unit<Curve, kBlocks, kStencil, kSplit, kCareful>(i, block);
}

template <class Curve, int kBlocks, int kStencil, bool kSplit>
__global__ void __launch_bounds__(Shape<Curve, kBlocks, kStencil, kSplit>::kWarpsOf * kWarp, 1)
    chained_kernel(const __grid_constant__ Chained p) {
  using S = Shape<Curve, kBlocks, kStencil, kSplit>;
  for (unsigned n = threadIdx.x; n < sizeof(Chained) / sizeof(unsigned); n += blockDim.x) {
    reinterpret_cast<unsigned*>(&shared_parameters())[n] = reinterpret_cast<const unsigned*>(&p)[n];
  }
  {
    uint4* to = reinterpret_cast<uint4*>(dynamic_shared() + kParameterBytes);
    for (int l = 0; l < S::kDepth; ++l) {
      const uint4* const from = reinterpret_cast<const uint4*>(p.layers[l + 1].weights);
      const std::int64_t count = S::kParts * p.layers[l + 1].part_fragments(p.layers[l].steps) / 2;
      for (std::int64_t n = threadIdx.x; n < count; n += blockDim.x) to[n] = from[n];
      to += count;
    }
  }
  __syncthreads();
  [[maybe_unused]] int careful = 1;
  if constexpr (Curve::kSilu && kStencil == 0) {
    careful = !(__uint_as_float(unsigned(p.range->largest_z)) < kPairedLimit) || p.range->careful != 0;
  }
  for (int n = int(blockIdx.x * S::kWarpsOf + threadIdx.x / kWarp); n < p.units; n += int(gridDim.x * S::kWarpsOf)) {
    __syncwarp();  // the lanes that have stored an entry are back
    int i, block;
    find_unit(n, S::kPaths * kGroup, i, block);
    if constexpr (Curve::kSilu && kStencil == 0) {
      if (!careful && !__any_sync(kAllLanes, paths_meet<S::kDepth>(p, i, block))) {
        one_unit<Curve, kBlocks, kStencil, kSplit, false>(i, block);
        continue;
      }
    }
    one_unit<Curve, kBlocks, kStencil, kSplit, true>(i, block);
  }
}

// ---- the choice ----

/// A kernel for a chain, and what it wants; null: none of these.
struct Kernel {
  void (*run)(Chained) = nullptr;
  int warps = 0, paths = 0;
  std::size_t moment_bytes = 0;
  Dialect dialect{};
};

template <class Curve, int kBlocks, int kStencil>
Kernel kernel_of(bool halves_alone) {
  using Alone = Shape<Curve, kBlocks, kStencil, false>;
  using Split = Shape<Curve, kBlocks, kStencil, true>;
  const Dialect dialect{true, kBlocks, Curve::kSilu && kStencil == 0, kStencil > 0};
  if (halves_alone) {
    return {chained_kernel<Curve, kBlocks, kStencil, false>, Alone::kWarpsOf, Alone::kPaths, Alone::kMomentBytes, dialect};
  }
  return {chained_kernel<Curve, kBlocks, kStencil, true>, Split::kWarpsOf, Split::kPaths, Split::kMomentBytes, dialect};
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

/// Bytes of parameters, weights and moments in shared memory.
inline std::size_t shared_bytes(const PathConnectivity<float>& op, const Kernel& kernel) {
  std::int64_t fragments = 0;
  for (int l = 1; l <= op.layers; ++l) {
    fragments += std::int64_t(half_steps(op, kernel.dialect, l).all()) * half_steps(op, kernel.dialect, l - 1).all() * kWarp;
  }
  return std::size_t(fragments) * (op.halves_alone ? 1 : 2) * sizeof(uint4) + kernel.moment_bytes + kParameterBytes;
}

/// The kernel, or none where shared memory is too small for it.
inline Kernel if_it_fits(const PathConnectivity<float>& op, const Kernel& kernel) {
  return kernel.run && shared_bytes(op, kernel) <= shared_limit() ? kernel : Kernel{};
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

inline const char* enqueue(const PathConnectivity<float>& op, const Kernel& kernel, const Stencil<float>& stencil,
                           CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.workspace)};
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
  chained.spacing = spacing > 0 ? float(spacing) : 0.0f;
  chained.nodes = int(blocks_of(op.nodes.interior, kPass)) * kPass;
  chained.interior = op.nodes.interior;
  for (int m = 0; m < chained.nodes; ++m) {
    const bool inside = m < op.nodes.interior;
    const double t = inside ? op.nodes.t[m] : 1.0;
    chained.t[m] = float(t);
    chained.w[m] = inside ? float(op.nodes.weights[m]) : 0.0f;
    chained.w_t[m] = inside ? float(op.nodes.weights[m] * (t - op.nodes.mean_t)) : 0.0f;
  }
  chained.variance_t = float(op.nodes.variance_t);
  chained.stencil = stencil;
  chained.samples = int(problem.samples);
  chained.units = int(count_units(problem.samples, kernel.paths * kGroup));
  chained.outputs = int(problem.outputs);
  chained.y = problem.y, chained.y_low = problem.y_low, chained.rounding = problem.rounding, chained.scale = problem.scale;
  chained.range = problem.range;
  chained.connectivity = problem.connectivity, chained.counts = problem.counts;
  const std::int64_t blocks =
      at_most(blocks_of(chained.units, kernel.warps), device_attribute(cudaDevAttrMultiProcessorCount));
  return launch(kernel.run, blocks, kernel.warps * kWarp, shared_bytes(op, kernel), stream, chained);
}

}  // namespace chained
}  // namespace
}  // namespace lmn
