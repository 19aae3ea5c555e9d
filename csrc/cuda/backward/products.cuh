// The three products of path_connectivity_backward: residuals times weights on the way forward, adjoints times weights on the
// way back, and adjoints times residuals, which are sums over all rows of a batch. One form for all, in shared memory. A block
// multiplies a tile, and a thread has 8 x 8, 8 x 4 or (double) 4 x 4 sums in registers. These are multiply-adds of the dtype;
// no matrix instruction is used yet.
#pragma once
#include "batch.cuh"

namespace lmn {
namespace {
namespace backward {

constexpr int kTileThreads = 128, kTileThreadRows = 16, kTileThreadColumns = 8;
constexpr int kSlice = 8;  // terms of each sum that are in shared memory at a time

template <class T>
constexpr int kRowsOfThread = sizeof(T) == 4 ? 8 : 4;

/// The parts of a tile, and where a thread's sums lie in it. kColumnsOfThread: 4 or 8.
template <class T, int kColumnsOfThread>
struct Tile {
  static constexpr int kRows = kTileThreadRows * kRowsOfThread<T>, kColumns = kTileThreadColumns * kColumnsOfThread;
};

/// One factor: a matrix in global memory, whose rows are `stride` numbers apart. `count` is the number of the result's rows, or
/// columns, that the factor has.
template <class T>
struct Factor {
  const T* values;
  std::int64_t stride;
  int count;
};

/// Slices of a factor on their way to shared memory, kSlice terms of kSize rows or columns of the result. kAlong: the terms of
/// a sum are neighbours in global memory; otherwise the rows, or columns, are.
template <class T, int kSize, bool kAlong>
struct Slices {
  static constexpr int kLoads = kSize * kSlice / kTileThreads;
  static constexpr int kApart = kTileThreads / (kAlong ? kSlice : kSize);  // rows of memory between two loads of a thread
  static constexpr int kStride = kSize + 4;                                // against bank conflicts
  static_assert(kLoads * kTileThreads == kSize * kSlice && kApart > 0);
  const T* at;          // the slice's first number
  std::int64_t onward;  // to the next slice
  int offset, step;     // a thread's first load, and from one load to the next
  int across, term;     // of the first load
  int here;             // rows, or columns, that the factor has from the tile's first one on
  T values[kLoads];

  __device__ Slices(const Factor<T>& factor, int first, int begin) {
    const int n = int(threadIdx.x), stride = int(factor.stride);
    across = kAlong ? n / kSlice : n % kSize, term = kAlong ? n % kSlice : n / kSize;
    at = factor.values + (kAlong ? first * factor.stride + begin : begin * factor.stride + first);
    onward = kAlong ? kSlice : kSlice * factor.stride;
    offset = kAlong ? across * stride + term : term * stride + across;
    step = kApart * stride;
    here = factor.count - first;
  }
  /// Loads the next slice, of which `left` terms are inside; zeros beyond the ends.
  __device__ void fetch(int left) {
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const bool inside = across + (kAlong ? n * kApart : 0) < here && term + (kAlong ? 0 : n * kApart) < left;
      values[n] = inside ? at[offset + n * step] : T(0);
    }
    at += onward;
  }
  __device__ void store(T* shared) const {
    T* const to = shared + term * kStride + across;
#pragma unroll
    for (int n = 0; n < kLoads; ++n) to[n * kApart * (kAlong ? 1 : kStride)] = values[n];
  }
};

/// Four neighbours, which one or two instructions load.
template <class T>
struct __align__(16) Four {
  T of[4];
};

/// Sums of products of one tile: sums over the terms k in [begin, end) of first(row, k) second(column, k). The block's threads
/// share the work; each has its own sums.
template <class T, int kColumnsOfThread, bool kFirstAlong, bool kSecondAlong>
struct TileProduct {
  using Size = Tile<T, kColumnsOfThread>;
  using First = Slices<T, Size::kRows, kFirstAlong>;
  using Second = Slices<T, Size::kColumns, kSecondAlong>;
  static constexpr int kR = kRowsOfThread<T>, kC = kColumnsOfThread;
  static constexpr int kFirstShared = kSlice * First::kStride, kSecondShared = kSlice * Second::kStride;
  static constexpr int kStaged = kTileThreadRows * Size::kColumns;
  static constexpr int kShared = 2 * (kFirstShared + kSecondShared);  // two slices of each, or one row of each thread
  static_assert(kStaged <= kShared && kFirstShared % 4 == 0 && kSecondShared % 4 == 0);

  T sums[kR][kC];

