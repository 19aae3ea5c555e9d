// Distances are sums of squared differences, because the Gram form |u|^2 + |v|^2 - 2 u v has no digits left for close rows.
// In float32 the Gram form serves all pairs that are not close, at half the work. The rows are then taken from a centre, so
// that few pairs count as close.
//
// One lane per second sample. A packed panel of second samples stays in L1 while blocks of first samples pass by it.
#include "level.h"

namespace lmn {
namespace {

// Register block: kRows first samples x kColumns vectors of second ones in accumulators.
constexpr int kRows = kBlockRows, kColumns = kDifferenceColumns;
template <class T>
constexpr int kPanel = kColumns * kLanes<T>;

// Number of features per sum: a longer float32 sum would lose digits, and a longer panel would leave L1.
constexpr std::int64_t kFeatures = 256;

// Samples of a task. The task's tile of the result is buffered, so that the mirrored half is also written in long runs.
constexpr int kTaskRows = 64, kTaskColumns = 96;
static_assert(kTaskRows % kRows == 0, "blocks of rows do not leave the buffer");
static_assert(kTaskColumns % kPanel<float> == 0 && kTaskColumns % kPanel<double> == 0, "whole panels only");

// In float32 rows are taken from a centre. A pair is close if its squared distance is at most this share of the larger
// row's squared norm about the centre. Close pairs are computed again in float64. For the other pairs the Gram form has a
// relative error of 3 * 2^-24 * 2 / kClose from its last two sums.
constexpr double kClose = 0x1p-2;
// Share of the largest squared norm: a smaller squared distance would lose some or all of its digits in float32.
constexpr double kTiny = 0x1p-100;
constexpr std::int64_t kCentreRows = 256;  // the centre is the mean of this many second samples; an estimate suffices

template <class T>
struct IntegerOf {
  using type = std::int64_t;
};
template <>
struct IntegerOf<float> {
  using type = std::int32_t;
};

template <class T>
struct Workspace {
  T* panels;             // [panels][features][kPanel], second samples; zeros beyond the last sample
  T* rows;               // [first_samples][features]
  double* first_norms;   // [first_samples], squared
  double* second_norms;  // [second_samples]
  // In float32 only:
  double* centre;          // [features]
  double* first_centred;   // [first_samples], squared norms about the centre
  double* second_centred;  // [second_samples]
  T* first_squares;        // [first_samples], first_centred times scale^2
  T* second_squares;       // [second_samples]
  T* first_limits;         // [first_samples], squared distances; a pair is close up to the larger of its two limits
  T* second_limits;        // [second_samples]
  T scale;                 // factor of panels and rows, a power of two
};

template <class T>
Workspace<T> split(const JacobianDistance<T>& op, Arena& arena) {
  Workspace<T> w{};
  w.second_norms = arena.take<double>(op.second_samples);
  w.first_norms = arena.take<double>(op.first_samples);
  w.panels = arena.take<T>(blocks_of(op.second_samples, kPanel<T>) * kPanel<T> * op.features);
  if constexpr (sizeof(T) == 4) {
    w.rows = arena.take<T>(op.first_samples * op.features);
    w.centre = arena.take<double>(op.features);
    w.second_centred = arena.take<double>(op.second_samples);
    w.first_centred = arena.take<double>(op.first_samples);
    w.second_squares = arena.take<T>(op.second_samples);
    w.first_squares = arena.take<T>(op.first_samples);
    w.second_limits = arena.take<T>(op.second_samples);
    w.first_limits = arena.take<T>(op.first_samples);
  } else {
    w.rows = const_cast<T*>(op.first);  // the rows are used as they are, and only read
  }
  return w;
}

inline double larger_of(double a, double b) { return a < b ? b : a; }
inline double finite_or_0(double value) { return isfinite(value) ? value : 0.0; }

inline double squared_norm(const double* row, std::int64_t features) {
  double sum = 0;
  for (std::int64_t f = 0; f < features; ++f) sum += row[f] * row[f];
  return sum;
}

/// |first - second|^2 of two rows; lanes run over features.
inline double squared_difference(const double* first, const double* second, std::int64_t features) {
  constexpr int kL = kLanes<double>, kSums = 4;
  D sums[kSums] = {};
  std::int64_t f = 0;
  for (; f + kSums * kL <= features; f += kSums * kL) {
#pragma GCC unroll 4
    for (int n = 0; n < kSums; ++n) {
      const D difference = load<D>(first + f + n * kL) - load<D>(second + f + n * kL);
      sums[n] = fma(difference, difference, sums[n]);
    }
  }
  for (; f < features; f += kL) {
    const std::int64_t count = at_most(kL, features - f);
    const D difference = load_partial<D>(first + f, count) - load_partial<D>(second + f, count);
    sums[0] = fma(difference, difference, sums[0]);
  }
  const D total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  for (int lane = 0; lane < kL; ++lane) sum += total[lane];
  return sum;
}

/// Adds one term of a panel's block: a squared difference in float64, a product in float32.
inline D term(D row, D column, D sum) {
  const D difference = column - row;
  return fma(difference, difference, sum);
}
inline F term(F row, F column, F sum) { return fma(row, column, sum); }

/// Sums the terms of kRows first samples and a panel of second samples.
template <class T>
inline void add_up(const T* const (&rows)[kRows], const T* panel, std::int64_t features, T* to) {
  using V = Vector<T>;
  for (std::int64_t begin = 0; begin < features; begin += kFeatures) {
    V sums[kRows][kColumns];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) sums[r][c] = V{};
    }
    for (std::int64_t f = begin; f < at_most(begin + kFeatures, features); ++f, panel += kPanel<T>) {
      V column[kColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) column[c] = load<V>(panel + c * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V value = splat<V>(rows[r][f]);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) sums[r][c] = term(value, column[c], sums[r][c]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) {
        T* const sum = to + r * kTaskColumns + c * kLanes<T>;
        store<V>(sum, begin == 0 ? sums[r][c] : load<V>(sum) + sums[r][c]);
      }
    }
  }
}

