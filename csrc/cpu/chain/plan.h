// The plan of a call: the layers, the nodes, and the place of every array in the workspace. make_plan() takes all arrays from
// one arena, so the size of the workspace always fits the places in it.
#pragma once
#include "residuals.h"

namespace lmn {
namespace {

// First samples per task. Their tables of exponentials stay in L2 at 100 units and 19 nodes.
constexpr std::int64_t kTaskRows = 64;
constexpr std::int64_t kFewestRows = 16;  // a multiple of all vectors' lanes, as kTaskRows

/// First samples per task: fewer where a few tasks would have all samples, so that the threads get equal shares.
inline std::int64_t task_rows(std::int64_t samples) {
  const std::int64_t rows = samples / 4 / kFewestRows * kFewestRows;
  return rows < kFewestRows ? kFewestRows : at_most(rows, kTaskRows);
}

/// Values of one layer at the samples: [blocks of lanes][width][lanes].
template <class T>
struct Layer {
  std::int64_t width;
  Activation activation;
  T* z = nullptr;         // before the activation
  T* a = nullptr;         // after it; the same memory for the identity
  T* v = nullptr;         // input of the next layer: a, or its own memory where an earlier value is added to a
  T* slope = nullptr;     // derivative of the activation; only with a stencil
  T* rounding = nullptr;  // root of the sum of squares of all terms behind v; v's rounding error is some epsilons of it
  T* packed = nullptr;    // weights into this layer, [blocks of kBlockRows][width of the layer before][rows of the block]
};

/// Pairs among the samples of one block of lanes: those of each lane's sample and the sample `step` lanes further, where the
/// first of `samples` lanes follows the last. Steps 1 to samples / 2 have every pair of the block in one lane, the half of the
/// vectors that a row for each sample would take.
template <class T>
struct Pairing {
  std::int64_t samples = 0, step = 0;
  Bits<Vector<T>> lower{}, upper{};   // the lanes of the first and of the second sample of each lane's pair
  Bits<Vector<T>> partner{}, back{};  // the lane that is `step` further, and the one that is `step` before

  Pairing() = default;
  Pairing(std::int64_t samples, std::int64_t step) : samples(samples), step(step) {
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const std::int64_t own = lane < samples ? lane : 0, other = (own + step) % samples;
      lower[lane] = own < other ? own : other;
      upper[lane] = own < other ? other : own;
      partner[lane] = other;
      back[lane] = (own + samples - step) % samples;
    }
  }
  /// Whether a lane has a pair. A step of half of the samples would have each pair twice.
  bool has(int lane) const { return lane < (2 * step == samples ? step : samples); }
};

/// Memory of one thread.
template <class T>
struct Scratch {
  using V = Vector<T>;
  V *panel, *next_panel;                     // [width][nodes of the block]
  V* kept;                                   // [slots] panels of values that are added to later ones
  Moments<V>* moments;                       // [outputs]
  V* values;                                 // [outputs][nodes of the stencil]
  const T *first_z, *first_a, *first_slope;  // [sum of widths], all layers at the first sample, one after the other
  // Whether each lane has a first sample of its own, as in a list of pairs and in a triangle. All layers at the lanes' own
  // samples then lie in `gathered`, [sum of widths][lanes] each: z, a and slope of the first samples, then of the second ones;
  // y, y_low and rounding of the outputs, [outputs][lanes], likewise.
  bool paired;
  T *gathered[6], *gathered_ends[6];
  Pairing<T> pairing;       // of a triangle
  V* second_table;          // [widths[0]][nodes], exp(-t z_j)
  V* lanes_table;           // the same of the first samples of a triangle, exp(-(1 - t) z_j)
  T* first_table;           // [rows of a task][nodes][whole_vectors(widths[0])], exp(-(1 - t) z_i)
  std::int64_t table_rows;  // the block of first samples that first_table holds; -1: none
  std::int64_t counts[2];   // this thread's share of the op's counts
};

template <class T>
struct Plan {
  const PathConnectivity<T>& op;
  Stencil<T> stencil;
  std::int64_t lane_blocks = 0, outputs = 0, total_width = 0, widest = 0, rows = 0;  // rows: first samples per task
  Layer<T>* layers = nullptr;
  int *added = nullptr, *kept = nullptr;         // [values], slot of the value added to each, slot that keeps each; or -1
  T *t = nullptr, *w = nullptr, *w_t = nullptr;  // [interior] nodes, weights, weights times t - mean t
  T* scale = nullptr;                            // [outputs]
  T *stabiliser = nullptr, *pooling = nullptr;   // [outputs], as scaled_stabiliser and pooling_factor say
  T pooled_stabiliser = 0;                       // in the outputs' common unit
  // Scaled outputs, laid out as a layer. y + y_low is a two-term representation of linear outputs: y_low is the rounding
  // error of y in T.
  T *y = nullptr, *y_low = nullptr;
  T *row_z = nullptr, *row_a = nullptr, *row_slope = nullptr;  // [samples][sum of widths], copies of the layers
  T *row_y = nullptr, *row_y_low = nullptr;                    // [samples][outputs]
  T *rounding = nullptr, *row_rounding = nullptr;              // of the scaled outputs, laid out as y and as row_y
  Scratch<T>* scratch = nullptr;                               // [threads]
  bool separable = false;                                      // the first layer is computed from two exponentials

