#include "device.h"

namespace lmn {
namespace {

constexpr int kBlock = 256;

__device__ double block_sum(double value) {
  __shared__ double partial[kBlock / kWarp];
  value = warp_sum(value);
  __syncthreads();  // threads may still read the partial sums of the call before
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kBlock / kWarp; ++warp) total += partial[warp];  // the same order in every thread
  return total;
}

// One block per row. The threads stride over the row's eigenvalues, so neighbouring threads read neighbouring values.
template <class T>
__global__ void spectral_entropy_kernel(SpectralEntropy<T> op) {
  const T* row = op.eigenvalues + std::int64_t(blockIdx.x) * op.samples;
  double scale = 1, mass = 0;
  for (std::int64_t n = threadIdx.x; n < op.samples; n += kBlock) mass += fabs(double(row[n]));
  mass = block_sum(mass);
  if (!isfinite(mass)) {  // the sum overflowed; with a NaN or an Inf among the values the result is a NaN
    scale = 0x1p-1000;
    mass = 0;
    for (std::int64_t n = threadIdx.x; n < op.samples; n += kBlock) mass += fabs(double(row[n])) * scale;
    mass = block_sum(mass);
  }
  double bits = 0;
  for (std::int64_t n = threadIdx.x; n < op.samples; n += kBlock) {
    const double p = fabs(double(row[n])) * scale / mass;
    if (p != 0) bits -= p * log2(p);  // true for a NaN, so the result is a NaN, too
  }
  bits = block_sum(bits);
  if (threadIdx.x == 0) op.bits[blockIdx.x] = bits < 0 ? 0.0 : bits;
}

template <class T>
const char* run(const SpectralEntropy<T>& op, CUstream_st* stream) {
  return launch(spectral_entropy_kernel<T>, op.batch, kBlock, 0, stream, op);
}

}  // namespace

const char* cuda_run(const SpectralEntropy<float>& op, CUstream_st* stream) { return run(op, stream); }
const char* cuda_run(const SpectralEntropy<double>& op, CUstream_st* stream) { return run(op, stream); }

}  // namespace lmn
