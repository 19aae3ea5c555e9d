// One pass over f's outputs. Lanes run over the outputs of a pair, or, where those fill less than half a vector, over
// the outputs of several pairs.
#include "level.h"

namespace lmn {
namespace {

// Vectors of outputs at a time: whole cache lines of every node's row, or a long row's nodes would fall into the same
// few sets of L1.
constexpr int kGroup = 4;
constexpr int kNodeChunk = 32;  // nodes gathered at a time, 2 kB

/// What the kernel needs of one vector of outputs, and the moments it collects.
template <class T>
struct Lane {
  using V = Vector<T>;
  V first, chord, magnitude, scale;
  Moments<V> moments{};

  Lane() = default;
  Lane(V y_first, V y_second, V y_scale)
      : first(y_first), chord(y_second - y_first), magnitude(larger(absolute(y_first), absolute(y_second)) * y_scale),
        scale(y_scale) {}
  inline void add(V y, T t, T weight, T weight_t) {
    const V e = (y - fma(splat<V>(t), chord, first)) * scale;
    const V weighted = e * weight;
    moments.e += weighted;
    moments.te = fma(splat<V>(weight_t), e, moments.te);
    moments.ee = fma(weighted, e, moments.ee);
  }
  inline V share(const PathNodes& nodes) const {  // 1 - r2
    return nonlinear_share<V, T>(chord * scale, moments, magnitude, T(nodes.variance_t), Epsilon<T>::value);
  }
};

template <class T>
struct Node {
  T t, weight, weight_t;
  Node(const PathNodes& nodes, int m)
      : t(T(nodes.t[m])), weight(T(nodes.weights[m])), weight_t(T(nodes.weights[m] * (nodes.t[m] - nodes.mean_t))) {}
};

/// A vector that may run on into the next row, but not beyond the end of the array.
template <class T>
inline Vector<T> load_row(const T* from, const T* end) {
  return from + kLanes<T> <= end ? load<Vector<T>>(from) : load_partial<Vector<T>>(from, end - from);
}

/// Adds the shares of kVectors vectors of a pair's outputs from start on.
template <class T, int kVectors>
inline void add_shares(const PathR2<T>& op, std::int64_t pair, std::int64_t start, CompensatedSum<Vector<T>>& sum) {
  const T *interior_end = op.interior + op.pairs * op.nodes.interior * op.outputs;
  const T *ends_end = op.ends + op.samples * op.outputs, *scale_end = op.workspace + op.outputs;
  const T* y = op.interior + pair * op.nodes.interior * op.outputs + start;
  const T* first = op.ends + op.first[pair] * op.outputs + start;
  const T* second = op.ends + op.second[pair] * op.outputs + start;
  Lane<T> lanes[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kLanes<T>;
    lanes[v] = Lane<T>(load_row(first + at, ends_end), load_row(second + at, ends_end),
                       load_row(op.workspace + start + at, scale_end));
  }
  for (int m = 0; m < op.nodes.interior; ++m, y += op.outputs) {
    const Node<T> node(op.nodes, m);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      // Rows are long here, one node's a page from the next's: the hardware does not see the stream.
      if constexpr (kVectors == kGroup) __builtin_prefetch(y + (v + 2 * kGroup) * kLanes<T>);
      lanes[v].add(load_row(y + v * kLanes<T>, interior_end), node.t, node.weight, node.weight_t);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    Vector<T> share = lanes[v].share(op.nodes);
    for (std::int64_t lane = op.outputs - start - v * kLanes<T>; lane < kLanes<T>; ++lane) share[lane] = 0;
    sum.add(share);
  }
}

template <class T>
T wide_pair(const PathR2<T>& op, std::int64_t pair) {
  CompensatedSum<Vector<T>> sum;
  std::int64_t start = 0;
  for (; start + kGroup * kLanes<T> <= op.outputs; start += kGroup * kLanes<T>) {
    add_shares<T, kGroup>(op, pair, start, sum);
  }
  for (; start < op.outputs; start += kLanes<T>) add_shares<T, 1>(op, pair, start, sum);
  T total = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) total += sum.sum[lane];
  return 1 - total / T(op.outputs);
}

/// As many pairs as fit into a vector.
template <class T>
void narrow_pairs(const PathR2<T>& op, std::int64_t begin, std::int64_t count) {
  using V = Vector<T>;
  T first[kLanes<T>] = {}, second[kLanes<T>] = {}, scale[kLanes<T>] = {};
  const T* y[kLanes<T>];
  for (const T*& row : y) row = op.interior;  // lanes without an output: any number will do
  int lane = 0;
  for (std::int64_t pair = begin; pair < begin + count; ++pair) {
    for (std::int64_t k = 0; k < op.outputs; ++k, ++lane) {
      y[lane] = op.interior + pair * op.nodes.interior * op.outputs + k;
      first[lane] = op.ends[op.first[pair] * op.outputs + k];
      second[lane] = op.ends[op.second[pair] * op.outputs + k];
      scale[lane] = op.workspace[k];
    }
  }
  Lane<T> lanes(load<V>(first), load<V>(second), load<V>(scale));
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
  const V share = lanes.share(op.nodes);
  for (std::int64_t pair = 0; pair < count; ++pair) {
    T total = 0;
    for (std::int64_t k = 0; k < op.outputs; ++k) total += share[pair * op.outputs + k];
    op.r2[begin + pair] = 1 - total / T(op.outputs);
  }
}

template <class T>
void path_r2_on(const PathR2<T>& op, int threads) {
#pragma omp parallel for num_threads(threads)
  for (std::int64_t k = 0; k < op.outputs; ++k) {
    T largest = 0;
    for (std::int64_t n = 1; n < op.samples; ++n) {
      const T difference = op.ends[n * op.outputs + k] - op.ends[k];
      largest = difference > largest ? difference : -difference > largest ? -difference : largest;
    }
    op.workspace[k] = output_scale(largest);
  }
  if (2 * op.outputs > kLanes<T>) {
#pragma omp parallel for num_threads(threads)
    for (std::int64_t pair = 0; pair < op.pairs; ++pair) op.r2[pair] = wide_pair(op, pair);
  } else {
    const std::int64_t group = kLanes<T> / op.outputs;
#pragma omp parallel for num_threads(threads)
    for (std::int64_t begin = 0; begin < op.pairs; begin += group) {
      narrow_pairs(op, begin, begin + group <= op.pairs ? group : op.pairs - begin);
    }
  }
}

}  // namespace

namespace LMN_LEVEL {
void path_r2(const PathR2<float>& op, int threads) { path_r2_on(op, threads); }
void path_r2(const PathR2<double>& op, int threads) { path_r2_on(op, threads); }
}  // namespace LMN_LEVEL

}  // namespace lmn
