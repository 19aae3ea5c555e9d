// Distances as sums of squared differences: the Gram form |u|^2 + |v|^2 - 2 u v has no digits left for close rows.
//
// One lane per second sample. A panel of second samples, packed, stays in L1 while blocks of first samples pass by it.
#include "level.h"

namespace lmn {
namespace {

using V = D;  // features are float64

// Register block: kRows first samples x kColumns vectors of second ones in accumulators.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kColumns = 3;
#else
constexpr int kRows = 4, kColumns = 2;
#endif
constexpr int kPanel = kColumns * kLanes<double>;
static_assert(kDistanceGroup % kPanel == 0, "the workspace is counted in whole panels");

// Samples of a task. Its tile of the result is buffered, so that the mirrored half is written in long stretches, too.
constexpr int kTaskRows = 64, kTaskColumns = kDistanceGroup * 4;
static_assert(kTaskRows % kRows == 0, "blocks of rows do not leave the buffer");

struct Workspace {
  double* panels;         // [panels][features][kPanel], second samples; beyond the last one zeros
  double* first_norms;    // [first_samples] squared
  double* second_norms;   // [second_samples rounded up to kDistanceGroup]
};

template <class T>
Workspace split(const JacobianDistance<T>& op) {
  const std::int64_t padded = (op.second_samples + kDistanceGroup - 1) / kDistanceGroup * kDistanceGroup;
  Workspace w;
  w.panels = op.workspace;
  w.second_norms = w.panels + padded * op.features;
  w.first_norms = w.second_norms + padded;
  return w;
}

inline double squared_norm(const double* row, std::int64_t features) {
  double sum = 0;
  for (std::int64_t f = 0; f < features; ++f) sum += row[f] * row[f];
  return sum;
}

/// distance^2 between kRows first samples and a panel of second ones.
inline void squared_differences(const double* const (&rows)[kRows], const double* panel, std::int64_t features,
                                double* to, std::int64_t stride) {
  V sums[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) sums[r][c] = V{};
  }
  for (std::int64_t f = 0; f < features; ++f, panel += kPanel) {
    V column[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) column[c] = load<V>(panel + c * kLanes<double>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V value = splat<V>(rows[r][f]);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const V difference = column[c] - value;
        sums[r][c] = fma(difference, difference, sums[r][c]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) store<V>(to + r * stride + c * kLanes<double>, sums[r][c]);
  }
}

/// The tile of the result that begins at (i, j), and in a symmetric one its mirror image.
template <class T>
void tile(const JacobianDistance<T>& op, const Workspace& w, std::int64_t i, std::int64_t j, bool symmetric) {
  double squares[kRows * kTaskColumns];
  T distances[kTaskRows * kTaskColumns];
  const std::int64_t rows = at_most(kTaskRows, op.first_samples - i);
  const std::int64_t columns = at_most(kTaskColumns, op.second_samples - j);
  for (std::int64_t block = 0; block < rows; block += kRows) {
    const double* row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = op.first + (i + at_most(block + r, rows - 1)) * op.features;
    for (std::int64_t column = 0; column < columns; column += kPanel) {
      squared_differences(row, w.panels + (j + column) * op.features, op.features, squares + column, kTaskColumns);
    }
    for (std::int64_t r = 0; r < at_most(kRows, rows - block); ++r) {
      const double norm = w.first_norms[i + block + r];
      const double *square = squares + r * kTaskColumns, *norms = w.second_norms + j;
      T* to = distances + (block + r) * kTaskColumns;
      for (std::int64_t c = 0; c < columns; ++c) {
        const double larger_norm = norm < norms[c] ? norms[c] : norm;
        const double rest = square[c] <= kSameFeatures * larger_norm ? 0.0 : square[c];  // a NaN stays
        to[c] = T(op.squared ? rest : __builtin_sqrt(rest));
      }
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t start = symmetric && i + r > j ? at_most(i + r - j, columns) : 0;  // each entry has one writer
    memcpy(op.distance + (i + r) * op.second_samples + j + start, distances + r * kTaskColumns + start,
           std::size_t(columns - start) * sizeof(T));
  }
  if (!symmetric) return;
  for (std::int64_t c = 0; c < columns; ++c) {
    T* mirrored = op.distance + (j + c) * op.second_samples + i;
    for (std::int64_t r = 0; r < at_most(rows, j + c - i); ++r) mirrored[r] = distances[r * kTaskColumns + c];
  }
}

template <class T>
void jacobian_distance_on(const JacobianDistance<T>& op, int threads) {
  const Workspace w = split(op);
  const bool symmetric = op.first == op.second && op.first_samples == op.second_samples;
  const std::int64_t padded = (op.second_samples + kPanel - 1) / kPanel * kPanel;
#pragma omp parallel for num_threads(threads)
  for (std::int64_t panel = 0; panel < padded; panel += kPanel) {
    double* to = w.panels + panel * op.features;
    for (int lane = 0; lane < kPanel; ++lane) {
      const bool exists = panel + lane < op.second_samples;
      const double* row = op.second + (exists ? panel + lane : 0) * op.features;
      for (std::int64_t f = 0; f < op.features; ++f) to[f * kPanel + lane] = exists ? row[f] : 0.0;
      w.second_norms[panel + lane] = exists ? squared_norm(row, op.features) : 0.0;
    }
  }
#pragma omp parallel for num_threads(threads)
  for (std::int64_t n = 0; n < op.first_samples; ++n) {
    w.first_norms[n] = symmetric ? w.second_norms[n] : squared_norm(op.first + n * op.features, op.features);
  }
  const std::int64_t tile_columns = (op.second_samples + kTaskColumns - 1) / kTaskColumns;
  const std::int64_t tile_rows = (op.first_samples + kTaskRows - 1) / kTaskRows;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t task = 0; task < tile_rows * tile_columns; ++task) {
    const std::int64_t i = task / tile_columns * kTaskRows, j = task % tile_columns * kTaskColumns;
    if (symmetric && j + kTaskColumns <= i) continue;  // wholly below the diagonal: another tile's mirror image
    tile(op, w, i, j, symmetric);
  }
}

}  // namespace

namespace LMN_LEVEL {
void jacobian_distance(const JacobianDistance<float>& op, int threads) { jacobian_distance_on(op, threads); }
void jacobian_distance(const JacobianDistance<double>& op, int threads) { jacobian_distance_on(op, threads); }
}  // namespace LMN_LEVEL

}  // namespace lmn
