// The product of a layer's weights with a panel. It carries many columns from one layer to the next. The columns are chord
// residuals of a few nodes for a vector of second samples, or the samples themselves (csrc/cpu/linear.cpp).
//
// A panel is [depth][columns] vectors. Weights are packed in the order in which the product reads them: blocks of kBlockRows
// rows, each [depth][rows of the block].
#pragma once
#include "../level.h"

namespace lmn {
namespace {

template <class W, class T>
void pack_weights(const W* weights, std::int64_t rows, std::int64_t depth, T* packed) {
  for (std::int64_t row = 0; row < rows; row += kBlockRows) {
    const std::int64_t height = at_most(kBlockRows, rows - row);
    for (std::int64_t d = 0; d < depth; ++d) {
      for (std::int64_t r = 0; r < height; ++r) *packed++ = weights[(row + r) * depth + d];
    }
  }
}

/// Multiplies each row of packed weights by its own factor.
template <class T>
void scale_packed(T* packed, std::int64_t rows, std::int64_t depth, const T* factors) {
  for (std::int64_t row = 0; row < rows; row += kBlockRows) {
    const std::int64_t height = at_most(kBlockRows, rows - row);
    for (std::int64_t d = 0; d < depth; ++d) {
      for (std::int64_t r = 0; r < height; ++r) *packed++ *= factors[row + r];
    }
  }
}

/// sums[r][c] = sum over depth of w[depth][r] panel[depth][c].
template <class T, int kR, int kC>
inline void multiply(const T* w, const Vector<T>* panel, std::int64_t depth, Vector<T> (&sums)[kR][kC]) {
  using V = Vector<T>;
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) sums[r][c] = V{};
  }
  for (std::int64_t d = 0; d < depth; ++d, w += kR, panel += kC) {
    V column[kC];
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) column[c] = panel[c];
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const V weight = splat<V>(w[r]);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sums[r][c] = fma(weight, column[c], sums[r][c]);
    }
  }
}

/// One block of rows. Writes to a panel, or adds to the moments of the outputs, or both; the other is null. Not inlined: the
/// compiler then gives all registers to the block.
template <class T, int kR, int kC>
__attribute__((noinline)) void product(const T* w, const Vector<T>* panel, std::int64_t depth, Vector<T>* out,
                                       Moments<Vector<T>>* moments, const T* node_w, const T* node_wt) {
  Vector<T> sums[kR][kC];
  multiply<T, kR, kC>(w, panel, depth, sums);
  if (out) {
    for (int r = 0; r < kR; ++r) {
      for (int c = 0; c < kC; ++c) out[r * kC + c] = sums[r][c];
    }
  }
  if (moments) {
    for (int r = 0; r < kR; ++r) {
      Moments<Vector<T>> own = moments[r];
      for (int c = 0; c < kC; ++c) add_moments(own, sums[r][c], node_w[c], node_wt[c]);
      moments[r] = own;
    }
  }
}

/// All rows of a layer: kC columns of the previous layer's panel -> this layer's panel, or moments of the outputs, or both.
template <class T, int kC>
void multiply_columns(const T* packed, std::int64_t rows, std::int64_t depth, const Vector<T>* panel, Vector<T>* out,
                      Moments<Vector<T>>* moments, const T* node_w, const T* node_wt) {
  for (std::int64_t row = 0; row < rows; row += kBlockRows) {
    with_size<kBlockRows>(rows - row, [&](auto height) {
      product<T, decltype(height)::value, kC>(packed + row * depth, panel, depth, out ? out + row * kC : nullptr,
                                              moments ? moments + row : nullptr, node_w, node_wt);
    });
  }
}

/// multiply_columns() for a number of columns known at run time, at most kBlockColumns.
template <class T>
void multiply_layer(const T* packed, std::int64_t rows, std::int64_t depth, int columns, const Vector<T>* panel, Vector<T>* out,
                    Moments<Vector<T>>* moments, const T* node_w, const T* node_wt) {
  with_size<kBlockColumns>(columns, [&](auto count) {
    multiply_columns<T, decltype(count)::value>(packed, rows, depth, panel, out, moments, node_w, node_wt);
  });
}

}  // namespace
}  // namespace lmn
