// The host's plan for path_connectivity_backward: how many pairs a batch has, and everything's place in the workspace.
#pragma once
#include <vector>

#include "paths.cuh"

namespace lmn {
namespace {
namespace backward {

/// A batch has as many pairs as so many bytes hold, at least one. Panels of this size are in part in a large card's L2, and the
/// launches of one batch take little time beside its work.
inline std::int64_t batch_bytes() {
#if defined(LMN_EMULATED)
  if (const char* const bytes = std::getenv("LMNFAST_EMULATED_BATCH")) return std::atoll(bytes);  // a test needs small batches
#endif
  return std::int64_t(64) << 20;
}
constexpr std::int64_t kOuterBlocks =
    512;  // blocks of outer_kernel, at most, where a layer is not larger; a wave on a large card

/// One layer's panels, [rows, width]. A pointer may be null.
template <class T>
struct Panels {
  T* residuals;   // of value 2 l + 1
  T* adjoints;    // of value 2 l; before, the slopes
  T* deviations;  // residuals of value 2 l, if they are added to a later value and no other panel keeps them
  T* after;       // adjoints of value 2 l + 1, if the value has a shift; not of the outputs, whose residuals they replace
  T* later[2];    // of values 2 l and 2 l + 1, if they are added to later values: sums of those values' adjoints
};

template <class T>
bool is_linear(const PathConnectivity<T>& op, int l) {
  return op.activations[l].kind == ActivationKind::kIdentity;
}
/// Whether the adjoints of layer l have a panel of their own, in which the slopes are before. The outputs' adjoints take the
/// place of the outputs' residuals.
template <class T>
bool has_slopes(const PathConnectivity<T>& op, int l) {
  return l < op.layers || !is_linear(op, l);
}
template <class T>
std::int32_t added_to(const PathConnectivity<T>& op, int value) {
  return op.skips ? op.skips[value] : -1;
}
template <class T>
bool has_shift(const PathConnectivity<T>& op, int value) {
  return op.skips && op.shifts[value];
}

/// The last value to which each value is added, or -1. The adjoint of the last one comes first.
template <class T>
std::vector<int> last_uses(const PathConnectivity<T>& op) {
  std::vector<int> last(2 * std::size_t(op.layers + 1), -1);
  for (int value = 0; value < int(last.size()); ++value) {
    if (added_to(op, value) >= 0) last[std::size_t(added_to(op, value))] = value;
  }
  return last;
}

template <class T>
struct Plan {
  Problem<T> problem{};
  std::int64_t group = 0;  // samples of a group
  std::int64_t rows = 0;   // of a panel
  std::vector<Panels<T>> panels;
  std::vector<Layer<T>> layers;
  std::vector<int> last_use;
  std::vector<Outer<T>> outer;  // of the layers 1 to L, without the batch
  T *nodes = nullptr, *ends = nullptr;
  double* partial = nullptr;
  double* sums = nullptr;  // double: what forward_kernel writes for other kernels
  std::int64_t partial_count = 0;
};

/// Calls function(constant) with the number of columns that a thread has in a product with `columns` columns.
template <class T, class Function>
const char* with_columns(std::int64_t columns, const Function& function) {
  if constexpr (sizeof(T) == 4) {
    if (columns > Tile<T, 4>::kColumns) return function(std::integral_constant<int, 8>{});
  }
  return function(std::integral_constant<int, 4>{});
}
template <class T>
std::int64_t columns_of_tile(std::int64_t columns) {
  return sizeof(T) == 4 && columns > Tile<T, 4>::kColumns ? Tile<T, 8>::kColumns : Tile<T, 4>::kColumns;
}

/// All panels. take(l) gives the place of one panel of layer l. clear_pair finds all residuals and slopes from the first ones,
/// so these panels come first.
template <class T, class Take>
std::vector<Panels<T>> take_panels(const PathConnectivity<T>& op, const std::vector<int>& last_use, const Take& take) {
  std::vector<Panels<T>> all(std::size_t(op.layers + 1));
  for (int l = 0; l <= op.layers; ++l) {
    Panels<T>& panels = all[std::size_t(l)];
    panels.residuals = take(l);
    panels.adjoints = has_slopes(op, l) ? take(l) : panels.residuals;
  }
  for (int l = 0; l <= op.layers; ++l) {
    Panels<T>& panels = all[std::size_t(l)];
    const auto is_added = [&](int half) { return last_use[std::size_t(2 * l + half)] >= 0; };
    if (l > 0 && !is_linear(op, l) && is_added(0)) panels.deviations = take(l);
    if (l < op.layers && has_shift(op, 2 * l + 1)) panels.after = take(l);
    for (int half = 0; half < 2; ++half) {
      if (is_added(half)) panels.later[half] = take(l);
    }
  }
  return all;
}

/// The samples of a group: all, or as many as give a batch its size. Two groups make a batch.
template <class T>
std::int64_t group_size(std::int64_t samples, std::int64_t pair_bytes) {
  const std::int64_t pairs = at_most(batch_bytes() / pair_bytes, 1 << 26);  // an int counts a batch's pairs
  if (samples * (samples - 1) / 2 <= pairs) return samples;
  std::int64_t side = std::int64_t(::sqrt(double(pairs)));
  side = side > 1 ? side : 1;
  return blocks_of(samples, blocks_of(samples, side));
}

/// What the product for the weights of layer l needs beside the batch.
template <class T>
Outer<T> outer_of(const PathConnectivity<T>& op, const Plan<T>& plan, int l) {
  const std::int64_t units = op.widths[l], depth = op.widths[l - 1];
  const bool by_unit = units >= depth;  // the tile's rows are the layer's units
  const Factor<T> adjoints{plan.panels[std::size_t(l)].adjoints, units, int(units)};
  const Factor<T> residuals{plan.panels[std::size_t(l - 1)].residuals, depth, int(depth)};
  Outer<T> outer{};
  outer.rows = by_unit ? adjoints : residuals, outer.columns = by_unit ? residuals : adjoints;
  outer.row_apart = by_unit ? depth : 1, outer.column_apart = by_unit ? 1 : depth;
  outer.size = units * depth;
  outer.tiles_across = int(blocks_of(outer.columns.count, columns_of_tile<T>(outer.columns.count)));
  outer.tiles = int(blocks_of(outer.rows.count, Tile<T, 4>::kRows)) * outer.tiles_across;
  const std::int64_t most = blocks_of(plan.rows, kFlushedRows), splits = at_most(blocks_of(kOuterBlocks, outer.tiles), most);
  outer.splits = int(splits > 1 ? splits : 1);
  return outer;
}

/// Takes the places of everything except the layers. The layers come last in the arena, one by one.
template <class T>
Plan<T> make_plan(const PathConnectivity<T>& op, Arena& arena) {
  Plan<T> plan;
  plan.problem = make_problem(op, arena);
  plan.nodes = arena.take<T>(3 * std::int64_t(op.nodes.interior));
  if (sizeof(T) == 8) {
    plan.sums = arena.take<double>(blocks_of(op.samples, kForwardTile) * padded(op.widths[0]) / kForwardTile);
  }
  plan.last_use = last_uses(op);
  const std::int64_t outputs = op.widths[op.layers], interior = op.nodes.interior;
  std::int64_t row_size = 0;  // numbers in all panels for one row
  take_panels(op, plan.last_use, [&](int l) -> T* { return row_size += op.widths[l], nullptr; });
  plan.group = group_size<T>(op.samples, (interior * row_size + 2 * outputs) * std::int64_t(sizeof(T)));
  const std::int64_t pairs = plan.group < op.samples ? plan.group * plan.group : op.samples * (op.samples - 1) / 2;
  plan.rows = pairs * interior;
  plan.ends = arena.take<T>(pairs * 2 * outputs);
  T* next = arena.take<T>(plan.rows * row_size);
  plan.panels = take_panels(op, plan.last_use, [&](int l) {
    T* const taken = next;
    if (next) next += plan.rows * op.widths[l];
    return taken;
  });
  for (int l = 1; l <= op.layers; ++l) {
    plan.outer.push_back(outer_of(op, plan, l));
    plan.partial_count += plan.outer.back().splits * plan.outer.back().size;
  }
  double* partial = plan.partial = arena.take<double>(plan.partial_count);
  for (Outer<T>& outer : plan.outer) {
    outer.partial = partial;
    if (partial) partial += outer.splits * outer.size;
  }
  return plan;
}

}  // namespace backward
}  // namespace
}  // namespace lmn
