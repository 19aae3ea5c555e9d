// The pairs: r2 along the paths from one first sample to a vector of second samples, one lane per second sample; among the
// samples of one vector, a triangle of pairs, one lane per pair; or along the paths of a list of pairs, one lane per pair.
// A few nodes are handled at a time. The chord residuals of the hidden units form a panel in L1. The packed weights carry the
// panel from layer to layer. The last layer's products go from the accumulators straight into the moments of each output.
// path_connectivity and hermite_connectivity call connectivity_on().
#pragma once
#include "tables.h"

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

/// A layer at both ends of the paths: from s's first sample to the block's lanes, or of the lanes' own pairs. before: number of
/// units in earlier layers.
template <class T>
Ends<T> ends_of(const Plan<T>& plan, const Scratch<T>& s, int l, std::int64_t before, std::int64_t block) {
  const Layer<T>& layer = plan.layers[l];
  if (s.paired) {
    const std::int64_t at = before * kLanes<T>;
    T* const* values = s.gathered;
    return {values[0] + at, values[1] + at, values[2] + at, values[3] + at, values[4] + at, values[5] + at, layer.width, true};
  }
  const std::int64_t start = block * layer.width * kLanes<T>;
  return {s.first_z + before,
          s.first_a + before,
          s.first_slope ? s.first_slope + before : nullptr,
          layer.z + start,
          layer.a + start,
          layer.slope ? layer.slope + start : nullptr,
          layer.width,
          false};
}

/// Moments of all outputs along the paths from sample i to the block's lanes, or of the lanes' own pairs.
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
        separated<false>(plan, s, ends, i, begin, columns, panel, static_cast<Vector<T>*>(nullptr));
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

/// 1 in each lane whose two samples are close (see kCloseSamples), 0 in the other lanes.
template <class T>
Vector<T> close_samples(const Plan<T>& plan, const Scratch<T>& s, std::int64_t block) {
  using V = Vector<T>;
  const Ends<T> ends = ends_of(plan, s, 0, 0, block);
  V distance{}, first{}, second{};
  for (std::int64_t unit = 0; unit < ends.width; ++unit) {
    const V z_first = ends.first(ends.first_z, unit), z_second = load<V>(ends.second_z + unit * kLanes<T>);
    distance = larger(distance, absolute(z_second - z_first));
    first = larger(first, absolute(z_first));
    second = larger(second, absolute(z_second));
  }
  return distance <= larger(first, second) * T(kCloseSamples) ? splat<V>(T(1)) : V{};
}

// ---- entries ----

/// The scaled outputs at both ends of the paths.
template <class T>
struct OutputEnds {
  const T *first_y, *first_y_low, *first_rounding;     // [outputs], or [outputs][lanes] if paired
  const T *second_y, *second_y_low, *second_rounding;  // [outputs][lanes]
  bool paired;

  OutputEnds(const Plan<T>& plan, const Scratch<T>& s, std::int64_t i, std::int64_t block) : paired(s.paired) {
    if (paired) {
      T* const* ends = s.gathered_ends;
      first_y = ends[0], first_y_low = ends[1], first_rounding = ends[2];
      second_y = ends[3], second_y_low = ends[4], second_rounding = ends[5];
    } else {
      const std::int64_t at = i * plan.outputs, start = block * plan.outputs * kLanes<T>;
      first_y = plan.row_y + at, first_y_low = plan.row_y_low + at, first_rounding = plan.row_rounding + at;
      second_y = plan.y + start, second_y_low = plan.y_low + start, second_rounding = plan.rounding + start;
    }
  }
  Vector<T> first(const T* values, std::int64_t k) const { return first_end<T>(values, k, paired); }
  Vector<T> second(const T* values, std::int64_t k) const { return load<Vector<T>>(values + k * kLanes<T>); }
};

