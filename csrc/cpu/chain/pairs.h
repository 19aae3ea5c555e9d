// The pairs: r2 along the paths from one first sample to a vector of second samples, one lane per second sample. A few nodes
// are handled at a time. The chord residuals of the hidden units form a panel in L1. The packed weights carry the panel from
// layer to layer. The last layer's products go from the accumulators straight into the moments of each output.
// path_connectivity and hermite_connectivity call connectivity_on().
#pragma once
#include "samples.h"

namespace lmn {
namespace {

/// Adds the residuals of the skip input, if the value has one, to the value's residuals. Keeps the sum if a later value needs
/// it.
template <class T>
void join_residuals(const Plan<T>& plan, const Scratch<T>& s, int value, Vector<T>* panel, std::int64_t size) {
  if (!plan.op.skips) return;
  const std::int64_t slot = plan.widest * kBlockColumns;
  if (plan.added[value] >= 0) {
    const Vector<T>* earlier = s.kept + plan.added[value] * slot;
    for (std::int64_t n = 0; n < size; ++n) panel[n] += earlier[n];
  }
  if (plan.kept[value] >= 0) memcpy(s.kept + plan.kept[value] * slot, panel, std::size_t(size) * sizeof(Vector<T>));
}

/// A layer at both ends of the paths from s's first sample to the block's lanes. before: number of units in earlier layers.
template <class T>
Ends<T> ends_of(const Plan<T>& plan, const Scratch<T>& s, int l, std::int64_t before, std::int64_t block) {
  const Layer<T>& layer = plan.layers[l];
  const std::int64_t start = block * layer.width * kLanes<T>;
  return {s.first_z + before, s.first_a + before, s.first_slope ? s.first_slope + before : nullptr,
          layer.z + start,    layer.a + start,    layer.slope ? layer.slope + start : nullptr,
          layer.width};
}

/// Moments of all outputs along the paths from sample i to the block's lanes.
template <class T>
void path_moments(const Plan<T>& plan, const Scratch<T>& s, std::int64_t i, std::int64_t block) {
  const PathConnectivity<T>& op = plan.op;
  const int interior = op.nodes.interior;
  const int node_blocks = int(blocks_of(interior, kBlockColumns));
  for (std::int64_t k = 0; k < plan.outputs; ++k) s.moments[k] = Moments<Vector<T>>{};
  for (int part = 0; part < node_blocks; ++part) {  // parts of nearly equal size: a single node would waste registers
    const int begin = int(std::int64_t(interior) * part / node_blocks);
    const int columns = int(std::int64_t(interior) * (part + 1) / node_blocks) - begin;
    const T* t = plan.t + begin;
    const T *w = plan.w + begin, *w_t = plan.w_t + begin;
    Vector<T>*panel = s.panel, *next = s.next_panel;
    std::int64_t before = 0;  // number of units in earlier layers
    for (int l = 0; l <= op.layers; ++l) {
      const Layer<T>& layer = plan.layers[l];
      const Ends<T> ends = ends_of(plan, s, l, before, block);
      if (l == 0 && plan.separable) {
        const T* first_table = s.first_table + i % kTaskRows * layer.width * interior + begin;
        with_kind(layer.activation.kind, [&](auto kind) {
          constexpr ActivationKind kKind = kind.value;
          if constexpr (is_separable(kKind)) {
            with_size<kBlockColumns>(columns, [&](auto count) {
              constexpr int kC = decltype(count)::value;
              separated_residuals<T, kKind, kC>(ends, t, first_table, s.second_table + begin, interior, panel);
            });
          }
        });
      } else if (l == 0) {
        with_kind(layer.activation.kind,
                  [&](auto kind) { residuals<T, kind.value, false>(ends, layer.activation, t, columns, panel); });
      } else {
        const std::int64_t depth = plan.layers[l - 1].width;
        if (l == op.layers && plan.ends_in_product()) {
          multiply_layer<T>(layer.packed, layer.width, depth, columns, panel, nullptr, s.moments, w, w_t);
          break;
        }
        multiply_layer<T>(layer.packed, layer.width, depth, columns, panel, next, nullptr, nullptr, nullptr);
        join_residuals(plan, s, 2 * l, next, layer.width * columns);
        if (layer.activation.kind != ActivationKind::kIdentity) {
          with_kind(layer.activation.kind,
                    [&](auto kind) { residuals<T, kind.value, true>(ends, layer.activation, t, columns, next); });
        }
        Vector<T>* const swapped = panel;
        panel = next;
        next = swapped;
      }
      join_residuals(plan, s, 2 * l + 1, panel, layer.width * columns);
      if (l == op.layers) {
        for (std::int64_t k = 0; k < plan.outputs; ++k) {
          for (int c = 0; c < columns; ++c) {
            add_moments(s.moments[k], panel[k * columns + c] * plan.scale[k], w[c], w_t[c]);
          }
        }
      }
      before += layer.width;
    }
  }
}

/// Moments as path_moments() computes them, but of the stencil's polynomials.
template <class T>
void polynomial_moments(const Plan<T>& plan, const Scratch<T>& s, std::int64_t block) {
  using V = Vector<T>;
  const PathConnectivity<T>& op = plan.op;
  const Stencil<T>& stencil = plan.stencil;
  const int size = stencil.size;
  const V* values = s.values;
  for (int begin = 0; begin < size; begin += kBlockColumns) {
    const int columns = int(at_most(kBlockColumns, size - begin));
    V *panel = s.panel, *next = s.next_panel;
    std::int64_t before = 0;
    for (int l = 0; l <= op.layers; ++l) {
      const Layer<T>& layer = plan.layers[l];
      const Ends<T> ends = ends_of(plan, s, l, before, block);
      if (l == 0) {
        with_kind(layer.activation.kind,
                  [&](auto kind) { stencil_residuals<T, kind.value, false>(ends, layer.activation, begin, columns, panel); });
      } else {
        const std::int64_t depth = plan.layers[l - 1].width;
        multiply_layer<T>(layer.packed, layer.width, depth, columns, panel, next, nullptr, nullptr, nullptr);
        join_residuals(plan, s, 2 * l, next, layer.width * columns);
        if (layer.activation.kind != ActivationKind::kIdentity) {
          with_kind(layer.activation.kind,
                    [&](auto kind) { stencil_residuals<T, kind.value, true>(ends, layer.activation, begin, columns, next); });
        }
        V* const swapped = panel;
        panel = next;
        next = swapped;
      }
      join_residuals(plan, s, 2 * l + 1, panel, layer.width * columns);
      before += layer.width;
    }
    if (plan.ends_in_product() && columns == size) {  // the scale is in the weights
      values = panel;
      break;
    }
    for (std::int64_t k = 0; k < plan.outputs; ++k) {
      const T scale = plan.ends_in_product() ? T(1) : plan.scale[k];
      for (int c = 0; c < columns; ++c) s.values[k * size + begin + c] = panel[k * columns + c] * scale;
    }
  }
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    const V* value = values + k * size;
    s.moments[k] = size == 2 ? stencil_moments<2>(stencil, value) : stencil_moments<3>(stencil, value);
  }
}

// ---- tables of exponentials ----

template <class T>
void fill_second_table(const Plan<T>& plan, const Scratch<T>& s, std::int64_t block) {
  const T factor = exponent_factor<T>(plan.op.activations[0].kind);
  const int interior = plan.op.nodes.interior;
  const Layer<T>& layer = plan.layers[0];
  for (std::int64_t unit = 0; unit < layer.width; ++unit) {
    const Vector<T> z = load<Vector<T>>(layer.z + (block * layer.width + unit) * kLanes<T>);
    for (int m = 0; m < interior; ++m) s.second_table[unit * interior + m] = exp(z * (-factor * plan.t[m]));
  }
}

template <class T>
void fill_first_table(const Plan<T>& plan, const Scratch<T>& s, std::int64_t begin, std::int64_t end) {
  using V = Vector<T>;
  const T factor = exponent_factor<T>(plan.op.activations[0].kind);
  const int interior = plan.op.nodes.interior;
  T* row = s.first_table;
  for (const T* z = plan.op.z + begin * plan.op.widths[0]; z < plan.op.z + end * plan.op.widths[0]; ++z) {
    for (int m = 0; m < interior; m += kLanes<T>) {
      const std::int64_t count = at_most(kLanes<T>, interior - m);
      const V t = load_partial<V>(plan.t + m, count);
      const V value = exp(*z * factor * (t - 1));
      memcpy(row, &value, std::size_t(count) * sizeof(T));
      row += count;
    }
  }
}

/// 1 in each lane whose sample is close to the first sample (see kCloseSamples), 0 in the other lanes.
template <class T>
Vector<T> close_samples(const Plan<T>& plan, const Scratch<T>& s, std::int64_t block) {
  using V = Vector<T>;
  const Layer<T>& layer = plan.layers[0];
  const T* zj = layer.z + block * layer.width * kLanes<T>;
  V distance{}, first{}, second{};
  for (std::int64_t unit = 0; unit < layer.width; ++unit) {
    const V z_first = splat<V>(s.first_z[unit]), z_second = load<V>(zj + unit * kLanes<T>);
    distance = larger(distance, absolute(z_second - z_first));
    first = larger(first, absolute(z_first));
    second = larger(second, absolute(z_second));
  }
  return distance <= larger(first, second) * T(kCloseSamples) ? splat<V>(T(1)) : V{};
}

// ---- entries ----

template <class T>
void finish_pairs(const Plan<T>& plan, Scratch<T>& s, std::int64_t i, std::int64_t block) {
  using V = Vector<T>;
  const PathConnectivity<T>& op = plan.op;
  const T *first_y = plan.row_y + i * plan.outputs, *first_y_low = plan.row_y_low + i * plan.outputs;
  const T* first_rounding = plan.row_rounding + i * plan.outputs;
  const std::int64_t start_j = block * plan.outputs * kLanes<T>;
  // An activation that is never 0 can underflow. An output near 0 at an end has underflowed, or nearly so.
  const T vanishing = never_zero(plan.last().activation.kind) ? Vanishing<T>::value : T(0);
  CompensatedSum<V> nonlinear;
  V constants{}, unresolved{};
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    const std::int64_t at_j = start_j + k * kLanes<T>;
    const V first = splat<V>(first_y[k]), second = load<V>(plan.y + at_j);
    const V rounding = load<V>(plan.rounding + at_j);
    const V magnitude = larger(absolute(first), absolute(second));
    const V chord = (second - first) + (load<V>(plan.y_low + at_j) - first_y_low[k]);
    const V rounding_squared = fma(rounding, rounding, splat<V>(first_rounding[k] * first_rounding[k]));
    const Share<V> share =
        share_of_output<V, T>(chord, s.moments[k], magnitude, V{}, rounding_squared, T(op.nodes.variance_t), Epsilon<T>::value);
    nonlinear.add(share.nonlinear);
    constants += share.constant;
    unresolved += share.unresolved;
    const V largest_rounding = larger(splat<V>(first_rounding[k]), rounding);
    unresolved += share.constant * hides_rounding<V, T>(largest_rounding, plan.scale[k], Epsilon<T>::value);
    const V least = splat<V>(vanishing * plan.scale[k]);
    unresolved += smaller(absolute(first), absolute(second)) < least ? splat<V>(T(1)) : V{};
  }
  // Outputs of close samples may be equal to rounding and still bend between the samples. Only float32 has this rule: no
  // dtype wider than float64 could measure the pair again.
  if (sizeof(T) == 4 && any<V>(constants > V{})) {
    unresolved += constants > V{} ? close_samples(plan, s, block) : V{};
  }
  const V r2 = 1 - nonlinear.sum / T(plan.outputs);
  const V entries = unresolved > V{} ? splat<V>(T(kUnresolved)) : r2;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const std::int64_t j = block * kLanes<T> + lane;
    if (j <= i || j >= op.samples) continue;
    op.connectivity[i * op.samples + j] = op.connectivity[j * op.samples + i] = entries[lane];
    const bool resolved = !(unresolved[lane] > 0);
    s.counts[0] += resolved ? std::int64_t(constants[lane]) : 0;
    s.counts[1] += !resolved;
  }
}

