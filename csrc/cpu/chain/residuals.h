// Chord residuals behind an activation: the distance of a hidden unit's activation on the path from the chord of that
// activation, for one first sample and a vector of second samples. There are three ways to compute it: the activation itself
// at every node; a product of two exponentials, where the first layer allows it; and for a stencil the slopes at both ends
// and the midpoint.
#pragma once
#include "../level.h"

#include "../../activation.h"  // after level.h, whose functions it uses

namespace lmn {
namespace {

/// A value of unit n at the first end of the paths. values: [n], or [n][lanes] if each lane has a first sample of its own.
template <class T>
inline Vector<T> first_end(const T* values, std::int64_t n, bool paired) {
  return paired ? load<Vector<T>>(values + n * kLanes<T>) : splat<Vector<T>>(values[n]);
}

/// The units of one layer at both ends of the paths.
template <class T>
struct Ends {
  const T *first_z, *first_a, *first_slope;     // [width], before and after the activation; slope only with a stencil
  const T *second_z, *second_a, *second_slope;  // [width][lanes]
  std::int64_t width;
  bool paired;  // each lane has a first sample of its own: first_z, first_a and first_slope are [width][lanes]

  Vector<T> first(const T* values, std::int64_t unit) const { return first_end<T>(values, unit, paired); }
};

// ---- at every node ----

/// z on the path, from its chord and its residual. For ReLU a z of the size of rounding becomes exactly 0: if all units that
/// feed this ReLU are off, z is 0 plus rounding noise (or the bias). Without the 0 that noise would become an output, and if
/// the path has no other output, r2 would be random.
template <ActivationKind kKind, class V>
inline V off_chord(V on_chord, V residual, V first, V second) {
  const V z = on_chord + residual;
  if constexpr (kKind != ActivationKind::kRelu) return z;
  const V rounding = larger(absolute(first), absolute(second)) * (kRoundedUlps * Epsilon<Scalar<V>>::value);
  return absolute(z) <= rounding ? V{} : z;
}

/// panel[unit][node] = act(z(t)) - chord of act. z(t) is the chord of z, plus the residual in the panel (kDeviates). kSlopes:
/// also slopes[unit][node] = act'(z(t)). Not inlined, like every function made for one activation: the compiler then gives all
/// registers to its loop.
template <class T, ActivationKind kKind, bool kDeviates, bool kSlopes = false>
__attribute__((noinline)) void residuals(const Ends<T>& ends, Activation activation, const T* t, int columns, Vector<T>* panel,
                                         Vector<T>* slopes = nullptr) {
  using V = Vector<T>;
  const T alpha = T(activation.alpha), beta = T(activation.beta);
  for (std::int64_t unit = 0; unit < ends.width; ++unit) {
    const V z_first = ends.first(ends.first_z, unit), z_second = load<V>(ends.second_z + unit * kLanes<T>);
    const V a_first = ends.first(ends.first_a, unit), a_second = load<V>(ends.second_a + unit * kLanes<T>);
    for (int c = 0; c < columns; ++c) {
      V& residual = panel[unit * columns + c];
      V z = on_chord(z_first, z_second, t[c]);
      if constexpr (kDeviates) z = off_chord<kKind>(z, residual, z_first, z_second);
      residual = activate<kKind>(z, alpha, beta) - on_chord(a_first, a_second, t[c]);
      if constexpr (kSlopes) slopes[unit * columns + c] = derivative<kKind>(z, alpha, beta);
    }
  }
}

// ---- from two exponentials ----
//
// SiLU, sigmoid and tanh from exp(-z(t)) = exp(-(1 - t) z_i) exp(-t z_j); for tanh with 2 z in place of z. The first factor
// comes from a table of the first samples, the second from a table of the second samples. A pair then takes a product
// instead of an exponential.

/// Beyond this |z| a product of two exponentials could overflow or lose its digits. The activation itself is then evaluated.
template <class T>
constexpr T kSeparableLimit = sizeof(T) == 4 ? T(80) : T(700);
/// 1 - 2 / (1 + exp(2 z)) has an absolute error of an epsilon, also near 0. Below this mean |z| tanh itself is evaluated.
template <class T>
constexpr T kTanhSeparableMean = T(0.25);

constexpr bool is_separable(ActivationKind kind) {
  return kind == ActivationKind::kSilu || kind == ActivationKind::kSigmoid || kind == ActivationKind::kTanh;
}

template <class T>
inline T exponent_factor(ActivationKind kind) {
  return kind == ActivationKind::kTanh ? T(2) : T(1);
}

/// Whether the first layer may be computed from two exponentials at these samples. Its activation is_separable. z: [count].
template <class T>
bool separates(ActivationKind kind, const T* z, std::int64_t count) {
  using V = Vector<T>;
  V all{};
  for (std::int64_t n = 0; n < count; n += kLanes<T>) {
    all = larger(all, absolute(load_partial<V>(z + n, at_most(kLanes<T>, count - n))));
  }
  T largest = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) largest = largest < all[lane] ? all[lane] : largest;
  if (!(largest * exponent_factor<T>(kind) < kSeparableLimit<T>)) return false;
  if (kind != ActivationKind::kTanh) return true;
  double sum = 0;
  for (std::int64_t n = 0; n < count; ++n) sum += double(z[n] < 0 ? -z[n] : z[n]);
  return sum >= double(kTanhSeparableMean<T>) * double(count);
}

/// Tables of exponentials. All begin at the node that is computed first.
template <class T>
struct Tables {
  const T* of_first;          // of a first sample: [node][whole_vectors(width)], exp(-(1 - t) z_i)
  const Vector<T>* of_lanes;  // the same of a block's samples: [width][stride]; null if all lanes have one first sample
  const Vector<T>* second;    // of a block's samples: [width][stride], exp(-t z_j)
  std::int64_t stride;
  Bits<Vector<T>> lower, upper;  // with of_lanes: the lanes that have each lane's first and second sample
};

/// panel[unit][node], and slopes[unit][node], as `residuals` computes them without kDeviates. kPaired: each lane has a first
/// sample of its own.
template <class T, ActivationKind kKind, int kC, bool kSlopes, bool kPaired>
__attribute__((noinline)) void separated_residuals(const Ends<T>& ends, const T* t, const Tables<T>& tables, Vector<T>* panel,
                                                   Vector<T>* slopes) {
  using V = Vector<T>;
  const T* const first_table = tables.of_first;
  const V *const lanes_table = tables.of_lanes, *const second_table = tables.second;
  const std::int64_t stride = tables.stride;
  [[maybe_unused]] const Bits<V> lower = tables.lower, upper = tables.upper;
  const std::int64_t first_stride = whole_vectors<T>(ends.width);
  T node[kC];
  for (int c = 0; c < kC; ++c) node[c] = t[c];
  for (std::int64_t unit = 0; unit < ends.width; ++unit) {
    const V z_first = first_end<T>(ends.first_z, unit, kPaired), z_second = load<V>(ends.second_z + unit * kLanes<T>);
    const V a_first = first_end<T>(ends.first_a, unit, kPaired), a_second = load<V>(ends.second_a + unit * kLanes<T>);
    const V z_chord = z_second - z_first, a_chord = a_second - a_first;
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) {
      V first, second = second_table[unit * stride + c];
      if constexpr (kPaired) {
        first = permuted(lanes_table[unit * stride + c], lower);
        second = permuted(second, upper);
      } else {
        first = splat<V>(first_table[c * first_stride + unit]);
      }
      const V logistic = reciprocal(fma(first, second, splat<V>(T(1))));
      const V chord = fma(splat<V>(node[c]), a_chord, a_first);
      [[maybe_unused]] const V steep = logistic - logistic * logistic;
      V residual;
      [[maybe_unused]] V slope;
      if constexpr (kKind == ActivationKind::kSilu) {
        const V z = fma(splat<V>(node[c]), z_chord, z_first);
        residual = fma(z, logistic, -chord);
        slope = fma(z, steep, logistic);
      } else if constexpr (kKind == ActivationKind::kSigmoid) {
        residual = logistic - chord;
        slope = steep;
      } else {
        residual = fma(splat<V>(T(2)), logistic, T(-1) - chord);
        slope = steep * T(4);
      }
      // A unit that does not move has residual 0. The rounding of the two exponentials would give another number.
      panel[unit * kC + c] = z_second == z_first ? V{} : residual;
      if constexpr (kSlopes) slopes[unit * kC + c] = slope;
    }
  }
}