/// The entries of the lanes' pairs.
template <class T>
struct Entries {
  Vector<T> r2, pooled, constants;
  Vector<T> unresolved;  // above 0 where a pair is not resolved; r2 and pooled are then kUnresolved
};

template <class T>
Entries<T> entries_of(const Plan<T>& plan, const Scratch<T>& s, std::int64_t i, std::int64_t block) {
  using V = Vector<T>;
  const PathConnectivity<T>& op = plan.op;
  const OutputEnds<T> ends(plan, s, i, block);
  // An activation that is never 0 can underflow. An output near 0 at an end has underflowed, or nearly so.
  const T vanishing = never_zero(plan.last().activation.kind) ? Vanishing<T>::value : T(0);
  CompensatedSum<V> nonlinear, bend, total;
  V constants{}, unresolved{};
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    const V first = ends.first(ends.first_y, k), second = ends.second(ends.second_y, k);
    const V first_rounding = ends.first(ends.first_rounding, k), rounding = ends.second(ends.second_rounding, k);
    const V magnitude = larger(absolute(first), absolute(second));
    const V chord = (second - first) + (ends.second(ends.second_y_low, k) - ends.first(ends.first_y_low, k));
    const V rounding_squared = fma(rounding, rounding, first_rounding * first_rounding);
    const Share<V> share = share_of_output<V, T>(chord, s.moments[k], magnitude, V{}, rounding_squared, T(op.nodes.variance_t),
                                                 Epsilon<T>::value, splat<V>(plan.stabiliser[k]));
    nonlinear.add(share.nonlinear);
    if (op.pooled) {
      bend.add(share.bend * plan.pooling[k]);
      total.add(share.total * plan.pooling[k]);
    }
    constants += share.constant;
    unresolved += share.unresolved;
    const V largest_rounding = larger(first_rounding, rounding);
    unresolved += share.constant * hides_rounding<V, T>(largest_rounding, plan.scale[k], Epsilon<T>::value);
    const V least = splat<V>(vanishing * plan.scale[k]);
    unresolved += smaller(absolute(first), absolute(second)) < least ? splat<V>(T(1)) : V{};
  }
  // Outputs of close samples may be equal to rounding and still bend between the samples. Only float32 has this rule: no
  // dtype wider than float64 could measure the pair again. With a stabiliser the entry of a constant output is 0, but that of
  // equal samples is 1, and the function that measures unresolved pairs compares the samples.
  if ((sizeof(T) == 4 || op.stabiliser > 0) && any<V>(constants > V{})) {
    unresolved += constants > V{} ? close_samples(plan, s, block) : V{};
  }
  V pooled{};
  for (int lane = 0; op.pooled && lane < kLanes<T>; ++lane) {
    const T all = total.sum[lane];
    pooled[lane] = pooled_r2(bend.sum[lane], all, plan.pooled_stabiliser);
    if (pool_underflows(all, plan.pooled_stabiliser, std::int64_t(constants[lane]), plan.outputs)) unresolved[lane] = 1;
  }
  const V r2 = 1 - nonlinear.sum / T(plan.outputs), none = splat<V>(T(kUnresolved));
  return {unresolved > V{} ? none : r2, unresolved > V{} ? none : pooled, constants, unresolved};
}

/// Counts a pair whose entry is written.
template <class T>
void count_pair(const Entries<T>& entries, int lane, std::int64_t (&counts)[2]) {
  const bool resolved = !(entries.unresolved[lane] > 0);
  counts[0] += resolved ? std::int64_t(entries.constants[lane]) : 0;
  counts[1] += !resolved;
}

/// Writes the entries of row i and the lanes of a block.
template <class T>
void write_row(const Plan<T>& plan, Scratch<T>& s, std::int64_t i, std::int64_t block, const Entries<T>& entries) {
  const PathConnectivity<T>& op = plan.op;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const std::int64_t j = block * kLanes<T> + lane;
    if (j >= op.samples) break;
    op.connectivity[i * op.samples + j] = op.connectivity[j * op.samples + i] = entries.r2[lane];
    if (op.pooled) op.pooled[i * op.samples + j] = op.pooled[j * op.samples + i] = entries.pooled[lane];
    count_pair(entries, lane, s.counts);
  }
}