  __device__ static T* shared() {
    __shared__ __align__(16) unsigned char memory[kShared * sizeof(T)];
    return reinterpret_cast<T*>(memory);
  }

  __device__ void add_slice(const T* first, const T* second) {
    const int row = int(threadIdx.x) / kTileThreadColumns * 4, column = int(threadIdx.x) % kTileThreadColumns * 4;
#pragma unroll
    for (int k = 0; k < kSlice; ++k) {
      Four<T> x[kR / 4], w[kC / 4];
#pragma unroll
      for (int r = 0; r < kR / 4; ++r) {
        x[r] = *reinterpret_cast<const Four<T>*>(first + k * First::kStride + r * 4 * kTileThreadRows + row);
      }
#pragma unroll
      for (int c = 0; c < kC / 4; ++c) {
        w[c] = *reinterpret_cast<const Four<T>*>(second + k * Second::kStride + c * 4 * kTileThreadColumns + column);
      }
#pragma unroll
      for (int r = 0; r < kR; ++r) {
#pragma unroll
        for (int c = 0; c < kC; ++c) sums[r][c] = fma(x[r / 4].of[r % 4], w[c / 4].of[c % 4], sums[r][c]);
      }
    }
  }

  /// Makes the sums. While a slice is multiplied, the next one is on its way.
  __device__ void multiply(const Factor<T>& first, const Factor<T>& second, int first_row, int first_column, int begin,
                           int end) {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int c = 0; c < kC; ++c) sums[r][c] = 0;
    }
    T* const firsts = shared();
    T* const seconds = firsts + 2 * kFirstShared;
    First next_first(first, first_row, begin);
    Second next_second(second, first_column, begin);
    next_first.fetch(end - begin), next_second.fetch(end - begin);
    next_first.store(firsts), next_second.store(seconds);
    __syncthreads();
    int turn = 0;
#pragma unroll 1
    for (int at = begin; at < end; at += kSlice) {
      const bool more = at + kSlice < end;
      if (more) next_first.fetch(end - at - kSlice), next_second.fetch(end - at - kSlice);
      add_slice(firsts + turn * kFirstShared, seconds + turn * kSecondShared);
      turn = 1 - turn;
      if (more) next_first.store(firsts + turn * kFirstShared), next_second.store(seconds + turn * kSecondShared);
      __syncthreads();
    }
  }

  /// Calls put(row, column, sum) for each sum of the tile, neighbouring threads with neighbouring columns. The sums go through
  /// shared memory, one row of each thread at a time.
  template <class Put>
  __device__ void each(const Put& put) const {
    T* const staged = shared();
    const int row = int(threadIdx.x) / kTileThreadColumns, column = int(threadIdx.x) % kTileThreadColumns * 4;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        staged[row * Size::kColumns + c / 4 * 4 * kTileThreadColumns + column + c % 4] = sums[r][c];
      }
      __syncthreads();
#pragma unroll 1
      for (int n = int(threadIdx.x); n < kStaged; n += kTileThreads) {
        put(r / 4 * 4 * kTileThreadRows + n / Size::kColumns * 4 + r % 4, n % Size::kColumns, staged[n]);
      }
      __syncthreads();
    }
  }
};

// ---- forward ----

/// to = sum + added. `added` may be null.
template <class T>
struct Ahead {
  T* to;
  const T* added;
  __device__ void put(std::int64_t at, T sum) const { to[at] = added ? sum + added[at] : sum; }
};

// ---- back ----

/// What becomes of the adjoint of value 2 l + 1 at one element, as soon as the products from the next layer are known. The
/// adjoint of value 2 l follows from it. All pointers but `adjoint` may be null.
template <class T>
struct Settle {
  const T* later[2];  // sums of the adjoints of later values to which value 2 l, or 2 l + 1, is added
  T* onto[2];         // the same sums of the earlier values that are added to value 2 l, or 2 l + 1
  bool begins[2];     // whether the sum of `onto` begins here
  T* after;           // keeps the adjoint of value 2 l + 1
  const T* slopes;    // of the activation; null: it is the identity
  T* adjoint;         // of value 2 l; may be where the slopes are

  __device__ void put(std::int64_t at, T sum) const {
    T value = later[1] ? sum + later[1][at] : sum;
    if (after) after[at] = value;
    if (onto[1]) onto[1][at] = begins[1] ? value : onto[1][at] + value;
    if (slopes) value *= slopes[at];
    if (later[0]) value += later[0][at];
    adjoint[at] = value;
    if (onto[0]) onto[0][at] = begins[0] ? value : onto[0][at] + value;
  }
};

