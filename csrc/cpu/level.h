// Common to the kernels of one instruction-set level: LMN_LEVEL is the level's namespace, set by the build.
#pragma once
#include "../ops.h"
#include "../statistics.h"
#include "simd.h"

#include <omp.h>

namespace lmn {
namespace {

inline std::int64_t at_most(std::int64_t value, std::int64_t limit) { return value < limit ? value : limit; }

/// Hands out 64-byte aligned pieces of a workspace; with a null base it only counts.
struct Arena {
  char* base;
  std::size_t used = 0;
  template <class U> U* take(std::int64_t count) {
    U* piece = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += (std::size_t(count) * sizeof(U) + 63) / 64 * 64;
    return piece;
  }
};

template <class T> struct Epsilon;
template <> struct Epsilon<float> { static constexpr float value = 0x1p-23f; };
template <> struct Epsilon<double> { static constexpr double value = 0x1p-52; };

/// Power of two that brings the largest |value - value of the first sample| to [0.5, 1): r2 does not see it, but the
/// squares of very small or large outputs would underflow or overflow.
template <class T>
inline T output_scale(T largest_difference) {
  int exponent = 0;
  if (!(largest_difference > 0) || !isfinite(largest_difference)) return 1;
  frexp(double(largest_difference), &exponent);
  constexpr int kLimit = sizeof(T) == 4 ? 120 : 1000;
  exponent = exponent > kLimit ? kLimit : exponent < -kLimit ? -kLimit : exponent;
  return T(ldexp(1.0, -exponent));
}

/// Sum with the rounding error of each addition carried along (Kahan).
template <class V>
struct CompensatedSum {
  V sum{}, lost{};
  inline void add(V value) {
    const V corrected = value - lost;
    const V next = sum + corrected;
    lost = (next - sum) - corrected;
    sum = next;
  }
};

}  // namespace
}  // namespace lmn
