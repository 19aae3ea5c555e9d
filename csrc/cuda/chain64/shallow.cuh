// The float64 kernel for one hidden layer of SiLU, sigmoid or tanh over equally spaced nodes. A warp makes its fragments of the
// matrix instruction itself. pack_shallow64_kernel fills the tables first; shallow_range in chain64.cuh says which networks
// come here.
#pragma once
#include "instructions.cuh"

namespace lmn {
namespace {
namespace float64 {

constexpr int kShallowThreads64 = 384;  // 12 warps of 168 registers fill a multiprocessor
constexpr int kShallowWarps64 = kShallowThreads64 / kWarp;
constexpr int kShallowTiles64 = 4;  // tiles of 8 outputs whose products the registers hold; the moments are in shared memory
constexpr int kShallowMoments64 = 6 * kShallowTiles64 * kShallowThreads64;  // doubles
constexpr int kShallowChunks64 = 3;  // most chunks of so many tiles; each chunk evaluates all activations again
constexpr int kGroup = 4;            // nodes at a time
// exp(-f z(t)) = exp(-f (1 - t) z_i) exp(-f t z_j), where f is 2 for tanh and 1 otherwise. At the first of four nodes each
// factor comes from a table for its sample. From one node to the next the product changes by exp(f h z_i) exp(-f h z_j), where
// h is the nodes' spacing.
constexpr int kBefore = 3;  // arrays before the tables: z, a, exp(+-f h z)

// Two nodes share a reciprocal, so (1 + E)^2 has to be finite, also at nodes that only fill up the last four.
constexpr double kShallowLimit64 = 340;
// 1 - 2 / (1 + exp(2 z)) is only right to an absolute epsilon. Below this mean |z| the general kernel evaluates tanh directly.
constexpr double kShallowTanhMean64 = 0.25;

struct Shallow64 {
  Problem<double> problem;
  const double2 *first, *second;  // [samples][steps][arrays][4], [blocks of 8 samples][steps][arrays][lanes]
  const double2* fragments;       // of the weights
  const double* z;                // [samples, stride]
  std::int64_t stride, width, units;
  int steps, groups, chunks;  // blocks of 8 hidden units, groups of nodes, chunks of outputs
  const int* take;            // 0: the general kernel measures this network

