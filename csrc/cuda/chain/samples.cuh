// The network at the samples, in both dtypes: values, slopes and their rounding for each layer, and the outputs' scale.
// enqueue_forward (chain.cuh) launches forward_kernel; finish_kernel (halves.cuh) and scale_kernel (chain64/samples.cuh) call
// scale_output.
#pragma once
#include "pairs.cuh"

namespace lmn {
namespace {

/// Sum over the block, valid in its first thread. The order of the additions does not depend on the schedule.
__device__ inline double block_sum(double value) {
  __shared__ double partial[kWarps];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 1; warp < kWarps; ++warp) value += partial[warp];
  return value;
}

constexpr int kForwardTile = 16;
static_assert(kForwardTile * kForwardTile == kThreads);

/// What the network adds to one of a layer's values at the samples: an earlier value and its rounding, [samples, stride], and a
/// shift that is affine in the samples, [samples, width]. Each may be null.
template <class T>
struct Earlier {
  const T *value, *rounding, *shift;
};

template <class T>
__device__ inline Earlier<T> of_network(const Earlier<T>& earlier, const Layer<T>& layer, const Problem<T>& problem) {
  return {in_network_if(earlier.value, problem.apart), in_network_if(earlier.rounding, problem.apart),
          in_network_if(earlier.shift, problem.samples * layer.width * std::int64_t(sizeof(T)))};
}

/// Adds the earlier value and the shift to a sum. Also adds the squares of the earlier value's rounding and of the shift to
/// `squares`, the sum of squares of everything that the sum is computed from.
template <class T>
__device__ inline void add_earlier(const Earlier<T>& earlier, const Layer<T>& layer, std::int64_t sample, std::int64_t unit,
                                   double& sum, double& squares) {
  if (earlier.value) {
    const double rounding = double(earlier.rounding[sample * layer.stride + unit]);
    sum += double(earlier.value[sample * layer.stride + unit]);
    squares = ::fma(rounding, rounding, squares);
  }
  if (earlier.shift) {
    const double term = double(earlier.shift[sample * layer.width + unit]);
    sum += term;
    squares = ::fma(term, term, squares);
  }
}

/// Notes a block's largest finite |a| and |v| of each unit. In the first layer it also notes the largest |z|, which may be a
/// NaN.
__device__ inline void note_range(const Problem<float>& problem, const Layer<float>& layer, std::int64_t first_unit, int row,
                                  int column, float z, float a, bool is_first) {
  __shared__ int largest[kForwardTile];  // as integers, because positive floats have the same order
  if (row == 0) largest[column] = 0;
  __syncthreads();
  if (a <= 0x1.fffffep127f) atomicMax(&largest[column], int(__float_as_uint(a)));
  __syncthreads();
  if (row == 0 && first_unit + column < layer.width) {
    atomicMax(reinterpret_cast<int*>(layer.half.largest) + first_unit + column, largest[column]);
  }
  if (!is_first) return;
  int largest_z = int(__float_as_uint(z));
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int other = __shfl_xor_sync(kAllLanes, largest_z, offset);
    largest_z = other > largest_z ? other : largest_z;
  }
  if (threadIdx.x % kWarp == 0) atomicMax(&problem.range->largest_z, largest_z);
}

