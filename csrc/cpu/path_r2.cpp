// One pass over f's outputs. Lanes run over the outputs of a pair. If these fill less than half a vector, lanes run over the
// outputs of several pairs.
#include "level.h"

namespace lmn {
namespace {

// Vectors of outputs at a time: whole cache lines of every node's row. Otherwise the nodes of a long row would fall into the
// same few sets of L1.
constexpr int kGroup = 4;
constexpr std::int64_t kChunk = 1 << 16;  // values that a thread takes at a time
constexpr int kNodeChunk = 32;            // nodes gathered at a time, 2 kB

/// One vector of outputs of a path: the values that the statistics need, and the moments collected so far.
template <class T>
struct Lane {
  using V = Vector<T>;
  V first, chord, magnitude, scale, rounding, least, stabiliser;
  Moments<V> moments{};

  Lane() = default;
  Lane(V y_first, V y_second, V y_scale, V y_rounding, V y_least, V y_stabiliser)
      : first(y_first),
        chord(y_second - y_first),
        magnitude(larger(absolute(y_first), absolute(y_second)) * y_scale),
        scale(y_scale),
        rounding(y_rounding),
        least(y_least),
        stabiliser(y_stabiliser) {}
  inline void add(V y, T t, T weight, T weight_t) {
    add_moments(moments, (y - fma(splat<V>(t), chord, first)) * scale, weight, weight_t);
  }
  inline Share<V> share(const PathNodes& nodes) const {
    return share_of_output<V, T>(chord * scale, moments, magnitude, least, fma(magnitude, magnitude, rounding * rounding),
                                 T(nodes.variance_t), Epsilon<T>::value, stabiliser);
  }
};

template <class T>
struct Node {
  T t, weight, weight_t;
  Node(const PathNodes& nodes, int m)
      : t(T(nodes.t[m])), weight(T(nodes.weights[m])), weight_t(T(nodes.weights[m] * (nodes.t[m] - nodes.mean_t))) {}
};

/// Loads a vector. It may reach into the next row, but not beyond the end of the array.
template <class T>
inline Vector<T> load_row(const T* from, const T* end) {
  return from + kLanes<T> <= end ? load<Vector<T>>(from) : load_partial<Vector<T>>(from, end - from);
}

/// Sums over the outputs of a pair.
template <class T>
struct PairSums {
  CompensatedSum<Vector<T>> nonlinear, bend, total;  // the last two for pooling
  Vector<T> constants{}, unresolved{};
};

/// The workspace: five numbers of each output, and one of all.
template <class T>
struct Outputs {
  const T *scale, *rounding, *least, *stabiliser, *pooling;  // [outputs]; rounding: of all numbers that it is computed from
  const T* pooled_stabiliser;
  explicit Outputs(const PathR2<T>& op)
      : scale(op.workspace),
        rounding(scale + op.outputs),
        least(rounding + op.outputs),
        stabiliser(least + op.outputs),
        pooling(stabiliser + op.outputs),
        pooled_stabiliser(pooling + op.outputs) {}
};

/// The op's counts, see ops.h.
struct Counts {
  std::int64_t constants = 0, unresolved = 0;
};

/// Sums over all outputs of a pair.
template <class T>
struct Entry {
  T nonlinear = 0, bend = 0, total = 0, constants = 0, unresolved = 0;

