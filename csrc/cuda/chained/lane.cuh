// What one lane of chained_kernel computes: SiLU's residuals, fragments of the matrix instruction, loads, and the rare outputs
// that ordinary_share does not decide. warp.cuh calls all of these.
#pragma once
#include "problem.cuh"

namespace lmn {
namespace {
namespace chained {

/// SiLU's residuals of one unit along one path, times the unit's scale. z and a are in units of -log2(e), so that ex2(z) is
/// exp(-z). inverse: 1 / scale, which becomes part of the reciprocal at no cost.
template <bool kFirst, Way kWay>
__device__ inline void silu_residuals(float z_i, float a_i, float z_j, float a_j, const float (&t)[kPass], float spacing,
                                      const float (&deviation)[kPass], float unscale, float inverse, float (&e)[kPass],
                                      bool& meets) {
  const float dz = z_j - z_i, da = a_j - a_i;
  if constexpr (kWay != Way::careful) meets |= dz == 0;
  float z[kPass], chord[kPass], power[kPass];
#pragma unroll
  for (int r = 0; r < kPass; ++r) {
    z[r] = fma(t[r], dz, z_i);
    if constexpr (!kFirst) z[r] = fma(deviation[r], unscale, z[r]);
    chord[r] = fma(t[r], da, a_i);
  }
  if constexpr (kFirst && kWay == Way::uniform) {
    const float ratio = exp2_fast(spacing * dz), squared = ratio * ratio;
    power[0] = exp2_fast(z[0]);
    power[1] = power[0] * ratio;
    power[2] = power[0] * squared;
    power[3] = power[1] * squared;
  } else {
#pragma unroll
    for (int r = 0; r < kPass; ++r) {
      power[r] = exp2_fast(kFirst || kWay == Way::careful ? z[r] : ::fminf(z[r], kPairedExponent));
    }
  }
  if constexpr (kWay == Way::careful) {
#pragma unroll
    for (int r = 0; r < kPass; ++r) {
      const float residual = fma(z[r], reciprocal(fma(power[r], inverse, inverse)), -chord[r]);
      const bool same = dz == 0 && (kFirst || deviation[r] == 0);
      e[r] = same ? 0.0f : residual;
    }
  } else {
#pragma unroll
    for (int r = 0; r < kPass; r += 2) {  // one reciprocal for two nodes
      const float second = fma(power[r + 1], inverse, inverse);
      const float both = reciprocal(fma(power[r], second, second));
      e[r] = fma(fma(z[r], power[r + 1], z[r]), both, -chord[r]);
      e[r + 1] = fma(fma(z[r + 1], power[r], z[r + 1]), both, -chord[r + 1]);
    }
  }
}

/// Packs the residuals of two neighbouring units at a tile's two nodes as two registers of the tile's fragment.
template <bool kSplit, int kUnits>
__device__ inline void to_fragment(const float (&e)[2][kPass], int tile, int first, std::uint32_t (&high)[kTiles][kUnits],
                                   std::uint32_t (&low)[kTiles][kUnits]) {
#pragma unroll
  for (int r = 2 * tile; r < 2 * tile + 2; ++r) {
    if constexpr (kSplit) {
      const float left = upper_half(e[0][r]), right = upper_half(e[1][r]);
      high[r / 2][first + r % 2] = to_halves(left, right);
      low[r / 2][first + r % 2] = to_halves(e[0][r] - left, e[1][r] - right);
    } else {
      high[r / 2][first + r % 2] = to_halves(e[0][r], e[1][r]);
    }
  }
}

/// sums += the fragment times one of two tiles of weights.
__device__ inline void multiply_tile(float (&sums)[4], const std::uint32_t (&a)[4], const uint4& w, int tile) {
  multiply_add_halves(sums, a, tile ? w.z : w.x, tile ? w.w : w.y);
}
__device__ inline void multiply_tile(float (&sums)[4], const std::uint32_t (&a)[2], const uint4& w, int tile) {
  multiply_add_halves(sums, a, tile ? w.z : w.x);
}

template <int kCount>
__device__ inline void read(float (&values)[kCount], const float* from) {
  if constexpr (kCount == 4) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
  } else {
    const float2 v = *reinterpret_cast<const float2*>(from);
    values[0] = v.x, values[1] = v.y;
  }
}
/// Reads from global memory that no kernel writes while this one runs. The function asks for the read-only path itself: the
/// pointers come from shared memory, so the compiler cannot know that no kernel writes there.
template <int kCount>
__device__ inline void fetch(float (&values)[kCount], const float* from) {
  if constexpr (kCount == 4) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(from));
    values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
  } else {
    const float2 v = __ldg(reinterpret_cast<const float2*>(from));
    values[0] = v.x, values[1] = v.y;
  }
}

/// 1 - r2 of an output that ordinary_share does not decide, a NaN if the output is unresolved; and 1 if the output is constant.
/// Not inline, because such outputs are rare.
__device__ __noinline__ float2 share_of_odd(float chord, Moments<float> m, float4 first, float4 second, float variance_t) {
  const Share<float> share = share_of_output<float, float>(chord, m, larger(absolute(first.x), absolute(second.x)), 0.0f,
                                                           first.z + second.z, variance_t, Epsilon<float>::value);
  const bool hides = share.constant > 0 && first.w + second.w > 0;
  return make_float2(hides || share.unresolved > 0 ? NAN : share.nonlinear, share.constant);
}

}  // namespace chained
}  // namespace
}  // namespace lmn
