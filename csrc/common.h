// Definitions that host and device share: sizes, the numbers of a dtype, a normalisation's factor, an output's scale, the
// pieces of a workspace, the slots of values that a chain adds. Plain C++, without CPU vectors and without CUDA's header.
#pragma once
#include <math.h>

#include "ops.h"

#if defined(__CUDACC__)
#define LMN_FN __host__ __device__ inline
#else
#define LMN_FN inline
#endif

namespace lmn {
namespace {

// ---- sizes ----

LMN_FN std::int64_t at_most(std::int64_t value, std::int64_t limit) { return value < limit ? value : limit; }
LMN_FN std::int64_t blocks_of(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// ---- numbers of a dtype ----

template <class T>
struct Epsilon;
template <>
struct Epsilon<float> {
  static constexpr float value = 0x1p-23f;
};
template <>
struct Epsilon<double> {
  static constexpr double value = 0x1p-52;
};
template <class T>
struct Vanishing;  // near the smallest normal number
template <>
struct Vanishing<float> {
  static constexpr float value = 0x1p-120f;
};
template <>
struct Vanishing<double> {
  static constexpr double value = 0x1p-1000;
};

/// The larger of a and b. V: a scalar, or a vector of lanes. If a is NaN, the result is NaN.
template <class V>
LMN_FN V larger(V a, V b) {
  return a < b ? b : a;
}

// ---- a normalisation along a path ----

/// What LayerNorm or RMSNorm multiplies by at a point t of a path. own: the variances, or mean squares, of the samples at both
/// ends. cross: their covariance, or mean product.
LMN_FN double normalisation_factor(double own_first, double own_second, double cross, double epsilon, double t) {
  const double square = (1 - t) * (1 - t) * own_first + 2 * t * (1 - t) * cross + t * t * own_second;
  return 1 / sqrt((square > 0 ? square : 0) + epsilon);
}

// ---- the outputs' scale ----

/// The power of two that brings the largest |value - value of the first sample| to [0.5, 1). The factor does not change r2.
/// Without it the squares of very small or large outputs would underflow or overflow.
template <class T>
LMN_FN T output_scale(T largest_difference) {
  if (!(largest_difference > 0) || isinf(largest_difference)) return T(1);
  int exponent = 0;
  ::frexp(double(largest_difference), &exponent);
  constexpr int kLimit = sizeof(T) == 4 ? 120 : 1000;
  exponent = exponent > kLimit ? kLimit : exponent < -kLimit ? -kLimit : exponent;
  return T(::ldexp(1.0, -exponent));
}

// ---- a workspace ----

/// Hands out pieces of a workspace. Each piece begins at a multiple of kAlignment bytes. With a null base it only counts
/// bytes.
template <int kAlignment>
struct ArenaOf {
  char* const base;
  std::size_t used = 0;
  ArenaOf(char* base_) : base(base_) {}
  template <class U>
  U* take(std::int64_t count) {
    U* const piece = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += (std::size_t(count) * sizeof(U) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
};

// ---- slots ----

/// Assigns slots to the values that a chain adds to later values. A slot is free again after the last addition of its value.
/// skips: [values], the number of the value that is added to each value, or -1. slots: [values], the result; -1 for a value
/// that is never added. free_from: [number of added values], scratch. Returns the number of slots.
inline int assign_slots(const std::int32_t* skips, int values, int* slots, int* free_from) {
  int count = 0;
  for (int value = 0; value < values; ++value) slots[value] = -1;
  for (int value = 0; value < values; ++value) {
    if (skips[value] >= 0) slots[skips[value]] = value;  // for now: the last value it is added to
  }
  for (int value = 0; value < values; ++value) {
    const int last = slots[value];
    if (last < 0) continue;
    int slot = 0;
    while (slot < count && free_from[slot] > value) ++slot;
    count += slot == count;
    free_from[slot] = last;
    slots[value] = slot;
  }
  return count;
}

}  // namespace
}  // namespace lmn