  void write(const PathR2<T>& op, std::int64_t pair, Counts& counts) {
    const T stabiliser = *Outputs<T>(op).pooled_stabiliser;
    if (op.pooled && pool_underflows(total, stabiliser, std::int64_t(constants), op.outputs)) unresolved = 1;
    const bool resolved = !(unresolved > 0);
    counts.constants += resolved ? std::int64_t(constants) : 0;
    counts.unresolved += !resolved;
    op.r2[pair] = resolved ? 1 - nonlinear / T(op.outputs) : T(kUnresolved);
    if (op.pooled) op.pooled[pair] = resolved ? pooled_r2(bend, total, stabiliser) : T(kUnresolved);
  }
};

/// Adds the shares of kVectors vectors of a pair's outputs from start on.
template <class T, int kVectors>
inline void add_shares(const PathR2<T>& op, std::int64_t pair, std::int64_t start, PairSums<T>& sums) {
  const T* interior_end = op.interior + op.pairs * op.nodes.interior * op.outputs;
  const T *ends_end = op.ends + op.samples * op.outputs, *outputs_end = Outputs<T>(op).pooled_stabiliser;
  const Outputs<T> outputs(op);
  const T* y = op.interior + pair * op.nodes.interior * op.outputs + start;
  const T* first = op.ends + op.first[pair] * op.outputs + start;
  const T* second = op.ends + op.second[pair] * op.outputs + start;
  Lane<T> lanes[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kLanes<T>;
    const auto row = [&](const T* values) { return load_row(values + start + at, outputs_end); };
    lanes[v] = Lane<T>(load_row(first + at, ends_end), load_row(second + at, ends_end), row(outputs.scale),
                       row(outputs.rounding), row(outputs.least), row(outputs.stabiliser));
  }
  for (int m = 0; m < op.nodes.interior; ++m, y += op.outputs) {
    const Node<T> node(op.nodes, m);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      // Rows are long here: the rows of two nodes are a page apart, and the hardware prefetcher does not follow.
      if constexpr (kVectors == kGroup) __builtin_prefetch(y + (v + 2 * kGroup) * kLanes<T>);
      lanes[v].add(load_row(y + v * kLanes<T>, interior_end), node.t, node.weight, node.weight_t);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    Share<Vector<T>> share = lanes[v].share(op.nodes);
    for (std::int64_t lane = op.outputs - start - v * kLanes<T>; lane < kLanes<T>; ++lane) {
      share.nonlinear[lane] = share.constant[lane] = share.unresolved[lane] = share.bend[lane] = share.total[lane] = 0;
    }
    sums.nonlinear.add(share.nonlinear);
    if (op.pooled) {
      const Vector<T> pooling = load_row(outputs.pooling + start + v * kLanes<T>, outputs_end);
      sums.bend.add(share.bend * pooling);
      sums.total.add(share.total * pooling);
    }
    sums.constants += share.constant;
    sums.unresolved += share.unresolved;
  }
}

template <class T>
void wide_pair(const PathR2<T>& op, std::int64_t pair, Counts& counts) {
  PairSums<T> sums;
  std::int64_t start = 0;
  for (; start + kGroup * kLanes<T> <= op.outputs; start += kGroup * kLanes<T>) {
    add_shares<T, kGroup>(op, pair, start, sums);
  }
  for (; start < op.outputs; start += kLanes<T>) add_shares<T, 1>(op, pair, start, sums);
  Entry<T> entry;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    entry.nonlinear += sums.nonlinear.sum[lane];
    entry.bend += sums.bend.sum[lane];
    entry.total += sums.total.sum[lane];
    entry.constants += sums.constants[lane];
    entry.unresolved += sums.unresolved[lane];
  }
  entry.write(op, pair, counts);
}

/// Handles as many pairs as fit into one vector.
template <class T>
void narrow_pairs(const PathR2<T>& op, std::int64_t begin, std::int64_t pairs, Counts& counts) {
  using V = Vector<T>;
  const Outputs<T> outputs(op);
  T first[kLanes<T>] = {}, second[kLanes<T>] = {}, scale[kLanes<T>] = {}, rounding[kLanes<T>] = {}, least[kLanes<T>] = {};
  T stabiliser[kLanes<T>] = {};
  const T* y[kLanes<T>];
  for (const T*& row : y) row = op.interior;  // lanes without an output read any number
  int lane = 0;
  for (std::int64_t pair = begin; pair < begin + pairs; ++pair) {
    for (std::int64_t k = 0; k < op.outputs; ++k, ++lane) {
      y[lane] = op.interior + pair * op.nodes.interior * op.outputs + k;
      first[lane] = op.ends[op.first[pair] * op.outputs + k];
      second[lane] = op.ends[op.second[pair] * op.outputs + k];
      scale[lane] = outputs.scale[k];
      rounding[lane] = outputs.rounding[k];
      least[lane] = outputs.least[k];
      stabiliser[lane] = outputs.stabiliser[k];
    }
  }
  Lane<T> lanes(load<V>(first), load<V>(second), load<V>(scale), load<V>(rounding), load<V>(least), load<V>(stabiliser));
  T gathered[kNodeChunk * kLanes<T>];
  for (int from = 0; from < op.nodes.interior; from += kNodeChunk) {
    const int nodes = op.nodes.interior - from < kNodeChunk ? op.nodes.interior - from : kNodeChunk;
    const std::int64_t at = from * op.outputs;
    for (int m = 0; m < nodes; ++m) {
      T* row = gathered + m * kLanes<T>;
      for (int lane = 0; lane < kLanes<T>; ++lane) row[lane] = y[lane][at + m * op.outputs];
    }
    for (int m = 0; m < nodes; ++m) {
      const Node<T> node(op.nodes, from + m);
      lanes.add(load<V>(gathered + m * kLanes<T>), node.t, node.weight, node.weight_t);
    }
  }
  const Share<V> share = lanes.share(op.nodes);
  for (std::int64_t pair = 0; pair < pairs; ++pair) {
    Entry<T> entry;
    for (std::int64_t k = 0; k < op.outputs; ++k) {
      const std::int64_t at = pair * op.outputs + k;
      entry.nonlinear += share.nonlinear[at];
      entry.bend += share.bend[at] * outputs.pooling[k];
      entry.total += share.total[at] * outputs.pooling[k];
      entry.constants += share.constant[at];
      entry.unresolved += share.unresolved[at];
    }
    entry.write(op, begin + pair, counts);
  }
}

template <class T>
std::size_t workspace_of(const PathR2<T>& op) {
  return (5 * std::size_t(op.outputs) + 1) * sizeof(T);
}

template <class T>
void path_r2_on(const PathR2<T>& op, int threads) {
  using V = Vector<T>;
  const T* const end = op.ends + op.samples * op.outputs;
  // A row of outputs at a time: down a column of many samples every output would read a cache line of its own.
#pragma omp parallel for num_threads(threads) if (worth_threads(op.samples * op.outputs))
  for (std::int64_t start = 0; start < op.outputs; start += kLanes<T>) {
    V largest{}, magnitude{};
    const V first = load_row(op.ends + start, end);
    for (const T* row = op.ends + start; row < end; row += op.outputs) {
      const V y = load_row(row, end), difference = absolute(y - first), size = absolute(y);
      largest = difference > largest ? difference : largest;  // a NaN is no larger
      magnitude = size > magnitude ? size : magnitude;
    }
    for (std::int64_t k = start; k < at_most(start + kLanes<T>, op.outputs); ++k) {
      const T own_largest = largest[k - start], scale = output_scale(own_largest);
      op.workspace[k] = scale;
      const T own = op.rounding ? op.rounding[k] * scale : 0;
      op.workspace[op.outputs + k] = magnitude[k - start] * scale * T(kLeastRounding) + own;
      op.workspace[2 * op.outputs + k] = op.rounding ? op.rounding[op.outputs + k] * scale : 0;
      op.workspace[3 * op.outputs + k] = scaled_stabiliser(op.stabiliser, scale);
      op.workspace[4 * op.outputs + k] = own_largest;  // for now
    }
  }
  T common = 0;  // the scale of the output that varies most
  for (std::int64_t k = 0; k < op.outputs; ++k) {
    if (op.workspace[4 * op.outputs + k] > 0 && (common == 0 || op.workspace[k] < common)) common = op.workspace[k];
  }
  common = common > 0 ? common : T(1);
  for (std::int64_t k = 0; k < op.outputs; ++k) op.workspace[4 * op.outputs + k] = pooling_factor(common, op.workspace[k]);
  op.workspace[5 * op.outputs] = scaled_stabiliser(op.stabiliser, common);
  std::int64_t constants = 0, unresolved = 0;
  // Chunks are short. If another process takes the core of a thread, the other threads wait for one chunk at most.
  const std::int64_t values = op.nodes.interior * op.outputs;
  if (2 * op.outputs > kLanes<T>) {
    const std::int64_t chunk = 1 + kChunk / (1 + values);
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk) if (worth_threads(op.pairs * values)) \
    reduction(+ : constants, unresolved)
    for (std::int64_t pair = 0; pair < op.pairs; ++pair) {
      Counts counts;
      wide_pair(op, pair, counts);
      constants += counts.constants;
      unresolved += counts.unresolved;
    }
  } else {
    const std::int64_t group = kLanes<T> / op.outputs, chunk = 1 + kChunk / (1 + group * values);
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk) if (worth_threads(op.pairs * values)) \
    reduction(+ : constants, unresolved)
    for (std::int64_t begin = 0; begin < op.pairs; begin += group) {
      Counts counts;
      narrow_pairs(op, begin, begin + group <= op.pairs ? group : op.pairs - begin, counts);
      constants += counts.constants;
      unresolved += counts.unresolved;
    }
  }
  op.counts[0] = constants;
  op.counts[1] = unresolved;
}

}  // namespace

namespace LMN_LEVEL {
std::size_t workspace(const PathR2<float>& op, int) { return workspace_of(op); }
std::size_t workspace(const PathR2<double>& op, int) { return workspace_of(op); }
void run(const PathR2<float>& op, int threads) { path_r2_on(op, threads); }
void run(const PathR2<double>& op, int threads) { path_r2_on(op, threads); }
}  // namespace LMN_LEVEL

}  // namespace lmn
