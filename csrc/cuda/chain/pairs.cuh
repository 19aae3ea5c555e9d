// The statistics of a pair from the outputs' moments, the pair's entry in the matrix, and the order of the units of work. The
// kernels of the paths call these at the end of each path.
#pragma once
#include "problem.cuh"

#include "../../activation.h"  // these two after device.h, because they use its functions
#include "../../statistics.h"

namespace lmn {
namespace {

constexpr int kEndOutputs = 32;
/// Writes the four numbers of output k at one sample that a pair's statistics need, so that one load reads them: y, the part of
/// y that rounding lost, the square of y's rounding, and 1 if an activation may hide this rounding. ends:
/// [samples][kEndOutputs]; lane 4 g + q has the outputs 16 h + 4 q + m at 4 (4 h + m) + q.
__device__ inline void write_end(float4* ends, std::int64_t sample, std::int64_t k, float y, float y_low, float rounding,
                                 float scale) {
  const std::int64_t place = 4 * (k / 16 * 4 + k % 4) + k % 16 / 4;
  const float hides = hides_rounding<float, float>(rounding, scale, Epsilon<float>::value);
  ends[sample * kEndOutputs + place] = make_float4(y, y_low, rounding * rounding, hides);
}

/// Sums over the outputs of a pair. kPooled, here and of the kernels: the statistic has a stabiliser, or is pooled, or both.
template <bool kPooled>
struct PairSums {
  double nonlinear = 0;  // sum of 1 - r2; a NaN if an output is unresolved
  int constants = 0;     // number of constant outputs

  __device__ PairSums plus(const PairSums& other) const { return {nonlinear + other.nonlinear, constants + other.constants}; }
  __device__ PairSums over_lanes(int lanes) const { return {warp_sum(nonlinear, lanes), warp_sum(constants, lanes)}; }
};
template <>
struct PairSums<true> {
  double nonlinear = 0;
  int constants = 0;
  double bend = 0, total = 0;  // of Share, in the outputs' common unit; 0 if nothing is pooled

