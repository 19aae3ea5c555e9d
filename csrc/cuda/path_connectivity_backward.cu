// Gradients of a chain's connectivity, a batch of pairs after the other. In a batch the residuals of every layer and the slopes
// of every activation stay in the workspace, as panels with a row for each path and node. The last residuals become the
// gradient in the outputs, and going back each layer's adjoints take the place of its slopes. So every step is a plain product
// or goes over elements. The kernels are in backward/; this file enqueues them. The products are multiply-adds of the dtype,
// without matrix instructions.
//
// No two blocks add to the same number, and launches on a stream have an order, so every sum has one order. Products are summed
// over a batch's rows by a fixed number of blocks for each tile, in double from 256 rows on; the last launch adds the blocks'.
#include "backward/plan.cuh"

namespace lmn {
namespace {
namespace backward {

/// Block k scales output k. The block after the last output sets the counts to 0 and the diagonals to 1.
template <class T>
__global__ void scale_kernel(const __grid_constant__ Problem<T> problem) {
  if (std::int64_t(blockIdx.x) < problem.outputs) return scale_output(problem, blockIdx.x);
  if (threadIdx.x == 0) problem.counts[0] = problem.counts[1] = 0;
  for (std::int64_t n = threadIdx.x; n < problem.samples; n += kThreads) {
    problem.connectivity[n * (problem.samples + 1)] = 1;
    if (problem.pooled) problem.pooled[n * (problem.samples + 1)] = 1;
  }
}

/// The places in `sums` of an op, for the values that have one; -1 for the others. Behind them the number of all numbers.
template <class T>
std::vector<std::int64_t> places_of_sums(const PathConnectivity<T>& op) {
  std::vector<std::int64_t> places;
  std::int64_t used = 0;
  for (int value = 0; value < 2 * (op.layers + 1); ++value) {
    const bool has_sum = value % 2 == 0 || has_shift(op, value);
    places.push_back(has_sum ? used : -1);
    if (has_sum) used += op.samples * op.widths[value / 2];
  }
  places.push_back(used);
  return places;
}

/// The weights of the path's two ends.
struct EndWeights {
  double first, second;
};
inline EndWeights end_weights(const PathNodes& nodes) {
  double inside = 0, moment = 0;
  for (int m = 0; m < nodes.interior; ++m) inside += nodes.weights[m], moment += nodes.weights[m] * nodes.t[m];
  const auto without_rounding = [](double weight) { return weight > 4 * Epsilon<double>::value ? weight : 0.0; };
  const double second = nodes.mean_t - moment;
  return {without_rounding(1 - inside - second), without_rounding(second)};
}

/// Enqueues everything of an op.
template <class T>
class Run {
 public:
  Run(const PathConnectivityBackward<T>& op, CUstream_st* stream)
      : op_(op), stream_(stream), arena_{static_cast<char*>(op.workspace)}, plan_(make_plan<T>(op, arena_)) {}

  const char* all() {
    const char* error = samples();
    const std::int64_t group = plan_.group, count = op_.samples;
    for (std::int64_t first = 0; !error && first < count; first += group) {
      const std::int64_t firsts = at_most(group, count - first);
      error = run(batch_within(first, firsts));
      for (std::int64_t second = first + group; !error && second < count; second += group) {
        error = run(batch_between(first, firsts, second, at_most(group, count - second)));
      }
    }
    double* to = op_.products;
    for (const Outer<T>& outer : plan_.outer) {
      if (error) break;
      error = launch(finish_outer_kernel<T>, blocks_of(outer.size, kWarp), kThreads, 0, stream_, outer, to);
      to += outer.size;
    }
    return error;
  }

 private:
  Panels<T>& panels(int l) { return plan_.panels[std::size_t(l)]; }
  const Layer<T>& layer(int l) { return plan_.layers[std::size_t(l)]; }
  int width(int l) const { return int(op_.widths[l]); }
  int interior() const { return op_.nodes.interior; }

  const char* zero(void* memory, std::size_t bytes) {
    return bytes > 0 ? message(cudaMemsetAsync(memory, 0, bytes, stream_)) : nullptr;
  }

