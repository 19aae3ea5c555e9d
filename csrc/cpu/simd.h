// Vectors of lanes, as wide as the instruction set that this file is compiled for, and their mathematics.
//
// Everything here is in an anonymous namespace and uses no standard-library templates. Otherwise the linker could keep an
// inline function compiled for AVX-512 as the copy for every level. Contraction is off (-ffp-contract=off): only fma() is a
// fused multiply-add.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../common.h"

namespace lmn {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
using F = Vector<float>;
using D = Vector<double>;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// Accumulators of a matrix product: kBlockRows rows of one factor x kBlockColumns vectors of the other. A step also holds
// the vectors and one broadcast value. This takes 28 of 32 registers, 16 of 16, or, without a fused multiply-add, 12 of 16
// including a product. A squared difference (jacobian_distance) takes one register more: 29 of 32. With 16 registers three
// columns would leave none for the difference, so it has two.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 8, kBlockColumns = 3, kDifferenceColumns = 3;
#elif defined(__AVX2__)
constexpr int kBlockRows = 4, kBlockColumns = 3, kDifferenceColumns = 2;
#else
constexpr int kBlockRows = 4, kBlockColumns = 2, kDifferenceColumns = 2;
#endif

template <class V>
struct ScalarOf;
template <>
struct ScalarOf<F> {
  using type = float;
};
template <>
struct ScalarOf<D> {
  using type = double;
};
template <class V>
using Scalar = typename ScalarOf<V>::type;
template <class V>
using Bits = typename VectorOf<Scalar<V>>::bits;

template <class V>
inline V splat(Scalar<V> value) {
  return value - V{};
}

template <class V>
inline V load(const Scalar<V>* from) {  // unaligned
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}
template <class V>
inline void store(Scalar<V>* to, V v) {
  memcpy(to, &v, sizeof(V));
}

template <class V>
inline V load_partial(const Scalar<V>* from, int64_t count) {
  V v{};
  memcpy(&v, from, size_t(count) * sizeof(Scalar<V>));
  return v;
}

#if defined(__AVX512F__)
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline D fma(D a, D b, D c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline D fma(D a, D b, D c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
inline F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline D fma(D a, D b, D c) { return (D)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
inline F fma(F a, F b, F c) { return a * b + c; }
inline D fma(D a, D b, D c) { return a * b + c; }
#endif

/// 1 / v to about one ulp for 2^-126 <= |v| < 2^126. A larger |v| gives 0 or 1 / v.
inline F reciprocal(F v) {
#if defined(__AVX512F__)
  const F guess = _mm512_maskz_rcp14_ps(__mmask16(-1), v);
  return fma(guess, fma(-v, guess, splat<F>(1.0f)), guess);
#else
  return 1.0f / v;
#endif
}
inline D reciprocal(D v) { return 1.0 / v; }

template <class V>
inline V absolute(V v) {
  return v < V{} ? -v : v;
}
template <class V>
inline V smaller(V a, V b) {
  return b < a ? b : a;
}

/// result[lane] = v[from[lane]]
template <class V>
inline V permuted(V v, Bits<V> from) {
#if defined(__clang__)
  V result;
  for (int lane = 0; lane < kLanes<Scalar<V>>; ++lane) result[lane] = v[from[lane]];
  return result;
#else
  return __builtin_shuffle(v, from);
#endif
}

/// Whether any lane's bits are set.
template <class V>
inline bool any(Bits<V> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  Scalar<V> lanes_set = 0;
  for (int lane = 0; lane < kLanes<Scalar<V>>; ++lane) lanes_set += mask[lane] ? 1 : 0;
  return lanes_set > 0;
#endif
}

template <class V>
inline V from_bits(Bits<V> bits) {
  return (V)bits;
}

template <class V>
struct ExpConstants;
template <>
struct ExpConstants<F> {
  static constexpr float kHighest = 88.0f, kLowest = -87.0f;  // e^x stays a normal number
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kMantissaBits = 23, kBias = 127;
};
template <>
struct ExpConstants<D> {
  static constexpr double kHighest = 709.0, kLowest = -708.0;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissaBits = 52, kBias = 1023;
};

/// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2.
inline F exp_tail(F r) {  // Chebyshev interpolation: 2e-9 of e^r
  F q = splat<F>(0.00019890988f);
  q = fma(q, r, splat<F>(0.0013933647f));
  q = fma(q, r, splat<F>(0.0083333105f));
  q = fma(q, r, splat<F>(0.041666467f));
  q = fma(q, r, splat<F>(0.16666667f));
  return fma(q, r, splat<F>(0.5f));
}
inline D exp_tail(D r) {  // Taylor to r^13: 4e-18 of e^r
  D q = splat<D>(1.0 / 6227020800.0);
  double factorial = 6227020800.0;
#pragma GCC unroll 12
  for (int n = 13; n > 2; --n) {
    factorial /= n;
    q = fma(q, r, splat<D>(1.0 / factorial));
  }
  return q;
}

/// x = n ln 2 + r; returns 2^n, and r and r^2 tail(r) through the references.
template <class V>
inline V exp_parts(V x, V& r, V& tail) {
  using C = ExpConstants<V>;
  x = smaller(larger(x, splat<V>(C::kLowest)), splat<V>(C::kHighest));
  const V rounded = fma(x, splat<V>(Scalar<V>(1.44269504088896340736)), splat<V>(C::kRound));
  const V n = rounded - C::kRound;
  r = fma(n, splat<V>(-C::kLn2High), x);
  r = fma(n, splat<V>(-C::kLn2Low), r);
  tail = r * r * exp_tail(r);
  const Bits<V> power = ((Bits<V>)rounded << C::kMantissaBits) + ((Bits<V>)splat<V>(Scalar<V>(1)));
  return from_bits<V>(power);
}

/// e^x. Results below the normal numbers are 0. Above x = 88 (709 in double) the result stays e^88 (e^709).
template <class V>
inline V exp(V x) {
  V r, tail;
  const V power = exp_parts(x, r, tail);
  const V result = fma(power, r + tail, power);
  return x < splat<V>(ExpConstants<V>::kLowest) ? V{} : result;
}

/// e^x - 1 without cancellation near 0.
template <class V>
inline V expm1(V x) {
  V r, tail;
  const V power = exp_parts(x, r, tail);
  return fma(power, r + tail, power - 1);
}

/// 2 atanh(s) for |s| <= 1 / 3.
template <class V>
inline V twice_atanh(V s) {
  constexpr int kTerms = sizeof(Scalar<V>) == 4 ? 8 : 17;  // (1 / 9)^kTerms / (2 kTerms + 1) is below epsilon / 8
  const V square = s * s;
  V sum{};
#pragma GCC unroll 17
  for (int n = kTerms - 1; n >= 0; --n) sum = fma(sum, square, splat<V>(Scalar<V>(1.0 / (2 * n + 1))));
  return 2 * s * sum;
}

/// log(1 + u) for 0 <= u <= 1.
template <class V>
inline V log1p_unit(V u) {
  return twice_atanh(u / (2 + u));
}

/// log2(v) for normal v > 0; 0 for any other v, so that p log p is 0 for p = 0.
inline D log2_(D v) {
  const Bits<D> bits = (Bits<D>)(v > D{} ? v : splat<D>(1.0));  // with the bits of -0 the difference below would overflow
  // Exponent such that the mantissa lies in [sqrt(1/2), sqrt(2)): subtract the bits of sqrt(1/2) first.
  const Bits<D> exponent = (bits - 0x3FE6A09E667F3BCDLL) >> 52;
  const D mantissa = from_bits<D>(bits - (exponent << 52));
  const D log_mantissa = twice_atanh((mantissa - 1) / (mantissa + 1));
  const D result = fma(log_mantissa, splat<D>(1.44269504088896340736), __builtin_convertvector(exponent, D));
  return v > D{} ? result : D{};
}

template <class V, class Function>
inline V per_lane(V v, Function function) {
  for (int lane = 0; lane < kLanes<Scalar<V>>; ++lane) v[lane] = function(v[lane]);
  return v;
}

// Chebyshev interpolation of erf(x) / x in x^2 on [0, 1], and of erfc(x) e^(x^2) in 1 / (1 + x / 2) on [1, 4];
// together within 1.2e-7 of erf, one or two ulps. The second is the longer part, and many vectors need it in no lane.
inline F erf(F x) {
  const F a = smaller(absolute(x), splat<F>(4.0f));  // erf(4) rounds to 1
  const F u = a * a;
  F small = splat<F>(7.875875e-05f);
  small = fma(small, u, splat<F>(-0.00080168643f));
  small = fma(small, u, splat<F>(0.0051890872f));
  small = fma(small, u, splat<F>(-0.026854211f));
  small = fma(small, u, splat<F>(0.11283594f));
  small = fma(small, u, splat<F>(-0.37612626f));
  small = fma(small, u, splat<F>(1.1283791f)) * a;
  if (!any<F>(a >= splat<F>(1.0f))) return x < F{} ? -small : small;
  const F t = reciprocal(fma(a, splat<F>(0.5f), splat<F>(1.0f)));
  F large = splat<F>(-0.053630427f);
  large = fma(large, t, splat<F>(-0.0570652f));
  large = fma(large, t, splat<F>(0.40349504f));
  large = fma(large, t, splat<F>(0.10149542f));
  large = fma(large, t, splat<F>(0.33075711f));
  large = fma(large, t, splat<F>(0.27363434f));
  large = fma(large, t, splat<F>(0.00060511842f));
  large = 1 - large * exp(-u);
  const F result = a < splat<F>(1.0f) ? small : large;
  return x < F{} ? -result : result;
}
inline D erf(D x) {
  return per_lane(x, [](double v) { return ::erf(v); });
}

// (e^2a - 1) / (e^2a + 1) for a = |x|. It distinguishes 1 from 1 - epsilon, but not x from x + x^3. tanh(20) rounds to 1.
template <class V>
inline V tanh_by_exp(V x) {
  const V m = expm1(smaller(2 * absolute(x), splat<V>(40)));
  const V magnitude = m / (m + 2);
  return x < V{} ? -magnitude : magnitude;
}
inline D tanh(D x) { return tanh_by_exp(x); }
// Near 0: Chebyshev interpolation of (tanh(x) / x - 1) / x^2 in x^2, right within one ulp. r2 measures curvature, so the
// curvature near 0 must be right.
inline F tanh(F x) {
  const F u = x * x;
  F q = splat<F>(0.0022695018f);
  q = fma(q, u, splat<F>(-0.008323187f));
  q = fma(q, u, splat<F>(0.021762503f));
  q = fma(q, u, splat<F>(-0.05395846f));
  q = fma(q, u, splat<F>(0.133333f));
  q = fma(q, u, splat<F>(-0.33333334f));
  return u < splat<F>(0.4f) ? fma(x * u, q, x) : tanh_by_exp(x);
}

// The sine of r = x - n pi. pi has three parts, whose products with n are exact for |n| < 2^11. Chebyshev interpolation in
// r^2: 1e-7.
inline F sin_from(F x, F n) {
  F r = fma(n, splat<F>(-3.140625f), x);
  r = fma(n, splat<F>(-9.67502593994140625e-4f), r);
  r = fma(n, splat<F>(-1.509957990978376432e-7f), r);
  const F u = r * r;
  F q = splat<F>(-2.408019e-08f);
  q = fma(q, u, splat<F>(2.7536464e-06f));
  q = fma(q, u, splat<F>(-0.00019841087f));
  q = fma(q, u, splat<F>(0.0083333328f));
  q = fma(q, u, splat<F>(-0.16666667f));
  return fma(q * u, r, r);
}
/// A set sign bit if the integer n is odd, given `rounded` = n + kRound.
inline Bits<F> odd_sign(F rounded) { return (Bits<F>)rounded << 31; }
inline F sin(F x) {
  if (any<F>(absolute(x) > splat<F>(6000.0f))) return per_lane(x, [](float v) { return ::sinf(v); });
  const F rounded = fma(x, splat<F>(0.318309886f), splat<F>(ExpConstants<F>::kRound));
  const F result = sin_from(x, rounded - ExpConstants<F>::kRound);
  return from_bits<F>((Bits<F>)result ^ odd_sign(rounded));
}
// cos(x) = -sin(x - pi / 2), and x = (n + 1 / 2) pi + r.
inline F cos(F x) {
  if (any<F>(absolute(x) > splat<F>(6000.0f))) return per_lane(x, [](float v) { return ::cosf(v); });
  const F rounded = fma(x, splat<F>(0.318309886f), splat<F>(-0.5f)) + ExpConstants<F>::kRound;
  const F result = -sin_from(x, rounded - ExpConstants<F>::kRound + 0.5f);
  return from_bits<F>((Bits<F>)result ^ odd_sign(rounded));
}
inline D sin(D x) {
  return per_lane(x, [](double v) { return ::sin(v); });
}
inline D cos(D x) {
  return per_lane(x, [](double v) { return ::cos(v); });
}

}  // namespace
}  // namespace lmn