  __device__ PairSums plus(const PairSums& other) const {
    return {nonlinear + other.nonlinear, constants + other.constants, bend + other.bend, total + other.total};
  }
  __device__ PairSums over_lanes(int lanes) const {
    return {warp_sum(nonlinear, lanes), warp_sum(constants, lanes), warp_sum(bend, lanes), warp_sum(total, lanes)};
  }
};

/// The scale that belongs to the outputs' common unit: of the output that varies most. spread: as of Problem.
template <class T>
__device__ inline T common_scale(const T* spread) {
  return *spread > 0 ? 1 / *spread : T(1);
}

/// 1 - r2 of an output, as share_of_output gives it, with a fourth of the instructions. False if share_of_output may find the
/// output constant or unresolved; `share` may then be anything. te: of the moments; bend: variance_t var(e) - te^2; factor: te
/// is multiplied by factor, and bend by its square; magnitude: the larger |y| of the two ends.
__device__ inline bool ordinary_share(float te, float bend, float factor, float chord, float magnitude, float rounding_squared,
                                      float variance_t, float& share) {
  constexpr float kConstant = float(kConstantUlps) * Epsilon<float>::value;
  constexpr float kResolved = float(kResolvedUlps32) * Epsilon<float>::value;
  const float covariance = fma(te, factor, chord * variance_t), residual = bend * (factor * factor);
  const float total = fma(covariance, covariance, residual);
  const float squares = fma(magnitude * (kConstant * kConstant), magnitude, rounding_squared * (kResolved * kResolved));
  share = ::fmaxf(residual, 0.0f) * reciprocal(total);
  // One sum replaces the larger of three bounds. No comparison is true for a NaN.
  return total > fma(squares, variance_t, float(kLeastTotal32)) && total < float(kLargestTotal32);
}

__device__ inline float bend_of(const Moments<float>& m, float variance_t) {
  return fma(variance_t, fma(-m.e, m.e, m.ee), -(m.te * m.te));
}

/// An output along the path from sample i to sample j, in units of the scaled output.
template <class T>
struct OutputOnPath {
  T chord;
  Share<T> share;
  bool unresolved;  // whether rounding may determine the share
};

/// Output k between samples i and j. problem: of the block's network. scale: of the output. least: an output below it has
/// underflowed or is about to.
template <bool kPooled, class T>
__device__ inline OutputOnPath<T> output_on_path(const Problem<T>& problem, std::int64_t i, std::int64_t j, std::int64_t k,
                                                 const Moments<T>& moments, T scale, T least) {
  const T *const y = problem.y, *const y_low = problem.y_low, *const rounding = problem.rounding;
  const std::int64_t at_i = i * problem.outputs + k, at_j = j * problem.outputs + k;
  const T first = y[at_i], second = y[at_j];
  const T chord = (second - first) + (y_low[at_j] - y_low[at_i]);
  const T rounding_squared = rounding[at_i] * rounding[at_i] + rounding[at_j] * rounding[at_j];
  const Share<T> share =
      share_of_output<T, T>(chord, moments, larger(absolute(first), absolute(second)), T(0), rounding_squared,
                            problem.nodes.variance_t, Epsilon<T>::value, stabiliser_of<kPooled>(problem.stabiliser, scale));
  const bool vanishes = absolute(first) < least || absolute(second) < least;
  const T largest_rounding = larger(rounding[at_i], rounding[at_j]);
  const bool hides = share.constant > 0 && hides_rounding<T, T>(largest_rounding, scale, Epsilon<T>::value) > 0;
  return {chord, share, vanishes || hides || share.unresolved > 0};
}

/// Adds output k between samples i and j. The parameters are those of output_on_path.
template <bool kPooled, class T>
__device__ inline void add_output(PairSums<kPooled>& sums, const Problem<T>& problem, std::int64_t i, std::int64_t j,
                                  std::int64_t k, const Moments<T>& moments, T scale, T least) {
  const OutputOnPath<T> output = output_on_path<kPooled>(problem, i, j, k, moments, scale, least);
  const Share<T>& share = output.share;
  sums.nonlinear += output.unresolved ? NAN : double(share.nonlinear);
  sums.constants += share.constant > 0 ? 1 : 0;
  if constexpr (kPooled) {
    if (!problem.pooled) return;
    const T factor = pooling_factor(common_scale(problem.spread), scale);
    sums.bend += double(share.bend * factor);
    sums.total += double(share.total * factor);
  }
}

/// Whether two samples are close in the sense of kCloseSamples.
template <class T>
__device__ inline bool are_close(const T* z, std::int64_t stride, std::int64_t width, std::int64_t i, std::int64_t j) {
  T distance = 0, largest = 0;
  for (std::int64_t unit = 0; unit < width; ++unit) {
    const T first = z[i * stride + unit], second = z[j * stride + unit];
    distance = larger(distance, absolute(second - first));
    largest = larger(largest, larger(absolute(first), absolute(second)));
  }
  return distance <= largest * T(kCloseSamples);
}

/// Writes both halves of a pair's entry, and counts. Returns whether the pair is resolved. z: [samples, stride], of the first
/// layer.
template <class T>
__device__ inline bool store_entry(T* connectivity, std::int64_t* counts, const PairSums<false>& sums, const T* z,
                                   std::int64_t stride, std::int64_t width, std::int64_t samples, std::int64_t outputs,
                                   std::int64_t i, std::int64_t j) {
  T entry = T(1 - sums.nonlinear / double(outputs));
  if (i == j) {
    entry = T(1);
  } else if (isnan(sums.nonlinear) || (sizeof(T) == 4 && sums.constants > 0 && are_close(z, stride, width, i, j))) {
    entry = T(kUnresolved);
    count(counts + 1, 1);
  } else if (sums.constants > 0) {
    count(counts, sums.constants);
  }
  connectivity[i * samples + j] = connectivity[j * samples + i] = entry;
  return entry != T(kUnresolved);
}

/// The same of a problem, whose first layer is `layer`. With a stabiliser, float64 has the rule of close samples, too: the
/// entry of a constant output is 0, that of equal samples 1, and Python compares the samples.
template <bool kPooled, class T>
__device__ inline bool store_entry(const Problem<T>& of_first, const PairSums<kPooled>& sums, const Layer<T>& layer,
                                   std::int64_t i, std::int64_t j) {
  if constexpr (!kPooled) {
    return store_entry(of_first.own_connectivity(), of_first.own_counts(), sums, layer.z, layer.stride, layer.width,
                       of_first.samples, of_first.outputs, i, j);
  } else {
    const Problem<T> problem = of_network(of_first);
    const std::int64_t samples = problem.samples, outputs = problem.outputs;
    const T stabiliser = scaled_stabiliser(problem.stabiliser, common_scale(problem.spread));
    T entry = T(1 - sums.nonlinear / double(outputs)), pooled = T(pooled_r2(sums.bend, sums.total, double(stabiliser)));
    const bool underflows = problem.pooled && pool_underflows(T(sums.total), stabiliser, sums.constants, outputs);
    const bool compares = (sizeof(T) == 4 || problem.stabiliser > 0) && sums.constants > 0;
    if (i == j) {
      entry = pooled = T(1);
    } else if (isnan(sums.nonlinear) || underflows || (compares && are_close(layer.z, layer.stride, layer.width, i, j))) {
      entry = pooled = T(kUnresolved);
      count(problem.counts + 1, 1);
    } else if (sums.constants > 0) {
      count(problem.counts, sums.constants);
    }
    problem.connectivity[i * samples + j] = problem.connectivity[j * samples + i] = entry;
    if (problem.pooled) problem.pooled[i * samples + j] = problem.pooled[j * samples + i] = pooled;
    return entry != T(kUnresolved);
  }
}

/// The n-th unit of work: a first sample i, and the number of a block of `size` second samples; those from i on are measured.
/// Units with the same block are neighbours, so that warps that share a cache read the same second samples.
template <class Index>
LMN_FN void find_unit(Index n, Index size, Index& i, Index& block) {
  const auto start = [size](Index b) { return size * (b * (b + 1) / 2); };
  block = Index((::sqrt(1.0 + 8.0 * double(n) / double(size)) - 1.0) / 2.0);
  while (block > 0 && start(block) > n) --block;
  while (start(block + 1) <= n) ++block;
  i = n - start(block);
}
inline std::int64_t count_units(std::int64_t samples, std::int64_t size) {
  const std::int64_t blocks = blocks_of(samples, size);
  return size * (blocks * (blocks - 1) / 2) + samples;
}

}  // namespace
}  // namespace lmn
