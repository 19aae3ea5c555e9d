// Float32 kernels for chains whose residuals never leave the registers: one hidden layer of any width that fits, or two of at
// most 128 units, and at most 32 outputs without an activation. This file is the host's side: the choice of the kernel and the
// launch. The kernel is in chained/. path_connectivity.cu and hermite_connectivity.cu ask here first.
//
// A warp takes one first sample and 8 second samples at a time, and four nodes in one pass. These are two tiles of the matrix
// instruction. The first layer's residuals are evaluated directly as fragments. A second layer's products are computed 16 units
// at a time, so that their residuals immediately become the fragments of the outputs' products. Weights are in shared memory.
// After the weights are loaded there is no block barrier. For hermite_connectivity the "nodes" are the path's slopes at its two
// ends (kStencil 2; two groups of second samples side by side), or these slopes and the path's midpoint (kStencil 3).
//
// A lane keeps its sums over outputs in registers, and none are left for the sums of pooled r2. Pooled r2 and r2 with a
// stabiliser are left to panels.cuh.
#pragma once
#include "chained/kernel.cuh"

namespace lmn {
namespace {
namespace chained {

/// A kernel for a chain and its needs. `run` is null if none of these kernels takes the chain.
struct Kernel {
  void (*run)(Chained) = nullptr;
  int warps = 0, paths = 0;  // warps of a block at most; paths of a lane
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
  if constexpr (kStencil == 0) {  // with a stencil there are too few registers
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

/// The kernel with as many warps as shared memory has room for, in steps of four (one warp for each scheduler). Null if there
/// is no room for half of the kernel's warps.
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

constexpr std::int64_t kChainedSamples = 1 << 16;  // so many samples have fewer than 2^31 units of work

/// Whether one of these kernels takes a problem, apart from its activations, widths and shared memory.
inline bool takes(const PathConnectivity<float>& op) {
  return op.layers >= 1 && op.layers <= 2 && !op.skips && op.activations[op.layers].kind == ActivationKind::kIdentity &&
         !pools(op) && op.widths[op.layers] <= kChainedOutputs && op.nodes.interior <= kMostNodes &&
         op.samples <= kChainedSamples && op.samples * padded(op.widths[0]) < std::int64_t(1) << 30;
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
  // At equally spaced nodes exponentials come from multiplication, also at the node that fills up a pass. This node must not
  // lie beyond the path's end, because no sample bounds the exponential there.
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
  const std::int64_t blocks = at_most(blocks_of(chained.units, kernel.warps), device_attribute(cudaDevAttrMultiProcessorCount));
  const std::size_t shared = common_bytes(op, kernel) + std::size_t(kernel.warps) * kernel.warp_bytes;
  return launch(kernel.run, Grid(blocks, op.networks), kernel.warps * kWarp, shared, stream, chained);
}

}  // namespace chained
}  // namespace
}  // namespace lmn
