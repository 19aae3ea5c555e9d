#include "device.h"

#include "../statistics.h"  // after device.h, whose functions it uses

namespace lmn {
namespace {

constexpr int kBlock = 1024;  // a block reads 32 outputs of all samples; with 961 samples each of its warps reads 31 rows
constexpr int kWarps = kBlock / kWarp;
constexpr std::int64_t kPart = 1024;        // entries of the matrix that a warp reads
constexpr std::int64_t kMostBlocks = 4096;  // most blocks for rows and parts; a warp takes one after the other

__device__ void largest(std::int64_t* to, std::int64_t value) {
  if (value > 0) atomicMax(reinterpret_cast<long long*>(to), static_cast<long long>(value));
}

/// Compares bits, because the bits of positive numbers have the same order as the numbers.
__device__ void largest(std::int64_t* to, double value) {
  if (value > 0) largest(to, std::int64_t(__double_as_longlong(value)));
}

__device__ void add_failing(std::int64_t* to, std::int64_t number, std::int64_t reach) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(number));
  largest(to + 1, reach);
}

/// A warp checks a part of the matrix, and neighbouring lanes read neighbouring values. The warps divide the matrix into parts
/// and not into rows, because the rows may be long and few.
template <class T>
__device__ void check_entries(const CheckOutputs<T>& op, std::int64_t part) {
  const int lane = int(threadIdx.x) % kWarp;
  const std::int64_t size = op.samples * op.columns, begin = part * kPart + lane, end = at_most((part + 1) * kPart, size);
  bool good = true;
#pragma unroll 8
  for (std::int64_t i = begin; i < end; i += kWarp) good = good & isfinite(op.matrix[i]);
  if (__all_sync(kAllLanes, good)) return;
  for (std::int64_t i = begin; i < end; i += kWarp) {  // rare, so the loop takes one entry after the other
    if (!isfinite(op.matrix[i])) add_failing(op.found + 8, 1, size - i);
  }
}

/// A warp checks a row of x or of y. Neighbouring lanes read neighbouring values.
template <class T>
__device__ void check_row(const CheckOutputs<T>& op, std::int64_t row) {
  const int lane = int(threadIdx.x) % kWarp;
  const bool is_y = row >= op.samples;
  const std::int64_t n = is_y ? row - op.samples : row, width = is_y ? op.outputs : op.inputs;
  const T* values = (is_y ? op.y : op.x) + n * width;
  bool good = true;
#pragma unroll 4
  for (std::int64_t k = lane; k < width; k += kWarp) good = good & isfinite(values[k]);
  if (!__all_sync(kAllLanes, good) && lane == 0) add_failing(op.found + (is_y ? 2 : 0), 1, op.samples - n);
  if (!is_y || !op.expected) return;
  const double tolerance = kSameOutputUlps * op.epsilon;
  double excess = 0, magnitude = 0;
  int unlike = 0;
  for (std::int64_t k = lane; k < width; k += kWarp) {
    const double found = double(values[k]), expected = double(op.expected[n * width + k]);
    if (isfinite(expected)) {
      const double size = absolute(expected), over = absolute(found - expected) / tolerance - size;
      if (!isfinite(over))
        ++unlike;
      else
        excess = over > excess ? over : excess;
      magnitude = size > magnitude ? size : magnitude;
    } else if (!(found == expected) && !(found != found && expected != expected)) {
      ++unlike;
    }
  }
  unlike = warp_sum(unlike);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    excess = larger(excess, __shfl_xor_sync(kAllLanes, excess, offset));
    magnitude = larger(magnitude, __shfl_xor_sync(kAllLanes, magnitude, offset));
  }
  if (lane != 0) return;
  if (unlike) atomicAdd(reinterpret_cast<unsigned long long*>(op.found + 4), static_cast<unsigned long long>(unlike));
  largest(op.found + 5, excess);
  largest(op.found + 6, magnitude);
}

/// A block checks 32 outputs of all samples: it counts those that the chain does not reproduce. A lane takes one output.
template <class T>
__device__ void check_columns(const CheckOutputs<T>& op, std::int64_t k) {
  __shared__ T highs[kWarps][kWarp], lows[kWarps][kWarp], aparts[kWarps][kWarp];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  T high = T(-INFINITY), low = T(INFINITY), apart = 0;
  if (k < op.outputs) {
#pragma unroll 4
    for (std::int64_t n = warp; n < op.samples; n += kWarps) {
      const T value = op.y[n * op.outputs + k], difference = absolute(op.again[n * op.outputs + k] - value);
      high = value > high ? value : high;
      low = value < low ? value : low;
      apart = difference <= apart ? apart : difference;  // a NaN replaces `apart` ...
      if (apart != apart) apart = T(INFINITY);           // ... and becomes infinite, which stays, and is above every tolerance
    }
  }
  highs[warp][lane] = high;
  lows[warp][lane] = low;
  aparts[warp][lane] = apart;
  __syncthreads();
  if (warp != 0) return;
  for (int other = 1; other < kWarps; ++other) {
    high = larger(high, highs[other][lane]);
    low = -larger(-low, -lows[other][lane]);
    apart = larger(apart, aparts[other][lane]);
  }
  const bool bad = k < op.outputs && !(isfinite(apart) && is_same_output(double(high), double(low), double(apart), op.epsilon));
  const unsigned others = __ballot_sync(kAllLanes, bad);
  if (lane == 0 && others) {
    atomicAdd(reinterpret_cast<unsigned long long*>(op.found + 7), static_cast<unsigned long long>(__popc(others)));
  }
}

// The first blocks take 32 outputs each. A warp of the other blocks takes one row of x, one row of y or one part of the matrix
// after the other. `found` must be zero before the launch.
template <class T>
__global__ void __launch_bounds__(kBlock)
    check_outputs_kernel(CheckOutputs<T> op, std::int64_t column_blocks, std::int64_t parts) {
  if (blockIdx.x < column_blocks) {
    check_columns(op, std::int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp);
    return;
  }
  const std::int64_t block = blockIdx.x - column_blocks;
  if (block == 0 && threadIdx.x < 2 && op.counts) op.found[10 + threadIdx.x] = op.counts[threadIdx.x];
  const std::int64_t step = (gridDim.x - column_blocks) * kWarps;
  const std::int64_t rows = 2 * op.samples;
  for (std::int64_t at = block * kWarps + threadIdx.x / kWarp; at < rows + parts; at += step) {
    if (at < rows)
      check_row(op, at);
    else
      check_entries(op, at - rows);
  }
}

template <class T>
const char* run(const CheckOutputs<T>& op, CUstream_st* stream) {
  if (cudaMemsetAsync(op.found, 0, kFindings * sizeof(std::int64_t), stream) != cudaSuccess) return message(cudaGetLastError());
  const std::int64_t columns = op.again ? blocks_of(op.outputs, kWarp) : 0;
  const std::int64_t parts = op.matrix ? blocks_of(op.samples * op.columns, kPart) : 0;
  const std::int64_t blocks = columns + at_most(blocks_of(2 * op.samples + parts, kWarps), kMostBlocks);
  return launch(check_outputs_kernel<T>, blocks, kBlock, 0, stream, op, columns, parts);
}

}  // namespace

const char* cuda_run(const CheckOutputs<float>& op, CUstream_st* stream) { return run(op, stream); }
const char* cuda_run(const CheckOutputs<double>& op, CUstream_st* stream) { return run(op, stream); }

}  // namespace lmn
