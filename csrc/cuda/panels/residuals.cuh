// Residuals of a layer from the sums of products, as fragments in the same registers. A warp calls residuals_of for one chunk
// of units at one set of tiles. residuals_of chooses among three forms by the activation and by what the network adds.
#pragma once
#include "products.cuh"

namespace lmn {
namespace {
namespace panels {

/// Packs the residuals of two neighbouring units at a tile's two nodes as two registers of the tile's fragment. The bits of the
/// upper halves replace the first two sums, the bits of the lower halves the other two. e: [node][unit].
template <bool kSplit>
__device__ inline void pack(float (&sums)[4], const float (&e)[2][2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if constexpr (kSplit) {
      const float high[2] = {upper_half(e[r][0]), upper_half(e[r][1])};
      sums[r] = __uint_as_float(to_halves(high[0], high[1]));
      sums[2 + r] = __uint_as_float(to_halves(e[r][0] - high[0], e[r][1] - high[1]));
    } else {
      sums[r] = __uint_as_float(to_halves(e[r][0], e[r][1]));
    }
  }
}
template <bool kSplit>
__device__ inline Fragment<kSplit> fragment_of(const float (&tile)[2][4]) {
  Fragment<kSplit> fragment;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    fragment.high[n] = __float_as_uint(tile[n / 2][n % 2]);
    if constexpr (kSplit) fragment.low[n] = __float_as_uint(tile[n / 2][2 + n % 2]);
  }
  return fragment;
}

/// Where a lane finds its values of one step of a layer: at the two samples, array after array, and the units' scales.
struct Ends {
  const float *first, *second, *scales;
};
constexpr int kArrayFloats = kWarp * 4;
__device__ inline Ends ends_of(const HalfLayer& half, int step) {
  const Work& work = work_of_warp();
  const int lane = lane_here();
  const std::int64_t at = half.step_floats(step);
  return {half.records + work.i / kGroup * half.group_floats() + at + (work.i % kGroup * 4 + lane % 4) * 4,
          half.records + work.group * half.group_floats() + at + lane * 4,
          half.units + (step * 2 * kStepUnits + 4 * (lane % 4))};
}
__device__ inline void take2(float (&to)[2], const float* from) {
  const float2 v = *reinterpret_cast<const float2*>(from);
  to[0] = v.x, to[1] = v.y;
}

/// The values of two neighbouring units of a lane at both samples, and the units' scales.
struct UnitsOfLane {
  float z[2], a[2], z_second[2], a_second[2], scale[2], unscale[2];
};
__device__ inline void take_units(UnitsOfLane& units, const Ends& ends, int first) {
  take2(units.z, ends.first + (kZ * kArrayFloats + first)), take2(units.a, ends.first + (kA * kArrayFloats + first));
  take2(units.z_second, ends.second + (kZ * kArrayFloats + first));
  take2(units.a_second, ends.second + (kA * kArrayFloats + first));
  take2(units.scale, ends.scales + first), take2(units.unscale, ends.scales + (kStepUnits + first));
}

/// A |z| of at most this is nothing but rounding, where deviations were added to the chord. ReLU would pass this rounding on as
/// an output.
__device__ inline float rounding_of_zero(float first, float second) {
  return larger(absolute(first), absolute(second)) * (kRoundedUlps * Epsilon<float>::value);
}
/// An activation's residual at z, times the unit's scale. sum: of the products; chord: of the activation, scaled.
template <ActivationKind kKind>
__device__ inline float curve_residual(float z, float rounded, float alpha, float beta, float sum, float scale, float chord) {
  if (kKind == ActivationKind::kRelu && absolute(z) <= rounded) z = 0;
  // If a half overflowed, `sum` is infinite. Some activations are finite there; the product with 0 makes the residual a NaN.
  return fma(sum, 0.0f, fma(activate<kKind, float>(z, alpha, beta), scale, -chord));
}

// SiLU's exponents are cut off at this number, so that a product of two terms 1 + exp(-z) does not overflow. The SiLU is then
// wrong by |z| 2^-62, which kTinyUnit keeps below a float's rounding.
constexpr float kPairedExponent = 62;

/// The residuals, as fragments, of an activation with little code, at all tiles of a chunk. SiLU uses the fast exponential, and
/// one reciprocal for two nodes. Their rounding would leave a residual where both samples agree in a unit and nothing deviates;
/// there the residual is set to 0.
template <ActivationKind kKind, int kTiles, bool kSplit>
__device__ inline void short_residuals(const Panels& p, Sums<kTiles>& sums, int set_tile, int first_step) {
  constexpr bool kSilu = kKind == ActivationKind::kSilu;
  constexpr float kToBinary = kSilu ? -1.4426950408889634f : 1.0f;
  const HalfLayer& half = layer_here(p)->half;
  const float alpha = layer_here(p)->alpha, beta = layer_here(p)->beta;
  const int steps = half.steps.all();
  const Work& work = work_of_warp();
  const int here = work.here, first_tile = work.first_tile + set_tile;
  const bool deviates = work.layer > 0;
  Ends ends = ends_of(half, first_step);
  const int step_floats = int(half.step_floats(1));
  float2 t[kTiles];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) t[m] = at_tile(p.problem.nodes.t, set_tile + m < here ? first_tile + m : first_tile);
#pragma unroll
  for (int n = 0; n < 2 * kChunkSteps; ++n) {  // two units at a time, to save registers
    const int g = n / 2, x = n % 2;
    if (first_step + g >= steps) break;
    if (n > 0 && x == 0) ends.first += step_floats, ends.second += step_floats, ends.scales += 2 * kStepUnits;
    UnitsOfLane units;
    take_units(units, ends, 2 * x);
    float z[2], dz[2], da[2], inverse[2], rounded[2];
    bool agree = false;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      // z is in units of -log2(e), so that 2^z is exp(-z). The scale becomes part of the reciprocal at no cost.
      z[u] = units.z[u] * kToBinary, dz[u] = units.z_second[u] * kToBinary - z[u], da[u] = units.a_second[u] - units.a[u];
      units.unscale[u] *= kToBinary, inverse[u] = reciprocal(units.scale[u]) * kToBinary;
      agree = agree || (dz[u] == 0 && z[u] != 0);
      rounded[u] = deviates ? rounding_of_zero(units.z[u], units.z_second[u]) : -1.0f;
    }
    if constexpr (kSilu) agree = __any_sync(kAllLanes, agree);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if (set_tile + m >= here) break;
      float (&sum)[4] = sums[g * kTiles + m][x];  // [node][unit]
      float e[2][2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        if constexpr (kSilu) {
          const float point = fma(sum[u], units.unscale[u], fma(t[m].x, dz[u], z[u]));
          const float next = fma(sum[2 + u], units.unscale[u], fma(t[m].y, dz[u], z[u]));
          const float power = exp2_fast(::fminf(point, kPairedExponent));
          const float next_power = exp2_fast(::fminf(next, kPairedExponent));
          const float term = fma(next_power, inverse[u], inverse[u]);
          const float both = reciprocal(fma(power, term, term));
          e[0][u] = fma(fma(point, next_power, point), both, -fma(t[m].x, da[u], units.a[u]));
          e[1][u] = fma(fma(next, power, next), both, -fma(t[m].y, da[u], units.a[u]));
        } else {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float here_t = r == 0 ? t[m].x : t[m].y;
            const float value = fma(sum[2 * r + u], units.unscale[u], fma(here_t, dz[u], z[u]));
            e[r][u] = curve_residual<kKind>(value, rounded[u], alpha, beta, sum[2 * r + u], units.scale[u],
                                            fma(here_t, da[u], units.a[u]));
          }
        }
      }
      if (kSilu && agree) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (dz[c % 2] == 0 && sum[c] == 0) e[c / 2][c % 2] = 0;
        }
      }
      pack<kSplit>(sum, e);
    }
  }
}

