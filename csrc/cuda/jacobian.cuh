// What jacobian.cu and jacobian_distance.cu share: values and slopes of a layer at the samples, and products in which one
// matrix is common to all samples and the other belongs to each sample.
#pragma once
#include "device.h"

#include "../activation.h"  // after device.h, because it uses its functions

namespace lmn {
namespace {

// ---- the network at the samples ----

constexpr int kForwardThreads = 256;
constexpr int kForwardTile = 32;  // samples, units and inputs that a block takes at a time
constexpr int kForwardSide = 16;  // side of the threads' square; each thread takes two samples and two units
static_assert(kForwardSide * kForwardSide == kForwardThreads && 2 * kForwardSide == kForwardTile, "a thread has 2 x 2 sums");

/// In: type of the inputs. T: type of the slopes, at least as wide. V: type of the values, which are computed in T.
template <class In, class T, class V>
struct ForwardLayer {
  const In* in;              // [samples][depth]
  const In *weights, *bias;  // [width][depth], null: `in` is the activation's argument; [width], null: no bias
  V* values;                 // [samples][width], null: not needed
  T* slopes;                 // [samples][slope_stride], null: not needed
  std::int64_t samples, depth, width, slope_stride;
  Activation activation;
};

// A block takes a tile of samples x units, and a thread 2 x 2 of the tile. Neighbouring lanes read and write neighbouring
// values. Sums are in double, because a slope is only as exact as its argument, and because the argument must be on the right
// side of a kink. On cards with few double units (1/64 of the float units) 961 x 100 x 100 multiply-adds take about 0.04 ms.
// kStacked: several networks, numbered by blockIdx.y, whose arrays follow one another; without slopes.
template <class In, class T, class V, ActivationKind kKind, bool kStacked = false>
__global__ void __launch_bounds__(kForwardThreads) forward_kernel(ForwardLayer<In, T, V> layer) {
  __shared__ double in[kForwardTile][kForwardTile + 1], weights[kForwardTile][kForwardTile + 1];
  const int lane = int(threadIdx.x) % kForwardTile, line = int(threadIdx.x) / kForwardTile;
  const int column = int(threadIdx.x) % kForwardSide, row = int(threadIdx.x) / kForwardSide;
  if constexpr (kStacked) {
    const std::int64_t network = blockIdx.y;
    layer.in += network * layer.samples * layer.depth;
    layer.weights += network * layer.width * layer.depth;
    if (layer.bias) layer.bias += network * layer.width;
    layer.values += network * layer.samples * layer.width;
    layer.slopes = nullptr;
  }
  const std::int64_t tiles = blocks_of(layer.width, kForwardTile);
  const std::int64_t first_sample = blockIdx.x / tiles * kForwardTile, first_unit = blockIdx.x % tiles * kForwardTile;
  double sums[2][2] = {};
  for (std::int64_t depth = 0; layer.weights && depth < layer.depth; depth += kForwardTile) {
    __syncthreads();  // the tiles before may still be in use
    for (int r = line; r < kForwardTile; r += kForwardThreads / kForwardTile) {
      const bool inside = depth + lane < layer.depth;
      const std::int64_t n = first_sample + r, unit = first_unit + r;
      in[r][lane] = inside && n < layer.samples ? double(layer.in[n * layer.depth + depth + lane]) : 0.0;
      weights[r][lane] = inside && unit < layer.width ? double(layer.weights[unit * layer.depth + depth + lane]) : 0.0;
    }
    __syncthreads();
    const int count = int(at_most(kForwardTile, layer.depth - depth));
    for (int d = 0; d < count; ++d) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          sums[r][c] = fma(weights[column + c * kForwardSide][d], in[row + r * kForwardSide][d], sums[r][c]);
        }
      }
    }
  }
  const T alpha = T(layer.activation.alpha), beta = T(layer.activation.beta);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const std::int64_t n = first_sample + row + r * kForwardSide, unit = first_unit + column + c * kForwardSide;
      if (n >= layer.samples || unit >= layer.width) continue;
      const T z = layer.weights ? T(layer.bias ? sums[r][c] + double(layer.bias[unit]) : sums[r][c])
                                : T(layer.in[n * layer.width + unit]);
      if (layer.values) layer.values[n * layer.width + unit] = V(activate<kKind>(z, alpha, beta));
      if (layer.slopes) layer.slopes[n * layer.slope_stride + unit] = derivative<kKind>(z, alpha, beta);
    }
  }
}

template <class In, class T, class V, ActivationKind kKind>
const char* forward_as(const ForwardLayer<In, T, V>& layer, CUstream_st* stream) {
  const std::int64_t blocks = blocks_of(layer.samples, kForwardTile) * blocks_of(layer.width, kForwardTile);
  return launch(forward_kernel<In, T, V, kKind>, blocks, kForwardThreads, 0, stream, layer);
}

