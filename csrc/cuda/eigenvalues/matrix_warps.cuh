// The matrix warps' part of tridiagonal_kernel. They hold the entries of the matrix, multiply them with the current column,
// send the products and the next column to the other blocks, and update the entries. tridiagonal.cuh describes the whole step.
#pragma once
#include "layout.cuh"

namespace lmn {
namespace {

// What changes from step to step for the matrix warps.
struct Step {
  int next;   // first index that is left after this step's column
  int chunk;  // chunk of column `next`
  bool owns;  // whether this lane holds column `next`
  int tag;
  double *column, *products;  // their places in the exchange
  const double *x, *v;
};

struct Lane {
  int warp, lane;
  int column;       // the lane's column in each chunk
  int row, stride;  // its rows have the indices row + q stride
  const double* w;
  double *chunks, *distant;  // its entries in shared and in global memory
  template <class L>
  __device__ double* spilled(const Shape& shape, int chunk) const {
    return at<L>(chunks, shape, L::kDistant ? chunk - shape.distant : chunk);
  }
  template <class L>
  __device__ double* at(double* of, const Shape& shape, int chunk) const {
    return of + ((chunk * kMatrixWarps + warp) * (L::kRows - shape.absent) - shape.absent) * kWarp + lane;
  }
};

template <class L, int kFirst, class Entry>
__device__ inline void post_column(const Lane& lane, const Step& step, const Shape& shape, const Entry& entry) {
#pragma unroll
  for (int q = kFirst; q < L::kRows; ++q) {
    const int index = lane.row + q * lane.stride;
    if (index >= step.next && index < shape.padded) post(step.column + index, entry(q), step.tag);
  }
}

// products += held x, for rows from kFirst on; the rows before kFirst are finished. The warps that hold column `next` also
// post it, in the form in which they hold it (without the last update).
template <class L, int kFirst>
__device__ inline void multiply(const double (&held)[L::kRows][L::kHeld], double (&products)[L::kRows], const Lane& lane,
                                const Step& step, const Shape& shape) {
  const auto add = [&](int chunk, const double* from) {
    const double x = step.x[chunk * L::kChunk + lane.column];
    double entry[L::kRows];
#pragma unroll
    for (int q = kFirst; q < L::kRows; ++q) entry[q] = from[q * kWarp];
    if (chunk == step.chunk && step.owns) {
      post_column<L, kFirst>(lane, step, shape, [&](int q) { return entry[q]; });
    }
#pragma unroll
    for (int q = kFirst; q < L::kRows; ++q) products[q] = fma(entry[q], x, products[q]);
  };
  int chunk = step.chunk;
  if constexpr (L::kDistant) {
#pragma unroll 1
    for (; chunk < shape.distant; ++chunk) add(chunk, lane.at<L>(lane.distant, shape, chunk));
  }
#pragma unroll 1
  for (; chunk < shape.spilled; ++chunk) add(chunk, lane.spilled<L>(shape, chunk));
  const double* at = step.x + shape.spilled * L::kChunk + lane.column;
  double following = at[0];
#pragma unroll
  for (int k = 0; k < L::kHeld; ++k) {
    const double x = following;
    if (k + 1 < L::kHeld) following = at[(k + 1) * L::kChunk];
    if (shape.spilled + k < step.chunk) continue;
    if (shape.spilled + k == step.chunk && step.owns) {
      post_column<L, kFirst>(lane, step, shape, [&](int q) { return held[q][k]; });
    }
#pragma unroll
    for (int q = kFirst; q < L::kRows; ++q) products[q] = fma(held[q][k], x, products[q]);
  }
}

// held -= v w^T + w v^T, with v and w of the step before.
template <class L, int kFirst>
__device__ inline void update(double (&held)[L::kRows][L::kHeld], const Lane& lane, const Step& step, const Shape& shape) {
  double v[L::kRows], w[L::kRows];
#pragma unroll
  for (int q = kFirst; q < L::kRows; ++q) {
    const int index = lane.row + q * lane.stride;
    v[q] = index < shape.padded ? step.v[index] : 0.0;
    w[q] = index < shape.padded ? lane.w[index] : 0.0;
  }
  const auto change = [&](int chunk, double* at) {
    const int column = chunk * L::kChunk + lane.column;
    const double column_v = step.v[column], column_w = lane.w[column];
    constexpr int kAtOnce = 4;  // all rows at once would take more registers than there are
#pragma unroll
    for (int begin = kFirst / kAtOnce * kAtOnce; begin < L::kRows; begin += kAtOnce) {
      double entry[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (begin + u >= kFirst && begin + u < L::kRows) entry[u] = at[(begin + u) * kWarp];
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int q = begin + u;
        if (q >= kFirst && q < L::kRows) at[q * kWarp] = fma(-w[q], column_v, fma(-v[q], column_w, entry[u]));
      }
    }
  };
  int chunk = step.chunk;
  if constexpr (L::kDistant) {
#pragma unroll 1
    for (; chunk < shape.distant; ++chunk) change(chunk, lane.at<L>(lane.distant, shape, chunk));
  }
#pragma unroll 1
  for (; chunk < shape.spilled; ++chunk) change(chunk, lane.spilled<L>(shape, chunk));
  const int first = shape.spilled * L::kChunk + lane.column;
  double following_v = step.v[first], following_w = lane.w[first];
#pragma unroll
  for (int k = 0; k < L::kHeld; ++k) {
    const double column_v = following_v, column_w = following_w;
    if (k + 1 < L::kHeld) {
      following_v = step.v[first + (k + 1) * L::kChunk];
      following_w = lane.w[first + (k + 1) * L::kChunk];
    }
    if (shape.spilled + k < step.chunk) continue;
#pragma unroll
    for (int q = kFirst; q < L::kRows; ++q) {
      held[q][k] = fma(-v[q], column_w, held[q][k]);
      held[q][k] = fma(-w[q], column_v, held[q][k]);
    }
  }
}

// Writes the rest of the matrix for the next phase. Its first column, `next` - 1, is in step.x except for the diagonal entry;
// the other columns are in `held`.
template <class L>
__device__ inline void hand_over(const double (&held)[L::kRows][L::kHeld], const Lane& lane, const Step& step,
                                 const Shape& shape, double* left) {
  const int first = step.next - 1;
  int row = lane.row;
  const auto put = [&](int q, int column, double v) {
    const int index = row + q * lane.stride;
    if (index < shape.padded && index >= column && column > first) left[(index - first) * shape.left() + column - first] = v;
  };
#pragma unroll
  for (int q = 0; q < L::kRows; ++q) {
    const int index = lane.row + q * lane.stride;
    if (lane.column == 0 && index >= first && index < shape.padded) left[(index - first) * shape.left()] = step.x[index];
  }
#pragma unroll 1
  for (int chunk = step.chunk; chunk < shape.spilled; ++chunk) {
    const double* const from =
        L::kDistant && chunk < shape.distant ? lane.at<L>(lane.distant, shape, chunk) : lane.spilled<L>(shape, chunk);
#pragma unroll 1
    for (int q = shape.absent; q < L::kRows; ++q) put(q, chunk * L::kChunk + lane.column, from[q * kWarp]);
  }
#pragma unroll
  for (int k = 0; k < L::kHeld; ++k) {
    forget(row);
#pragma unroll
    for (int q = 0; q < L::kRows; ++q) put(q, (shape.spilled + k) * L::kChunk + lane.column, held[q][k]);
  }
}

// Calls function(First<kFirst>()) with kFirst = the largest even number that is not above the first row that is left.
template <int kFirst>
struct First {
  static constexpr int value = kFirst;
};
template <class L, int kFirst = 0, class Function>
__device__ inline void from_row(int first, const Function& function) {
  if constexpr (kFirst + 2 >= L::kRows) {
    function(First<kFirst>());
  } else {
    if (first < kFirst + 2)
      function(First<kFirst>());
    else
      from_row<L, kFirst + 2>(first, function);
  }
}

// Sums of eight rows' products over the column lanes, all at once. After the first exchange a lane has sums of two lanes for
// four rows, then of four lanes for two rows, and so on. With eight column lanes this takes 7 shuffles; a sum of each row for
// itself would take 8 shuffles for each halving. Lane c gets the sum of row sum_row(c).
template <class L>
__device__ inline double sums_over_columns(const double (&products)[L::kRows], int lane) {
  constexpr int kLanes = L::kColumnLanes;
  double eight[8], four[4], two[2];
#pragma unroll
  for (int q = 0; q < 8; ++q) eight[q] = q < L::kRows ? products[q < L::kRows ? q : 0] : 0.0;
  const auto halve = [&](double low, double high, int offset) {
    const bool upper = lane & offset;
    return (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, offset);
  };
#pragma unroll
  for (int q = 0; q < 4; ++q) four[q] = halve(eight[q], eight[q + 4], kLanes / 2);
#pragma unroll
  for (int q = 0; q < 2; ++q) two[q] = halve(four[q], four[q + 2], kLanes / 4);
  double sum = halve(two[0], two[1], kLanes / 8);
  if (kLanes > 8) sum += __shfl_xor_sync(kAllLanes, sum, kLanes / 16);
  if (kLanes > 16) sum += __shfl_xor_sync(kAllLanes, sum, kLanes / 32);
  return sum;
}
template <class L>
__device__ inline int sum_row(int lane) {
  constexpr int kLanes = L::kColumnLanes;
  return (lane & kLanes / 2 ? 4 : 0) + (lane & kLanes / 4 ? 2 : 0) + (lane & kLanes / 8 ? 1 : 0);
}

// The matrix warps' part for one matrix. This block has a row left for `last` steps; if `stays` is set, it has one at the end.
template <class L>
__device__ void hold_matrix(const Matrices& A, int matrix, const Scale& scale, const Shape& shape, const Work& work, int last,
                            bool stays, double* memory) {
  const int block = int(blockIdx.x) % shape.blocks;
  Lane lane;
  lane.warp = int(threadIdx.x) / kWarp;
  lane.lane = int(threadIdx.x) % kWarp;
  const int column_lane = lane.lane % L::kColumnLanes, column_warp = lane.warp / L::kRowWarps;
  lane.column = column_warp * L::kColumnLanes + column_lane;
  const int slot = lane.warp % L::kRowWarps * L::kRowLanes + lane.lane / L::kColumnLanes;
  lane.stride = L::kRowStep * shape.blocks;
  lane.row = shape.padding + (slot - shape.absent * L::kRowStep) * shape.blocks + block;
  lane.w = memory + shape.w;
  lane.chunks = memory + shape.chunks;
  lane.distant = work.distant;
  if constexpr (L::kDistant) {
    lane.distant += std::int64_t(blockIdx.x) * shape.distant * L::kChunk * (L::kSlots - shape.absent * L::kRowStep);
  }
  double* const partial = memory + shape.partial;  // [column warps, slots]

  const auto entry = [&](int index, int column) {
    const int i = index - shape.padding, j = column - shape.padding;
    if (i < 0 || i >= shape.samples || j < 0) return 0.0;
    return A.entry(i, j) * scale.first * scale.second;
  };
  double held[L::kRows][L::kHeld];
#pragma unroll
  for (int q = 0; q < L::kRows; ++q) {
    const int index = lane.row + q * lane.stride;
#pragma unroll
    for (int k = 0; k < L::kHeld; ++k) held[q][k] = entry(index, (shape.spilled + k) * L::kChunk + lane.column);
    if (q < shape.absent) continue;
#pragma unroll 1
    for (int chunk = 0; chunk < shape.spilled; ++chunk) {
      double* const to =
          L::kDistant && chunk < shape.distant ? lane.at<L>(lane.distant, shape, chunk) : lane.spilled<L>(shape, chunk);
      to[q * kWarp] = entry(index, chunk * L::kChunk + lane.column);
    }
  }

  int gone = 0;  // rows of this block that are finished
  const bool hands_over = stays && shape.left() > 1;
  const auto step_of = [&](int n) {
    Step step;
    step.next = shape.padding + n + 1;
    step.chunk = step.next / L::kChunk;
    step.owns = lane.column == step.next % L::kChunk;
    step.tag = ((n >> 1) + 1) & 3;
    step.products = work.exchange + (std::int64_t(matrix) * 2 + (n & 1)) * 2 * shape.words() - shape.skipped;
    step.column = step.products + shape.words();
    step.x = memory + shape.x + (n & 1) * shape.padded;
    step.v = memory + shape.x + ((n + 1) & 1) * shape.padded;
    return step;
  };
  const auto first_of = [&](const Step& step) {
    while (shape.padding + gone * shape.blocks + block < step.next) ++gone;
    return shape.absent + gone / L::kRowStep;
  };
  for (int n = 0; n < last; ++n) {
    const Step step = step_of(n);
    const int first = first_of(step);
    forget(lane.row);

    meet(kColumnReady, L::kThreads);
    double products[L::kRows];
#pragma unroll
    for (int q = 0; q < L::kRows; ++q) products[q] = 0.0;
    from_row<L>(first, [&](auto from) { multiply<L, decltype(from)::value>(held, products, lane, step, shape); });
    const double sum = sums_over_columns<L>(products, column_lane);
    const int q = sum_row<L>(column_lane);
    if (column_lane % (L::kColumnLanes / 8) == 0 && q < L::kRows) {
      partial[column_warp * L::kSlots + q * L::kRowStep + slot] = sum;
    }
    if (lane.warp == 0) {
      meet(kSumsReady, kMatrixThreads);
#pragma unroll
      for (int begin = 0; begin < L::kSlots; begin += kWarp) {
        const int of = begin + lane.lane;
        const int index = shape.padding + (of - shape.absent * L::kRowStep) * shape.blocks + block;
        if (of >= L::kSlots || index < step.next || index >= shape.padded) continue;
        double total[L::kColumnWarps];
#pragma unroll
        for (int u = 0; u < L::kColumnWarps; ++u) total[u] = partial[u * L::kSlots + of];
#pragma unroll
        for (int half = L::kColumnWarps / 2; half > 0; half /= 2) {
#pragma unroll
          for (int u = 0; u < half; ++u) total[u] += total[u + half];
        }
        post(step.products + index, total[0], step.tag);
      }
    } else {
      arrive(kSumsReady, kMatrixThreads);
    }
    if (n + 1 < last || hands_over) {
      from_row<L>(first, [&](auto from) { update<L, decltype(from)::value>(held, lane, step, shape); });
    }
    arrive(kMatrixRead, L::kThreads);
  }
  if (hands_over) {
    const Step step = step_of(last);
    meet(kColumnReady, L::kThreads);
    from_row<L>(first_of(step), [&](auto from) { update<L, decltype(from)::value>(held, lane, step, shape); });
    hand_over<L>(held, lane, step, shape, work.left + std::int64_t(matrix) * shape.left() * shape.left());
    arrive(kMatrixRead, L::kThreads);
  }
}

}  // namespace
}  // namespace lmn
