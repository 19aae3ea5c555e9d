// The gradient of the entries of a connectivity matrix: for one first sample and a vector of second samples, or a vector of
// pairs, the chain is run forward along the paths as in pairs.h, but with all residuals and slopes kept. The entries give the
// gradient in the outputs, which goes back layer by layer. csrc/ops.h says what is summed.
//
// The order of every sum is fixed. A task's sums over pairs are in T. They are added, in double, to the sums of the task's
// slot. A task's slot depends on its number alone, and the slots' sums are added in order, so the thread count changes no bit.
#pragma once
#include "at_samples.h"

namespace lmn {
namespace {

// ---- backward ----

/// P and Q of each output, csrc/ops.h. gradient: of the lanes' entries, 0 where an entry has no gradient.
template <class T>
void output_coefficients(const Plan<T>& plan, const Scratch<T>& s, const BackwardScratch<T>& own, std::int64_t i,
                         std::int64_t block, Vector<T> gradient) {
  using V = Vector<T>;
  const OutputEnds<T> ends(plan, s, i, block);
  const T variance_t = T(plan.op.nodes.variance_t);
  const bool pools = plan.op.pools;
  CompensatedSum<V> bend, total;
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    const V first = ends.first(ends.first_y, k), second = ends.second(ends.second_y, k);
    const V chord = (second - first) + (ends.second(ends.second_y_low, k) - ends.first(ends.first_y_low, k));
    const V magnitude = larger(absolute(first), absolute(second)), stabiliser = splat<V>(plan.stabiliser[k]);
    const Share<V> share =
        share_of_output<V, T>(chord, s.moments[k], magnitude, V{}, V{}, variance_t, Epsilon<T>::value, stabiliser);
    const V covariance = fma(chord, splat<V>(variance_t), s.moments[k].te);
    const V moves = share.constant > V{} ? V{} : gradient;
    if (pools) {  // the factors that all outputs share come below
      const V weight = moves * plan.pooling[k];
      own.along[k] = weight * covariance;
      own.across[k] = weight;
      bend.add(share.bend * plan.pooling[k]);
      total.add(share.total * plan.pooling[k]);
    } else {
      const V all = share.total + stabiliser;
      const V slope = all > V{} ? covariance / all : V{}, factor = moves * slope * T(2 / double(plan.outputs));
      own.along[k] = factor * fma(slope, s.moments[k].te, share.nonlinear);
      own.across[k] = factor * slope * variance_t;
    }
  }
  if (!pools) return;
  const V all = total.sum + plan.pooled_stabiliser;
  const V bent = all > V{} ? (bend.sum + plan.pooled_stabiliser) / all : V{}, straight = 1 - bent;
  const V factor = all > V{} ? 2 / all : V{};
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    own.along[k] = factor * fma(straight * s.moments[k].te, own.across[k], bent * own.along[k]);
    own.across[k] = factor * own.across[k] * (straight * variance_t);
  }
}

/// Exchanges the adjoints of a value with those that wait: adds those that wait for this value, and leaves all for the value
/// that was added to it.
template <class T>
void exchange(const Backward<T>& b, const Plan<T>& plan, const BackwardScratch<T>& own, int value, std::int64_t size,
              Vector<T>* adjoint) {
  using V = Vector<T>;
  if (!b.op.skips) return;
  const std::int64_t panel = plan.widest * kBlockColumns;
  if (b.source[value] >= 0 && own.waits[value]) {
    const V* waiting = own.pending + b.source[value] * panel;
    for (std::int64_t n = 0; n < size; ++n) adjoint[n] += waiting[n];
  }
  const int added = b.op.skips[value];
  if (added < 0) return;
  V* waiting = own.pending + b.source[added] * panel;
  for (std::int64_t n = 0; n < size; ++n) waiting[n] = own.waits[added] ? waiting[n] + adjoint[n] : adjoint[n];
  own.waits[added] = true;
}