/// A block computes 16 samples x 16 units of one layer, one thread per value. Products are in double: the rounding of a node
/// averages out along a path, but the rounding of the ends would tilt the whole path. `before` null: the layer is z itself.
/// into_z, into_v: what the network adds there. In double the first layer's blocks also sum |z| for the choice of the kernel;
/// the sum is infinite if some |z| is not below the limit.
template <class T>
__global__ void forward_kernel(Problem<T> problem, Layer<T> layer, int index, const T* z, const T* before,
                               const T* before_rounding, std::int64_t depth, std::int64_t before_stride, Earlier<T> into_z,
                               Earlier<T> into_v, double limit, double* sums) {
  problem = of_network(problem);
  layer = of_network(layer, depth, problem.apart);
  z = in_network(z, problem.samples * layer.width * std::int64_t(sizeof(T)));  // of the first layer
  before = in_network_if(before, problem.apart), before_rounding = in_network_if(before_rounding, problem.apart);
  into_z = of_network(into_z, layer, problem), into_v = of_network(into_v, layer, problem);
  sums = in_network_if(sums, problem.apart);
  __shared__ T a_tile[kForwardTile][kForwardTile + 1], w_tile[kForwardTile][kForwardTile + 1];
  __shared__ T rounding_tile[kForwardTile][kForwardTile + 1];
  const int row = int(threadIdx.x) / kForwardTile, column = int(threadIdx.x) % kForwardTile;
  const std::int64_t across = layer.stride / kForwardTile;
  const std::int64_t sample = blockIdx.x / across * kForwardTile + row;
  const std::int64_t first_unit = blockIdx.x % across * kForwardTile, unit = first_unit + column;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    problem.layers[index] = layer;
    if (problem.pooled && !before) *problem.spread = 0;
  }
  const bool valid = sample < problem.samples && unit < layer.width;
  double sum = 0, squares = 0;
  if (before) {
    for (std::int64_t begin = 0; begin < depth; begin += kForwardTile) {
      const std::int64_t d = begin + column, other = first_unit + row;
      const bool inside = sample < problem.samples && d < depth;
      a_tile[row][column] = inside ? before[sample * before_stride + d] : T(0);
      rounding_tile[row][column] = inside ? before_rounding[sample * before_stride + d] : T(0);
      if constexpr (sizeof(T) == 4) {  // the rounding to a half, relative to the largest |a| of all samples
        const float* const largest = problem.layers[index - 1].half.largest;
        const float quantum = inside && largest ? largest[d] * kHalfRounding : 0.0f;
        rounding_tile[row][column] = float(::hypot(double(rounding_tile[row][column]), double(quantum)));
      }
      w_tile[row][column] = other < layer.width && d < depth ? layer.weights[other * depth + d] : T(0);
      __syncthreads();
      for (int d_tile = 0; d_tile < kForwardTile; ++d_tile) {
        const double w = double(w_tile[column][d_tile]), term = w * double(rounding_tile[row][d_tile]);
        sum = ::fma(w, double(a_tile[row][d_tile]), sum);
        squares = ::fma(term, term, squares);
      }
      __syncthreads();
    }
    if (valid && layer.biases) {
      const double bias = double(layer.biases[unit]);
      sum += bias;
      squares = ::fma(bias, bias, squares);
    }
    if (valid) add_earlier(into_z, layer, sample, unit, sum, squares);
  } else if (valid) {
    sum = double(z[sample * layer.width + unit]);
  }
  const T value = T(sum);
  T activated = value, left = value;
  if (sample < problem.samples) {
    T slope = T(0);
    with_kind(layer.kind, [&](auto kind) {
      activated = activate<kind.value, T>(value, layer.alpha, layer.beta);
      if (layer.slope) slope = derivative<kind.value, T>(value, layer.alpha, layer.beta);
    });
    if (layer.slope) layer.slope[sample * layer.stride + unit] = valid ? slope : T(0);
    layer.z[sample * layer.stride + unit] = valid ? value : T(0);
    layer.a[sample * layer.stride + unit] = valid ? activated : T(0);
    squares += sum * sum;
    left = activated;
    if (layer.v != layer.a) {
      // rounding of z, which may be added to a
      layer.rounding[sample * layer.stride + unit] = valid ? T(::sqrt(squares)) : T(0);
      double total = double(activated);
      if (valid) add_earlier(into_v, layer, sample, unit, total, squares);
      left = T(total);
      layer.v[sample * layer.stride + unit] = valid ? left : T(0);
    }
    squares += double(left) * double(left);
    layer.rounding[sample * layer.stride + unit] = valid ? T(::sqrt(squares)) : T(0);
    if (valid && index == problem.last) {
      problem.y_low[sample * layer.width + unit] = problem.ends_linear ? T(sum - double(value)) : T(0);
    }
  }
  if constexpr (sizeof(T) == 4) {
    if (layer.half.largest) {
      note_range(problem, layer, first_unit, row, column, valid ? absolute(value) : 0.0f,
                 valid ? larger(absolute(activated), absolute(left)) : 0.0f, !before);
    }
    if (!before && valid && unit == 0) {
      problem.connectivity[sample * (problem.samples + 1)] = 1;
      if (problem.pooled) problem.pooled[sample * (problem.samples + 1)] = 1;
    }
    return;
  }
  if (before) return;
  const double magnitude = ::fabs(sum);  // 0 outside the matrix
  const double total = block_sum(magnitude < limit ? magnitude : HUGE_VAL);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

/// Scales output k to order 1. The whole block calls this.
template <class T>
__device__ void scale_output(const Problem<T>& problem, std::int64_t k) {
  __shared__ double partial[kThreads];
  const Layer<T>& layer = problem.layers[problem.last];
  const T origin = layer.v[k];
  T largest = 0;
  for (std::int64_t n = threadIdx.x; n < problem.samples; n += kThreads) {
    const T difference = absolute(layer.v[n * layer.stride + k] - origin);
    largest = largest < difference ? difference : largest;
  }
  partial[threadIdx.x] = double(largest);
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half && partial[threadIdx.x] < partial[threadIdx.x + half]) {
      partial[threadIdx.x] = partial[threadIdx.x + half];
    }
    __syncthreads();
  }
  const T scale = output_scale(T(partial[0]));
  if (threadIdx.x == 0) {
    problem.scale[k] = scale;
    if (problem.pooled && partial[0] > 0) atomic_larger(problem.spread, 1 / scale);
  }
  for (std::int64_t n = threadIdx.x; n < problem.samples; n += kThreads) {
    const std::int64_t at = n * problem.outputs + k;
    problem.y[at] = layer.v[n * layer.stride + k] * scale;
    problem.y_low[at] *= scale;
    problem.rounding[at] = layer.rounding[n * layer.stride + k] * scale;
    if constexpr (sizeof(T) == 4) {
      if (problem.ends) write_end(problem.ends, n, k, problem.y[at], problem.y_low[at], problem.rounding[at], scale);
    }
  }
}

}  // namespace
}  // namespace lmn
