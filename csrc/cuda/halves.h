// What the float32 kernels of paths share: residuals and weights as halves, in the order of the matrix instruction's fragments,
// and the samples' values in the order in which lanes read them. chain/, chained/ and panels/ use these; halves.cuh fills them.
//
// A half has 11 bits of mantissa, as many as TF32, at twice the rate. A power of two for each unit and each row of weights
// brings the values into a half's range. If a value is beyond this range, a sum is infinite. Values far below the largest one
// of their unit lose bits, which counts as rounding (kHalfRounding). In both cases the pair is unresolved, and float64 measures
// it.
//
// Units go in steps of 16. Of each step, lane 4 g + q has the units 4 q .. 4 q + 3, so that it reads them at once, and so that
// a pair of one layer's accumulators is a register of the next layer's fragment. If a width leaves 8 or fewer units, a last
// step of 8 units may follow, of which lane 4 g + q has the units 2 q and 2 q + 1. A tile of the matrix instruction has 16
// rows. Row g is the path from one first sample i to second sample j0 + g at one node; row g + 8 is the same path at the next
// node. So all rows of a lane belong to one path.
#pragma once
#include "device.h"

namespace lmn {
namespace {

constexpr int kStepUnits = 16, kTailUnits = 8;
constexpr int kGroup = 8;          // second samples of a tile
constexpr int kScaleExponent = 8;  // the largest value becomes a half of 2^8 to 2^9, so a residual may be 128 times its samples
constexpr int kExponentLimit = 120;  // largest exponent of a scale
// Steps of the smallest halves are 2^-24. So a residual, and a weight beside the row's largest weight, are exact to 2^-33 of
// the largest |a| of their unit, which is 2^-10 float32 epsilons of it. This counts 32 times, as the errors add up over the
// units of a layer.
constexpr float kHalfRounding = 0x1p-5f;

/// The steps of one layer.
struct Steps {
  int full, tail;  // steps of 16 units; 1 if a step of 8 units follows
  LMN_FN int all() const { return full + tail; }
  LMN_FN std::int64_t units() const { return std::int64_t(full) * kStepUnits + tail * kTailUnits; }
};
inline Steps steps_of(std::int64_t width, bool may_end_in_tail) {
  const int rest = int(width % kStepUnits);
  const bool tail = may_end_in_tail && rest > 0 && rest <= kTailUnits;
  return {int(width / kStepUnits) + (rest > 0 && !tail), tail};
}

/// The arrays of a record: z; a times the unit's scale; and, if slopes are needed, the slope times the unit's scale.
enum Array { kZ, kA, kSlope };

/// A layer as the kernels of halves see it. All pointers are to global memory.
struct HalfLayer {
  Steps steps;
  int arrays;      // 2, or 3 with slopes
  int parts;       // parts of the weights: 1, or 2 with the part that rounding to halves lost
  float factor;    // factor of z, a and unscale: -log2(e) if SiLU's exponentials use ex2 directly, otherwise 1
  bool inverse;    // whether `units` holds 1 / scale in place of the scale
  float* largest;  // [units], the largest |a| and |v| over the samples; null: no kernel of halves follows
  float* records;  // [groups of 8 samples][steps][arrays][32 lanes][4, in a tail 2]; null for outputs without an activation
  float* units;    // [steps][2][16, in a tail 8]: the unit's scale; the factor from a sum of products to units of z
  uint2* weights;  // [parts][steps][steps of the layer before][32 lanes][2 tiles of 8 of this layer's units]

  LMN_FN std::int64_t group_floats() const { return arrays * steps.units() * kGroup; }
  /// Where a step's part of a group begins, in floats.
  LMN_FN std::int64_t step_floats(int step) const { return std::int64_t(step) * arrays * kStepUnits * kGroup; }
  LMN_FN std::int64_t part_fragments(Steps before) const { return std::int64_t(steps.all()) * before.all() * kWarp * 2; }
};

/// A power of two that brings a positive number to [2^8, 2^9); 1 for 0, NaN and Inf.
LMN_FN float half_scale(double largest) {
  if (!(largest > 0) || largest > 1e300) return 1.0f;
  int exponent = 0;
  ::frexp(largest, &exponent);
  exponent = kScaleExponent + 1 - exponent;
  exponent = exponent > kExponentLimit ? kExponentLimit : exponent < -kExponentLimit ? -kExponentLimit : exponent;
  return float(::ldexp(1.0, exponent));
}

/// The part of a number that a half holds exactly; the number minus this part is the rest.
__device__ inline float upper_half(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }

}  // namespace
}  // namespace lmn