/// Multiplies the adjoints by slopes, unless these are null, and adds their sums over the nodes. kKeeps: writes the products.
template <class T, int kC, bool kKeeps>
__attribute__((noinline)) void sum_adjoints(Vector<T>* adjoint, const Vector<T>* slopes, std::int64_t width, const T* t,
                                            Vector<T>* first_sums, Vector<T>* second_sums) {
  using V = Vector<T>;
  V near_first[kC], near_second[kC];
  for (int c = 0; c < kC; ++c) near_first[c] = splat<V>(1 - t[c]), near_second[c] = splat<V>(t[c]);
  for (std::int64_t unit = 0; unit < width; ++unit) {
    V first = first_sums[unit], second = second_sums[unit];
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) {
      V value = adjoint[unit * kC + c];
      if (slopes) value *= slopes[unit * kC + c];
      if (kKeeps && slopes) adjoint[unit * kC + c] = value;
      first = fma(value, near_first[c], first);
      second = fma(value, near_second[c], second);
    }
    first_sums[unit] = first, second_sums[unit] = second;
  }
}

/// `sum_adjoints` of a value, in this thread's sums.
template <class T>
void sum_value(const Backward<T>& b, const Plan<T>& plan, const BackwardScratch<T>& own, int value, Part part,
               const Vector<T>* slopes, Vector<T>* adjoint) {
  const std::int64_t at = b.summed[value], width = b.op.widths[value / 2];
  const auto sum = [&](auto keeps) {
    with_size<kBlockColumns>(part.columns, [&](auto count) {
      sum_adjoints<T, decltype(count)::value, decltype(keeps)::value == 1>(adjoint, slopes, width, plan.t + part.begin,
                                                                           own.first_sums + at, own.second_sums + at);
    });
  };
  if (value > 0) {
    sum(SizeConstant<1>{});
  } else {
    sum(SizeConstant<0>{});
  }
}

/// The adjoints of the outputs at a part of the nodes, in the units of the last product's weights.
template <class T>
void output_adjoints(const Plan<T>& plan, const Scratch<T>& s, const BackwardScratch<T>& own, Part part) {
  using V = Vector<T>;
  const T mean_t = T(plan.op.nodes.mean_t);
  const V* residual = own.panels[plan.op.layers] + plan.outputs * part.begin;
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    const T scale = plan.ends_in_product() ? T(1) : plan.scale[k];
    for (int c = 0; c < part.columns; ++c) {
      const V deviation = fma(residual[k * part.columns + c], splat<V>(scale), -s.moments[k].e);
      const V delta = own.along[k] * (plan.t[part.begin + c] - mean_t) - own.across[k] * deviation;
      own.adjoint[k * part.columns + c] = delta * (plan.w[part.begin + c] * scale);
    }
  }
}

/// The gradient in the outputs at both ends of the paths.
template <class T>
void add_end_adjoints(const Backward<T>& b, const Plan<T>& plan, const Scratch<T>& s, const BackwardScratch<T>& own) {
  using V = Vector<T>;
  const T mean_t = T(plan.op.nodes.mean_t);
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    const T scale = plan.ends_in_product() ? T(1) : plan.scale[k];
    const V mean = own.across[k] * s.moments[k].e;
    own.first_sums[b.units + k] += (mean - own.along[k] * mean_t) * (b.first_weight * scale);
    own.second_sums[b.units + k] += (mean + own.along[k] * (1 - mean_t)) * (b.last_weight * scale);
  }
}

/// Carries the adjoints of a part of the nodes back to the samples.
template <class T>
void go_back(const Backward<T>& b, const Plan<T>& plan, const Scratch<T>& s, const BackwardScratch<T>& own, Part part) {
  using V = Vector<T>;
  const PathConnectivity<T>& op = plan.op;
  for (int value = 0; value < 2 * (op.layers + 1); ++value) own.waits[value] = false;
  output_adjoints(plan, s, own, part);
  V *adjoint = own.adjoint, *before = own.before;
  for (int l = op.layers; l >= 0; --l) {
    const Layer<T>& layer = plan.layers[l];
    const std::int64_t size = layer.width * part.columns;
    const V* slopes = nullptr;
    if (layer.activation.kind != ActivationKind::kIdentity) {
      exchange(b, plan, own, 2 * l + 1, size, adjoint);
      if (b.summed[2 * l + 1] >= 0) sum_value(b, plan, own, 2 * l + 1, part, nullptr, adjoint);
      slopes = own.slopes[l] + layer.width * part.begin;
      if (op.skips) {  // otherwise the slopes are multiplied as the adjoints are summed
        for (std::int64_t n = 0; n < size; ++n) adjoint[n] *= slopes[n];
        slopes = nullptr;
      }
    }
    exchange(b, plan, own, 2 * l, size, adjoint);
    sum_value(b, plan, own, 2 * l, part, slopes, adjoint);
    if (l == 0) break;
    const std::int64_t width = op.widths[l - 1];
    const V* const residuals = own.panels[l - 1] + width * part.begin;
    if (turns_adjoints<T>(layer.width, width)) {
      turn<T>(adjoint, layer.width, part.columns, own.turned);
      add_outer<T>(residuals, width, own.turned, layer.width, part.columns, own.products[l - 1]);
    } else {
      turn<T>(residuals, width, part.columns, own.turned);
      add_outer<T>(adjoint, layer.width, own.turned, width, part.columns, own.products[l - 1]);
    }
    multiply_layer<T>(b.transposed[l - 1], width, layer.width, part.columns, adjoint, before, nullptr, nullptr, nullptr);
    V* const swapped = adjoint;
    adjoint = before;
    before = swapped;
  }
}

