// The vector warps' part of tridiagonal_kernel. The vector warps of every block receive the products and the next column, and
// compute v and w of the Householder step from them. All blocks compute the same bits. tridiagonal.cuh describes the whole
// step.
#pragma once
#include "layout.cuh"

namespace lmn {
namespace {

// The square of a share of the matrix's largest entry: a column whose length is at most this share counts as zero. A matrix of
// exact rank one leaves columns of 1e-110. Their factor 2 / |v|^2 would raise the tags of posted zeros (1.5e-323) to the size
// of the matrix.
constexpr double kNoColumn = 1e-44;
// How often a thread looks for other blocks' values of one matrix before it gives the matrix up. This takes about a second, if
// each look is an L2 access of 423 clocks. A matrix of 2048 takes some 10^5 looks.
constexpr int kPatience = 1 << 22;

// The vector warps' part for one matrix; the arguments are those of hold_matrix. has_last_row: this block has the matrix's last
// row, and writes the diagonals.
template <class L>
__device__ void make_vectors(const Matrices& A, int matrix, const Scale& scale, const Shape& shape, const Work& work, int last,
                             bool stays, bool has_last_row, double* memory) {
  constexpr int kEntries = L::kEntries, kWarps = L::kVectorWarps;
  const int thread = int(threadIdx.x) - kMatrixThreads, warp = thread / kWarp, padding = shape.padding, padded = shape.padded;
  const bool first_lane = thread % kWarp == 0, writes = thread == 0 && has_last_row;
  double* const sums = memory + shape.sums;  // [4, warps], then one number
  double* const W = memory + shape.w;
  double* const X = memory + shape.x;
  double* const diagonal = work.diagonal + std::int64_t(matrix) * shape.whole + (shape.whole - shape.samples);
  double* const off_diagonal = work.off_diagonal + std::int64_t(matrix) * shape.whole + (shape.whole - shape.samples);
  // A thread's entries are pairs of neighbours.
  const auto index_of = [&](int e) { return 2 * thread + 2 * L::kVectorThreads * (e >> 1) + (e & 1); };
  const auto scaled = [&](int i) { return A.entry(i, 0) * scale.first * scale.second; };

  double w[kEntries], kept[kEntries];
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const int index = index_of(e);
    kept[e] = index > padding && index < padded ? scaled(index - padding) : 0.0;
    if (index < padded) {
      W[index] = 0.0;
      X[padded + index] = 0.0;
      X[index] = kept[e];
    }
  }
  if (writes && shape.samples == shape.whole) diagonal[0] = scaled(0);
  int patience = kPatience;