  bool lists() const { return op.first != nullptr; }  // the pairs of a list, not all pairs
  const Layer<T>& last() const { return layers[op.layers]; }
  bool ends_linear() const { return op.layers > 0 && last().activation.kind == ActivationKind::kIdentity; }
  /// Whether the outputs' residuals are the last product and nothing else. Their scale is then in the weights, and the
  /// residuals are not stored.
  bool ends_in_product() const { return ends_linear() && (!op.skips || op.skips[2 * op.layers] < 0); }
};

template <class T>
Plan<T> make_plan(const PathConnectivity<T>& op, const Stencil<T>& stencil, Arena& arena, int threads) {
  using V = Vector<T>;
  Plan<T> plan{op, stencil};
  plan.lane_blocks = blocks_of(op.samples, kLanes<T>);
  plan.rows = task_rows(op.samples);
  plan.outputs = op.widths[op.layers];
  for (int l = 0; l <= op.layers; ++l) {
    plan.total_width += op.widths[l];
    plan.widest = op.widths[l] > plan.widest ? op.widths[l] : plan.widest;
  }
  const std::int64_t interior = op.nodes.interior;
  int slots = 0;
  if (op.skips) {
    const int values = 2 * (op.layers + 1);
    for (int value = 0; value < values; ++value) slots += op.skips[value] >= 0;
    plan.added = arena.take<int>(values);
    plan.kept = arena.take<int>(values);
    int* free_from = arena.take<int>(slots);
    if (arena.base) {
      assign_slots(op.skips, values, plan.kept, free_from);
      for (int value = 0; value < values; ++value) {
        plan.added[value] = op.skips[value] < 0 ? -1 : plan.kept[op.skips[value]];
      }
    }
  }
  plan.layers = arena.take<Layer<T>>(op.layers + 1);
  plan.t = arena.take<T>(interior);
  plan.w = arena.take<T>(interior);
  plan.w_t = arena.take<T>(interior);
  plan.scale = arena.take<T>(plan.outputs);
  plan.stabiliser = arena.take<T>(plan.outputs);
  plan.pooling = arena.take<T>(plan.outputs);
  plan.y = arena.take<T>(plan.lane_blocks * plan.outputs * kLanes<T>);
  plan.y_low = arena.take<T>(plan.lane_blocks * plan.outputs * kLanes<T>);
  plan.row_z = arena.take<T>(op.samples * plan.total_width);
  plan.row_a = arena.take<T>(op.samples * plan.total_width);
  plan.row_slope = arena.take<T>(stencil.size == 0 ? 0 : op.samples * plan.total_width);
  plan.row_y = arena.take<T>(op.samples * plan.outputs);
  plan.row_y_low = arena.take<T>(op.samples * plan.outputs);
  plan.rounding = arena.take<T>(plan.lane_blocks * plan.outputs * kLanes<T>);
  plan.row_rounding = arena.take<T>(op.samples * plan.outputs);
  plan.scratch = arena.take<Scratch<T>>(threads);
  for (int l = 0; l <= op.layers; ++l) {
    const std::int64_t values = plan.lane_blocks * op.widths[l] * kLanes<T>;
    Layer<T> layer{op.widths[l], op.activations[l]};
    layer.z = arena.take<T>(values);
    layer.a = layer.activation.kind == ActivationKind::kIdentity ? layer.z : arena.take<T>(values);
    layer.v = op.skips && (op.skips[2 * l + 1] >= 0 || op.shifts[2 * l + 1]) ? arena.take<T>(values) : layer.a;
    layer.slope = stencil.size == 0 ? nullptr : arena.take<T>(values);
    layer.rounding = arena.take<T>(values);
    layer.packed = l == 0 ? nullptr : arena.take<T>(op.widths[l] * op.widths[l - 1]);
    if (arena.base) plan.layers[l] = layer;
  }
  plan.separable = stencil.size == 0 && is_separable(op.activations[0].kind) && !plan.lists();
  for (int thread = 0; thread < threads; ++thread) {
    Scratch<T> s{};
    s.panel = arena.take<V>(plan.widest * kBlockColumns);
    s.next_panel = arena.take<V>(plan.widest * kBlockColumns);
    s.kept = arena.take<V>(slots * plan.widest * kBlockColumns);
    s.moments = arena.take<Moments<V>>(plan.outputs);
    s.values = arena.take<V>(stencil.size * plan.outputs);
    s.second_table = arena.take<V>(plan.separable ? op.widths[0] * interior : 0);
    s.lanes_table = arena.take<V>(plan.separable ? op.widths[0] * interior : 0);
    s.first_table = arena.take<T>(plan.separable ? plan.rows * whole_vectors<T>(op.widths[0]) * interior : 0);
    for (int n = 0; n < 6; ++n) {
      const bool unused = n % 3 == 2 && stencil.size == 0;  // slopes belong to a stencil
      s.gathered[n] = arena.take<T>(unused ? 0 : plan.total_width * kLanes<T>);
      s.gathered_ends[n] = arena.take<T>(plan.outputs * kLanes<T>);
    }
    s.paired = plan.lists();
    s.table_rows = -1;
    s.counts[0] = s.counts[1] = 0;
    if (arena.base) plan.scratch[thread] = s;
  }
  return plan;
}

template <class T>
std::size_t workspace(const PathConnectivity<T>& op, const Stencil<T>& stencil, int threads) {
  Arena arena{nullptr};
  make_plan(op, stencil, arena, threads);
  return arena.used;
}

}  // namespace
}  // namespace lmn
