// The statistics of a path, written once for every kernel and device. V is a scalar or a vector of lanes. The including file
// must first define, for V: fma, splat<V>(scalar).
#pragma once
#include "common.h"

namespace lmn {
namespace {

// Rounding error of a short sum, in epsilons of the larger end value. It holds where no term exceeds the sum's values at the
// path's ends.
constexpr int kRoundedUlps = 8;
// An output is constant if its standard deviation along a path is at most this many epsilons of its magnitude at the ends.
// The same number as lmnfast.reference.CONSTANT_ULPS.
constexpr double kConstantUlps = 4.0;
// An output is unresolved if its standard deviation along a path is at most this many epsilons of the terms that the output
// is computed from (the root of the sum of squares of all terms, layer by layer). Rounding could then change the output's
// 1 - r2 by more than about 1 / 128 in float32, 1e-7 in float64. The pair is measured again in float64, without a chord. A
// larger number here means more pairs of this kind.
constexpr double kResolvedUlps32 = 0x1p8, kResolvedUlps64 = 0x1p24;
// Range of var(t) var(y). Below it the squares of a path's numbers lose digits; above it they overflow.
constexpr double kLeastTotal32 = 1e-24, kLargestTotal32 = 1e30, kLeastTotal64 = 1e-280, kLargestTotal64 = 1e290;
// Two samples are close if none of their first pre-activations differs by more than this share of the largest one. The
// outputs of close samples may be equal to float32 rounding and still bend between the samples, so the constant rule does
// not apply to close samples in float32.
constexpr double kCloseSamples = 0x1p-10;
// Where only f's outputs are known, the size of the terms behind an output is estimated. It is the output's magnitude at the
// path's ends, and at least this share of the output's largest value over the samples: an output may be small because its
// terms cancel.
constexpr double kLeastRounding = 0x1p-6;
// Two results of the same operations in different orders differ by at most this many epsilons of the value's magnitude and
// of the largest magnitude. The same number as SAME_OUTPUT_ULPS in lmnfast/_samples.py.
constexpr double kSameOutputUlps = 32;
/// Whether two functions have the same output. high, low: range of the output over the samples; apart: the largest
/// difference of the two functions there. The same rule as Checks.same in lmnfast/_checks.py.
LMN_FN bool is_same_output(double high, double low, double apart, double epsilon) {
  const double above = high < 0 ? -high : high, below = low < 0 ? -low : low;
  return apart <= 1e-3 * (high - low) + kRoundedUlps * epsilon * (above < below ? below : above) + 1e-30;
}
/// Marks an unresolved entry of a connectivity matrix or of a list of pairs.
constexpr double kUnresolved = -1.0;

/// Weighted moments over the nodes of the chord residual e(t) = y(t) - (y_i + t (y_j - y_i)).
template <class V>
struct Moments {
  V e, te, ee;  // sum w e, sum w (t - mean t) e, sum w e^2
};
/// Adds a node. w_t: w (t - mean t).
template <class V, class T>
LMN_FN void add_moments(Moments<V>& moments, V e, T w, T w_t) {
  const V weighted = e * w;
  moments.e += weighted;
  moments.te = fma(splat<V>(w_t), e, moments.te);
  moments.ee = fma(weighted, e, moments.ee);
}

/// The contribution of one output to the entry of one pair.
template <class V>
struct Share {
  V nonlinear;    // 1 - r2; without a stabiliser 0 where the output is constant
  V constant;     // 1 where the output is constant, else 0
  V unresolved;   // 1 where rounding may determine 1 - r2, else 0
  V bend, total;  // the terms of 1 - r2 = bend / total, for pooling; 0 where the output is constant
};

/// Stands for a stabiliser of 0 at compile time.
struct NoStabiliser {};
template <class V>
LMN_FN V operator+(V v, NoStabiliser) {
  return v;
}
/// A stabiliser in the units of an output that is multiplied by `scale`. At most so large that r2 is 0 and nothing overflows,
/// and not 0 because it is small: a constant output's r2 is then 0 all the same.
template <class T>
LMN_FN T scaled_stabiliser(double stabiliser, T scale) {
  constexpr double kLargest = sizeof(T) == 4 ? kLargestTotal32 : kLargestTotal64, kLeast = Vanishing<T>::value;
  const double scaled = stabiliser * double(scale) * double(scale);
  return T(stabiliser > 0 && scaled < kLeast ? kLeast : scaled < kLargest ? scaled : kLargest);
}
/// The same of a kernel that knows at compile time whether there may be a stabiliser.
template <bool kPossible, class T>
LMN_FN auto stabiliser_of(double stabiliser, T scale) {
  if constexpr (kPossible) {
    return scaled_stabiliser(stabiliser, scale);
  } else {
    return NoStabiliser{};
  }
}
/// What brings the bend and the total of an output, which is multiplied by `scale`, to the unit that all outputs share.
template <class T>
LMN_FN T pooling_factor(T common, T scale) {
  return common / scale * (common / scale);
}
/// r2 pooled over outputs: the share of the path's variance, summed over the outputs, that lies on its chord. bend, total: sums
/// over the outputs in their common unit. stabiliser: in this unit.
template <class T>
LMN_FN T pooled_r2(T bend, T total, T stabiliser) {
  const T all = total + stabiliser;
  return all > 0 ? 1 - (bend + stabiliser) / all : T(1);
}
/// Whether sums over outputs, `constants` of them constant, underflow.
template <class T>
LMN_FN bool pool_underflows(T total, T stabiliser, std::int64_t constants, std::int64_t outputs) {
  constexpr T kLeast = static_cast<T>(sizeof(T) == 4 ? kLeastTotal32 : kLeastTotal64);
  return constants < outputs && !(total + stabiliser > kLeast);
}

/// 1 - r2 of one output, from its chord and the moments of its residual.
/// With cov(y, t) = chord var(t) + te and var(e) = ee - e^2:
///   var(t) var(y) = cov^2 + (var(t) var(e) - te^2), so 1 - r2 is the second term's share, and nothing cancels.
/// magnitude: the larger |y| of the two ends. least: an output below |least| never counts as constant, because its own
/// rounding is unknown; exception: with a negative `least`, an output that is 0 at both ends does count as constant.
/// rounding_squared: of both ends together, see kResolvedUlps32. All values are in the units of the chord, in which the
/// outputs' spread over the samples is of order 1. stabiliser: is added to var(t) var(y); an output that is constant then has
/// r2 = 0.
template <class V, class T, class Stabiliser = NoStabiliser>
LMN_FN Share<V> share_of_output(V chord, const Moments<V>& m, V magnitude, V least, V rounding_squared, T variance_t, T epsilon,
                                Stabiliser stabiliser = {}) {
  const V zero{}, one = zero + T(1);
  const V covariance = chord * variance_t + m.te;
  const V residual = variance_t * (m.ee - m.e * m.e) - m.te * m.te;
  const V nonlinear = residual < zero ? zero : residual;  // a NaN stays
  const V total = covariance * covariance + nonlinear;
  const V tolerance = magnitude * (static_cast<T>(kConstantUlps) * epsilon);
  const V constant_total = tolerance * tolerance * variance_t;
  constexpr T kResolved = static_cast<T>(sizeof(T) == 4 ? kResolvedUlps32 : kResolvedUlps64);
  const V resolved_total = rounding_squared * (kResolved * epsilon * (kResolved * epsilon) * variance_t);
  constexpr T kLeast = static_cast<T>(sizeof(T) == 4 ? kLeastTotal32 : kLeastTotal64);
  constexpr T kLargest = static_cast<T>(sizeof(T) == 4 ? kLargestTotal32 : kLargestTotal64);
  // Squares that underflow prove nothing. Only if all numbers to be squared are 0 is the output known to be constant.
  const V sizes = chord * chord + m.ee;
  const V moved = (chord < zero ? -chord : chord) + (m.te < zero ? -m.te : m.te) + (m.e < zero ? -m.e : m.e);
  V constant = total <= constant_total ? one : zero;
  constant = constant_total >= zero + kLeast ? constant : moved + sizes > zero ? zero : constant;
  const V known_from = least < zero ? -least : least, zeros_from = least < zero ? zero : least;
  constant = magnitude >= (magnitude > zero ? known_from : zeros_from) ? constant : zero;
  const V stable = total + stabiliser;
  V resolved = stable > resolved_total ? one : zero;  // a NaN makes it 0
  resolved = stable > zero + kLeast ? resolved : zero;
  resolved = total < zero + kLargest ? resolved : zero;
  const V bend = constant > zero ? zero : nonlinear, moving = constant > zero ? zero : total;
  const V all = moving + stabiliser;
  const V share = all > zero ? (bend + stabiliser) / all : zero;
  return {share, constant, constant > zero ? zero : one - resolved, bend, moving};
}

/// Whether an output may be constant in appearance only. Activations bend over a distance of about 1. If the rounding of the
/// terms behind the output is nearly as large, an activation may hide this rounding together with any variation below it.
/// rounding: scaled as the output is.
template <class V, class T>
LMN_FN V hides_rounding(V rounding, T scale, T epsilon) {
  return rounding * (4 * epsilon) > V{} + scale ? V{} + T(1) : V{};
}

/// A polynomial that replaces an output's residual along a path. It is given by the residual's slopes at both ends and, with
/// the midpoint, the residual's value there. e(t) = sum over v of value_v phi_v(t), so its moments follow from these sums:
template <class T>
struct Stencil {
  static constexpr int kMost = 3;
  int size = 0;  // 2, or 3 with the midpoint; 0: no polynomial, the residual is evaluated at every node
  T e[kMost] = {}, te[kMost] = {}, ee[kMost][kMost] = {};  // sum w phi_v, sum w (t - mean t) phi_v, sum w phi_v phi_u
};

/// phi = t (1 - t)^2, -t^2 (1 - t) and 16 t^2 (1 - t)^2. With the midpoint, an eighth of the third is
/// taken from the first and added to the second, so that these two are 0 at the midpoint.
template <class T>
inline Stencil<T> make_stencil(const PathNodes& nodes, bool midpoint) {
  Stencil<T> stencil;
  stencil.size = midpoint ? 3 : 2;
  double e[3] = {}, te[3] = {}, ee[3][3] = {};
  for (int m = 0; m < nodes.interior; ++m) {
    const double t = nodes.t[m], w = nodes.weights[m], bump = 16 * t * t * (1 - t) * (1 - t);
    const double half = midpoint ? bump / 8 : 0.0;
    const double phi[3] = {t * (1 - t) * (1 - t) - half, half - t * t * (1 - t), bump};
    for (int v = 0; v < 3; ++v) {
      e[v] += w * phi[v];
      te[v] += w * (t - nodes.mean_t) * phi[v];
      for (int u = 0; u < 3; ++u) ee[v][u] += w * phi[v] * phi[u];
    }
  }
  for (int v = 0; v < 3; ++v) {
    stencil.e[v] = static_cast<T>(e[v]);
    stencil.te[v] = static_cast<T>(te[v]);
    for (int u = 0; u < 3; ++u) stencil.ee[v][u] = static_cast<T>(ee[v][u]);
  }
  return stencil;
}

template <int kSize, class V, class T>
LMN_FN Moments<V> stencil_moments(const Stencil<T>& stencil, const V* value) {
  Moments<V> m{value[0] * stencil.e[0], value[0] * stencil.te[0], value[0] * value[0] * stencil.ee[0][0]};
  for (int v = 1; v < kSize; ++v) {
    m.e = m.e + value[v] * stencil.e[v];
    m.te = m.te + value[v] * stencil.te[v];
    V sum = value[v] * stencil.ee[v][v];
    for (int u = 0; u < v; ++u) sum = sum + value[u] * (2 * stencil.ee[v][u]);
    m.ee = m.ee + value[v] * sum;
  }
  return m;
}

}  // namespace
}  // namespace lmn