// ---- for a stencil ----

/// panel[unit][node]: the residual's slopes at both ends, then its value at the midpoint; of these three the ones from
/// `begin` on. With kDeviates the panel holds the same numbers of z.
template <class T, ActivationKind kKind, bool kDeviates>
__attribute__((noinline)) void stencil_residuals(const Ends<T>& ends, Activation activation, int begin, int columns,
                                                 Vector<T>* panel) {
  using V = Vector<T>;
  const bool slopes = begin == 0, midpoint = begin + columns == 3;
  const T alpha = T(activation.alpha), beta = T(activation.beta);
  for (std::int64_t unit = 0; unit < ends.width; ++unit) {
    const V z_first = ends.first(ends.first_z, unit), z_second = load<V>(ends.second_z + unit * kLanes<T>);
    const V a_first = ends.first(ends.first_a, unit), a_second = load<V>(ends.second_a + unit * kLanes<T>);
    const V z_chord = z_second - z_first, a_chord = a_second - a_first;
    V* const residual = panel + unit * columns;
    if (slopes) {
      const V slope_second = load<V>(ends.second_slope + unit * kLanes<T>);
      residual[0] = fma(ends.first(ends.first_slope, unit), kDeviates ? z_chord + residual[0] : z_chord, -a_chord);
      residual[1] = fma(slope_second, kDeviates ? z_chord + residual[1] : z_chord, -a_chord);
    }
    if (midpoint) {
      V& middle = residual[columns - 1];
      V z = on_chord(z_first, z_second, T(0.5));
      if constexpr (kDeviates) z = off_chord<kKind>(z, middle, z_first, z_second);
      middle = activate<kKind>(z, alpha, beta) - on_chord(a_first, a_second, T(0.5));
    }
  }
}

}  // namespace
}  // namespace lmn
