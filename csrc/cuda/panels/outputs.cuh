// From the outputs' moments to a pair's sums, and the moments' way to the workspace between two passes. panels_kernel calls
// these for outputs in registers (any number) and for the straight form (few outputs).
#pragma once
#include "state.cuh"

namespace lmn {
namespace {
namespace panels {

/// Adds a lane's four outputs of a step to the pair's sums. moments: in units of the products (in_products), or of the
/// residuals times their scales.
template <bool kPooled>
__device__ inline void add_four(PairSums<kPooled>& sums, const Problem<float>& of_first, bool in_products, int step,
                                const Moments<float> (&moments)[4]) {
  const Problem<float> problem = of_network(of_first);
  const int lane = lane_here();
  const std::int64_t k = std::int64_t(step) * kStepUnits + 4 * (lane % 4);
  if (k >= problem.outputs) return;
  const Layer<float>& layer = *afresh(problem.layers + problem.last);
  const float vanishing = never_zero(layer.kind) ? Vanishing<float>::value : 0.0f;
  const Work& work = work_of_warp();
  const std::int64_t i = work.i, j = at_most(std::int64_t(work.group) * kGroup + lane / 4, problem.samples - 1);
  float y[8], y_low[8], rounding[8], scale[4];  // of sample i, then of sample j
  if (problem.outputs % 4 == 0) {
    const auto both = [&](float (&to)[8], const float* from) {
      float four[4];
      take4(four, from + i * problem.outputs + k);
#pragma unroll
      for (int c = 0; c < 4; ++c) to[c] = four[c];
      take4(four, from + j * problem.outputs + k);
#pragma unroll
      for (int c = 0; c < 4; ++c) to[4 + c] = four[c];
    };
    both(y, problem.y), both(y_low, problem.y_low), both(rounding, problem.rounding);
    take4(scale, problem.scale + k);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const std::int64_t output = at_most(k + c, problem.outputs - 1);
      const std::int64_t at_i = i * problem.outputs + output, at_j = j * problem.outputs + output;
      y[c] = problem.y[at_i], y[4 + c] = problem.y[at_j];
      y_low[c] = problem.y_low[at_i], y_low[4 + c] = problem.y_low[at_j];
      rounding[c] = problem.rounding[at_i], rounding[4 + c] = problem.rounding[at_j];
      scale[c] = problem.scale[output];
    }
  }
  // The factors that bring a moment to units of the chord.
  const float* const unit = layer.half.units + step * 2 * kStepUnits + 4 * (lane % 4);
  float factor[4] = {1, 1, 1, 1};
  if (in_products) {
    take4(factor, unit + kStepUnits);
  } else if (layer.half.records) {
    take4(factor, unit);
#pragma unroll
    for (int c = 0; c < 4; ++c) factor[c] = reciprocal(factor[c]);  // exact, because the factor is a power of two
  }
  float nonlinear = 0;
  bool ordinary = !kPooled;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    factor[c] *= scale[c];
    float share = 0;
    const float first = absolute(y[c]), second = absolute(y[4 + c]);
    const bool plain =
        ordinary_share(moments[c].te, bend_of(moments[c], problem.nodes.variance_t), factor[c],
                       (y[4 + c] - y[c]) + (y_low[4 + c] - y_low[c]), ::fmaxf(first, second),
                       fma(rounding[c], rounding[c], rounding[4 + c] * rounding[4 + c]), problem.nodes.variance_t, share) &&
        ::fminf(first, second) >= vanishing * scale[c];
    if (k + c < problem.outputs) ordinary = ordinary && plain, nonlinear += share;
  }
  if (ordinary) {
    sums.nonlinear += double(nonlinear);
    return;
  }
  Moments<float> next[4] = {moments[0], moments[1], moments[2], moments[3]};
#pragma unroll 1
  for (int c = 0; c < 4 && k + c < problem.outputs; ++c) {
    const float f = factor[0], unit_scale = problem.scale[k + c];
    const Moments<float> m{next[0].e * f, next[0].te * f, next[0].ee * f * f};
    add_output(sums, problem, i, j, k + c, m, unit_scale, vanishing * unit_scale);
#pragma unroll
    for (int n = 0; n < 3; ++n) next[n] = next[n + 1], factor[n] = factor[n + 1];
  }
}

/// Between two passes a lane's moments are in the workspace.
template <int kCount>
__device__ inline void load_moments(Moments<float> (&moments)[kCount], const float* from) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    const float* const at = from + n * kMoments * kWarp;
    moments[n] = {at[0], at[kWarp], at[2 * kWarp]};
  }
}
template <int kCount>
__device__ inline void store_moments(const Moments<float> (&moments)[kCount], float* to) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    float* const at = to + n * kMoments * kWarp;
    at[0] = moments[n].e, at[kWarp] = moments[n].te, at[2 * kWarp] = moments[n].ee;
  }
}

}  // namespace panels
}  // namespace
}  // namespace lmn