/// The product of a batch's rows with a layer's weights. kForward: values [rows, width] times the transpose of the weights
/// [units, width]. Otherwise: values [rows, width] times the weights [width, units]. A block has one tile of the result [rows,
/// units]; blocks of the same rows are neighbours. Each element goes through `end`.
template <class T, int kColumnsOfThread, bool kForward, class End>
__global__ void __launch_bounds__(kTileThreads, 3)
    multiply_kernel(const T* values, const T* weights, int rows, int width, int units, const __grid_constant__ End end) {
  using Product = TileProduct<T, kColumnsOfThread, true, kForward>;
  constexpr int kRows = Product::Size::kRows, kColumns = Product::Size::kColumns;
  const int across = (units + kColumns - 1) / kColumns;
  const int first_row = int(blockIdx.x) / across * kRows, first_unit = int(blockIdx.x) % across * kColumns;
  Product product;
  product.multiply({values, width, rows}, {weights, kForward ? width : units, units}, first_row, first_unit, 0, width);
  product.each([&](int r, int c, T sum) {
    const int row = first_row + r, unit = first_unit + c;
    if (row < rows && unit < units) end.put(std::int64_t(row) * units + unit, sum);
  });
}

/// The same elements without a product: the values' own.
template <class T>
__global__ void settle_kernel(const T* values, std::int64_t count, const __grid_constant__ Settle<T> end) {
  const std::int64_t n = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n < count) end.put(n, values[n]);
}

// ---- sums over rows ----

constexpr int kFlushedRows = 256;  // rows that are summed in the dtype, before the sum is added in double

/// partial[split] += the sum over a batch's rows of column(row) times row(row)^T. The blocks of a split take their own part of
/// the rows; each block takes one tile. One factor's units are the tile's rows, the other's its columns: the more numerous ones
/// are rows. Nothing but the launch decides which rows a split has, so a sum has one order.
template <class T>
struct Outer {
  Factor<T> rows, columns;                 // [batch's rows, units]
  std::int64_t row_apart, column_apart;    // distances in the result
  std::int64_t size;                       // numbers in the result
  int splits, tiles, tiles_across, depth;  // depth: rows of the batch
  double* partial;                         // [splits, size]
};
template <class T, int kColumnsOfThread>
__global__ void __launch_bounds__(kTileThreads, 3) outer_kernel(const __grid_constant__ Outer<T> p) {
  using Product = TileProduct<T, kColumnsOfThread, false, false>;
  const int split = int(blockIdx.x) / p.tiles, tile = int(blockIdx.x) % p.tiles;
  const int first_row = tile / p.tiles_across * Product::Size::kRows;
  const int first_column = tile % p.tiles_across * Product::Size::kColumns;
  const int share = int(blocks_of(blocks_of(p.depth, kSlice), p.splits)) * kSlice;
  const int begin = int(at_most(std::int64_t(split) * share, p.depth)),
            end = int(at_most(std::int64_t(begin) + share, p.depth));
  double* const partial = p.partial + split * p.size;
  Product product;
#pragma unroll 1
  for (int at = begin; at < end; at += kFlushedRows) {
    product.multiply(p.rows, p.columns, first_row, first_column, at, int(at_most(at + kFlushedRows, end)));
    product.each([&](int r, int c, T sum) {
      const int row = first_row + r, column = first_column + c;
      if (row < p.rows.count && column < p.columns.count) {
        partial[row * p.row_apart + column * p.column_apart] += double(sum);
      }
    });
  }
}

/// Adds the sums of a block's warps, in the warps' order; valid in the first warp.
__device__ inline double over_warps(double sum) {
  __shared__ double parts[kWarps][kWarp];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  parts[warp][lane] = sum;
  __syncthreads();
  for (int other = 1; warp == 0 && other < kWarps; ++other) sum += parts[other][lane];
  return sum;
}

/// to[n] = the sum over splits of partial[split][n]. A lane per number; the warps share the splits.
template <class T>
__global__ void finish_outer_kernel(const __grid_constant__ Outer<T> p, double* to) {
  const std::int64_t n = std::int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  double sum = 0;
  if (n < p.size) {
#pragma unroll 4
    for (int split = int(threadIdx.x) / kWarp; split < p.splits; split += kWarps) sum += p.partial[split * p.size + n];
  }
  sum = over_warps(sum);
  if (int(threadIdx.x) < kWarp && n < p.size) to[n] = sum;
}

}  // namespace backward
}  // namespace
}  // namespace lmn