/// Turns the sums of first sample i and `columns` second samples from j on into distances, or squared distances.
inline void write_distances(const JacobianDistance<double>& op, const Workspace<double>& w, std::int64_t i, std::int64_t j,
                            std::int64_t columns, bool, double* squares, double* to) {
  const double norm = w.first_norms[i], *norms = w.second_norms + j;
  for (std::int64_t c = 0; c < columns; ++c) {
    const double rest = squares[c] <= kSameFeatures * larger_of(norm, norms[c]) ? 0.0 : squares[c];  // a NaN stays
    to[c] = op.squared ? rest : __builtin_sqrt(rest);
  }
}
inline void write_distances(const JacobianDistance<float>& op, const Workspace<float>& w, std::int64_t i, std::int64_t j,
                            std::int64_t columns, bool symmetric, float* products, float* to) {
  const float limit = w.first_limits[i], *limits = w.second_limits + j, unit = 1 / w.scale;
  const float square = w.first_squares[i], *squares = w.second_squares + j;
  std::int32_t close = 0;
  for (std::int64_t c = 0; c < columns; ++c) {
    const float rest = (square + squares[c]) - 2 * products[c], larger = limit < limits[c] ? limits[c] : limit;
    close |= rest <= larger;
    products[c] = rest;  // from here on a squared distance
    to[c] = op.squared ? rest * unit * unit : __builtin_sqrtf(rest) * unit;
  }
  if (!close) return;
  for (std::int64_t c = 0; c < columns; ++c) {
    if (!(products[c] <= (limit < limits[c] ? limits[c] : limit))) continue;
    const bool itself = symmetric && i == j + c;
    const double norm = larger_of(w.first_norms[i], w.second_norms[j + c]);
    const double again =
        itself ? 0.0 : squared_difference(op.first + i * op.features, op.second + (j + c) * op.features, op.features);
    const double rest = again <= kSameFeatures * norm ? 0.0 : again;
    to[c] = float(op.squared ? rest : __builtin_sqrt(rest));
  }
}

