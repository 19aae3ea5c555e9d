// What the float32 kernels of paths share: residuals and weights as halves, in the order of the matrix instruction's
// fragments, and the samples' values in the order in which lanes read them.
//
// A half has 11 bits of mantissa, as TF32 has, at twice the rate. A power of two for each unit and each row of weights brings
// the values into a half's range. Where a value is beyond it, a sum is infinite; where values are far below the largest one of
// their unit, they lose bits, which counts as rounding (kHalfRounding). Either way the pair is unresolved: float64 measures it.
//
// Units go in steps of 16: of these lane 4 g + q has units 4 q .. 4 q + 3, so that it reads them at once, and so that a pair
// of accumulators of one layer is a register of the next layer's fragment. Where a width leaves 8 or fewer units, a last
// step of 8 may follow, of which lane 4 g + q has units 2 q and 2 q + 1.
// A tile of the matrix instruction has 16 rows: row g is the path from one first sample i to second sample j0 + g at one node,
// row g + 8 the same path at the next node. So all rows of a lane are of one path.
#pragma once
#include "device.h"

namespace lmn {
namespace {

constexpr int kStepUnits = 16, kTailUnits = 8;
constexpr int kGroup = 8;            // second samples of a tile
constexpr int kScaleExponent = 8;    // the largest value as a half: 2^8 to 2^9, so a residual may exceed its samples 128 times
constexpr int kExponentLimit = 120;  // of a scale
// Steps of the smallest halves are 2^-24, so a residual, and a weight beside the row's largest, are exact to 2^-33 of the largest
// |a| of their unit, or 2^-10 float32 epsilons of that. Counted 32 times, as they add up over the units of a layer.
constexpr float kHalfRounding = 0x1p-5f;

/// Steps of one layer.
struct Steps {
  int full, tail;  // of 16 units; 1 where one of 8 units follows
  LMN_FN int all() const { return full + tail; }
  LMN_FN std::int64_t units() const { return std::int64_t(full) * kStepUnits + tail * kTailUnits; }
};
inline Steps steps_of(std::int64_t width, bool may_end_in_tail) {
  const int rest = int(width % kStepUnits);
  const bool tail = may_end_in_tail && rest > 0 && rest <= kTailUnits;
  return {int(width / kStepUnits) + (rest > 0 && !tail), tail};
}

/// The arrays of a record: z; a times the unit's scale; and where slopes are asked for, the slope times the unit's scale.
enum Array { kZ, kA, kSlope };

/// A layer as the kernels of halves see it. All in the memory of the device.
struct HalfLayer {
  Steps steps;
  int arrays;       // 2, or 3 with slopes
  int parts;        // of the weights: 1, or 2 with what rounding them to halves lost
  float factor;     // of z, a and unscale: -log2(e) where SiLU's exponentials are taken by ex2 at once, else 1
  bool inverse;     // `units` holds 1 / scale in place of the scale
  float* largest;   // [units], |a| and |v| over the samples
  float* records;   // [groups of 8 samples][steps][arrays][32 lanes][4, in a tail 2]; null: of outputs without an activation
  float* units;     // [steps][2][16, in a tail 8]: the unit's scale; what brings a sum of products to units of z
  uint2* weights;   // [parts][steps][steps of the layer before][32 lanes][2 tiles of 8 of this layer's units]

  LMN_FN std::int64_t group_floats() const { return arrays * steps.units() * kGroup; }
  /// Where a step's part of a group begins.
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

/// A number as a half and the rest of it.
__device__ inline float upper_half(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }

}  // namespace
}  // namespace lmn