// ---- a list of pairs ----

/// Copies rows of `from`, one for each lane, into lanes. samples: of the lanes.
template <class T>
void gather(T* to, const T* from, std::int64_t width, const std::int64_t (&samples)[kLanes<T>]) {
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const T* const row = from + samples[lane] * width;
    for (std::int64_t n = 0; n < width; ++n) to[n * kLanes<T> + lane] = row[n];
  }
}

/// Gathers the samples of the pairs from `begin` on, one pair in each lane. Lanes beyond the last pair repeat the last pair.
template <bool kStencil, class T>
void gather_ends(const Plan<T>& plan, Scratch<T>& s, std::int64_t begin) {
  const PathConnectivity<T>& op = plan.op;
  for (int end = 0; end < 2; ++end) {
    std::int64_t samples[kLanes<T>];
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      samples[lane] = (end == 0 ? op.first : op.second)[at_most(begin + lane, op.pairs - 1)];
    }
    const T* const values[] = {plan.row_z, plan.row_a, plan.row_slope};
    for (int n = 0; n < (kStencil ? 3 : 2); ++n) gather(s.gathered[3 * end + n], values[n], plan.total_width, samples);
    const T* const outputs[] = {plan.row_y, plan.row_y_low, plan.row_rounding};
    for (int n = 0; n < 3; ++n) gather(s.gathered_ends[3 * end + n], outputs[n], plan.outputs, samples);
  }
}

/// Writes the entries of the pairs from `begin` on.
template <class T>
void write_list(const Plan<T>& plan, Scratch<T>& s, std::int64_t begin, const Entries<T>& entries) {
  const PathConnectivity<T>& op = plan.op;
  for (int lane = 0; lane < kLanes<T> && begin + lane < op.pairs; ++lane) {
    op.connectivity[begin + lane] = entries.r2[lane];
    if (op.pooled) op.pooled[begin + lane] = entries.pooled[lane];
    count_pair(entries, lane, s.counts);
  }
}

template <bool kStencil, class T>
void run_list(const Plan<T>& plan, Scratch<T>& s, std::int64_t begin) {
  gather_ends<kStencil>(plan, s, begin);
  if constexpr (kStencil) {
    polynomial_moments(plan, s, 0);
  } else {
    path_moments(plan, s, 0, 0);
  }
  write_list(plan, s, begin, entries_of(plan, s, 0, 0));
}

// ---- all pairs ----

/// Makes sample i the first sample of the paths.
template <bool kStencil, class T>
void take_row(const Plan<T>& plan, Scratch<T>& s, std::int64_t i) {
  s.paired = false;
  s.first_z = plan.row_z + i * plan.total_width;
  s.first_a = plan.row_a + i * plan.total_width;
  s.first_slope = kStencil ? plan.row_slope + i * plan.total_width : nullptr;
}

/// A task: some first samples x one block of lanes, on or above the diagonal. Tasks come row after row, so a thread mostly
/// keeps its table of first samples. Every pair gives the same bits on any thread.
struct Tile {
  std::int64_t rows = 0, block = 0;  // rows: the number of the block of first samples

  template <class T>
  Tile(const Plan<T>& plan, std::int64_t task) {
    static_assert(kFewestRows % kLanes<T> == 0);
    const std::int64_t blocks = plan.rows / kLanes<T>;  // of lanes, in the first samples of a task
    while (task >= plan.lane_blocks - rows * blocks) task -= plan.lane_blocks - rows++ * blocks;
    block = rows * blocks + task;
  }
  /// The rows of the task whose samples come before those of the block: each has a pair in every lane.
  template <class T>
  std::int64_t end(const Plan<T>& plan) const {
    return at_most(at_most((rows + 1) * plan.rows, block * kLanes<T>), plan.op.samples);
  }
  /// Whether the block's own samples are among the task's first samples: their pairs are a triangle.
  template <class T>
  bool has_triangle(const Plan<T>& plan) const {
    return block * kLanes<T> < (rows + 1) * plan.rows;
  }
};