/// Runs the lanes' pairs forward and, if any has a gradient, back. Returns their entries.
template <class T>
Entries<T> differentiate(const Backward<T>& b, const Plan<T>& plan, const Scratch<T>& s, const BackwardScratch<T>& own,
                         std::int64_t i, std::int64_t block, Vector<T> gradient) {
  using V = Vector<T>;
  kept_moments(plan, s, own, i, block);
  const Entries<T> entries = entries_of(plan, s, i, block);
  gradient = entries.unresolved > V{} ? V{} : gradient;
  if (!any<V>(gradient != V{})) return entries;
  output_coefficients(plan, s, own, i, block, gradient);
  add_end_adjoints(b, plan, s, own);
  for (int n = 0; n < int(blocks_of(plan.op.nodes.interior, kBlockColumns)); ++n) {
    go_back(b, plan, s, own, Part(plan.op.nodes.interior, n));
  }
  return entries;
}

// ---- tasks ----

/// The values that are summed, and the outputs' ends: where each has its rows in a slot.
template <class T, class Function>
void each_sum(const Backward<T>& b, const Slot& slot, const Function& function) {
  for (int value = 0; value < 2 * (b.op.layers + 1); ++value) {
    if (b.summed[value] < 0) continue;
    function(b.summed[value], b.op.widths[value / 2], slot.sums + b.summed[value] * b.op.samples);
  }
  function(b.units, b.op.widths[b.op.layers], slot.ends);
}

/// Adds sums [units][lanes] to the rows of the lanes' samples. count: of the lanes that have one.
template <class T, class SampleOf>
void scatter(const Backward<T>& b, const Slot& slot, const Vector<T>* sums, int count, const SampleOf& sample_of) {
  each_sum(b, slot, [&](std::int64_t from, std::int64_t width, double* rows) {
    for (int lane = 0; lane < count; ++lane) {
      double* const row = rows + sample_of(lane) * width;
      for (std::int64_t unit = 0; unit < width; ++unit) row[unit] += double(sums[from + unit][lane]);
    }
  });
}

template <class T>
void clear(Vector<T>* sums, std::int64_t count) {
  for (std::int64_t n = 0; n < count; ++n) sums[n] = Vector<T>{};
}

template <class T>
void differentiate_list(const Backward<T>& b, const Plan<T>& plan, Scratch<T>& s, const BackwardScratch<T>& own,
                        const Slot& slot, std::int64_t begin) {
  const PathConnectivityBackward<T>& op = b.op;
  const int count = int(at_most(kLanes<T>, op.pairs - begin));
  clear<T>(own.first_sums, b.units + plan.outputs);
  clear<T>(own.second_sums, b.units + plan.outputs);
  gather_ends<false>(plan, s, begin);
  const Entries<T> entries = differentiate(b, plan, s, own, 0, 0, load_partial<Vector<T>>(op.gradient + begin, count));
  write_list(plan, s, begin, entries);
  scatter<T>(b, slot, own.first_sums, count, [&](int lane) { return op.first[begin + lane]; });
  scatter<T>(b, slot, own.second_sums, count, [&](int lane) { return op.second[begin + lane]; });
}

