// Sums of outer products and of lanes. A panel is [units][columns] vectors, whose lanes are pairs. Both sums run over lanes, so
// the panel is turned first: its lanes become rows, and its units become lanes.
#pragma once
#include "product.h"

namespace lmn {
namespace {

// ---- turning lanes into rows ----

#if defined(__clang__)
template <class Index, Index... kIndices>
struct Indices {};
template <int kStep, bool kSecond, class V, int... kLane>
inline V exchanged(V a, V b, Indices<int, kLane...>) {
  constexpr int kCount = int(sizeof...(kLane));
  return __builtin_shufflevector(a, b,
                                 (kLane & kStep ? kCount + kLane - (kSecond ? 0 : kStep) : kLane + (kSecond ? kStep : 0))...);
}
template <int kStep, bool kSecond, class V>
inline V exchanged(V a, V b) {
  return exchanged<kStep, kSecond>(a, b, __make_integer_seq<Indices, int, kLanes<Scalar<V>>>{});
}
#else
template <int kStep, bool kSecond, class V>
inline V exchanged(V a, V b) {
  constexpr int kCount = kLanes<Scalar<V>>;
  Bits<V> from;
  for (int lane = 0; lane < kCount; ++lane) {
    from[lane] = lane & kStep ? kCount + lane - (kSecond ? 0 : kStep) : lane + (kSecond ? kStep : 0);
  }
  return __builtin_shuffle(a, b, from);
}
#endif

/// Transposes a square of kLanes vectors: blocks of kStep rows and lanes change places, from 1 to half of the lanes.
template <int kStep = 1, class V>
inline void transpose(V* rows) {
  constexpr int kCount = kLanes<Scalar<V>>;
  if constexpr (kStep < kCount) {
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
      if (row & kStep) continue;
      const V a = rows[row], b = rows[row + kStep];
      rows[row] = exchanged<kStep, false>(a, b);
      rows[row + kStep] = exchanged<kStep, true>(a, b);
    }
    transpose<2 * kStep>(rows);
  }
}

/// turned[column][lane][unit] = panel[unit][column][lane]; 0 for units beyond the last.
template <class T>
__attribute__((noinline)) void turn(const Vector<T>* panel, std::int64_t width, int columns, T* turned) {
  using V = Vector<T>;
  const std::int64_t stride = whole_vectors<T>(width);
  for (std::int64_t unit = 0; unit < width; unit += kLanes<T>) {
    const int count = int(at_most(kLanes<T>, width - unit));
    for (int c = 0; c < columns; ++c) {
      V rows[kLanes<T>];
      for (int n = 0; n < count; ++n) rows[n] = panel[(unit + n) * columns + c];
      for (int n = count; n < kLanes<T>; ++n) rows[n] = V{};
      transpose(rows);
      for (int lane = 0; lane < kLanes<T>; ++lane) store<V>(turned + (c * kLanes<T> + lane) * stride + unit, rows[lane]);
    }
  }
}

/// Adds to sums[unit] the sum over the lanes of values[unit].
template <class T>
__attribute__((noinline)) void add_lanes(const Vector<T>* values, std::int64_t width, double* sums) {
  using V = Vector<T>;
  for (std::int64_t unit = 0; unit < width; unit += kLanes<T>) {
    const int count = int(at_most(kLanes<T>, width - unit));
    V rows[kLanes<T>];
    for (int n = 0; n < count; ++n) rows[n] = values[unit + n];
    for (int n = count; n < kLanes<T>; ++n) rows[n] = V{};
    transpose(rows);
    for (int half = kLanes<T> / 2; half > 0; half /= 2) {
      for (int n = 0; n < half; ++n) rows[n] += rows[n + half];
    }
    for (int n = 0; n < count; ++n) sums[unit + n] += double(rows[0][n]);
  }
}

// ---- outer products ----

/// sums[r][c] += sum over s of a[r][s] b[s][c]. a: rows of `depth` numbers. b, sums: rows of `stride` numbers.
template <class T, int kR, int kC>
__attribute__((noinline)) void add_outer_block(const T* a, const T* b, std::int64_t depth, std::int64_t stride, T* sums) {
  using V = Vector<T>;
  V block[kR][kC];
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) block[r][c] = load<V>(sums + r * stride + c * kLanes<T>);
  }
  for (std::int64_t s = 0; s < depth; ++s, b += stride) {
    V column[kC];
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) column[c] = load<V>(b + c * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const V factor = splat<V>(a[r * depth + s]);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) block[r][c] = fma(factor, column[c], block[r][c]);
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) store<V>(sums + r * stride + c * kLanes<T>, block[r][c]);
  }
}

/// sums[row][unit] += sum over columns and lanes of panel[row][column][lane] turned[column][lane][unit].
/// sums: [rows][whole_vectors(width)].
template <class T>
void add_outer(const Vector<T>* panel, std::int64_t rows, const T* turned, std::int64_t width, int columns, T* sums) {
  const std::int64_t stride = whole_vectors<T>(width), depth = columns * kLanes<T>;
  const T* a = reinterpret_cast<const T*>(panel);
  const std::int64_t vectors = stride / kLanes<T>, parts = blocks_of(vectors, kBlockColumns);
  for (std::int64_t part = 0; part < parts; ++part) {  // of nearly equal width
    const std::int64_t begin = vectors * part / parts, unit = begin * kLanes<T>;
    with_size<kBlockColumns>(vectors * (part + 1) / parts - begin, [&](auto count) {
      constexpr int kC = decltype(count)::value;
      for (std::int64_t row = 0; row < rows; row += kBlockRows) {
        with_size<kBlockRows>(rows - row, [&](auto height) {
          add_outer_block<T, decltype(height)::value, kC>(a + row * depth, turned + unit, depth, stride,
                                                          sums + row * stride + unit);
        });
      }
    });
  }
}

/// Whether the outer products of a layer's adjoints and its inputs' residuals cost less with the adjoints turned than with the
/// residuals turned. Turning a vector costs about as much as twelve rows of products.
template <class T>
constexpr bool turns_adjoints(std::int64_t outputs, std::int64_t inputs) {
  return (inputs + 12) * whole_vectors<T>(outputs) < (outputs + 12) * whole_vectors<T>(inputs);
}
/// The count of numbers in the sums of these outer products: [inputs][turned outputs], or [outputs][turned inputs].
template <class T>
constexpr std::int64_t outer_size(std::int64_t outputs, std::int64_t inputs) {
  return turns_adjoints<T>(outputs, inputs) ? inputs * whole_vectors<T>(outputs) : outputs * whole_vectors<T>(inputs);
}

}  // namespace
}  // namespace lmn