/// Fills the tables of exponentials for a task.
template <class T>
void begin_tile(const Plan<T>& plan, Scratch<T>& s, Tile tile) {
  if (!plan.separable) return;
  const std::int64_t begin = tile.rows * plan.rows;
  fill_second_table(plan, s, tile.block);
  if (tile.has_triangle(plan)) fill_lanes_table(plan, s, tile.block);
  if (s.table_rows == tile.rows || tile.end(plan) == begin) return;
  fill_first_table(plan, s, begin, at_most(begin + plan.rows, plan.op.samples));
  s.table_rows = tile.rows;
}

/// Makes the lanes' pairs those of a step among the block's samples, see Pairing.
template <bool kStencil, class T>
void take_step(const Plan<T>& plan, Scratch<T>& s, std::int64_t block, std::int64_t samples, std::int64_t step) {
  using V = Vector<T>;
  s.paired = true;
  s.pairing = Pairing<T>(samples, step);
  const Bits<V> lower = s.pairing.lower, upper = s.pairing.upper;
  const auto spread = [&](const T* from, std::int64_t width, T* first, T* second) {
    from += block * width * kLanes<T>;
    for (std::int64_t n = 0; n < width * kLanes<T>; n += kLanes<T>) {
      const V own = load<V>(from + n);
      store<V>(first + n, permuted(own, lower));
      store<V>(second + n, permuted(own, upper));
    }
  };
  std::int64_t at = 0;
  for (int l = 0; l <= plan.op.layers; ++l) {
    const Layer<T>& layer = plan.layers[l];
    spread(layer.z, layer.width, s.gathered[0] + at, s.gathered[3] + at);
    spread(layer.a, layer.width, s.gathered[1] + at, s.gathered[4] + at);
    if (kStencil) spread(layer.slope, layer.width, s.gathered[2] + at, s.gathered[5] + at);
    at += layer.width * kLanes<T>;
  }
  const T* const outputs[] = {plan.y, plan.y_low, plan.rounding};
  for (int n = 0; n < 3; ++n) spread(outputs[n], plan.outputs, s.gathered_ends[n], s.gathered_ends[3 + n]);
}

/// Writes the entries of a step among the samples from `start` on.
template <class T>
void write_step(const Plan<T>& plan, Scratch<T>& s, std::int64_t start, const Entries<T>& entries) {
  const PathConnectivity<T>& op = plan.op;
  for (int lane = 0; s.pairing.has(lane) && lane < kLanes<T>; ++lane) {
    const std::int64_t i = start + s.pairing.lower[lane], j = start + s.pairing.upper[lane];
    op.connectivity[i * op.samples + j] = op.connectivity[j * op.samples + i] = entries.r2[lane];
    if (op.pooled) op.pooled[i * op.samples + j] = op.pooled[j * op.samples + i] = entries.pooled[lane];
    count_pair(entries, lane, s.counts);
  }
}

/// The number of tasks: tiles, or vectors of pairs.
template <class T>
std::int64_t tasks_of(const PathConnectivity<T>& op) {
  if (op.first) return blocks_of(op.pairs, kLanes<T>);
  const std::int64_t rows = blocks_of(op.samples, task_rows(op.samples)), blocks = task_rows(op.samples) / kLanes<T>;
  return rows * blocks_of(op.samples, kLanes<T>) - blocks * (rows * (rows - 1) / 2);
}

