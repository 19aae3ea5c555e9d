// One block per row, a pair of samples; threads stride over its units, so neighbouring threads read and write neighbouring
// values. A thread keeps the coefficients of kDegrees degrees of one unit in registers while it walks the nodes; the rule is in
// shared memory. More degrees take more passes, which evaluate the hidden layer again. It has not run on a card.
#include "device.h"

#include "../activation.h"

namespace lmn {
namespace {

constexpr int kThreads = 128;
template <class T>
constexpr int kDegrees = sizeof(T) == 4 ? 20 : 10;  // 20 doubles and their sums of squares would not fit into the registers

/// What a block of threads shares.
template <class T>
struct RowRule {
  T polynomials[kMostCoefficients * kDegrees<T>];         // [interior][kDegrees<T>], of one pass
  T t[kMostCoefficients], scales[kMostCoefficients + 2];  // the last two scales are the ends'
};

/// The coefficients of a row's units. energy: receives this thread's sums of squares. from: the first degree of the pass.
template <ActivationKind kKind, class T>
__device__ void row_coefficients(const BlockCoefficients<T>& op, const RowRule<T>& rule, int from, T (&energy)[kDegrees<T>]) {
  const std::int64_t row = blockIdx.x, width = op.units * (op.gated ? 2 : 1);
  const T *z_i = op.z + op.first[row] * width, *z_j = op.z + op.second[row] * width;
  const T alpha = T(op.activation.alpha), beta = T(op.activation.beta);
  const int interior = op.interior;
  for (std::int64_t unit = threadIdx.x; unit < op.units; unit += kThreads) {
    const T z_first = z_i[unit], z_second = z_j[unit], shift = op.shift ? op.shift[unit] : T(0);
    T g_first = 0, g_second = 0, g_shift = 0;
    if (op.gated) {
      g_first = z_i[op.units + unit], g_second = z_j[op.units + unit];
      g_shift = op.shift ? op.shift[op.units + unit] : T(0);
    }
    const auto hidden = [&](T z, T gate, T scale) {  // a scale of 1, where nothing is normalised, changes no bit
      const T value = activate<kKind>(z * scale + shift, alpha, beta);
      return op.gated ? value * (gate * scale + g_shift) : value;
    };
    const T first = hidden(z_first, g_first, rule.scales[interior]);
    const T second = hidden(z_second, g_second, rule.scales[interior + 1]);
    T sums[kDegrees<T>] = {};
    for (int m = 0; m < interior; ++m) {
      const T t = rule.t[m], z = on_chord(z_first, z_second, t), gate = on_chord(g_first, g_second, t);
      const T residual = hidden(z, gate, rule.scales[m]) - on_chord(first, second, t);
#pragma unroll
      for (int d = 0; d < kDegrees<T>; ++d) sums[d] = fma(rule.polynomials[m * kDegrees<T> + d], residual, sums[d]);
    }
#pragma unroll
    for (int d = 0; d < kDegrees<T>; ++d) {
      const T value = sums[d] * op.scale;
      energy[d] = fma(value, value, energy[d]);
      const int degree = from + d;
      if (op.begin <= degree && degree < op.end) {
        op.coefficients[((degree - op.begin) * op.rows + row) * op.units + unit] = sums[d];
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) block_coefficients_kernel(BlockCoefficients<T> op, int from) {
  __shared__ RowRule<T> rule;
  __shared__ double partial[kThreads / kWarp];
  const std::int64_t row = blockIdx.x, i = op.first[row], j = op.second[row];
  const int interior = op.interior;
  for (int n = threadIdx.x; n < interior * kDegrees<T>; n += kThreads) {
    const int d = from + n % kDegrees<T>;
    rule.polynomials[n] = d < op.degrees ? T(op.polynomials[d * interior + n / kDegrees<T>]) : T(0);
  }
  for (int m = threadIdx.x; m < interior + 2; m += kThreads) {
    const double t = m < interior ? op.t[m] : double(m - interior);
    if (m < interior) rule.t[m] = T(t);
    rule.scales[m] = op.own ? T(normalisation_factor(op.own[i], op.own[j], op.cross[row], op.epsilon, t)) : T(1);
  }
  __syncthreads();
  T energy[kDegrees<T>] = {};
  const RowRule<T>& filled = rule;  // GCC, which compiles it for the emulator, does not count a use inside a generic lambda
  with_kind(op.activation.kind, [&](auto kind) { row_coefficients<decltype(kind)::value>(op, filled, from, energy); });
#pragma unroll
  for (int d = 0; d < kDegrees<T>; ++d) {
    const double sum = warp_sum(double(energy[d]));
    __syncthreads();  // threads may still read the partial sums of the degree before
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0 && from + d < op.degrees) {
      double total = 0;
      for (int warp = 0; warp < kThreads / kWarp; ++warp) total += partial[warp];
      op.energy[row * op.degrees + from + d] = total;
    }
  }
}

template <class T>
const char* block_coefficients_on(const BlockCoefficients<T>& op, CUstream_st* stream) {
  const char* error = nullptr;
  for (int from = 0; from < op.degrees && !error; from += kDegrees<T>) {  // `from`: the first degree of a pass
    error = launch(block_coefficients_kernel<T>, op.rows, kThreads, 0, stream, op, from);
  }
  return error;
}

}  // namespace

const char* cuda_run(const BlockCoefficients<float>& op, CUstream_st* stream) { return block_coefficients_on(op, stream); }
const char* cuda_run(const BlockCoefficients<double>& op, CUstream_st* stream) { return block_coefficients_on(op, stream); }

}  // namespace lmn
