// Eigenvalues of a tridiagonal matrix by multisection with Sturm's counts. The kernel takes the diagonals that
// tridiagonal_kernel writes, and it expects that largest_kernel ran before.
//
// The number of eigenvalues below z is the number of sign changes of p_i = (d_i - z) p_{i-1} - e_{i-1}^2 p_{i-2}, p_{-1} = 1.
// This takes two multiply-adds a row, one of them on the critical path, and no division. Blocks of 16 rows are scaled so that
// the last coefficient is 1: y_i = (g_i - z h_i) y_{i-1} - y_{i-2} with k_i = e_{i-1}^2 k_{i-2}, h_i = k_{i-1} / k_i,
// g_i = d_i h_i, p_i = k_i y_i. Eight factors of the least e^2 are 1e-256, so k and y stay within the range of a double. A
// coupling e is raised to at least 1e-16 of the bound on the spectrum; float64 resolves no smaller couplings.
#pragma once
#include "matrices.cuh"

namespace lmn {
namespace {

constexpr int kSturmBlock = 128, kRowsAtOnce = 16;
constexpr double kLeastCoupling = 1e-32;  // the square of 1e-16

__host__ __device__ inline int sturm_rows(int samples) {  // rows from either end to the middle, padded
  return ((samples | 1) / 2 + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce;
}
inline std::size_t sturm_bytes(int samples) {
  return (2 * sizeof(double2)) * std::size_t(sturm_rows(samples) + sturm_rows(samples) / kRowsAtOnce) + 32 * sizeof(double);
}

// kLanes lanes find one eigenvalue. They try kLanes / 2 shifts at once. Two lanes count for each shift, from the two ends of
// the matrix to its middle.
template <int kLanes>
__global__ void __launch_bounds__(kSturmBlock) sturm_kernel(Work work, int samples, int blocks, double* eigenvalues) {
  constexpr int kShifts = kLanes / 2;
  // (kShifts + 1)^kRounds is so large that the last interval is 6e-14 or 2e-14 of the bound on the spectrum.
  constexpr int kRounds = kLanes == 32 ? 11 : 20;
  static_assert(kLanes == 32 || kLanes == 8);
  const int matrix = int(blockIdx.x) / blocks, thread = int(threadIdx.x), lane = thread % kWarp;
  const double* const d = work.diagonal + std::int64_t(matrix) * samples;
  const double* const e = work.off_diagonal + std::int64_t(matrix) * samples;
  const int asked = (int(blockIdx.x) % blocks * kSturmBlock + thread) / kLanes;
  const int rank = asked < samples ? asked : samples - 1;
  double* const to = asked < samples && lane % kLanes == 0 ? eigenvalues + std::int64_t(matrix) * samples + rank : nullptr;
  const double largest = of_bits(work.largest[matrix]);
  if (!isfinite(largest) || work.failed[matrix] || largest == 0) {
    if (to) *to = largest == 0 ? 0.0 : of_bits(0x7ff8000000000000ull);
    return;
  }

  const int odd = samples | 1, rows = (odd - 1) / 2, padding = odd - samples, padded = sturm_rows(samples);
  double* const shared = reinterpret_cast<double*>(dynamic_shared());
  double2* const table = reinterpret_cast<double2*>(shared + 32);  // [padded, 2]: h and g, by row from either end
  double2* const scales = table + 2 * padded;                      // [padded / 16, 2]: k of the last two rows of a block

  double bound = 0;  // Gershgorin's bound on the spectrum
  for (int i = thread; i < samples; i += kSturmBlock) {
    bound = fmax(bound, fabs(d[i]) + (i ? fabs(e[i - 1]) : 0.0) + (i + 1 < samples ? fabs(e[i]) : 0.0));
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) bound = fmax(bound, __shfl_xor_sync(kAllLanes, bound, offset));
  if (lane == 0) shared[thread / kWarp] = bound;
  __syncthreads();
  for (int warp = 0; warp < kSturmBlock / kWarp; ++warp) bound = fmax(bound, shared[warp]);
  bound *= 1 + 1e-12;
  const double unit = 1.0 / bound;

  // The padding before the first row has diagonal entries of 2, above the spectrum, and is coupled to nothing.
  for (int k = thread; k < 2 * padded; k += kSturmBlock) {
    const int from_end = k & 1, j = (k >> 1) - (padded - rows);  // j: row counted from that end
    double diagonal = 2.0, coupling = 0.0;
    if (j >= 0) {
      const int i = (from_end ? odd - 1 - j : j) - padding, c = from_end ? i : i - 1;
      if (i >= 0) {
        diagonal = d[i] * unit;
        if (j > 0 && c >= 0 && c + 1 < samples) coupling = e[c] * unit;
      }
    }
    table[k] = make_double2(diagonal, fmax(coupling * coupling, kLeastCoupling));
  }
  __syncthreads();
  for (int k = thread; k < 2 * (padded / kRowsAtOnce); k += kSturmBlock) {
    double2* const at = table + (k >> 1) * (2 * kRowsAtOnce) + (k & 1);
    double before = 1.0, before_that = 1.0;
    for (int u = 0; u < kRowsAtOnce; ++u) {
      const double2 row = at[2 * u];
      const double now = row.y * before_that, h = before / now;
      at[2 * u] = make_double2(h, row.x * h);
      before_that = before;
      before = now;
    }
    scales[k] = make_double2(before, before_that);
  }
  __syncthreads();

  const int middle = rows - padding;
  const auto coupling_of = [&](bool inside, int i) {
    const double coupling = inside ? e[i] * unit : 0.0;
    return fmax(coupling * coupling, kLeastCoupling);
  };
  const double middle_d = d[middle] * unit;
  const double up = coupling_of(middle >= 1, middle - 1), down = coupling_of(middle + 1 < samples, middle);
  const int from_end = (lane / kShifts) & 1, shift = lane % kShifts, group = lane / kLanes * kLanes;
  double low = -1.0, high = 1.0;
  for (int round = 0; round < kRounds; ++round) {
    const double step = (high - low) * (1.0 / (kShifts + 1)), z = fma(double(shift + 1), step, low);
    double p = 1.0, before = 0.0;
    unsigned signs = 0;
    int below = 0;
    const double2* row = table + from_end;
    for (int begin = 0; begin < padded; begin += kRowsAtOnce, row += 2 * kRowsAtOnce) {
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; ++u) {
        const double2 c = row[2 * u];
        const double now = fma(fma(-z, c.x, c.y), p, -before);
        signs = append_sign(signs, now);
        before = p;
        p = now;
      }
      below += __popc((signs ^ (signs >> 1)) & 0xffffu);
      const double2 scale = scales[begin / (kRowsAtOnce / 2) + from_end];
      p *= scale.x;
      before *= scale.y;
      // p and `before` times a power of two that brings the larger one to [1, 2)
      const int exponent = int(fmax(fabs(p), fabs(before)) > 0 ? bits_of(fmax(fabs(p), fabs(before))) >> 52 : 0);
      const double power = of_bits(std::uint64_t(2046 - exponent) << 52);
      p *= power;
      before *= power;
    }
    // The counts from both ends meet at the middle row.
    const double other = __shfl_xor_sync(kAllLanes, p, kShifts), other_before = __shfl_xor_sync(kAllLanes, before, kShifts);
    const double top = from_end ? other : p, top_before = from_end ? other_before : before;
    const double bottom = from_end ? p : other, bottom_before = from_end ? before : other_before;
    const double pivot = (middle_d - z) * top * bottom - up * top_before * bottom - down * bottom_before * top;
    below += __shfl_xor_sync(kAllLanes, below, kShifts);
    below += int((bits_of(pivot) ^ bits_of(top) ^ bits_of(bottom)) >> 63);
    const unsigned above = (__ballot_sync(kAllLanes, below > rank) >> group) & ((1u << kShifts) - 1);
    const int first = above ? __ffs(int(above)) - 1 : kShifts;  // number of the first shift above the eigenvalue
    high = first < kShifts ? fma(double(first + 1), step, low) : high;
    low = first ? fma(double(first), step, low) : low;
  }
  if (to) {
    const Scale back(largest, -1);
    *to = 0.5 * (low + high) * bound * back.first * back.second;
  }
}

}  // namespace
}  // namespace lmn
