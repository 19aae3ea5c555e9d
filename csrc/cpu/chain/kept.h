// The way forward of a gradient: what is in memory, and path_moments() with all residuals and slopes kept.
#pragma once
#include "outer.h"
#include "pairs.h"

namespace lmn {
namespace {

constexpr std::int64_t kMostSlots = 32, kLeastSlots = 8, kTasksPerSlot = 2;
constexpr std::int64_t kSlotBytes = std::int64_t(1) << 26;  // of all slots, if kLeastSlots take less

// ---- the plan ----

/// Memory of one thread, beside its Scratch.
template <class T>
struct BackwardScratch {
  using V = Vector<T>;
  V **panels, **slopes;  // [layers + 1], of all nodes: [parts][width][nodes of the part]
  V *adjoint, *before;   // [width][nodes of a part]
  V* pending;            // [values that are added][width][nodes of a part], adjoints that wait for their value
  bool* waits;           // [values], whether there is one
  V *along, *across;     // [outputs], P and Q of csrc/ops.h
  // [units that are summed, then outputs]: of the row's or the step's first samples, of the step's second ones, and of the
  // samples of the task's block
  V *first_sums, *step_sums, *second_sums;
  T* turned;     // a panel, turned
  T** products;  // [layers], outer products of the task, laid out as outer_size() says
};

/// Sums of one slot, laid out as the op's results.
struct Slot {
  double *products, *sums, *ends;
};

template <class T>
struct Backward {
  const PathConnectivityBackward<T>& op;
  std::int64_t slots = 0, product_count = 0, units = 0;  // units: of the values that are summed
  std::int64_t* summed = nullptr;                        // [values], the first unit of a value in `sums`, or -1
  std::int32_t* source = nullptr;                        // [values], place in `pending` of a value that is added, or -1
  T** transposed = nullptr;                              // [layers], weights packed for the way back
  T first_weight = 0, last_weight = 0;                   // of the nodes at both ends
  Slot* sums = nullptr;                                  // [slots]
  BackwardScratch<T>* scratch = nullptr;                 // [threads]
  // At the samples: adjoints of a layer and of the layer before; its inputs; and adjoints that wait, [samples][widest] each
  double *adjoint = nullptr, *before = nullptr, *inputs = nullptr, *pending = nullptr;