/// Residuals of unit u of a step at a tile's two nodes, from the products. This form also adds and keeps earlier values.
template <bool kPolynomial>
__device__ inline void slow_residuals(const Panels& p, int tile, int step, int u, float& first, float& second) {
  const Layer<float>& layer = *layer_here(p);
  const bool deviates = work_of_warp().layer > 0;
  const HalfLayer& half = layer.half;
  const int lane = lane_here();
  const float* const unit = half.units + step * 2 * kStepUnits + 4 * (lane % 4) + u;
  const float unscale = unit[kStepUnits];
  float scale = unit[0];
  float deviation[2] = {0, 0};
  if (deviates) deviation[0] = first * unscale, deviation[1] = second * unscale;
  const auto join = [&](int value, float (&residual)[2]) {
    const std::int64_t slot = std::int64_t(p.pass_tiles) * p.kept_steps * 8 * kWarp;
    float* const kept = in_network(p.kept, p.problem.apart) + blockIdx.x * p.block_kept +
                        (std::int64_t(tile) * p.kept_steps + step) * 8 * kWarp + 2 * u * kWarp + lane;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (layer.added[value] >= 0) residual[r] += kept[layer.added[value] * slot + r * kWarp];
      if (layer.kept[value] >= 0) kept[layer.kept[value] * slot + r * kWarp] = residual[r];
    }
  };
  if (p.kept) join(0, deviation);
  float e[2] = {deviation[0], deviation[1]};
  if (!half.records) {
    scale = 1;
  } else if (layer.kind == ActivationKind::kIdentity) {
    e[0] *= scale, e[1] *= scale;
  } else {
    const Ends ends = ends_of(half, step);
    const float z_first = ends.first[kZ * kArrayFloats + u], z_second = ends.second[kZ * kArrayFloats + u];
    const float a_first = ends.first[kA * kArrayFloats + u], a_second = ends.second[kA * kArrayFloats + u];
    if (kPolynomial && tile == 0) {
      const float z_chord = z_second - z_first, a_chord = a_second - a_first;
      e[0] = fma(ends.first[kSlope * kArrayFloats + u], z_chord + deviation[0], -a_chord);
      e[1] = fma(ends.second[kSlope * kArrayFloats + u], z_chord + deviation[1], -a_chord);
    } else {
      float t[2] = {0.5f, 0.5f};  // a polynomial has its midpoint here
      if constexpr (!kPolynomial) {
        const float2 both = at_tile(p.problem.nodes.t, work_of_warp().first_tile + tile);
        t[0] = both.x, t[1] = both.y;
      }
      with_kind(layer.kind, [&](auto kind) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float z = on_chord(z_first, z_second, t[r]) + deviation[r];
          if constexpr (kind.value == ActivationKind::kRelu) {  // ReLU would pass rounding on as an output
            const float largest = larger(absolute(z_first), absolute(z_second));
            if (deviates && absolute(z) <= largest * (kRoundedUlps * Epsilon<float>::value)) z = 0;
          }
          const float a = activate<kind.value, float>(z, layer.alpha, layer.beta);
          e[r] = fma(a, scale, -on_chord(a_first, a_second, t[r]));
        }
      });
      // If a half overflowed, the deviation is infinite. Some activations are finite there; the product with 0 makes e a NaN.
      e[0] = fma(deviation[0], 0.0f, e[0]), e[1] = fma(deviation[1], 0.0f, e[1]);
    }
  }
  if (p.kept && (layer.added[1] >= 0 || layer.kept[1] >= 0)) {
    const float inverse = 1 / scale;
    e[0] *= inverse, e[1] *= inverse;
    join(1, e);
    e[0] *= scale, e[1] *= scale;
  }
  first = e[0], second = e[1];
}

