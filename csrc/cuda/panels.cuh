// The float32 kernel for any depth, widths, outputs, activations, nodes and sums, for paths and for their polynomials. This
// file is the host's side: the plan and the launch. The kernel is in panels/. path_connectivity.cu and hermite_connectivity.cu
// call it for all networks that chained.cuh does not take.
//
// A unit of work is one first sample i and a group of 8 second samples. A tile of the matrix instruction is two nodes of these
// 8 paths. The residuals of one layer at several tiles are a panel of fragments. Panels are in shared memory if they fit there.
// A warp takes 32 units of a layer at kTiles tiles at a time. It reads weights directly from L2, a step ahead of their use. No
// two warps with the same set of tiles need the same weights, so the only barrier is the one between layers. With many outputs
// a warp takes 32 of them at all nodes and keeps their moments in registers. With few outputs behind a wide layer (kStraight)
// the last residuals go from the accumulators directly into the outputs' products, and are in no panel.
#pragma once
#include <vector>

#include "panels/kernel.cuh"

namespace lmn {
namespace {
namespace panels {

constexpr int kMostSets = 2;
constexpr int kNarrowSteps = 16;  // a layer of at most so many steps has fewer chunks than a block of all warps has warps

/// How the kernel runs, and everything that it needs except the layers.
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
  plan.straight = straight && !pools(op) && problem.ends_linear && !polynomial && slots == 0 &&
                  problem.outputs <= kStraightOutputs && steps(op.layers - 1) > kNarrowSteps;
  std::int64_t widest[2] = {0, 0};  // the widest layer of each panel, in steps
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
  const auto take = [&](int tiles, int count) {  // takes this plan if a multiprocessor has room for `count` such blocks
    const std::int64_t bytes = fragments(tiles, kPanelWarps / count) * std::int64_t(sizeof(uint4));
    if (resident || bytes + std::int64_t(kStaticShared) > std::int64_t(shared_limit()) ||
        count * (bytes + std::int64_t(kStaticShared) + reserved) > whole) {
      return;
    }
    resident = count, panels.pass_tiles = tiles, plan.shared = std::size_t(bytes);
  };
  // The warps of small blocks wait less for one another. But if weights are read again with every pass, few passes matter more.
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

template <int kTiles, bool kStraight, bool kPolynomial, bool kPooled>
const char* launch_panels(const PanelPlan& plan, std::int64_t networks, CUstream_st* stream) {
  const Grid grid(plan.blocks, networks);
  const auto kernel = plan.panels.problem.halves_alone ? panels_kernel<kTiles, false, kStraight, kPolynomial, kPooled>
                                                       : panels_kernel<kTiles, true, kStraight, kPolynomial, kPooled>;
  return launch(kernel, grid, plan.threads, plan.shared, stream, plan.panels);
}
/// The same for a plan that is not straight.
template <int kTiles, bool kPolynomial>
const char* launch_panels(const PanelPlan& plan, bool pooled, std::int64_t networks, CUstream_st* stream) {
  return pooled ? launch_panels<kTiles, false, kPolynomial, true>(plan, networks, stream)
                : launch_panels<kTiles, false, kPolynomial, false>(plan, networks, stream);
}

/// Enqueues everything of an op, or of its polynomials. apart: bytes between the workspaces of two networks.
template <bool kPolynomial>
const char* enqueue_by_panels(const PathConnectivity<float>& op, const Stencil<float>& stencil, std::size_t apart,
                              CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.workspace), std::int64_t(apart)};
  HalfPlan half = make_half_plan(op, Dialect{false, 0, false, kPolynomial}, arena);
  PanelPlan plan = make_panel_plan(op, half, stencil, arena);
  if (plan.blocks == 0) return "no CUDA device";
  for (int l = 1; l <= op.layers; ++l) {  // the kernel's offsets into the layer's weights are 32-bit numbers
    const std::int64_t before = half_steps(op, half.dialect, l - 1).all();
    if (before * half_steps(op, half.dialect, l).all() * kWarp > 0x3fffffff) return "a layer too wide for the kernel";
  }
  // Nodes go in pairs. If their number is odd, the last node is repeated without weight.
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
    return launch_panels<kFewTiles, true>(plan, pools(op), op.networks, stream);
  } else {
    if (plan.panels.panels) return launch_panels<kFewTiles, false>(plan, pools(op), op.networks, stream);
    return plan.straight ? launch_panels<kPathTiles, true, false, false>(plan, op.networks, stream)
                         : launch_panels<kPathTiles, false>(plan, pools(op), op.networks, stream);
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