template <class In, class T, class V, int kKind = 0>
const char* forward(const ForwardLayer<In, T, V>& layer, CUstream_st* stream) {
  if constexpr (kKind + 1 < int(ActivationKind::kCount)) {
    if (int(layer.activation.kind) != kKind) return forward<In, T, V, kKind + 1>(layer, stream);
  }
  return forward_as<In, T, V, ActivationKind(kKind)>(layer, stream);
}

// ---- products ----

/// A matrix for each sample; with stride 0 one matrix for all samples.
template <class T>
struct Matrices {
  const T* values;
  std::int64_t stride;
};

/// out[n] = diag(row[n]) left[n] diag(middle[n]) right[n] diag(column[n]). The diagonals have the stride slope_stride; null
/// stands for ones. At most one of left and right has a stride. Its samples are stacked, so that there is one product of large
/// matrices.
template <class T>
struct Product {
  Matrices<T> left, right;  // [rows][depth], [depth][columns]
  const T *row, *middle, *column;
  T* out;  // [samples][rows][columns]
  std::int64_t samples, rows, depth, columns, slope_stride;
};

/// Four neighbouring values, loaded and stored as 16 bytes.
template <class T>
struct alignas(16) Quad {
  T values[4];
};

// A block has 16 x 8 threads; a thread takes quads of rows and quads of columns. A thread keeps 64 sums in registers and makes
// four loads of 16 bytes from shared memory in each step. Four blocks (16 warps) share a multiprocessor; while one block loads,
// the others multiply.
constexpr int kProductThreads = 128, kProductLanes = 16, kProductDepth = 16, kUnrolled = 4;
constexpr int kQuadRows = 4 * kProductThreads / kProductLanes, kQuadColumns = 4 * kProductLanes;
template <class T>
constexpr int kRowQuads = sizeof(T) == 4 ? 2 : 1;

/// A stacked row or column: its sample, and its number within the sample. Without stacking: 0, and the row or column itself.
struct Place {
  std::int64_t sample, line;
};
__device__ inline Place place_of(std::int64_t stacked, std::int64_t lines, bool is_stacked) {
  const std::int64_t sample = is_stacked ? stacked / lines : 0;
  return {sample, stacked - sample * lines};
}