/// The rows of a task in front of its triangle.
template <class T>
void differentiate_rows(const Backward<T>& b, const Plan<T>& plan, Scratch<T>& s, const BackwardScratch<T>& own,
                        const Slot& slot, Tile tile, Tasks& tasks) {
  const PathConnectivityBackward<T>& op = b.op;
  const std::int64_t block = tile.block, start = block * kLanes<T>;
  for (std::int64_t i = tile.rows * plan.rows; i < tile.end(plan); ++i) {
    if (!tasks.go_on()) return;
    take_row<false>(plan, s, i);
    clear<T>(own.first_sums, b.units + plan.outputs);
    Vector<T> gradient{};
    for (int lane = 0; lane < kLanes<T> && start + lane < op.samples; ++lane) {
      const std::int64_t j = start + lane;
      gradient[lane] = op.gradient[i * op.samples + j] + op.gradient[j * op.samples + i];
    }
    write_row(plan, s, i, block, differentiate(b, plan, s, own, i, block, gradient));
    each_sum(b, slot, [&](std::int64_t from, std::int64_t width, double* rows) {
      add_lanes<T>(own.first_sums + from, width, rows + i * width);
    });
  }
}

/// The pairs among the samples of a task's block. Adds their sums to those of the rows' second samples.
template <class T>
void differentiate_triangle(const Backward<T>& b, const Plan<T>& plan, Scratch<T>& s, const BackwardScratch<T>& own,
                            std::int64_t block, Tasks& tasks) {
  using V = Vector<T>;
  const PathConnectivityBackward<T>& op = b.op;
  const std::int64_t start = block * kLanes<T>, samples = at_most(kLanes<T>, op.samples - start),
                     units = b.units + plan.outputs;
  BackwardScratch<T> step_own = own;
  step_own.second_sums = own.step_sums;
  for (std::int64_t step = 1; step <= samples / 2; ++step) {
    if (!tasks.go_on()) return;
    take_step<false>(plan, s, block, samples, step);
    const Pairing<T>& pairing = s.pairing;
    clear<T>(own.first_sums, units);
    clear<T>(own.step_sums, units);
    V gradient{}, starts{};  // starts: 1 where the lane's own sample is the first of its pair
    for (int lane = 0; pairing.has(lane) && lane < kLanes<T>; ++lane) {
      const std::int64_t i = start + pairing.lower[lane], j = start + pairing.upper[lane];
      gradient[lane] = op.gradient[i * op.samples + j] + op.gradient[j * op.samples + i];
      starts[lane] = i == start + lane;
    }
    write_step(plan, s, start, differentiate(b, plan, s, step_own, 0, block, gradient));
    for (std::int64_t n = 0; n < units; ++n) {
      const V first = own.first_sums[n], second = own.step_sums[n];
      const V of_lane = starts > V{} ? first : second, of_partner = starts > V{} ? second : first;
      own.second_sums[n] += of_lane + permuted(of_partner, pairing.back);
    }
  }
}

template <class T>
void differentiate_tile(const Backward<T>& b, const Plan<T>& plan, Scratch<T>& s, const BackwardScratch<T>& own,
                        const Slot& slot, Tile tile, Tasks& tasks) {
  const std::int64_t start = tile.block * kLanes<T>;
  begin_tile(plan, s, tile);
  clear<T>(own.second_sums, b.units + plan.outputs);
  differentiate_rows(b, plan, s, own, slot, tile, tasks);
  if (tile.has_triangle(plan)) differentiate_triangle(b, plan, s, own, tile.block, tasks);
  scatter<T>(b, slot, own.second_sums, int(at_most(kLanes<T>, b.op.samples - start)), [&](int lane) { return start + lane; });
}

/// Adds the products of a task to those of its slot, and clears them.
template <class T>
void add_products(const Backward<T>& b, const BackwardScratch<T>& own, const Slot& slot) {
  double* sums = slot.products;
  for (int l = 0; l < b.op.layers; ++l) {
    const std::int64_t inputs = b.op.widths[l], outputs = b.op.widths[l + 1];
    const bool turned = turns_adjoints<T>(outputs, inputs);
    const std::int64_t of_output = turned ? 1 : whole_vectors<T>(inputs), of_input = turned ? whole_vectors<T>(outputs) : 1;
    T* const from = own.products[l];
    for (std::int64_t k = 0; k < outputs; ++k, sums += inputs) {
      for (std::int64_t n = 0; n < inputs; ++n) sums[n] += double(from[k * of_output + n * of_input]);
    }
    memset(from, 0, std::size_t(outer_size<T>(outputs, inputs)) * sizeof(T));
  }
}