template <bool kStencil, class T>
void run_tile(const Plan<T>& plan, Scratch<T>& s, Tile tile, Tasks& tasks) {
  constexpr std::int64_t kRowsBetween = 8;  // between two looks at the clock: a task of a wide, deep chain may take seconds
  const std::int64_t begin = tile.rows * plan.rows, end = tile.end(plan), block = tile.block;
  const auto entries = [&](std::int64_t i) {
    if constexpr (kStencil) {
      polynomial_moments(plan, s, block);
    } else {
      path_moments(plan, s, i, block);
    }
    return entries_of(plan, s, i, block);
  };
  begin_tile(plan, s, tile);
  for (std::int64_t i = begin; i < end; ++i) {
    if (i % kRowsBetween == 0 && !tasks.go_on()) return;
    take_row<kStencil>(plan, s, i);
    write_row(plan, s, i, block, entries(i));
  }
  if (!tile.has_triangle(plan) || !tasks.go_on()) return;
  const std::int64_t start = block * kLanes<T>, samples = at_most(kLanes<T>, plan.op.samples - start);
  for (std::int64_t step = 1; step <= samples / 2; ++step) {
    take_step<kStencil>(plan, s, block, samples, step);
    write_step(plan, s, start, entries(0));
  }
}

/// Fills what a plan holds of the network and of the samples. Returns false if the watch said stop.
template <class T>
bool fill_plan(Plan<T>& plan, int threads, Tasks& tasks) {
  const PathConnectivity<T>& op = plan.op;
  for (int m = 0; m < op.nodes.interior; ++m) {
    plan.t[m] = T(op.nodes.t[m]);
    plan.w[m] = T(op.nodes.weights[m]);
    plan.w_t[m] = T(op.nodes.weights[m] * (op.nodes.t[m] - op.nodes.mean_t));
  }
  for (int l = 1; l <= op.layers; ++l) {
    pack_weights(op.weights[l - 1], op.widths[l], op.widths[l - 1], plan.layers[l].packed);
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t block = 0; block < plan.lane_blocks; ++block) {
    if (tasks.go_on()) forward_block(plan, block);
  }
  if (!tasks.go_on()) return false;
  scale_outputs(plan);
#pragma omp parallel for num_threads(threads) if (worth_threads(op.samples * plan.total_width))
  for (std::int64_t i = 0; i < op.samples; ++i) fill_rows(plan, i);
  if (plan.separable) plan.separable = separates(op.activations[0].kind, op.z, op.samples * op.widths[0]);
  for (std::int64_t i = 0; !plan.lists() && i < op.samples; ++i) {
    op.connectivity[i * (op.samples + 1)] = T(1);
    if (op.pooled) op.pooled[i * (op.samples + 1)] = T(1);
  }
  return true;
}

/// Adds the counts of all threads.
template <class T>
void add_counts(const Plan<T>& plan, int threads) {
  for (int n = 0; n < 2; ++n) {
    plan.op.counts[n] = 0;
    for (int thread = 0; thread < threads; ++thread) plan.op.counts[n] += plan.scratch[thread].counts[n];
  }
}

template <bool kStencil, class T>
void connectivity_on(const PathConnectivity<T>& op, const Stencil<T>& stencil, int threads) {
  Arena arena{static_cast<char*>(op.workspace)};
  Plan<T> plan = make_plan(op, stencil, arena, threads);
  const std::int64_t count = tasks_of(op);
  Tasks tasks(op.watch, count);
  if (!fill_plan(plan, threads, tasks)) return;
#pragma omp parallel num_threads(threads)
  {
    Scratch<T>& scratch = plan.scratch[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
    for (std::int64_t n = 0; n < count; ++n) {
      if (!tasks.go_on()) continue;
      if (plan.lists()) {
        run_list<kStencil>(plan, scratch, n * kLanes<T>);
      } else {
        run_tile<kStencil>(plan, scratch, Tile(plan, n), tasks);
      }
      tasks.count_one();
    }
  }
  add_counts(plan, threads);
}

}  // namespace
}  // namespace lmn
