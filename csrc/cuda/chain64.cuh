// path_connectivity and hermite_connectivity in float64, on the FP64 matrix instruction. This file is the host's side: the plan
// and the launches. There are two kernels. chain64/shallow.cuh takes one hidden layer of SiLU, sigmoid or tanh over equally
// spaced nodes; its warps make their matrix fragments themselves. chain64/general.cuh takes every other network, pooled r2 and
// r2 with a stabiliser; its blocks carry panels of residuals from layer to layer.
//
// In both kernels a tile of matrix rows is 8 pairs (one first sample and 8 second samples) at one node, and all rows of a lane,
// g = lane / 4, belong to one pair. Of 8 hidden units, lane q = lane % 4 of a group has the units 2 q and 2 q + 1, as columns q
// and q + 4 of the instruction's A. So a lane's sums for 8 units are the next layer's fragments.
#pragma once
#include "chain64/general.cuh"
#include "chain64/samples.cuh"
#include "chain64/shallow.cuh"

namespace lmn {
namespace {
namespace float64 {

/// The host's plan for both kernels.
struct Plan64 {
  Plan plan;
  General64 general{};
  std::int64_t general_blocks = 0, shallow_blocks = 0;
  std::size_t general_shared = 0, shallow_shared = 0;
  Shallow64 shallow{};
  double2 *first = nullptr, *second = nullptr;  // the shallow kernel's tables; null: this kernel does not take the network
  double spacing = 0;
};

/// The range of inputs that the shallow kernel takes. A limit of 0: it does not take the network.
inline Range shallow_range(const PathConnectivity<double>& op, std::size_t shared) {
  constexpr int kGroups = 16;  // most groups of four nodes; each has a table for every sample
  const ActivationKind kind = op.activations[0].kind;
  const bool tanh = kind == ActivationKind::kTanh;
  if (pools(op) || op.layers != 1 || op.activations[1].kind != ActivationKind::kIdentity || (op.skips && op.skips[2] >= 0) ||
      !(kind == ActivationKind::kSilu || kind == ActivationKind::kSigmoid || tanh) || op.nodes.interior > kGroup * kGroups ||
      spacing_of(op.nodes) < 0 || op.widths[1] > 8 * kShallowTiles64 * kShallowChunks64 || shared > shared_limit()) {
    return {0, 0};
  }
  const double past = op.nodes.t[0] + double(blocks_of(op.nodes.interior, kGroup) * kGroup - 1) * spacing_of(op.nodes);
  const double reach = past > 1 ? 2 * past - 1 : 1;  // largest |z| on a path, relative to the largest |z| at a sample
  return {kShallowLimit64 / reach / (tanh ? 2 : 1), tanh ? kShallowTanhMean64 : 0};
}

/// Takes the places of everything except the layers.
template <int kStencil>
Plan64 make_plan64(const PathConnectivity<double>& op, const Stencil<double>& stencil, Arena& arena) {
  Plan64 plan;
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const std::int64_t output_tiles = blocks_of(op.widths[op.layers], 8);
  Range range{0, 0};
  if constexpr (kStencil == 0) {
    Shallow64& shallow = plan.shallow;
    shallow.steps = int(blocks_of(op.widths[0], 8));
    shallow.groups = int(blocks_of(op.nodes.interior, kGroup));
    shallow.chunks = int(blocks_of(output_tiles, kShallowTiles64));
    plan.shallow_shared = std::size_t(shallow.chunks) * std::size_t(shallow.steps) * kShallowTiles64 * kWarp * sizeof(double2) +
                          (3 * kGroup * std::size_t(shallow.groups) + kShallowMoments64) * sizeof(double);
    range = shallow_range(op, plan.shallow_shared);
    if (range.limit > 0) {
      const std::int64_t size = std::int64_t(shallow.steps) * shallow.arrays() * 4;
      plan.first = arena.take<double2>(op.samples * size);
      plan.second = arena.take<double2>(8 * blocks_of(op.samples, 8) * size);
      plan.spacing = spacing_of(op.nodes);
      shallow.first = plan.first;
      shallow.second = plan.second;
      shallow.units = count_units(op.samples, 8);
      plan.shallow_blocks = at_most(blocks_of(shallow.units, kShallowWarps64), processors);
    }
  }
  plan.plan = make_plan(op, kStencil > 0, range, arena);

  General64& general = plan.general;
  general.stencil = stencil;
  general.skip = plan.plan.flag;
  general.slots = assign_slots(op).count;
  std::int64_t widest = 0, widest_kept = 0;
  for (int l = 0; l < op.layers; ++l) widest = op.widths[l] > widest ? op.widths[l] : widest;
  for (int l = 0; general.slots > 0 && l <= op.layers; ++l) {
    widest_kept = op.widths[l] > widest_kept ? op.widths[l] : widest_kept;
  }
  const std::int64_t panel_tiles = blocks_of(widest, 8);
  general.chunk = int(at_most(output_tiles, panel_tiles > kWarps ? panel_tiles : kWarps));
  const std::int64_t tiles = panel_tiles > general.chunk ? panel_tiles : general.chunk;
  const std::int64_t nodes = kStencil > 0 ? kStencil : op.nodes.interior;
  // The first that fits: two blocks for each multiprocessor, one block, panels in global memory. Half as many rows are
  // preferred to panels in global memory.
  const std::size_t reserved = std::size_t(device_attribute(cudaDevAttrReservedSharedMemoryPerBlock));
  const std::size_t half = std::size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)) / 2;
  const std::size_t static_shared = static_shared64(pools(op));
  std::int64_t moments = 0;  // bytes
  const auto plan_rows = [&](int rows) {
    general.passes = int(blocks_of(nodes, rows));
    general.second_blocks = general.passes > 1 ? 1 : int(at_most(kSecondBlocks, rows / nodes));
    general.panel_size = tiles * general.second_blocks * blocks_of(nodes, general.passes) * kWarp;
    moments = general.passes > 1 ? std::int64_t(output_tiles * 6 * kWarp * sizeof(double)) : 0;
    plan.general_shared = std::size_t(2 * general.panel_size) * sizeof(double2);
    return plan.general_shared + static_shared <= shared_limit();
  };
  int rows = kPanelTiles64;
  while (rows > kPanelTiles64 / 2 && !plan_rows(rows)) --rows;
  const bool fits = plan_rows(rows);
  if (!fits) plan_rows(kPanelTiles64);
  general.units = count_units(op.samples, 8 * general.second_blocks);
  if (!fits) plan.general_shared = 0;
  const bool two = plan.general_shared + static_shared + reserved <= half;
  const std::size_t room = (two ? half - reserved : shared_limit()) - static_shared;
  const bool moments_fit = plan.general_shared + std::size_t(moments) <= room;
  if (moments_fit) plan.general_shared += std::size_t(moments);
  plan.general_blocks = at_most(general.units, (two ? 2 : 1) * std::int64_t(processors));
  if (!fits) general.panels = arena.take<double2>(plan.general_blocks * 2 * general.panel_size);
  if (moments > 0 && !moments_fit) general.moments = arena.take<double>(plan.general_blocks * output_tiles * 6 * kWarp);
  general.slot_size = blocks_of(widest_kept, 8) * general.second_blocks * blocks_of(nodes, general.passes) * kWarp;
  general.kept = arena.take<double2>(plan.general_blocks * general.slots * general.slot_size);
  return plan;
}

template <ActivationKind kKind>
const char* enqueue_shallow64(const Plan64& plan, std::int64_t networks, CUstream_st* stream) {
  const Shallow64& shallow = plan.shallow;
  const std::int64_t threads = 8 * blocks_of(shallow.problem.samples, 8) * shallow.steps * 4;
  const char* const error = launch(pack_shallow64_kernel<kKind>, Grid(blocks_of(threads, kThreads), networks), kThreads, 0,
                                   stream, shallow, plan.plan.first, plan.spacing, plan.first, plan.second);
  if (error) return error;
  return launch(shallow64_kernel<kKind>, Grid(plan.shallow_blocks, networks), kShallowThreads64, plan.shallow_shared, stream,
                shallow);
}

/// apart: bytes between the workspaces of two networks.
template <int kStencil>
const char* enqueue64(const PathConnectivity<double>& op, const Stencil<double>& stencil, std::size_t apart,
                      CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.workspace), std::int64_t(apart)};
  Plan64 plan = make_plan64<kStencil>(op, stencil, arena);
  if (const char* error = enqueue_samples(op, plan.plan, arena, stream)) return error;
  plan.general.problem = plan.plan.problem;
  if constexpr (kStencil == 0) {
    if (plan.first) {
      Shallow64& shallow = plan.shallow;
      const Layer<double>& layer = plan.plan.first;
      shallow.problem = plan.plan.problem;
      shallow.fragments = plan.plan.last.fragments;
      shallow.z = layer.z;
      shallow.stride = layer.stride;
      shallow.width = layer.width;
      shallow.take = plan.plan.flag;
      const char* const error =
          layer.kind == ActivationKind::kSilu      ? enqueue_shallow64<ActivationKind::kSilu>(plan, op.networks, stream)
          : layer.kind == ActivationKind::kSigmoid ? enqueue_shallow64<ActivationKind::kSigmoid>(plan, op.networks, stream)
                                                   : enqueue_shallow64<ActivationKind::kTanh>(plan, op.networks, stream);
      if (error) return error;
    }
  }
  return launch(pools(op) ? general64_kernel<kStencil, true> : general64_kernel<kStencil, false>,
                Grid(plan.general_blocks, op.networks), kThreads, plan.general_shared, stream, plan.general);
}

/// The workspace of one network.
template <int kStencil>
std::size_t own_workspace64(const PathConnectivity<double>& op, const Stencil<double>& stencil) {
  Arena arena{nullptr};
  const Plan64 plan = make_plan64<kStencil>(op, stencil, arena);
  return workspace(op, plan.plan, arena);
}
template <int kStencil>
std::size_t workspace64(const PathConnectivity<double>& op, const Stencil<double>& stencil) {
  const std::size_t own = own_workspace64<kStencil>(op, stencil);
  return own * std::size_t(networks_at_once(op.networks, own));
}
template <int kStencil>
const char* connectivity64(const PathConnectivity<double>& op, const Stencil<double>& stencil, CUstream_st* stream) {
  const std::size_t own = own_workspace64<kStencil>(op, stencil);
  return in_parts(op, own,
                  [&](const PathConnectivity<double>& part) { return enqueue64<kStencil>(part, stencil, own, stream); });
}

}  // namespace float64
}  // namespace
}  // namespace lmn