/// Residuals, as fragments, of a layer with one activation and without earlier values, at all tiles of a chunk. The loop takes
/// two units at two nodes at a time and then moves the registers on. Unrolled, the code of all activations would be large.
template <ActivationKind kKind, int kTiles, bool kSplit>
__device__ inline void curve_residuals(const Panels& p, Sums<kTiles>& sums, int set_tile, int first_step) {
  static_assert(kChunkSteps == 2);
  const Layer<float>& layer = *layer_here(p);
  const float alpha = layer.alpha, beta = layer.beta;
  const int steps = layer.half.steps.all();
#pragma unroll 1
  for (int n = 0; n < 2 * kChunkSteps; ++n) {
    const int step = first_step + n / 2 < steps ? first_step + n / 2 : steps - 1;
    UnitsOfLane units;
    take_units(units, ends_of(layer.half, step), n % 2 * 2);
    float rounded[2], dz[2], da[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      rounded[u] = work_of_warp().layer > 0 ? rounding_of_zero(units.z[u], units.z_second[u]) : -1.0f;
      dz[u] = units.z_second[u] - units.z[u], da[u] = units.a_second[u] - units.a[u];
    }
#pragma unroll 1
    for (int m = 0; m < kTiles; ++m) {
      const int tile = set_tile + m < work_of_warp().here ? set_tile + m : set_tile;
      const float2 both = at_tile(p.problem.nodes.t, work_of_warp().first_tile + tile);
      float done[4], e[2][2];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int u = c % 2;
        const float sum = sums[0][0][c], t = c < 2 ? both.x : both.y;
        const float z = fma(sum, units.unscale[u], fma(t, dz[u], units.z[u]));
        e[c / 2][u] = curve_residual<kKind>(z, rounded[u], alpha, beta, sum, units.scale[u], fma(t, da[u], units.a[u]));
      }
      pack<kSplit>(done, e);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int next = 0; next + 1 < kTiles; ++next) sums[next][0][c] = sums[next + 1][0][c];
        if (kSplit || c < 2) sums[kTiles - 1][0][c] = done[c];
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float done = sums[m][0][c];
        sums[m][0][c] = sums[m][1][c], sums[m][1][c] = sums[kTiles + m][0][c];
        sums[kTiles + m][0][c] = sums[kTiles + m][1][c], sums[kTiles + m][1][c] = done;
      }
    }
  }
}

