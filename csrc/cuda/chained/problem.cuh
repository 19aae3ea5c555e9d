// The parameters of chained_kernel, and the variants that it is compiled for. chained.cuh fills the parameters on the host.
#pragma once
#include "../halves.cuh"

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

}  // namespace chained
}  // namespace
}  // namespace lmn
