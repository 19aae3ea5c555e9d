// The kernels of path_connectivity_backward that are no products: residuals and slopes of a layer's activation, the outputs'
// statistics and from them the gradient in the outputs, and the sums of adjoints that belong to a sample.
#pragma once
#include "products.cuh"

namespace lmn {
namespace {
namespace backward {

// ---- residuals ----

constexpr int kRowsOfBlock = 64;

/// Residuals and slopes of an activation at a batch's rows, all [rows, width]. The residual is act(z(t)) - chord of act, where
/// z(t) is the chord of z plus the deviation, which layer 0 does not have.
template <class T>
struct Bend {
  Layer<T> layer;
  const T* deviations;  // null: none
  const T* added;       // null, or residuals of an earlier value
  T* residuals;
  T* slopes;  // may be where the deviations are; none of the identity
};

// A warp takes a row, its lanes neighbouring units.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bend_kernel(Batch batch, const T* nodes, int interior, const __grid_constant__ Bend<T> p) {
  __shared__ int2 ends[kRowsOfBlock];
  const int begin = int(blockIdx.x) * kRowsOfBlock;
  const int here = int(at_most(kRowsOfBlock, std::int64_t(batch.pairs) * interior - begin));
  if (int(threadIdx.x) < here) ends[threadIdx.x] = batch.samples((begin + int(threadIdx.x)) / interior);
  __syncthreads();
  const Layer<T>& layer = p.layer;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, width = int(layer.width);
  with_kind(layer.kind, [&](auto kind) {
    for (int row = warp; row < here; row += kWarps) {
      const T t = nodes[(begin + row) % interior];
      const std::int64_t i = ends[row].x * layer.stride, j = ends[row].y * layer.stride;
      const std::int64_t at = std::int64_t(begin + row) * width;
      for (int unit = lane; unit < width; unit += kWarp) {
        const T z_first = layer.z[i + unit], z_second = layer.z[j + unit];
        T z = on_chord(z_first, z_second, t);
        if (p.deviations) {
          z += p.deviations[at + unit];
          if constexpr (kind.value == ActivationKind::kRelu) {  // ReLU would pass rounding on as an output
            const T largest = larger(absolute(z_first), absolute(z_second));
            if (absolute(z) <= largest * (kRoundedUlps * Epsilon<T>::value)) z = 0;
          }
        }
        T residual = activate<kind.value, T>(z, layer.alpha, layer.beta) - on_chord(layer.a[i + unit], layer.a[j + unit], t);
        if (p.added) residual += p.added[at + unit];
        p.residuals[at + unit] = residual;
        if constexpr (kind.value != ActivationKind::kIdentity) {
          p.slopes[at + unit] = derivative<kind.value, T>(z, layer.alpha, layer.beta);
        }
      }
    }
  });
}

// ---- statistics ----

template <class T>
struct Statistics {
  Problem<T> problem;
  Layer<T> first;        // layer 0
  const T* gradient;     // [samples, samples]
  T mean_t, weights[2];  // weights of the path's ends
  T* outputs;            // [rows, outputs], residuals, which the gradient replaces
  T* ends;               // [pairs, 2, outputs], the gradient at the samples
  // Residuals and slopes of layer l are at panels + rows * 2 * (widths of the layers before), one after the other.
  T* panels;
  std::int64_t rows;  // of a panel, which the batch may not fill
  bool last_slopes;   // whether the last layer has slopes; its residuals are the outputs
};

/// Moments of an output's residual, scaled. from: the residual at the pair's first node.
template <class T>
__device__ inline Moments<T> moments_of(const Problem<T>& problem, const T* from, T scale) {
  Moments<T> moments{0, 0, 0};
#pragma unroll 4
  for (int m = 0; m < problem.nodes.interior; ++m) {
    add_moments(moments, from[m * problem.outputs] * scale, problem.nodes.w[m], problem.nodes.w_t[m]);
  }
  return moments;
}

/// P and Q of an output, in units of the scaled output: delta_m = w_m (P (t_m - mean t) - Q (e_m - mean e)).
template <class T>
struct Slope {
  T p, q;
};
template <bool kPooled, class T>
__device__ inline Slope<T> slope_of(const Problem<T>& problem, const PairSums<kPooled>& sums, const OutputOnPath<T>& output,
                                    T te, T scale, T gradient) {
  const T variance_t = problem.nodes.variance_t, covariance = fma(output.chord, variance_t, te);
  if (output.share.constant > 0) return {0, 0};
  if constexpr (kPooled) {
    if (problem.pooled) {
      const T common = common_scale(problem.spread);
      const double stabiliser = double(scaled_stabiliser(problem.stabiliser, common)), all = sums.total + stabiliser;
      const T rest = T((sums.bend + stabiliser) / all), r2 = 1 - rest;
      const T factor = T(2 * double(gradient) / all * double(pooling_factor(common, scale)));
      return {factor * fma(rest, covariance, r2 * te), factor * r2 * variance_t};
    }
  }
  const T all = output.share.total + stabiliser_of<kPooled>(problem.stabiliser, scale);
  const T u = covariance / all, factor = 2 * (gradient / T(problem.outputs)) * u;
  return {factor * fma(u, te, output.share.nonlinear), factor * u * variance_t};
}

/// Nothing of an unresolved pair's paths may reach a sum. A zero adjoint is not enough: it may meet numbers that are not
/// finite.
template <class T>
__device__ inline void clear_pair(const Statistics<T>& p, int pair) {
  const int lane = int(threadIdx.x) % kWarp, nodes = p.problem.nodes.interior;
  const auto clear = [&](T* from, std::int64_t count) {
    for (std::int64_t n = lane; n < count; n += kWarp) from[n] = 0;
  };
  T* panel = p.panels;
  for (int l = 0; l <= p.problem.last; ++l) {
    const std::int64_t count = nodes * p.problem.layers[l].width, size = p.rows * p.problem.layers[l].width;
    clear(panel + pair * count, count);
    if (l < p.problem.last || p.last_slopes) clear(panel + size + pair * count, count);
    panel += 2 * size;
  }
  clear(p.ends + pair * 2 * p.problem.outputs, 2 * p.problem.outputs);
}

// A warp takes a pair, its lanes neighbouring outputs: the moments and the pair's entry; then the moments again, and from them
// the gradient in the outputs, which takes the residuals' place.
template <bool kPooled, class T>
__global__ void __launch_bounds__(kThreads) statistics_kernel(Batch batch, const __grid_constant__ Statistics<T> p) {
  const Problem<T>& problem = p.problem;
  const int lane = int(threadIdx.x) % kWarp, nodes = problem.nodes.interior;
  const std::int64_t pair = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp, outputs = problem.outputs;
  if (pair >= batch.pairs) return;  // the whole warp; there is no block barrier
  const int2 samples = batch.samples(int(pair));
  const std::int64_t i = samples.x, j = samples.y;
  const T vanishing = never_zero(problem.layers[problem.last].kind) ? Vanishing<T>::value : T(0);
  T* const residuals = p.outputs + pair * nodes * outputs;
  PairSums<kPooled> sums;
  for (std::int64_t k = lane; k < outputs; k += kWarp) {
    const T scale = problem.scale[k];
    add_output(sums, problem, i, j, k, moments_of(problem, residuals + k, scale), scale, vanishing * scale);
  }
  sums = sums.over_lanes(kWarp);
  const bool resolved = lane == 0 && store_entry(problem, sums, p.first, i, j);
  if (!__any_sync(kAllLanes, resolved)) return clear_pair(p, int(pair));
  const T gradient = p.gradient[i * problem.samples + j] + p.gradient[j * problem.samples + i];
  for (std::int64_t k = lane; k < outputs; k += kWarp) {
    const T scale = problem.scale[k];
    const Moments<T> moments = moments_of(problem, residuals + k, scale);
    const OutputOnPath<T> output = output_on_path<kPooled>(problem, i, j, k, moments, scale, vanishing * scale);
    const Slope<T> slope = slope_of(problem, sums, output, moments.te, scale, gradient);
    for (int m = 0; m < nodes; ++m) {
      T& residual = residuals[m * outputs + k];
      const T off = problem.nodes.w[m] * fma(residual, scale, -moments.e);
      residual = scale * fma(slope.p, problem.nodes.w_t[m], -(slope.q * off));
    }
    const T off = -slope.q * moments.e;  // the residual is 0 at the ends
    T* const ends = p.ends + pair * 2 * outputs + k;
    ends[0] = scale * p.weights[0] * (-slope.p * p.mean_t - off);
    ends[outputs] = scale * p.weights[1] * (slope.p * (1 - p.mean_t) - off);
  }
}

// ---- sums for the samples ----

/// Adjoints of one value, which go to the samples: times 1 - t to a path's first sample, times t to its second.
template <class T>
struct Parts {
  const T* adjoints;  // [pairs, nodes, width]
  const T* t;         // [nodes]; null: the two ends
  int nodes, width;
  double* to;  // [samples, width]
};

// A block takes one sample and 32 units, a lane per unit. Its warps share the pairs of the sample. Within a pair sums are in T,
// over pairs in double.
template <class T>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(Batch batch, const __grid_constant__ Parts<T> p) {
  const int chunks = (p.width + kWarp - 1) / kWarp, n = int(blockIdx.x) / chunks;
  const int warp = int(threadIdx.x) / kWarp, unit = int(blockIdx.x) % chunks * kWarp + int(threadIdx.x) % kWarp;
  double total = 0;
  const auto add = [&](int pair, int end) {
    const T* const from = p.adjoints + std::int64_t(pair) * p.nodes * p.width + unit;
    T sum = 0;
#pragma unroll 4
    for (int m = 0; m < p.nodes; ++m) {
      const T t = p.t ? p.t[m] : T(m);
      sum = fma(end == 0 ? 1 - t : t, from[std::int64_t(m) * p.width], sum);
    }
    total += double(sum);
  };
  if (unit < p.width) {
    if (n < batch.firsts) {
      for (int b = (batch.within ? n + 1 : 0) + warp; b < batch.seconds; b += kWarps) add(batch.place(n, b), 0);
    }
    if (batch.within || n >= batch.firsts) {
      const int b = batch.within ? n : n - batch.firsts, end = batch.within ? b : batch.firsts;
      for (int a = warp; a < end; a += kWarps) add(batch.place(a, b), 1);
    }
  }
  total = over_warps(total);
  if (warp > 0 || unit >= p.width) return;
  const std::int64_t sample = n < batch.firsts ? batch.first + n : batch.second + n - batch.firsts;
  p.to[sample * p.width + unit] += total;
}

}  // namespace backward
}  // namespace
}  // namespace lmn