/// Adds the slots in order. The sums of the last product's rows are in the units of the scaled outputs if the scale is in the
/// weights.
template <class T>
void add_slots(const Backward<T>& b, const Plan<T>& plan, int threads) {
  const std::int64_t outputs = plan.outputs, last = b.op.layers > 0 ? b.op.widths[b.op.layers - 1] : 0;
  const std::int64_t scaled_products = b.product_count - outputs * last;
  const std::int64_t scaled_sums = b.sum_count() - b.end_count();  // the last value that is summed is the last product
  const auto add = [&](double* into, std::int64_t count, double* Slot::* member, std::int64_t scaled, std::int64_t width,
                       bool by_rows) {
#pragma omp parallel for num_threads(threads) if (worth_threads(count * b.slots))
    for (std::int64_t n = 0; n < count; ++n) {
      double sum = 0;
      for (std::int64_t slot = 0; slot < b.slots; ++slot) sum += (b.sums[slot].*member)[n];
      const std::int64_t at = n - scaled;
      if (at >= 0 && plan.ends_in_product()) sum *= double(plan.scale[by_rows ? at / width : at % width]);
      into[n] = sum;
    }
  };
  add(b.op.products, b.product_count, &Slot::products, scaled_products, last > 0 ? last : 1, true);
  add(b.op.sums, b.sum_count(), &Slot::sums, scaled_sums, outputs, false);
  add(b.op.ends, b.end_count(), &Slot::ends, 0, outputs, false);
}

// ---- a call ----

template <class T>
void gradients_on(const PathConnectivityBackward<T>& op, int threads) {
  Arena arena{static_cast<char*>(op.workspace)};
  Plan<T> plan = make_plan(op, Stencil<T>{}, arena, threads);
  const Backward<T> made = make_backward(op, plan, arena, threads);
  const std::int64_t count = tasks_of(op);
  Tasks tasks(op.watch, count);
  if (!fill_plan(plan, threads, tasks)) return;
  Backward<T> b = made;
  double inner = 0, inner_t = 0;
  for (int m = 0; m < op.nodes.interior; ++m) {
    inner += op.nodes.weights[m];
    inner_t += op.nodes.weights[m] * op.nodes.t[m];
  }
  b.last_weight = T(op.nodes.mean_t - inner_t);
  b.first_weight = T(1 - inner - (op.nodes.mean_t - inner_t));
  for (int l = 0; l < op.layers; ++l) {
    const bool scaled = l + 1 == op.layers && plan.ends_in_product();
    pack_transposed(op.weights[l], op.widths[l + 1], op.widths[l], scaled ? plan.scale : nullptr, b.transposed[l]);
  }
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    Scratch<T>& scratch = plan.scratch[thread];
    const BackwardScratch<T>& own = b.scratch[thread];
    for (int l = 0; l < op.layers; ++l) {
      memset(own.products[l], 0, std::size_t(outer_size<T>(op.widths[l + 1], op.widths[l])) * sizeof(T));
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t n = 0; n < b.slots; ++n) {
      const Slot& slot = b.sums[n];
      memset(slot.products, 0, std::size_t(b.product_count) * sizeof(double));
      memset(slot.sums, 0, std::size_t(b.sum_count()) * sizeof(double));
      memset(slot.ends, 0, std::size_t(b.end_count()) * sizeof(double));
      // A slot's tasks follow each other, so that most of them share a table of first samples.
      for (std::int64_t task = count * n / b.slots; task < count * (n + 1) / b.slots; ++task) {
        if (!tasks.go_on()) break;
        if (plan.lists()) {
          differentiate_list(b, plan, scratch, own, slot, task * kLanes<T>);
        } else {
          differentiate_tile(b, plan, scratch, own, slot, Tile(plan, task), tasks);
        }
        add_products(b, own, slot);
        tasks.count_one();
      }
    }
  }
  add_slots(b, plan, threads);
  go_back_at_samples(b, plan, threads);
  add_counts(plan, threads);
}

template <class T>
std::size_t workspace_of(const PathConnectivityBackward<T>& op, int threads) {
  Arena arena{nullptr};
  const Plan<T> plan = make_plan(op, Stencil<T>{}, arena, threads);
  make_backward(op, plan, arena, threads);
  return arena.used;
}

}  // namespace
}  // namespace lmn