// A block takes a tile of the stacked product. Neighbouring lanes read and write neighbouring columns.
template <class T, int kColumnQuads, bool kStackedRows>
__global__ void __launch_bounds__(kProductThreads, sizeof(T) == 4 ? 4 : 3) product_kernel(Product<T> p, bool in_quads) {
  constexpr int kRows = kRowQuads<T> * kQuadRows, kColumns = kColumnQuads * kQuadColumns;
  constexpr int kRowStep = kProductThreads / kProductDepth, kDepthStep = kProductThreads / kColumns;
  static_assert(kProductThreads % kColumns == 0 && kRows <= kProductThreads, "a thread loads one column of a tile");
  __shared__ Quad<T> left[kProductDepth][kRows / 4 + 1], right[kProductDepth][kColumns / 4];
  // a table, because a division costs as much as a hundred multiply-adds
  __shared__ Place row_places[kRows], column_places[kColumns];
  const int thread = int(threadIdx.x), lane = thread % kProductLanes, line = thread / kProductLanes;
  const std::int64_t stacked_rows = kStackedRows ? p.samples * p.rows : p.rows;
  const std::int64_t stacked_columns = kStackedRows ? p.columns : p.samples * p.columns;
  const std::int64_t tiles = blocks_of(stacked_columns, kColumns);
  const std::int64_t first_row = blockIdx.x / tiles * kRows, first_column = blockIdx.x % tiles * kColumns;
  if (thread < kRows) row_places[thread] = place_of(first_row + thread, p.rows, kStackedRows);
  const int own_column = thread % kColumns;
  const Place column_place = place_of(first_column + own_column, p.columns, !kStackedRows);
  if (thread < kColumns) column_places[thread] = column_place;
  const T* const right_of = p.right.values + column_place.sample * p.right.stride + column_place.line;
  const T* const right_middle = !kStackedRows && p.middle ? p.middle + column_place.sample * p.slope_stride : nullptr;

  T sums[4 * kRowQuads<T>][4 * kColumnQuads] = {};
  for (std::int64_t depth = 0; depth < p.depth; depth += kProductDepth) {
    __syncthreads();  // the tiles before may still be in use; the first time, the places are not written yet
#pragma unroll 4
    for (int r = 0; r < kRows; r += kRowStep) {
      const int row = r + thread / kProductDepth, d = thread % kProductDepth;
      T value = 0;
      if (first_row + row < stacked_rows && depth + d < p.depth) {
        const Place place = row_places[row];
        value = p.left.values[place.sample * p.left.stride + place.line * p.depth + depth + d];
        if (kStackedRows && p.middle) value *= p.middle[place.sample * p.slope_stride + depth + d];
      }
      left[d][row / 4].values[row % 4] = value;
    }
#pragma unroll 4  // all loads at once would take 16 more registers, and spill
    for (int n = 0; n < kProductDepth; n += kDepthStep) {
      const int d = n + thread / kColumns;
      T value = 0;
      if (first_column + own_column < stacked_columns && depth + d < p.depth) {
        value = right_of[(depth + d) * p.columns];
        if (right_middle) value *= right_middle[depth + d];
      }
      right[d][own_column / 4].values[own_column % 4] = value;
    }
    __syncthreads();
    const int count = int(at_most(kProductDepth, p.depth - depth));
    for (int begin = 0; begin < count; begin += kUnrolled) {
#pragma unroll
      for (int d = begin; d < begin + kUnrolled; ++d) {  // beyond the depth there are zeros
        Quad<T> rows[kRowQuads<T>], columns[kColumnQuads];
#pragma unroll
        for (int q = 0; q < kRowQuads<T>; ++q) rows[q] = left[d][q * kQuadRows / 4 + line];
#pragma unroll
        for (int q = 0; q < kColumnQuads; ++q) columns[q] = right[d][q * kQuadColumns / 4 + lane];
#pragma unroll
        for (int r = 0; r < 4 * kRowQuads<T>; ++r) {
#pragma unroll
          for (int c = 0; c < 4 * kColumnQuads; ++c) {
            sums[r][c] = fma(rows[r / 4].values[r % 4], columns[c / 4].values[c % 4], sums[r][c]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 4 * kRowQuads<T>; ++r) {
    const int own_row = r / 4 * kQuadRows + line * 4 + r % 4;
    if (first_row + own_row >= stacked_rows) continue;
    const Place row = row_places[own_row];
#pragma unroll
    for (int q = 0; q < kColumnQuads; ++q) {
      const int begin = q * kQuadColumns + lane * 4;  // first of four neighbouring columns
      const int count = int(at_most(4, stacked_columns - first_column - begin));
      Quad<T> result;
      T* to[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (c >= count) continue;
        const Place column = column_places[begin + c];
        const std::int64_t n = kStackedRows ? row.sample : column.sample, slopes = n * p.slope_stride;
        T value = sums[r][4 * q + c];
        if (p.row) value *= p.row[slopes + row.line];
        if (p.column) value *= p.column[slopes + column.line];
        result.values[c] = value;
        to[c] = p.out + (n * p.rows + row.line) * p.columns + column.line;
        if (!in_quads) *to[c] = value;
      }
      if (in_quads && count > 0) *reinterpret_cast<Quad<T>*>(to[0]) = result;
    }
  }
}

template <class T, int kColumnQuads, bool kStackedRows>
const char* multiply_tiles(const Product<T>& p, CUstream_st* stream) {
  const std::int64_t rows = kStackedRows ? p.samples * p.rows : p.rows;
  const std::int64_t columns = kStackedRows ? p.columns : p.samples * p.columns;
  // Rows of a view, or of a result with an odd width, may begin between two multiples of 16 bytes.
  const bool in_quads = p.columns % 4 == 0 && reinterpret_cast<std::uintptr_t>(p.out) % 16 == 0;
  const std::int64_t tiles = blocks_of(rows, kRowQuads<T> * kQuadRows) * blocks_of(columns, kColumnQuads * kQuadColumns);
  return launch(product_kernel<T, kColumnQuads, kStackedRows>, tiles, kProductThreads, 0, stream, p, in_quads);
}

template <class T, bool kStackedRows>
const char* multiply_stacked(const Product<T>& p, CUstream_st* stream) {
  const std::int64_t columns = kStackedRows ? p.columns : p.samples * p.columns;
  // The narrower tile is taken if it leaves fewer columns empty.
  const bool narrow = columns <= 4 * kQuadColumns && blocks_of(columns, kQuadColumns) % 2 == 1;
  if (narrow) return multiply_tiles<T, 1, kStackedRows>(p, stream);
  return multiply_tiles<T, 2, kStackedRows>(p, stream);
}

/// stacked_rows: the samples are stacked as rows; otherwise as columns, if only `right` has a matrix for each sample.
template <class T>
const char* multiply(const Product<T>& p, bool stacked_rows, CUstream_st* stream) {
  return stacked_rows ? multiply_stacked<T, true>(p, stream) : multiply_stacked<T, false>(p, stream);
}

}  // namespace
}  // namespace lmn