template <bool kStencil, class T>
void run_task(const Plan<T>& plan, Scratch<T>& s, std::int64_t task, std::int64_t block, Tasks& tasks) {
  constexpr std::int64_t kRowsBetween = 8;  // between two looks at the clock: a task of a wide, deep chain may take seconds
  const std::int64_t begin = task * kTaskRows, end = at_most(begin + kTaskRows, plan.op.samples);
  if (plan.separable) {
    fill_second_table(plan, s, block);
    if (s.table_task != task) fill_first_table(plan, s, begin, end);
    s.table_task = task;
  }
  for (std::int64_t i = begin; i < at_most(end, (block + 1) * kLanes<T>); ++i) {
    if (i % kRowsBetween == 0 && !tasks.go_on()) return;
    s.first_z = plan.row_z + i * plan.total_width;
    s.first_a = plan.row_a + i * plan.total_width;
    s.first_slope = kStencil ? plan.row_slope + i * plan.total_width : nullptr;
    if constexpr (kStencil) {
      polynomial_moments(plan, s, block);
    } else {
      path_moments(plan, s, i, block);
    }
    finish_pairs(plan, s, i, block);
  }
}

template <bool kStencil, class T>
void connectivity_on(const PathConnectivity<T>& op, const Stencil<T>& stencil, int threads) {
  Arena arena{static_cast<char*>(op.workspace)};
  Plan<T> plan = make_plan(op, stencil, arena, threads);
  for (int m = 0; m < op.nodes.interior; ++m) {
    plan.t[m] = T(op.nodes.t[m]);
    plan.w[m] = T(op.nodes.weights[m]);
    plan.w_t[m] = T(op.nodes.weights[m] * (op.nodes.t[m] - op.nodes.mean_t));
  }
  for (int l = 1; l <= op.layers; ++l) {
    pack_weights(op.weights[l - 1], op.widths[l], op.widths[l - 1], plan.layers[l].packed);
  }

  // A task is kTaskRows first samples x one block of lanes, on or above the diagonal. Tasks come row after row, so a thread
  // mostly keeps its table of first samples. Every pair gives the same bits on any thread.
  static_assert(kTaskRows % kLanes<T> == 0);
  constexpr std::int64_t kBlocksPerTask = kTaskRows / kLanes<T>;
  const std::int64_t task_rows = blocks_of(op.samples, kTaskRows);
  const std::int64_t count = task_rows * plan.lane_blocks - kBlocksPerTask * (task_rows * (task_rows - 1) / 2);
  Tasks tasks(op.watch, count);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t block = 0; block < plan.lane_blocks; ++block) {
    if (tasks.go_on()) forward_block(plan, block);
  }
  if (!tasks.go_on()) return;
  scale_outputs(plan);
#pragma omp parallel for num_threads(threads) if (worth_threads(op.samples * plan.total_width))
  for (std::int64_t i = 0; i < op.samples; ++i) fill_rows(plan, i);
  if (plan.separable) plan.separable = separates(op.activations[0].kind, op.z, op.samples * op.widths[0]);
  for (std::int64_t i = 0; i < op.samples; ++i) op.connectivity[i * (op.samples + 1)] = T(1);
#pragma omp parallel num_threads(threads)
  {
    Scratch<T>& scratch = plan.scratch[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
    for (std::int64_t n = 0; n < count; ++n) {
      if (!tasks.go_on()) continue;
      std::int64_t row = 0, rest = n;
      while (rest >= plan.lane_blocks - row * kBlocksPerTask) rest -= plan.lane_blocks - row++ * kBlocksPerTask;
      run_task<kStencil>(plan, scratch, row, row * kBlocksPerTask + rest, tasks);
      tasks.count_one();
    }
  }
  for (int n = 0; n < 2; ++n) {
    op.counts[n] = 0;
    for (int thread = 0; thread < threads; ++thread) op.counts[n] += plan.scratch[thread].counts[n];
  }
}

}  // namespace
}  // namespace lmn