/// Residuals of any layer at all tiles of a chunk, in place of the sums. The loop takes one unit at two nodes at a time and
/// then moves the registers on.
template <int kTiles, bool kPolynomial>
__device__ inline void any_residuals(const Panels& p, Sums<kTiles>& sums, int set_tile, int first_step) {
  constexpr int kCount = kTiles * kChunkSteps;
#pragma unroll 1
  for (int n = 0; n < kCount; ++n) {
    const int step = first_step + n / kTiles, tile = set_tile + n % kTiles;
    float e[2][4];  // [node][unit]
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int u = 0; u < 4; ++u) e[r][u] = sums[0][u / 2][2 * r + u % 2];
    }
    if (tile < work_of_warp().here && step < layer_here(p)->half.steps.all()) {
#pragma unroll 1
      for (int u = 0; u < 4; ++u) {
        float first = e[0][0], second = e[1][0];
        slow_residuals<kPolynomial>(p, tile, step, u, first, second);
#pragma unroll
        for (int next = 0; next < 3; ++next) e[0][next] = e[0][next + 1], e[1][next] = e[1][next + 1];
        e[0][3] = first, e[1][3] = second;
      }
    }
#pragma unroll
    for (int next = 0; next + 1 < kCount; ++next) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[next][0][c] = sums[next + 1][0][c], sums[next][1][c] = sums[next + 1][1][c];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int u = 0; u < 4; ++u) sums[kCount - 1][u / 2][2 * r + u % 2] = e[r][u];
    }
  }
}

/// The activations that curve_residuals takes. The other activations have large code or no residual, or short_residuals takes
/// them.
template <ActivationKind kKind>
constexpr bool kIsCurve =
    kKind == ActivationKind::kLeakyRelu || kKind == ActivationKind::kElu || kKind == ActivationKind::kGelu ||
    kKind == ActivationKind::kGeluTanh || kKind == ActivationKind::kTanh || kKind == ActivationKind::kSigmoid;

/// Residuals of the warp's current layer, as fragments in place of the sums.
template <int kTiles, bool kSplit, bool kPolynomial>
__device__ inline void residuals_of(const Panels& p, Sums<kTiles>& sums, int set_tile, int first_step) {
  if (!kPolynomial && !p.kept) {
    const ActivationKind kind = layer_here(p)->kind;
    // The fast exponential's relative error grows with |z|. A SiLU unit that is nearly off (careful) needs the accurate
    // exponential.
    if (kind == ActivationKind::kSilu && !afresh(&in_network(p.problem.range, p.problem.apart)->careful)[0]) {
      return short_residuals<ActivationKind::kSilu, kTiles, kSplit>(p, sums, set_tile, first_step);
    }
    if (kind == ActivationKind::kRelu) {
      return short_residuals<ActivationKind::kRelu, kTiles, kSplit>(p, sums, set_tile, first_step);
    }
    bool is_done = false;
    with_kind(kind, [&](auto constant) {
      constexpr ActivationKind kKind = constant.value;
      if constexpr (kIsCurve<kKind>) {
        curve_residuals<kKind, kTiles, kSplit>(p, sums, set_tile, first_step);
        is_done = true;
      }
    });
    if (is_done) return;
  }
  any_residuals<kTiles, kPolynomial>(p, sums, set_tile, first_step);
#pragma unroll
  for (int n = 0; n < kTiles * kChunkSteps; ++n) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const float (&of)[4] = sums[n][x];
      const float e[2][2] = {{of[0], of[1]}, {of[2], of[3]}};
      pack<kSplit>(sums[n][x], e);
    }
  }
}

}  // namespace panels
}  // namespace
}  // namespace lmn