  std::int64_t sum_count() const { return op.samples * units; }
  std::int64_t end_count() const { return op.samples * op.widths[op.layers]; }
};

/// Whether the adjoints of a value are summed, see csrc/ops.h.
template <class T>
bool is_summed(const PathConnectivityBackward<T>& op, int value) {
  return value % 2 == 0 || (op.skips && op.shifts[value]);
}

template <class T>
Backward<T> make_backward(const PathConnectivityBackward<T>& op, const Plan<T>& plan, Arena& arena, int threads) {
  using V = Vector<T>;
  Backward<T> b{op};
  const int values = 2 * (op.layers + 1);
  b.summed = arena.take<std::int64_t>(values);
  b.source = arena.take<std::int32_t>(values);
  std::int64_t sources = 0, most_turned = 0;
  for (int value = 0; value < values; ++value) {
    std::int64_t summed = -1;
    if (is_summed(op, value)) {
      summed = b.units;
      b.units += op.widths[value / 2];
    }
    bool added = false;
    for (int later = value + 1; op.skips && later < values; ++later) added = added || op.skips[later] == value;
    if (arena.base) b.summed[value] = summed, b.source[value] = added ? std::int32_t(sources) : -1;
    sources += added;
  }
  b.transposed = arena.take<T*>(op.layers);
  for (int l = 0; l < op.layers; ++l) {
    T* const packed = arena.take<T>(op.widths[l] * op.widths[l + 1]);
    if (arena.base) b.transposed[l] = packed;
    b.product_count += op.widths[l] * op.widths[l + 1];
    const std::int64_t turned =
        whole_vectors<T>(turns_adjoints<T>(op.widths[l + 1], op.widths[l]) ? op.widths[l + 1] : op.widths[l]);
    most_turned = turned > most_turned ? turned : most_turned;
  }
  const std::int64_t bytes = std::int64_t(sizeof(double)) * (b.product_count + b.sum_count() + b.end_count());
  const std::int64_t fitting = kSlotBytes / (bytes > 0 ? bytes : 1);
  const std::int64_t shares = blocks_of(tasks_of(op), kTasksPerSlot);
  b.slots = at_most(at_most(shares, kMostSlots), fitting > kLeastSlots ? fitting : kLeastSlots);
  b.sums = arena.take<Slot>(b.slots);
  for (std::int64_t n = 0; n < b.slots; ++n) {
    Slot slot;
    slot.products = arena.take<double>(b.product_count);
    slot.sums = arena.take<double>(b.sum_count());
    slot.ends = arena.take<double>(b.end_count());
    if (arena.base) b.sums[n] = slot;
  }
  b.adjoint = arena.take<double>(op.samples * plan.widest);
  b.before = arena.take<double>(op.samples * plan.widest);
  b.inputs = arena.take<double>(op.samples * plan.widest);
  b.pending = arena.take<double>(sources * op.samples * plan.widest);
  const std::int64_t interior = op.nodes.interior, panel = plan.widest * kBlockColumns;
  b.scratch = arena.take<BackwardScratch<T>>(threads);
  for (int thread = 0; thread < threads; ++thread) {
    BackwardScratch<T> s;
    s.panels = arena.take<V*>(op.layers + 1);
    s.slopes = arena.take<V*>(op.layers + 1);
    s.products = arena.take<T*>(op.layers);
    for (int l = 0; l <= op.layers; ++l) {
      const std::int64_t size = op.widths[l] * interior;
      V* const kept = arena.take<V>(size);
      const bool bends = op.activations[l].kind != ActivationKind::kIdentity;
      V* const slopes = arena.take<V>(bends ? size : 0);
      T* const products = arena.take<T>(l < op.layers ? outer_size<T>(op.widths[l + 1], op.widths[l]) : 0);
      if (!arena.base) continue;
      s.panels[l] = kept, s.slopes[l] = slopes;
      if (l < op.layers) s.products[l] = products;
    }
    s.adjoint = arena.take<V>(panel);
    s.before = arena.take<V>(panel);
    s.pending = arena.take<V>(sources * panel);
    s.waits = arena.take<bool>(values);
    s.along = arena.take<V>(plan.outputs);
    s.across = arena.take<V>(plan.outputs);
    s.first_sums = arena.take<V>(b.units + plan.outputs);
    s.step_sums = arena.take<V>(b.units + plan.outputs);
    s.second_sums = arena.take<V>(b.units + plan.outputs);
    s.turned = arena.take<T>(most_turned * kBlockColumns * kLanes<T>);
    if (arena.base) b.scratch[thread] = s;
  }
  return b;
}

/// Weights [rows][depth], scaled by row if `factors` is not null, as pack_weights() packs their transpose.
template <class T>
void pack_transposed(const T* weights, std::int64_t rows, std::int64_t depth, const T* factors, T* packed) {
  for (std::int64_t begin = 0; begin < depth; begin += kBlockRows) {
    const std::int64_t height = at_most(kBlockRows, depth - begin);
    for (std::int64_t row = 0; row < rows; ++row) {
      const T factor = factors ? factors[row] : T(1);
      for (std::int64_t n = 0; n < height; ++n) *packed++ = weights[row * depth + begin + n] * factor;
    }
  }
}

// ---- forward ----

/// A part of the nodes: parts are of nearly equal size, as in path_moments().
struct Part {
  int begin, columns;
  Part(int interior, int part) {
    const int parts = int(blocks_of(interior, kBlockColumns));
    begin = int(std::int64_t(interior) * part / parts);
    columns = int(std::int64_t(interior) * (part + 1) / parts) - begin;
  }
};

/// The first layer's residuals and slopes.
template <class T>
void first_residuals(const Plan<T>& plan, const Scratch<T>& s, const Ends<T>& ends, std::int64_t i, Part part, Vector<T>* panel,
                     Vector<T>* slopes) {
  if (plan.separable) return separated<true>(plan, s, ends, i, part.begin, part.columns, panel, slopes);
  const Layer<T>& layer = plan.layers[0];
  with_kind(layer.activation.kind, [&](auto kind) {
    constexpr ActivationKind kKind = kind.value;
    if constexpr (kKind == ActivationKind::kIdentity) {
      residuals<T, kKind, false>(ends, layer.activation, plan.t + part.begin, part.columns, panel);
    } else {
      residuals<T, kKind, false, true>(ends, layer.activation, plan.t + part.begin, part.columns, panel, slopes);
    }
  });
}

/// path_moments() with all residuals and slopes kept.
template <class T>
void kept_moments(const Plan<T>& plan, const Scratch<T>& s, const BackwardScratch<T>& kept, std::int64_t i,
                  std::int64_t block) {
  const PathConnectivity<T>& op = plan.op;
  for (std::int64_t k = 0; k < plan.outputs; ++k) s.moments[k] = Moments<Vector<T>>{};
  for (int n = 0; n < int(blocks_of(op.nodes.interior, kBlockColumns)); ++n) {
    const Part part(op.nodes.interior, n);
    const T *t = plan.t + part.begin, *w = plan.w + part.begin, *w_t = plan.w_t + part.begin;
    const Vector<T>* last = nullptr;
    std::int64_t before = 0;  // number of units in earlier layers
    for (int l = 0; l <= op.layers; ++l) {
      const Layer<T>& layer = plan.layers[l];
      const Ends<T> ends = ends_of(plan, s, l, before, block);
      const std::int64_t at = layer.width * part.begin, size = layer.width * part.columns;
      Vector<T>*panel = kept.panels[l] + at, *slopes = kept.slopes[l] + at;
      if (l == 0) {
        first_residuals(plan, s, ends, i, part, panel, slopes);
      } else {
        multiply_layer<T>(layer.packed, layer.width, plan.layers[l - 1].width, part.columns, last, panel,
                          l == op.layers && plan.ends_in_product() ? s.moments : nullptr, w, w_t);
        join_residuals(plan, s, 2 * l, panel, size);
        with_kind(layer.activation.kind, [&](auto kind) {
          if constexpr (kind.value != ActivationKind::kIdentity) {
            residuals<T, kind.value, true, true>(ends, layer.activation, t, part.columns, panel, slopes);
          }
        });
      }
      join_residuals(plan, s, 2 * l + 1, panel, size);
      last = panel;
      before += layer.width;
    }
    for (std::int64_t k = 0; k < plan.outputs && !plan.ends_in_product(); ++k) {
      for (int c = 0; c < part.columns; ++c) {
        add_moments(s.moments[k], last[k * part.columns + c] * plan.scale[k], w[c], w_t[c]);
      }
    }
  }
}

}  // namespace
}  // namespace lmn
