// Sums of squared differences in float64, tile against tile: the Gram form has no digits left for close rows.
#include "device.h"

namespace lmn {
namespace {

constexpr int kWarps = 8, kThreadRows = 4;
constexpr int kTile = kWarp;        // first samples and second samples of a block
constexpr int kDepth = 32;          // features in shared memory at a time
static_assert(kWarps * kThreadRows == kTile, "each warp has kThreadRows rows of a tile");

// One warp per row, lanes over its features: neighbouring lanes read neighbouring values.
__global__ void __launch_bounds__(kWarps* kWarp) norm_kernel(const double* features, std::int64_t samples,
                                                             std::int64_t width, double* norms) {
  const std::int64_t row = (std::int64_t(blockIdx.x) * kWarps * kWarp + threadIdx.x) / kWarp;
  if (row >= samples) return;  // whole warps leave together, so the warp sum stays legal
  double sum = 0;
  for (std::int64_t f = threadIdx.x % kWarp; f < width; f += kWarp) {
    const double value = features[row * width + f];
    sum = fma(value, value, sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) norms[row] = sum;
}

// A block takes a tile of kTile x kTile distances, each lane a second sample, each warp every eighth first one:
// neighbouring lanes write neighbouring values, the mirrored tile by way of shared memory.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    distance_kernel(JacobianDistance<T> op, const double* first_norms, const double* second_norms, bool symmetric) {
  __shared__ double first[kTile][kDepth + 1], second[kTile][kDepth + 1];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const std::int64_t tiles = blocks_of(op.second_samples, kTile);
  const std::int64_t i = blockIdx.x / tiles * kTile, j = blockIdx.x % tiles * kTile;
  if (symmetric && j < i) return;  // another block's mirror image
  double sums[kThreadRows] = {};
  for (std::int64_t depth = 0; depth < op.features; depth += kDepth) {
    __syncthreads();  // the tiles before may still be read
    for (int row = warp; row < kTile; row += kWarps) {
      const bool inside = depth + lane < op.features;
      first[row][lane] = inside && i + row < op.first_samples ? op.first[(i + row) * op.features + depth + lane] : 0.0;
      second[row][lane] = inside && j + row < op.second_samples ? op.second[(j + row) * op.features + depth + lane] : 0.0;
    }
    __syncthreads();
    const int count = int(at_most(kDepth, op.features - depth));
    for (int f = 0; f < count; ++f) {
      const double value = second[lane][f];
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        const double difference = value - first[warp + r * kWarps][f];
        sums[r] = fma(difference, difference, sums[r]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int row = warp + r * kWarps;
    if (i + row >= op.first_samples || j + lane >= op.second_samples) continue;
    const double larger_norm = larger(first_norms[i + row], second_norms[j + lane]);
    const bool counts = larger_norm <= 0x1.fffffffffffffp1023;  // not so of a NaN, an Inf, a sum that overflowed
    const double square = !counts ? larger_norm - larger_norm : sums[r] <= kSameFeatures * larger_norm ? 0.0 : sums[r];
    const double distance = op.squared ? square : ::sqrt(square);
    first[row][lane] = distance;
    op.distance[(i + row) * op.second_samples + j + lane] = T(distance);
  }
  if (!symmetric || i == j) return;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int row = warp + r * kWarps;
    if (j + row >= op.second_samples || i + lane >= op.first_samples) continue;
    op.distance[(j + row) * op.second_samples + i + lane] = T(first[lane][row]);
  }
}

template <class T>
const char* jacobian_distance_on(const JacobianDistance<T>& op, CUstream_st* stream) {
  const bool symmetric = op.first == op.second && op.first_samples == op.second_samples;
  double* const second_norms = op.workspace;
  double* const first_norms = symmetric ? second_norms : second_norms + op.second_samples;
  const char* error = launch(norm_kernel, blocks_of(op.second_samples, kWarps), kWarps * kWarp, 0, stream, op.second,
                             op.second_samples, op.features, second_norms);
  if (!error && !symmetric) {
    error = launch(norm_kernel, blocks_of(op.first_samples, kWarps), kWarps * kWarp, 0, stream, op.first,
                   op.first_samples, op.features, first_norms);
  }
  if (error) return error;
  return launch(distance_kernel<T>, blocks_of(op.first_samples, kTile) * blocks_of(op.second_samples, kTile),
                kWarps * kWarp, 0, stream, op, first_norms, second_norms, symmetric);
}

}  // namespace

const char* jacobian_distance_cuda(const JacobianDistance<float>& op, CUstream_st* stream) {
  return jacobian_distance_on(op, stream);
}
const char* jacobian_distance_cuda(const JacobianDistance<double>& op, CUstream_st* stream) {
  return jacobian_distance_on(op, stream);
}

}  // namespace lmn
