// The statistics of a path, once, for every kernel and device. V: a scalar, or a vector of lanes.
#pragma once

#if defined(__CUDACC__)
#define LMN_FN __host__ __device__ inline
#else
#define LMN_FN inline
#endif

namespace lmn {
namespace {

// An output whose standard deviation along a path is at most this many epsilons of its magnitude at the ends is
// constant; the same number as lmnfast.reference.CONSTANT_ULPS.
constexpr double kConstantUlps = 4.0;

/// Weighted moments over the nodes of the chord residual e(t) = y(t) - (y_i + t (y_j - y_i)).
template <class V>
struct Moments {
  V e, te, ee;  // sum w e, sum w (t - mean t) e, sum w e^2
};

/// 1 - r2 of one output, from its chord and the moments of its residual; 0 where it is constant.
/// With cov(y, t) = chord var(t) + te and var(e) = ee - e^2:
///   var(t) var(y) = cov^2 + (var(t) var(e) - te^2), so 1 - r2 is the second term's share, and nothing cancels.
template <class V, class T>
LMN_FN V nonlinear_share(V chord, const Moments<V>& m, V magnitude, T variance_t, T epsilon) {
  const V covariance = chord * variance_t + m.te;
  const V residual = variance_t * (m.ee - m.e * m.e) - m.te * m.te;
  const V nonlinear = residual < V{} ? V{} : residual;  // a NaN stays
  const V total = covariance * covariance + nonlinear;
  const V tolerance = magnitude * (static_cast<T>(kConstantUlps) * epsilon);
  return total <= tolerance * tolerance * variance_t ? V{} : nonlinear / total;
}

}  // namespace
}  // namespace lmn
