#include "device.h"

namespace lmn {
namespace {

constexpr int kBlock = 1024;  // one block reads 32 outputs of all samples: 961 of them are 31 rows for each of its warps
constexpr int kWarps = kBlock / kWarp;
constexpr std::int64_t kMostBlocks = 4096;  // of those that read rows, each warp one after the other

__device__ void largest(std::int64_t* to, std::int64_t value) {
  if (value > 0) atomicMax(reinterpret_cast<long long*>(to), static_cast<long long>(value));
}

/// The bits of positive numbers are in the order of the numbers.
__device__ void largest(std::int64_t* to, double value) {
  if (value > 0) largest(to, std::int64_t(__double_as_longlong(value)));
}

__device__ void add_failing(std::int64_t* to, std::int64_t number, std::int64_t reach) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(number));
  largest(to + 1, reach);
}

/// Rows of x, y or the matrix, one to a warp, neighbouring lanes at neighbouring values.
template <class T>
__device__ void check_row(const CheckOutputs<T>& op, std::int64_t row) {
  const int lane = int(threadIdx.x) % kWarp;
  const int what = int(row / op.samples);
  const std::int64_t n = row % op.samples, width = what == 0 ? op.inputs : what == 1 ? op.outputs : op.samples;
  const T* values = (what == 0 ? op.x : what == 1 ? op.y : op.connectivity) + n * width;
  bool good = true;
  for (std::int64_t k = lane; k < width; k += kWarp) good = good && isfinite(values[k]);
  if (!__all_sync(kAllLanes, good)) {
    if (what < 2) {
      if (lane == 0) add_failing(op.found + 2 * what, 1, op.samples - n);
    } else {  // rare: entry after entry
      for (std::int64_t k = lane; k < width; k += kWarp) {
        if (!isfinite(values[k])) add_failing(op.found + 8, 1, op.samples * op.samples - n * width - k);
      }
    }
  }
  if (what != 1 || !op.expected) return;
  const double tolerance = kSameOutputUlps * op.epsilon;
  double excess = 0, magnitude = 0;
  int unlike = 0;
  for (std::int64_t k = lane; k < width; k += kWarp) {
    const double found = double(values[k]), expected = double(op.expected[n * width + k]);
    if (isfinite(expected)) {
      const double size = absolute(expected), over = absolute(found - expected) / tolerance - size;
      if (!isfinite(over)) ++unlike;
      else excess = over > excess ? over : excess;
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

/// 32 outputs of all samples, one to a lane: whether the chain gives them.
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
      apart = difference <= apart ? apart : difference;  // a NaN comes in ...
      if (apart != apart) apart = T(INFINITY);           // ... and stays, as what no tolerance takes
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

// The first blocks take 32 outputs each, the warps of the others a row each; found is zero before.
template <class T>
__global__ void __launch_bounds__(kBlock) check_outputs_kernel(CheckOutputs<T> op, std::int64_t column_blocks) {
  if (blockIdx.x < column_blocks) {
    check_columns(op, std::int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp);
    return;
  }
  const std::int64_t block = blockIdx.x - column_blocks;
  if (block == 0 && threadIdx.x < 2) op.found[10 + threadIdx.x] = op.counts[threadIdx.x];
  const std::int64_t step = (gridDim.x - column_blocks) * kWarps;
  for (std::int64_t row = block * kWarps + threadIdx.x / kWarp; row < 3 * op.samples; row += step) check_row(op, row);
}

template <class T>
const char* run(const CheckOutputs<T>& op, CUstream_st* stream) {
  if (cudaMemsetAsync(op.found, 0, kFindings * sizeof(std::int64_t), stream) != cudaSuccess) return message(cudaGetLastError());
  const std::int64_t columns = op.again ? blocks_of(op.outputs, kWarp) : 0;
  const std::int64_t rows = at_most(blocks_of(3 * op.samples, kWarps), kMostBlocks);
  return launch(check_outputs_kernel<T>, columns + rows, kBlock, 0, stream, op, columns);
}

}  // namespace

const char* check_outputs_cuda(const CheckOutputs<float>& op, CUstream_st* stream) { return run(op, stream); }
const char* check_outputs_cuda(const CheckOutputs<double>& op, CUstream_st* stream) { return run(op, stream); }

}  // namespace lmn