/// Writes 4 x 4 values of a tile's buffer as columns of the result. Together with `fetch` this saves 15 % of the time
/// (N = 4096, 100 features).
template <class T>
inline void transpose_4(const T* from, T* to, std::int64_t stride) {
#if defined(__clang__)
#define LMN_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LMN_PICK(a, b, ...) __builtin_shuffle(a, b, Indices{__VA_ARGS__})
#endif
  typedef T V __attribute__((vector_size(4 * sizeof(T))));
  typedef typename IntegerOf<T>::type Indices __attribute__((vector_size(4 * sizeof(T)), unused));
  V rows[4];
  for (int n = 0; n < 4; ++n) memcpy(&rows[n], from + n * kTaskColumns, sizeof(V));
  const V low = LMN_PICK(rows[0], rows[1], 0, 4, 1, 5), high = LMN_PICK(rows[0], rows[1], 2, 6, 3, 7);
  const V low_2 = LMN_PICK(rows[2], rows[3], 0, 4, 1, 5), high_2 = LMN_PICK(rows[2], rows[3], 2, 6, 3, 7);
  const V columns[4] = {LMN_PICK(low, low_2, 0, 1, 4, 5), LMN_PICK(low, low_2, 2, 3, 6, 7), LMN_PICK(high, high_2, 0, 1, 4, 5),
                        LMN_PICK(high, high_2, 2, 3, 6, 7)};
  for (int n = 0; n < 4; ++n) memcpy(to + n * stride, &columns[n], sizeof(V));
#undef LMN_PICK
}

/// Prefetches cache lines that are about to be written: stores that miss the cache retire one after the other.
template <class T>
inline void fetch(const T* to, std::int64_t count) {
  constexpr std::int64_t kLine = 64 / std::int64_t(sizeof(T));
  for (std::int64_t n = 0; n < count + kLine - 1; n += kLine) __builtin_prefetch(to + at_most(n, count - 1), 1);
}

