// One pass over f's outputs: a vector of lanes runs over the outputs of a pair, or, where those do not fill one, over
// the outputs of several pairs.
#include "level.h"

namespace lmn {
namespace {

/// 1 - r2 of kLanes outputs; values(m) gives them at interior node m, in whatever memory they lie.
template <class V, class T, class ValuesAt>
inline V lanes_share(const PathNodes& nodes, V first, V second, V scale, ValuesAt values) {
  const V chord = second - first;
  Moments<V> moments{};
  for (int m = 0; m < nodes.interior; ++m) {
    const T t = T(nodes.t[m]);
    const V e = (values(m) - fma(splat<V>(t), chord, first)) * scale;
    const V weighted = e * T(nodes.weights[m]);
    moments.e += weighted;
    moments.te += weighted * T(nodes.t[m] - nodes.mean_t);
    moments.ee = fma(weighted, e, moments.ee);
  }
  const V magnitude = larger(absolute(first), absolute(second)) * scale;
  return nonlinear_share<V, T>(chord * scale, moments, magnitude, T(nodes.variance_t), Epsilon<T>::value);
}

/// A pair whose outputs fill a vector; the last one overlaps the one before and counts its own lanes only.
template <class T>
T wide_pair(const PathR2<T>& op, std::int64_t pair) {
  using V = Vector<T>;
  const T* y = op.interior + pair * op.nodes.interior * op.outputs;
  const T* first = op.ends + op.first[pair] * op.outputs;
  const T* second = op.ends + op.second[pair] * op.outputs;
  CompensatedSum<V> sum;
  for (std::int64_t k = 0; k < op.outputs; k += kLanes<T>) {
    const std::int64_t start = k + kLanes<T> <= op.outputs ? k : op.outputs - kLanes<T>;
    V share = lanes_share<V, T>(op.nodes, load<V>(first + start), load<V>(second + start), load<V>(op.workspace + start),
                                [&](int m) { return load<V>(y + m * op.outputs + start); });
    for (std::int64_t lane = 0; lane < k - start; ++lane) share[lane] = 0;
    sum.add(share);
  }
  T total = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) total += sum.sum[lane];
  return 1 - total / T(op.outputs);
}

/// As many pairs as fit into a vector with fewer outputs than lanes.
template <class T>
void narrow_pairs(const PathR2<T>& op, std::int64_t begin, std::int64_t count) {
  using V = Vector<T>;
  const std::int64_t stride = op.nodes.interior * op.outputs;
  const T* y[kLanes<T>];
  V first{}, second{}, scale{};
  const int used = int(count * op.outputs);
  for (int lane = 0; lane < used; ++lane) {
    const std::int64_t pair = begin + lane / op.outputs, k = lane % op.outputs;
    y[lane] = op.interior + pair * stride + k;
    first[lane] = op.ends[op.first[pair] * op.outputs + k];
    second[lane] = op.ends[op.second[pair] * op.outputs + k];
    scale[lane] = op.workspace[k];
  }
  const V share = lanes_share<V, T>(op.nodes, first, second, scale, [&](int m) {
    T gathered[kLanes<T>] = {};
    for (int lane = 0; lane < used; ++lane) gathered[lane] = y[lane][m * op.outputs];
    return load<V>(gathered);
  });
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
  if (op.outputs >= kLanes<T>) {
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
