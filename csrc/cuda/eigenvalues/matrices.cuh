// The input of symmetric_eigenvalues, its workspace, and the power of two that scales each matrix. Every part of the folder
// uses these structs. largest_kernel runs first; the scale and the check for NaN and Inf come from its result.
#pragma once
#include "instructions.cuh"

namespace lmn {
namespace {

struct Matrices {
  const void* entries;  // [batch, samples, samples]
  bool is_double;
  int samples, batch;

  __device__ Matrices one(int matrix) const {
    const std::int64_t at = std::int64_t(matrix) * samples * samples;
    int row = samples;
    forget(row);
    return {is_double ? static_cast<const void*>(static_cast<const double*>(entries) + at)
                      : static_cast<const void*>(static_cast<const float*>(entries) + at),
            is_double, row, 1};
  }
  // Reads an entry of the first matrix, from the lower triangle only, as LAPACK does.
  __device__ double entry(int i, int j) const {
    const int at = i < j ? j * samples + i : i * samples + j;
    return is_double ? static_cast<const double*>(entries)[at] : double(static_cast<const float*>(entries)[at]);
  }
};

// Pointers into the caller's workspace.
struct Work {
  double* exchange;             // [batch, 2, 2, words()], of one phase: by parity of the step, products and columns. 0 at first
  unsigned long long* largest;  // [batch], bits of the largest magnitude. 0 at first
  unsigned long long* failed;   // [batch], 0 at first
  double* diagonal;             // [batch, samples]
  double* off_diagonal;         // [batch, samples], the last entry is not used
  double* left;                 // [batch, rows, rows], the lower triangle that one phase leaves to the next
  double* distant;              // [blocks, ...], the entries that a block's shared memory does not hold
};

// A warp per row. The bits of magnitudes have the same order as the magnitudes, and a NaN is above all of them.
constexpr int kRowsPerBlock = 8;
__global__ void largest_kernel(Matrices matrices, Work work) {
  const std::int64_t row = std::int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= std::int64_t(matrices.batch) * matrices.samples) return;
  const int matrix = int(row / matrices.samples), i = int(row % matrices.samples);
  unsigned long long largest = 0;
  for (int j = int(threadIdx.x) % kWarp; j <= i; j += kWarp) {
    const unsigned long long bits = bits_of(fabs(matrices.one(matrix).entry(i, j)));
    largest = bits > largest ? bits : largest;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAllLanes, largest, offset);
    largest = other > largest ? other : largest;
  }
  if (threadIdx.x % kWarp == 0) atomicMax(work.largest + matrix, largest);
}

// Two powers of two. A matrix times `first` times `second` has its largest magnitude in [0.5, 1). There are two of them because
// a single factor might not be a normal number.
struct Scale {
  double first, second;
  __device__ explicit Scale(double largest, int sign) : first(1), second(1) {
    if (!(largest > 0)) return;
    int exponent = 0;
    ::frexp(largest, &exponent);
    first = ::ldexp(1.0, -sign * (exponent / 2));
    second = ::ldexp(1.0, -sign * (exponent - exponent / 2));
  }
};

}  // namespace
}  // namespace lmn