/// Computes the tile of the result that begins at (i, j), and in a symmetric result its mirror image.
template <class T>
void tile(const JacobianDistance<T>& op, const Workspace<T>& w, std::int64_t i, std::int64_t j, bool symmetric, Tasks& tasks) {
  T sums[kRows * kTaskColumns];
  T distances[kTaskRows * kTaskColumns];
  const std::int64_t rows = at_most(kTaskRows, op.first_samples - i);
  const std::int64_t columns = at_most(kTaskColumns, op.second_samples - j);
  for (std::int64_t block = 0; block < rows; block += kRows) {
    if (!tasks.go_on()) return;
    const T* row[kRows];
    for (std::int64_t r = block; r < at_most(block + kRows, rows); ++r) {
      fetch(op.distance + (i + r) * op.second_samples + j, columns);
    }
    constexpr int kShare = kTaskColumns * kRows / kTaskRows;  // rows of the mirrored half to prefetch with this block
    for (std::int64_t c = block / kRows * kShare; symmetric && c < at_most((block / kRows + 1) * kShare, columns); ++c) {
      fetch(op.distance + (j + c) * op.second_samples + i, rows);
    }
    for (int r = 0; r < kRows; ++r) row[r] = w.rows + (i + at_most(block + r, rows - 1)) * op.features;
    for (std::int64_t column = 0; column < columns; column += kPanel<T>) {
      add_up<T>(row, w.panels + (j + column) * op.features, op.features, sums + column);
    }
    for (std::int64_t r = 0; r < at_most(kRows, rows - block); ++r) {
      write_distances(op, w, i + block + r, j, columns, symmetric, sums + r * kTaskColumns,
                      distances + (block + r) * kTaskColumns);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t start = symmetric && i + r > j ? at_most(i + r - j, columns) : 0;  // each entry has one writer
    memcpy(op.distance + (i + r) * op.second_samples + j + start, distances + r * kTaskColumns + start,
           std::size_t(columns - start) * sizeof(T));
  }
  if (!symmetric) return;
  if (rows == kTaskRows && columns == kTaskColumns && j >= i + rows) {
    for (std::int64_t c = 0; c < columns; c += 4) {
      for (std::int64_t r = 0; r < rows; r += 4) {
        transpose_4(distances + r * kTaskColumns + c, op.distance + (j + c) * op.second_samples + i + r, op.second_samples);
      }
    }
    return;
  }
  for (std::int64_t c = 0; c < columns; ++c) {
    T* mirrored = op.distance + (j + c) * op.second_samples + i;
    for (std::int64_t r = 0; r < at_most(rows, j + c - i); ++r) mirrored[r] = distances[r * kTaskColumns + c];
  }
}

template <class T>
void pack(const JacobianDistance<T>& op, const Workspace<T>& w, std::int64_t panel, const double* centre) {
  T* const to = w.panels + panel * op.features;
  for (int lane = 0; lane < kPanel<T>; ++lane) {
    const bool exists = panel + lane < op.second_samples;
    const double* row = op.second + (exists ? panel + lane : 0) * op.features;
    for (std::int64_t f = 0; f < op.features; ++f) {
      const double value = centre ? (row[f] - centre[f]) * double(w.scale) : row[f];
      to[f * kPanel<T> + lane] = exists ? T(value) : T(0);
    }
  }
}

/// Prepares norms, and rows in the layout that the products read.
void prepare(const JacobianDistance<double>& op, Workspace<double>& w, bool symmetric, int threads) {
#pragma omp parallel for num_threads(threads) if (worth_threads(op.second_samples * op.features))
  for (std::int64_t panel = 0; panel < op.second_samples; panel += kPanel<double>) pack<double>(op, w, panel, nullptr);
#pragma omp parallel for num_threads(threads) if (worth_threads(op.second_samples * op.features))
  for (std::int64_t n = 0; n < op.second_samples; ++n) {
    w.second_norms[n] = squared_norm(op.second + n * op.features, op.features);
  }
  if (symmetric) {
    w.first_norms = w.second_norms;
    return;
  }
#pragma omp parallel for num_threads(threads) if (worth_threads(op.first_samples * op.features))
  for (std::int64_t n = 0; n < op.first_samples; ++n) {
    w.first_norms[n] = squared_norm(op.first + n * op.features, op.features);
  }
}
/// Squared norms of samples in float32: about 0, and about the centre.
void norms_of(const double* rows, const double* centre, std::int64_t samples, std::int64_t features, double* norms,
              double* centred, int threads) {
#pragma omp parallel for num_threads(threads) if (worth_threads(samples * features))
  for (std::int64_t n = 0; n < samples; ++n) {
    norms[n] = squared_norm(rows + n * features, features);
    centred[n] = squared_difference(rows + n * features, centre, features);
  }
}
/// Turns these norms into scaled squares and limits.
void limits_of(std::int64_t samples, double scale, const double* norms, const double* centred, float* squares, float* limits) {
  for (std::int64_t n = 0; n < samples; ++n) {
    const double square = centred[n] * scale * scale, same = 2 * kSameFeatures * norms[n] * scale * scale;
    squares[n] = float(square);
    limits[n] = float(larger_of(larger_of(kClose * square, same), kTiny));
  }
}
/// The mean of some second samples, rounded to a multiple of a power of two that is close to their magnitude. Integers minus
/// this centre are exact in float32.
void find_centre(const JacobianDistance<float>& op, double* centre) {
  const std::int64_t rows = at_most(op.second_samples, kCentreRows);
  double largest = 0;
  for (std::int64_t f = 0; f < op.features; ++f) centre[f] = 0;
  for (std::int64_t n = 0; n < rows; ++n) {
    const double* const row = op.second + n * op.second_samples / rows * op.features;
    for (std::int64_t f = 0; f < op.features; ++f) {
      const double value = finite_or_0(row[f]);
      centre[f] += value / double(rows);
      largest = larger_of(largest, __builtin_fabs(value));
    }
  }
  const double grain = 64 * output_scale(largest);  // 1 / grain is 1/64 to 1/32 of the largest
  for (std::int64_t f = 0; f < op.features; ++f) centre[f] = __builtin_rint(centre[f] * grain) / grain;
}
void prepare(const JacobianDistance<float>& op, Workspace<float>& w, bool symmetric, int threads) {
  find_centre(op, w.centre);
  norms_of(op.second, w.centre, op.second_samples, op.features, w.second_norms, w.second_centred, threads);
  if (symmetric) {
    w.first_norms = w.second_norms;
    w.first_centred = w.second_centred;
    w.first_squares = w.second_squares;
    w.first_limits = w.second_limits;
  } else {
    norms_of(op.first, w.centre, op.first_samples, op.features, w.first_norms, w.first_centred, threads);
  }
  double largest = 0;
  for (std::int64_t n = 0; n < op.second_samples; ++n) largest = larger_of(largest, finite_or_0(w.second_centred[n]));
  for (std::int64_t n = 0; n < op.first_samples; ++n) largest = larger_of(largest, finite_or_0(w.first_centred[n]));
  w.scale = output_scale(float(__builtin_sqrt(largest)));
  limits_of(op.second_samples, w.scale, w.second_norms, w.second_centred, w.second_squares, w.second_limits);
  if (!symmetric) limits_of(op.first_samples, w.scale, w.first_norms, w.first_centred, w.first_squares, w.first_limits);
#pragma omp parallel for num_threads(threads) if (worth_threads(op.second_samples * op.features))
  for (std::int64_t panel = 0; panel < op.second_samples; panel += kPanel<float>) pack<float>(op, w, panel, w.centre);
#pragma omp parallel for num_threads(threads) if (worth_threads(op.first_samples * op.features))
  for (std::int64_t n = 0; n < op.first_samples; ++n) {
    const double* row = op.first + n * op.features;
    for (std::int64_t f = 0; f < op.features; ++f) {
      w.rows[n * op.features + f] = float((row[f] - w.centre[f]) * double(w.scale));
    }
  }
}

template <class T>
void jacobian_distance_on(const JacobianDistance<T>& op, int threads) {
  Arena arena{reinterpret_cast<char*>(op.workspace)};
  Workspace<T> w = split(op, arena);
  const bool symmetric = op.first == op.second && op.first_samples == op.second_samples;
  prepare(op, w, symmetric, threads);
  const std::int64_t tile_columns = (op.second_samples + kTaskColumns - 1) / kTaskColumns;
  const std::int64_t tile_rows = (op.first_samples + kTaskRows - 1) / kTaskRows;
  Tasks tasks(op.watch, tile_rows * tile_columns);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t task = 0; task < tile_rows * tile_columns; ++task) {
    const std::int64_t i = task / tile_columns * kTaskRows, j = task % tile_columns * kTaskColumns;
    // A tile wholly below the diagonal is the mirror image of another tile.
    if (!tasks.go_on() || (symmetric && j + kTaskColumns <= i)) continue;
    tile(op, w, i, j, symmetric, tasks);
    tasks.count_one();
  }
}

template <class T>
std::size_t workspace_of(const JacobianDistance<T>& op) {
  Arena arena{nullptr};
  split(op, arena);
  return arena.used;
}

}  // namespace

namespace LMN_LEVEL {
std::size_t workspace(const JacobianDistance<float>& op, int) { return workspace_of(op); }
std::size_t workspace(const JacobianDistance<double>& op, int) { return workspace_of(op); }
void run(const JacobianDistance<float>& op, int threads) { jacobian_distance_on(op, threads); }
void run(const JacobianDistance<double>& op, int threads) { jacobian_distance_on(op, threads); }
}  // namespace LMN_LEVEL

}  // namespace lmn
