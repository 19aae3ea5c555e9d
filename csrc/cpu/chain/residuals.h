// Residuals from the chord behind an activation: how far a hidden unit's activation on the path is from the chord of that
// activation, for one first sample and a vector of second ones. Three ways to the same number: the activation itself at every
// node; a product of two exponentials, for the first layer where it may be used; and for a stencil the slopes at both ends and
// the midpoint.
#pragma once
#include "../level.h"

#include "../../activation.h"  // after level.h, whose functions it uses

namespace lmn {
namespace {

/// The units of one layer at both ends of the paths.
template <class T>
struct Ends {
  const T *first_z, *first_a, *first_slope;     // [width], before and after the activation; its derivative, for a stencil alone
  const T *second_z, *second_a, *second_slope;  // [width][lanes]
  std::int64_t width;
};

// ---- at every node ----

/// z on the path, from its chord and its distance from it. ReLU turns what rounding leaves of a zero into an output: where
/// all units before it are off, z is 0, or the bias, and there may be nothing else along a path.
template <ActivationKind kKind, class V>
inline V off_chord(V on_chord, V residual, V first, V second) {
  const V z = on_chord + residual;
  if constexpr (kKind != ActivationKind::kRelu) return z;
  const V rounding = larger(absolute(first), absolute(second)) * (kRoundedUlps * Epsilon<Scalar<V>>::value);
  return absolute(z) <= rounding ? V{} : z;
}

/// panel[unit][node] = act(z(t)) - chord of act, with z(t) the chord of z plus what the panel holds (kDeviates). Not inlined,
/// as no function made for one activation is: the compiler gives the registers to its loop alone.
template <class T, ActivationKind kKind, bool kDeviates>
__attribute__((noinline)) void residuals(const Ends<T>& ends, Activation activation, const T* t, int columns,
                                         Vector<T>* panel) {
  using V = Vector<T>;
  const T alpha = T(activation.alpha), beta = T(activation.beta);
  for (std::int64_t unit = 0; unit < ends.width; ++unit) {
    const V z_first = splat<V>(ends.first_z[unit]), z_second = load<V>(ends.second_z + unit * kLanes<T>);
    const V a_first = splat<V>(ends.first_a[unit]), a_second = load<V>(ends.second_a + unit * kLanes<T>);
    for (int c = 0; c < columns; ++c) {
      V& residual = panel[unit * columns + c];
      V z = on_chord(z_first, z_second, t[c]);
      if constexpr (kDeviates) z = off_chord<kKind>(z, residual, z_first, z_second);
      residual = activate<kKind>(z, alpha, beta) - on_chord(a_first, a_second, t[c]);
    }
  }
}

// ---- from two exponentials ----
//
// SiLU, sigmoid and tanh from exp(-z(t)) = exp(-(1 - t) z_i) exp(-t z_j), for tanh of 2 z. The first factor comes from a
// table of the first samples, the second from one of the second samples, and a pair takes a product in place of an
// exponential.

/// Beyond this |z| a product of two exponentials could overflow or lose its digits, and the activation is evaluated itself.
template <class T> constexpr T kSeparableLimit = sizeof(T) == 4 ? T(80) : T(700);
/// 1 - 2 / (1 + exp(2 z)) is right to an absolute epsilon, and no better near 0. Below this mean |z| tanh is evaluated itself.
template <class T> constexpr T kTanhSeparableMean = T(0.25);

constexpr bool is_separable(ActivationKind kind) {
  return kind == ActivationKind::kSilu || kind == ActivationKind::kSigmoid || kind == ActivationKind::kTanh;
}

template <class T>
inline T exponent_factor(ActivationKind kind) {
  return kind == ActivationKind::kTanh ? T(2) : T(1);
}

/// Whether the first layer may be taken from two exponentials at these samples, whose activation is_separable. z: [count].
template <class T>
bool separates(ActivationKind kind, const T* z, std::int64_t count) {
  T largest = 0;
  double sum = 0;
  for (std::int64_t n = 0; n < count; ++n) {
    const T magnitude = z[n] < 0 ? -z[n] : z[n];
    largest = largest < magnitude ? magnitude : largest;
    sum += double(magnitude);
  }
  if (!(largest * exponent_factor<T>(kind) < kSeparableLimit<T>)) return false;
  return kind != ActivationKind::kTanh || sum >= double(kTanhSeparableMean<T>) * double(count);
}

/// panel[unit][node] as `residuals` has it without deviations. first_table: [width][stride], exp(-(1 - t) z_i); second_table:
/// the same, exp(-t z_j); both from the first of the kC nodes on.
template <class T, ActivationKind kKind, int kC>
__attribute__((noinline)) void separated_residuals(const Ends<T>& ends, const T* t, const T* first_table,
                                                   const Vector<T>* second_table, std::int64_t stride, Vector<T>* panel) {
  using V = Vector<T>;
  T node[kC];
  for (int c = 0; c < kC; ++c) node[c] = t[c];
  for (std::int64_t unit = 0; unit < ends.width; ++unit) {
    const V z_first = splat<V>(ends.first_z[unit]), z_second = load<V>(ends.second_z + unit * kLanes<T>);
    const V a_first = splat<V>(ends.first_a[unit]), a_second = load<V>(ends.second_a + unit * kLanes<T>);
    const V z_chord = z_second - z_first, a_chord = a_second - a_first;
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) {
      const V first = splat<V>(first_table[unit * stride + c]);
      const V logistic = reciprocal(fma(first, second_table[unit * stride + c], splat<V>(T(1))));
      const V chord = fma(splat<V>(node[c]), a_chord, a_first);
      V residual;
      if constexpr (kKind == ActivationKind::kSilu) {
        residual = fma(fma(splat<V>(node[c]), z_chord, z_first), logistic, -chord);
      } else if constexpr (kKind == ActivationKind::kSigmoid) {
        residual = logistic - chord;
      } else {
        residual = fma(splat<V>(T(2)), logistic, T(-1) - chord);
      }
      // A unit that does not move has no residual; the two exponentials' rounding would leave one.
      panel[unit * kC + c] = z_second == z_first ? V{} : residual;
    }
  }
}

// ---- of a stencil ----

/// panel[unit][node]: the residual's slopes at both ends, then its value at the midpoint, those from `begin` on; from what the
/// panel holds (kDeviates).
template <class T, ActivationKind kKind, bool kDeviates>
__attribute__((noinline)) void stencil_residuals(const Ends<T>& ends, Activation activation, int begin, int columns,
                                                 Vector<T>* panel) {
  using V = Vector<T>;
  const bool slopes = begin == 0, midpoint = begin + columns == 3;
  const T alpha = T(activation.alpha), beta = T(activation.beta);
  for (std::int64_t unit = 0; unit < ends.width; ++unit) {
    const V z_first = splat<V>(ends.first_z[unit]), z_second = load<V>(ends.second_z + unit * kLanes<T>);
    const V a_first = splat<V>(ends.first_a[unit]), a_second = load<V>(ends.second_a + unit * kLanes<T>);
    const V z_chord = z_second - z_first, a_chord = a_second - a_first;
    V* const residual = panel + unit * columns;
    if (slopes) {
      const V slope_second = load<V>(ends.second_slope + unit * kLanes<T>);
      residual[0] = fma(splat<V>(ends.first_slope[unit]), kDeviates ? z_chord + residual[0] : z_chord, -a_chord);
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