  for (int n = 0; n < last; ++n) {
    const int next = padding + n + 1, tag = ((n >> 1) + 1) & 3;
    double* const x = X + (n & 1) * padded;        // this step's column
    double* const v = X + ((n + 1) & 1) * padded;  // v of the step before, then the next column
    arrive(kColumnReady, L::kThreads);
    if (n + 1 == last && !stays) {  // no row of this block is left after this step
      meet(kMatrixRead, L::kThreads);
      return;
    }

    // `rest`: |x|^2 without its first entry. w . x and v . x correct the products for the missing update.
    double rest = 0, w_x = 0, v_x = 0;
#pragma unroll
    for (int e = 0; e < kEntries; e += 2) {
      const int index = index_of(e);
      if (index + 1 >= next && index < padded) {
        const double2 old_v = *reinterpret_cast<const double2*>(v + index);
        const double2 old_w = *reinterpret_cast<const double2*>(W + index);
        const double x0 = L::kKeepsColumn ? kept[e] : x[index], x1 = L::kKeepsColumn ? kept[e + 1] : x[index + 1];
        if (index > next) rest = fma(x0, x0, rest);
        if (index + 1 > next) rest = fma(x1, x1, rest);
        w_x = fma(old_w.x, x0, w_x);
        v_x = fma(old_v.x, x0, v_x);
        w_x = fma(old_w.y, x1, w_x);
        v_x = fma(old_v.y, x1, v_x);
      }
    }
    rest = whole_warp_sum(rest);
    w_x = whole_warp_sum(w_x);
    v_x = whole_warp_sum(v_x);
    if (first_lane) {
      sums[warp] = rest;
      sums[kWarps + warp] = w_x;
      sums[2 * kWarps + warp] = v_x;
    }
    meet(kVectorWarpsMeet, L::kVectorThreads);
    rest = w_x = v_x = 0;
#pragma unroll
    for (int u = 0; u < kWarps; ++u) {
      rest += sums[u];
      w_x += sums[kWarps + u];
      v_x += sums[2 * kWarps + u];
    }
    const double alpha = x[next], old_w_next = W[next], old_v_next = v[next], square = fma(alpha, alpha, rest);
    double beta = alpha, gamma = 0.0;
    if (rest > 0.0 && square > kNoColumn) {
      const double length = sqrt(square);
      beta = alpha > 0 ? -length : length;
      gamma = 1.0 / fma(fabs(alpha), length, square);
    }
    const double v_next = alpha - beta;
    if (writes) off_diagonal[n] = beta;

    const double* const products = work.exchange + (std::int64_t(matrix) * 2 + (n & 1)) * 2 * shape.words() - shape.skipped;
    const double* const column = products + shape.words();
    double z[kEntries];
    const auto fetch = [&](const double* from) {
      unsigned missing = 0;
#pragma unroll
      for (int e = 0; e < kEntries; e += 2) {
        if (index_of(e + 1) >= next && index_of(e) < padded)
          missing |= 1u << e;
        else
          z[e] = z[e + 1] = 0.0;
      }
      while (missing) {
#pragma unroll
        for (int e = 0; e < kEntries; e += 2) {
          if (!(missing >> e & 1)) continue;
          const double2 both = look(from + index_of(e));
          z[e] = both.x;
          z[e + 1] = both.y;
        }
#pragma unroll
        for (int e = 0; e < kEntries; e += 2) {
          if ((index_of(e) < next || tag_of(z[e]) == tag) && tag_of(z[e + 1]) == tag) missing &= ~(1u << e);
        }
        if (missing) {
          // The thread then goes on with whatever it has read: a NaN at the end is better than a card that hangs.
          if (--patience < 0) {
            work.failed[matrix] = 1;
            break;
          }
#if defined(LMN_EMULATED)
          emulator::give_way();
#endif
        }
      }
      __syncwarp();  // lanes leave the loop one by one, and the next instructions take the whole warp
    };
    fetch(column);
    // The next column, and the corrections of the products for the missing update. Both are computed before the products
    // arrive.
    double u[kEntries], dot = 0;
#pragma unroll
    for (int e = 0; e < kEntries; e += 2) {
      const int index = index_of(e);
      u[e] = u[e + 1] = w[e] = w[e + 1] = 0.0;
      if (index + 1 >= next && index < padded) {
        const double2 old_v = *reinterpret_cast<const double2*>(v + index);
        const double2 old_w = *reinterpret_cast<const double2*>(W + index);
        u[e] = fma(-old_w.x, old_v_next, fma(-old_v.x, old_w_next, z[e]));
        u[e + 1] = fma(-old_w.y, old_v_next, fma(-old_v.y, old_w_next, z[e + 1]));
        w[e] = fma(-beta, u[e], fma(-old_w.x, v_x, -old_v.x * w_x));
        w[e + 1] = fma(-beta, u[e + 1], fma(-old_w.y, v_x, -old_v.y * w_x));
      }
    }
    fetch(products);
    const auto new_v = [&](int e) {
      const int index = index_of(e);
      return index == next ? v_next : L::kKeepsColumn ? kept[e] : index > next && index < padded ? x[index] : 0.0;
    };
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const int index = index_of(e);
      const double p = index < next ? 0.0 : gamma * (z[e] + w[e]);
      w[e] = p;
      u[e] = fma(-p, v_next, u[e]);
      dot = fma(new_v(e), p, dot);
      if (index == next) sums[4 * kWarps] = p;
    }
    dot = whole_warp_sum(dot);
    if (first_lane) sums[3 * kWarps + warp] = dot;
    meet(kVectorWarpsMeet, L::kVectorThreads);
    dot = 0;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) dot += sums[3 * kWarps + k];
    const double kappa = 0.5 * gamma * dot, along_v = fma(-2.0 * kappa, v_next, sums[4 * kWarps]);
    meet(kMatrixRead, L::kThreads);
#pragma unroll
    for (int e = 0; e < kEntries; e += 2) {
      const int index = index_of(e);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const double of_v = new_v(e + h);
        w[e + h] = fma(-kappa, of_v, w[e + h]);
        u[e + h] = fma(-along_v, of_v, u[e + h]);
        if (index + h == next && has_last_row) diagonal[n + 1] = u[e + h];
        if (index + h <= next) w[e + h] = u[e + h] = 0.0;
        if (L::kKeepsColumn) kept[e + h] = u[e + h];
      }
      if (index + 2 >= next && index < padded) {
        *reinterpret_cast<double2*>(W + index) = make_double2(w[e], w[e + 1]);
        *reinterpret_cast<double2*>(v + index) = make_double2(u[e], u[e + 1]);
      }
    }
  }
  if (stays && shape.left() > 1) {  // the matrix warps hand the rest over
    arrive(kColumnReady, L::kThreads);
    meet(kMatrixRead, L::kThreads);
  }
}

}  // namespace
}  // namespace lmn