  /// Everything that the samples determine, and zeros where batches add.
  const char* samples() {
    if (device_attribute(cudaDevAttrMultiProcessorCount) == 0) return "no CUDA device";
    places_ = places_of_sums<T>(op_);
    const char* error = zero(plan_.partial, std::size_t(plan_.partial_count) * sizeof(double));
    if (!error) error = zero(op_.sums, std::size_t(places_.back()) * sizeof(double));
    if (!error) error = zero(op_.ends, std::size_t(op_.samples * plan_.problem.outputs) * sizeof(double));
    if (!error) error = store_nodes(op_.nodes, plan_.nodes, plan_.problem.nodes, stream_);
    if (error) return error;
    const auto layer_at = [&](int l) { return layer_of<T>(op_, l, false, arena_); };
    error = enqueue_forward<T>(op_, plan_.problem, 0.0, plan_.sums, stream_, layer_at, [&](int, const Layer<T>& layer) {
      plan_.layers.push_back(layer);
      return static_cast<const char*>(nullptr);
    });
    if (error) return error;
    return launch(scale_kernel<T>, plan_.problem.outputs + 1, kThreads, 0, stream_, plan_.problem);
  }

  const char* run(const Batch& batch) {
    if (batch.pairs == 0) return nullptr;
    const char* error = nullptr;
    for (int l = 0; l <= op_.layers && !error; ++l) error = forward(batch, l);
    if (!error) error = pools(op_) ? statistics<true>(batch) : statistics<false>(batch);
    if (!error) error = add_parts(batch, plan_.ends, nullptr, 2, op_.layers, op_.ends);
    for (int l = op_.layers; l >= 0 && !error; --l) error = back(batch, l);
    return error;
  }

  int rows_of(const Batch& batch) const { return batch.pairs * interior(); }

  /// The residuals of a value; null: they are 0, or there is no value.
  const T* residuals_of(int value) {
    if (value <= 0) return nullptr;
    return value % 2 == 1 || is_linear<T>(op_, value / 2) ? panels(value / 2).residuals : panels(value / 2).deviations;
  }

  /// The residuals and slopes of layer l.
  const char* forward(const Batch& batch, int l) {
    const T* deviations = nullptr;
    if (l > 0) {
      T* const to = is_linear<T>(op_, l)   ? panels(l).residuals
                    : panels(l).deviations ? panels(l).deviations
                                           : panels(l).adjoints;
      const Ahead<T> ahead{to, residuals_of(added_to<T>(op_, 2 * l))};
      if (const char* error = multiply<true>(batch, panels(l - 1).residuals, l, width(l - 1), width(l), ahead)) return error;
      if (is_linear<T>(op_, l)) return nullptr;
      deviations = to;
    }
    const Bend<T> bend{layer(l), deviations, residuals_of(added_to<T>(op_, 2 * l + 1)), panels(l).residuals,
                       panels(l).adjoints};
    return launch(bend_kernel<T>, blocks_of(rows_of(batch), kRowsOfBlock), kThreads, 0, stream_, batch, plan_.problem.nodes.t,
                  interior(), bend);
  }

  template <bool kPooled>
  const char* statistics(const Batch& batch) {
    const EndWeights weights = end_weights(op_.nodes);
    const Panels<T>& last = panels(op_.layers);
    const Statistics<T> of{
        plan_.problem,  layer(0),   op_.gradient,        T(op_.nodes.mean_t), {T(weights.first), T(weights.second)},
        last.residuals, plan_.ends, panels(0).residuals, plan_.rows,          has_slopes<T>(op_, op_.layers)};
    return launch(statistics_kernel<kPooled, T>, blocks_of(batch.pairs, kWarps), kThreads, 0, stream_, batch, of);
  }

  /// What layer l has to do when the products from the next layer, or the gradient in the outputs, are there.
  Settle<T> settle(int l) {
    Settle<T> settle{};
    for (int half = 0; half < 2; ++half) {
      const int value = 2 * l + half, source = added_to<T>(op_, value);
      settle.later[half] = panels(l).later[half];
      if (source < 0) continue;
      settle.onto[half] = panels(source / 2).later[source % 2];
      settle.begins[half] = plan_.last_use[std::size_t(source)] == value;
    }
    settle.after = panels(l).after;
    settle.slopes = is_linear<T>(op_, l) ? nullptr : panels(l).adjoints;
    settle.adjoint = panels(l).adjoints;
    return settle;
  }