  LMN_FN int arrays() const { return kBefore + groups; }
};

/// One sample's part of the residuals of 2 hidden units at 4 nodes.
struct Side {
  double2 z, a, ratio, table;
};
__device__ inline Side load_side(const double2* from, int apart, int group) {
  return {from[0], from[apart], from[2 * apart], from[(kBefore + group) * apart]};
}

/// e = act(z(t)) - chord of act for one unit at 4 nodes. For tanh, a is the activation plus 1.
template <ActivationKind kKind>
__device__ inline void shallow_residuals(double (&e)[kGroup], const double (&t)[kGroup], double z_first, double z_second,
                                         double a_first, double a_second, double ratio, double power) {
  const double z_chord = z_second - z_first, a_chord = a_second - a_first, ratio_squared = ratio * ratio;
  const double next = power * ratio;
  const double powers[kGroup] = {power, next, power * ratio_squared, next * ratio_squared};
#pragma unroll
  for (int r = 0; r < kGroup; r += 2) {
    const double up = 1.0 + powers[r + 1], inverse = reciprocal_fast(fma(powers[r], up, up));
    const double chord[2] = {fma(t[r], a_chord, a_first), fma(t[r + 1], a_chord, a_first)};
    if constexpr (kKind == ActivationKind::kSilu) {
      const double z[2] = {fma(t[r], z_chord, z_first), fma(t[r + 1], z_chord, z_first)};
      e[r] = fma(fma(z[0], powers[r + 1], z[0]), inverse, -chord[0]);
      e[r + 1] = fma(fma(z[1], powers[r], z[1]), inverse, -chord[1]);
    } else {
      constexpr double kHeight = kKind == ActivationKind::kTanh ? 2.0 : 1.0;
      e[r] = fma(kHeight * up, inverse, -chord[0]);
      e[r + 1] = fma(kHeight, fma(powers[r], inverse, inverse), -chord[1]);
    }
  }
  // A unit that does not move has no residual. The rounding of the two exponentials would leave a residual, so it is set to 0.
#pragma unroll
  for (int r = 0; r < kGroup; ++r) e[r] = z_chord == 0 ? 0.0 : e[r];
}

// A warp per unit of work: 8 pairs with one first sample. Warps are independent once the weights are in shared memory.
template <ActivationKind kKind>
__global__ void __launch_bounds__(kShallowThreads64, 1) shallow64_kernel(Shallow64 p) {
  if (!*in_network(p.take, p.problem.apart)) return;
  const Problem<double>& problem = p.problem;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const std::int64_t samples = problem.samples, outputs = problem.outputs;
  double2* const weights = reinterpret_cast<double2*>(dynamic_shared());  // [chunks][steps][tiles][lanes], scaled
  const int fragments = p.chunks * p.steps * kShallowTiles64 * kWarp;
  double* const nodes = reinterpret_cast<double*>(weights + fragments);  // [t, weight, weight times t - mean t][4 groups]
  for (int n = int(threadIdx.x); n < fragments; n += kShallowThreads64) {
    const int tile = n / (kShallowTiles64 * kWarp) / p.steps * kShallowTiles64 + n / kWarp % kShallowTiles64;
    const int step = n / (kShallowTiles64 * kWarp) % p.steps, k = 8 * tile + n % kWarp / 4;
    double2 w = make_double2(0, 0);
    if (k < outputs) {
      const double scale = in_network(problem.scale, problem.apart)[k];
      w = in_network(p.fragments, problem.apart)[(std::int64_t(tile) * p.steps + step) * kWarp + n % kWarp];
      w = make_double2(w.x * scale, w.y * scale);
    }
    weights[n] = w;
  }
  const int padded_nodes = kGroup * p.groups;
  double* const moments = nodes + 3 * padded_nodes + threadIdx.x;  // [tiles][2 outputs][e, te, ee][threads]
  for (int n = int(threadIdx.x); n < padded_nodes; n += kShallowThreads64) {
    const bool inside = n < problem.nodes.interior;
    nodes[n] = inside ? problem.nodes.t[n] : 0.0;
    nodes[padded_nodes + n] = inside ? problem.nodes.w[n] : 0.0;
    nodes[2 * padded_nodes + n] = inside ? problem.nodes.w_t[n] : 0.0;
  }
  __syncthreads();
  const int arrays = p.arrays();
  for (std::int64_t unit = std::int64_t(blockIdx.x) * kShallowWarps64 + warp; unit < p.units;
       unit += std::int64_t(gridDim.x) * kShallowWarps64) {
    __syncwarp();  // waits for the lanes that have stored an entry
    std::int64_t i, block;
    find_unit(unit, std::int64_t(8), i, block);
    const double2* const first = in_network(p.first, problem.apart) + i * p.steps * arrays * 4 + lane % 4;
    const double2* const second = in_network(p.second, problem.apart) + block * p.steps * arrays * kWarp + lane;
    const std::int64_t j = 8 * block + lane / 4;
    PairSums<false> pair_sums;
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      const double2* const chunk_weights = weights + chunk * p.steps * kShallowTiles64 * kWarp + lane;
      const int tiles = int(at_most(kShallowTiles64, blocks_of(outputs, 8) - chunk * kShallowTiles64));
      for (int n = 0; n < 6 * kShallowTiles64; ++n) moments[n * kShallowThreads64] = 0;
#pragma unroll 1
      for (int group = 0; group < p.groups; ++group) {
        double t[kGroup], sums[kGroup / 2][kShallowTiles64][4] = {};
#pragma unroll
        for (int r = 0; r < kGroup; ++r) t[r] = nodes[kGroup * group + r];
#pragma unroll 1
        for (int step = 0; step < p.steps; ++step) {
          const Side a = load_side(first + step * arrays * 4, 4, group);
          const Side b = load_side(second + step * arrays * kWarp, kWarp, group);
          double x[kGroup], y[kGroup];
          shallow_residuals<kKind>(x, t, a.z.x, b.z.x, a.a.x, b.a.x, a.ratio.x * b.ratio.x, a.table.x * b.table.x);
          shallow_residuals<kKind>(y, t, a.z.y, b.z.y, a.a.y, b.a.y, a.ratio.y * b.ratio.y, a.table.y * b.table.y);
#pragma unroll
          for (int n = 0; n < kShallowTiles64; ++n) {
            if (n >= tiles) break;
            const double2 w = chunk_weights[(step * kShallowTiles64 + n) * kWarp];
#pragma unroll
            for (int m = 0; m < kGroup / 2; ++m) {
              multiply_add64(sums[m][n], x[2 * m], x[2 * m + 1], y[2 * m], y[2 * m + 1], w.x, w.y);
            }
          }
        }
        const double *const w = nodes + padded_nodes + kGroup * group, *const w_t = w + padded_nodes;
#pragma unroll
        for (int n = 0; n < kShallowTiles64; ++n) {
          if (n >= tiles) break;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            double* const at = moments + (6 * n + 3 * half) * kShallowThreads64;
            Moments<double> m{at[0], at[kShallowThreads64], at[2 * kShallowThreads64]};
#pragma unroll
            for (int r = 0; r < kGroup; ++r) add_moments(m, sums[r / 2][n][2 * (r % 2) + half], w[r], w_t[r]);
            at[0] = m.e;
            at[kShallowThreads64] = m.te;
            at[2 * kShallowThreads64] = m.ee;
            __syncwarp();  // otherwise the compiler loads all moments at once, and spills
          }
        }
      }
#pragma unroll 1
      for (int n = 0; n < 2 * tiles; ++n) {
        const double* const at = moments + 3 * n * kShallowThreads64;
        const std::int64_t k = 8 * (chunk * kShallowTiles64 + n / 2) + 2 * (lane % 4) + n % 2;
        if (k >= outputs) break;
        const Moments<double> m{at[0], at[kShallowThreads64], at[2 * kShallowThreads64]};
        const Problem<double> own = of_network(problem);
        add_output(pair_sums, own, i, at_most(j, samples - 1), k, m, own.scale[k], 0.0);
      }
    }
    pair_sums = pair_sums.over_lanes(4);
    if (lane % 4 == 0 && i <= j && j < samples) {
      store_entry(problem.own_connectivity(), problem.own_counts(), pair_sums, in_network(p.z, problem.apart), p.stride,
                  p.width, samples, outputs, i, j);
    }
  }
}

/// A thread per sample and two hidden units. Threads beyond the last sample repeat it.
template <ActivationKind kKind>
__global__ void pack_shallow64_kernel(Shallow64 p, Layer<double> layer, double spacing, double2* first, double2* second) {
  constexpr double kFactor = kKind == ActivationKind::kTanh ? 2.0 : 1.0, kShift = kKind == ActivationKind::kTanh ? 1.0 : 0.0;
  const std::int64_t apart = p.problem.apart;
  layer.z = in_network(layer.z, apart), layer.a = in_network(layer.a, apart);
  first = in_network(first, apart), second = in_network(second, apart);
  const std::int64_t n = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int q = int(n % 4), arrays = p.arrays();
  const std::int64_t step = n / 4 % p.steps, sample = n / 4 / p.steps;
  if (sample >= 8 * blocks_of(p.problem.samples, 8)) return;
  const std::int64_t from = at_most(sample, p.problem.samples - 1) * layer.stride + 8 * step + 2 * q;
  const double2 z = *reinterpret_cast<const double2*>(layer.z + from), a = *reinterpret_cast<const double2*>(layer.a + from);
  const auto power = [z](double factor) { return make_double2(exp(factor * z.x), exp(factor * z.y)); };
  double2* const to_second = second + ((sample / 8 * p.steps + step) * arrays * 8 + sample % 8) * 4 + q;
  double2* const to_first = first + (sample * p.steps + step) * arrays * 4 + q;
  const double2 shifted = make_double2(a.x + kShift, a.y + kShift);
  to_second[0] = z;
  to_second[kWarp] = shifted;
  to_second[2 * kWarp] = power(-kFactor * spacing);
  for (int group = 0; group < p.groups; ++group) {
    to_second[(kBefore + group) * kWarp] = power(-kFactor * p.problem.nodes.t[kGroup * group]);
  }
  if (sample >= p.problem.samples) return;
  to_first[0] = z;
  to_first[4] = shifted;
  to_first[8] = power(kFactor * spacing);
  for (int group = 0; group < p.groups; ++group) {
    to_first[(kBefore + group) * 4] = power(kFactor * (p.problem.nodes.t[kGroup * group] - 1.0));
  }
}

}  // namespace float64
}  // namespace
}  // namespace lmn
