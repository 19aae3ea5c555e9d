// The parameters of chained_kernel, and the variants that it is compiled for. chained.cuh fills the parameters on the host.
#pragma once
#include "../halves.cuh"

namespace lmn {
namespace {
namespace chained {

constexpr int kMostNodes = 64;     // interior nodes that fit the kernel's parameters
constexpr int kTiles = 2;          // tiles of the matrix instruction in one pass
constexpr int kPass = 2 * kTiles;  // nodes in one pass
constexpr int kChainedOutputs = kEndOutputs;

// With |z| below kPairedLimit a product of two terms 1 + exp(-z) is far from overflow, and SiLU's exponentials at equally
// spaced nodes may come from multiplication. In a deeper layer z may exceed the z of its samples, so exponents are cut off at
// kPairedExponent. A SiLU is then wrong by |z| 2^-62, which kTinyUnit keeps below a float's rounding.
constexpr float kPairedLimit = 43, kPairedExponent = 62;

__device__ inline int smaller(int a, int b) { return a < b ? a : b; }

/// The kernel's parameters: a node rule and the layers, by value.
struct Chained {
  HalfLayer layers[3];  // the hidden layers and, last, the outputs
  ActivationKind kind;  // of the hidden layers, if the kernel is for any activation
  float alpha, beta;
  // Nodes that only fill up the last pass have weight 0. They repeat the last node; with uniform nodes they are the path's end.
  alignas(16) float t[kMostNodes];
  alignas(16) float w[kMostNodes];    // weights divided by `weight`
  alignas(16) float w_t[kMostNodes];  // weights times t - mean t
  int nodes, interior;                // `nodes` is a multiple of kPass; the first `interior` of them count
  bool uniform;                       // nodes are equally spaced, and all their weights are `weight`
  float spacing, weight;
  float variance_t;
  Stencil<float> stencil;
  float bend[3][3];               // of the stencil: variance_t var(e) - te^2 = sum over u <= v of bend[v][u] value_v value_u
  int samples, units, outputs;    // units: number of units of work; in the block's copy, the end of the block's own units
  const float4* ends;             // see write_end
  const float* scale;             // [outputs]
  float factor[kChainedOutputs];  // set in the block's copy: from sums of products to scaled outputs, in the order of `ends`
  const float* z;                 // [samples, stride], of the first layer
  std::int64_t stride, width;
  const RangeFlags* range;
  float* connectivity;
  std::int64_t* counts;
  std::int64_t apart;  // as in Problem; the pointers of the block's copy are those of its own network
};

/// The activation of all hidden layers; kCount: any activation.
template <ActivationKind kKind_>
struct Curve {
  static constexpr ActivationKind kKind = kKind_;
  static constexpr bool kSilu = kKind == ActivationKind::kSilu;
};

/// How a unit of work is measured. careful: any z; residuals are 0 where two samples agree in a hidden unit, because the
/// exponential's rounding would leave another number there. The other two ways notice such samples and leave them to `careful`.
/// uniform: nodes are equally spaced and have one weight. The way is a template's parameter, because a branch in an unrolled
/// loop becomes instructions that are issued even if they are not needed.
enum class Way { careful, fast, uniform };

}  // namespace chained
}  // namespace
}  // namespace lmn