  /// Takes layer l's adjoints into the results, and goes back to the layer before.
  const char* back(const Batch& batch, int l) {
    const T* const t = plan_.problem.nodes.t;
    const auto sums_of = [&](int value) { return op_.sums + places_[std::size_t(value)]; };
    const char* error = nullptr;
    const bool on_top = l == op_.layers;
    if (has_shift<T>(op_, 2 * l + 1)) {
      error = add_parts(batch, on_top ? panels(l).residuals : panels(l).after, t, interior(), l, sums_of(2 * l + 1));
    }
    if (!error && on_top && (has_slopes<T>(op_, l) || added_to<T>(op_, 2 * l) >= 0)) {
      const std::int64_t count = std::int64_t(rows_of(batch)) * width(l);
      error = launch(settle_kernel<T>, blocks_of(count, kThreads), kThreads, 0, stream_, panels(l).residuals, count, settle(l));
    }
    if (!error) error = add_parts(batch, panels(l).adjoints, t, interior(), l, sums_of(2 * l));
    if (error || l == 0) return error;
    Outer<T> outer = plan_.outer[std::size_t(l - 1)];
    outer.depth = rows_of(batch);
    error = with_columns<T>(outer.columns.count, [&](auto columns) {
      return launch(outer_kernel<T, columns.value>, std::int64_t(outer.splits) * outer.tiles, kTileThreads, 0, stream_, outer);
    });
    return error ? error : multiply<false>(batch, panels(l).adjoints, l, width(l), width(l - 1), settle(l - 1));
  }

  template <bool kForward, class End>
  const char* multiply(const Batch& batch, const T* values, int l, int depth, int units, const End& end) {
    const int rows = rows_of(batch);
    const T* const weights = op_.weights[l - 1];
    return with_columns<T>(units, [&](auto columns) {
      using Size = Tile<T, columns.value>;
      const std::int64_t tiles = blocks_of(rows, Size::kRows) * blocks_of(units, Size::kColumns);
      return launch(multiply_kernel<T, columns.value, kForward, End>, tiles, kTileThreads, 0, stream_, values, weights, rows,
                    depth, units, end);
    });
  }

  const char* add_parts(const Batch& batch, const T* adjoints, const T* t, int nodes, int l, double* to) {
    const std::int64_t samples = batch.within ? batch.firsts : batch.firsts + batch.seconds;
    const Parts<T> parts{adjoints, t, nodes, width(l), to};
    return launch(add_parts_kernel<T>, samples * blocks_of(width(l), kWarp), kThreads, 0, stream_, batch, parts);
  }

  const PathConnectivityBackward<T>& op_;
  CUstream_st* const stream_;
  Arena arena_;
  Plan<T> plan_;
  std::vector<std::int64_t> places_;
};

template <class T>
std::size_t workspace(const PathConnectivityBackward<T>& op) {
  Arena arena{nullptr};
  make_plan<T>(op, arena);
  for (int l = 0; l <= op.layers; ++l) layer_of<T>(op, l, false, arena);
  return arena.used;
}

template <class T>
const char* enqueue(const PathConnectivityBackward<T>& op, CUstream_st* stream) {
  if (op.first) return "lists of pairs are for the CPU";
  if (op.networks != 1) return "only one network at a time";
  if (op.pools != (op.pooled != nullptr)) return "pools does not say whether there is a result pooled";
  return Run<T>(op, stream).all();
}

}  // namespace backward
}  // namespace

std::size_t cuda_workspace(const PathConnectivityBackward<float>& op) { return backward::workspace(op); }
std::size_t cuda_workspace(const PathConnectivityBackward<double>& op) { return backward::workspace(op); }
const char* cuda_run(const PathConnectivityBackward<float>& op, CUstream_st* stream) { return backward::enqueue(op, stream); }
const char* cuda_run(const PathConnectivityBackward<double>& op, CUstream_st* stream) { return backward::enqueue(op, stream); }

}  // namespace lmn
