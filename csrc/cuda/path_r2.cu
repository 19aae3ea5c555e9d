// path_r2 on CUDA: one pass over f's outputs. Memory bandwidth bounds it, so the number of bytes on their way to a
// multiprocessor decides its speed. Three kernels: the outputs' scale, then the pairs, by one kernel for small and one for
// large pairs.
#include "device.h"

#include "../statistics.h"  // after device.h, because it uses its functions

namespace lmn {
namespace {

// ---- one output of one pair ----

template <class T>
struct Output {
  T first, chord, magnitude, scale;
  Moments<T> moments;

  __device__ void start(T y_first, T y_second, T y_scale) {
    first = y_first;
    chord = y_second - y_first;
    magnitude = larger(absolute(y_first), absolute(y_second)) * y_scale;
    scale = y_scale;
    moments = {};
  }
  __device__ void add(T y, T t, T weight, T weight_t) {
    add_moments(moments, (y - fma(t, chord, first)) * scale, weight, weight_t);
  }
  template <class Stabiliser>
  __device__ Share<T> share(T rounding, T least, T variance_t, Stabiliser stabiliser) const {
    return share_of_output<T, T>(chord * scale, moments, magnitude, least, fma(magnitude, magnitude, rounding * rounding),
                                 variance_t, Epsilon<T>::value, stabiliser);
  }
};

template <class T>
__device__ T not_a_number() {
  return T(NAN);
}

/// Whether n is the index of a sample. The host cannot check the indices without waiting for the device.
template <class T>
__device__ bool is_sample(const PathR2<T>& op, std::int64_t n) {
  return n >= 0 && n < op.samples;
}

/// The number behind the other arrays of the workspace, used if r2 is pooled: 1 / scale of the output that varies most, 0 if no
/// output varies.
template <class T>
LMN_FN T* spread_of(const PathR2<T>& op) {
  return op.workspace + 3 * (op.outputs + op.nodes.interior);
}
template <class T>
__device__ T common_scale(const PathR2<T>& op) {
  const T spread = *spread_of(op);
  return spread > 0 ? 1 / spread : T(1);
}

/// Sums over a pair's outputs: of shares, a NaN if an output is unresolved; the number of constant outputs; and, if r2 is
/// pooled, bend and total of Share in the outputs' common unit. kPooled, here and of the kernels: there is a stabiliser, or r2
/// is pooled, or both.
enum Sum { kShares, kConstants, kBend, kTotal };
template <bool kPooled>
constexpr int kSums = kPooled ? 4 : 2;
template <bool kPooled>
struct PairSums {
  double of[kSums<kPooled>] = {};

  /// The sums over neighbouring lanes, whose number is a power of two.
  __device__ void add_lanes(int lanes = kWarp) {
#pragma unroll
    for (int n = 0; n < kSums<kPooled>; ++n) of[n] = warp_sum(of[n], lanes);
  }
};

/// Adds an output's terms, if r2 is pooled.
template <class T>
__device__ void pool_output(const PathR2<T>& op, PairSums<true>& sums, T bend, T total, T scale) {
  if (!op.pooled) return;
  const T factor = pooling_factor(common_scale(op), scale);
  sums.of[kBend] += double(bend * factor), sums.of[kTotal] += double(total * factor);
}

/// Stores a pair's entry, and counts.
template <bool kPooled, class T>
__device__ void store_entry(const PathR2<T>& op, std::int64_t pair, const PairSums<kPooled>& sums, bool known) {
  T entry = T(1) - T(sums.of[kShares] / double(op.outputs)), pooled = T(0);
  bool unresolved = isnan(sums.of[kShares]);
  if constexpr (kPooled) {
    if (op.pooled) {
      const T stabiliser = scaled_stabiliser(op.stabiliser, common_scale(op));
      pooled = T(pooled_r2(sums.of[kBend], sums.of[kTotal], double(stabiliser)));
      unresolved |= pool_underflows(T(sums.of[kTotal]), stabiliser, std::int64_t(sums.of[kConstants]), op.outputs);
    }
  }
  if (!known) {
    entry = pooled = not_a_number<T>();
  } else if (unresolved) {
    entry = pooled = T(kUnresolved);
    count(op.counts + 1, 1);
  } else if (sums.of[kConstants] > 0) {
    count(op.counts, sums.of[kConstants]);
  }
  op.r2[pair] = entry;
  if (kPooled && op.pooled) op.pooled[pair] = pooled;
}

// ---- the outputs' scale ----

constexpr int kScaleThreads = 1024;
constexpr int kScaleColumns = 8;  // one 32-byte sector of a row of floats; the samples give the threads enough work
constexpr int kScaleBatch = 8;    // loads on their way per thread; 1024 samples of eight outputs take one round trip

// A block takes `columns` neighbouring outputs (a power of two), kScaleThreads / columns samples at a time.
template <class T>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(PathR2<T> op, int columns) {
  T* const largest = reinterpret_cast<T*>(dynamic_shared());  // [kScaleThreads] largest differences, then as many largest |y|
  T* const magnitudes = largest + kScaleThreads;
  const int thread = int(threadIdx.x), rows = kScaleThreads / columns;
  const std::int64_t k = std::int64_t(blockIdx.x) * columns + thread % columns;
  T mine = 0, magnitude = 0;
  if (blockIdx.x == 0 && thread == 0) op.counts[0] = op.counts[1] = 0;
  if (k < op.outputs && op.samples > 0) {
    const T origin = op.ends[k];
    for (std::int64_t n = thread / columns; n < op.samples; n += kScaleBatch * rows) {
      T y[kScaleBatch];
#pragma unroll
      for (int b = 0; b < kScaleBatch; ++b) {
        const std::int64_t row = n + b * rows;
        y[b] = row < op.samples ? op.ends[row * op.outputs + k] : origin;
      }
#pragma unroll
      for (int b = 0; b < kScaleBatch; ++b) {
        const T difference = absolute(y[b] - origin);
        mine = difference > mine ? difference : mine;  // ignores a NaN, as the CPU's kernel does
        magnitude = absolute(y[b]) > magnitude ? absolute(y[b]) : magnitude;
      }
    }
  }
  largest[thread] = mine;
  magnitudes[thread] = magnitude;
  for (int half = kScaleThreads / 2; half >= columns; half /= 2) {
    __syncthreads();
    if (thread < half) {
      largest[thread] = larger(largest[thread], largest[thread + half]);
      magnitudes[thread] = larger(magnitudes[thread], magnitudes[thread + half]);
    }
  }
  if (thread < columns && k < op.outputs) {
    op.workspace[k] = output_scale(largest[thread]);
    if (op.pooled && largest[thread] > 0) atomic_larger(spread_of(op), 1 / op.workspace[k]);
    const T own = op.rounding ? op.rounding[k] * op.workspace[k] : T(0);
    op.workspace[op.outputs + k] = magnitudes[thread] * op.workspace[k] * T(kLeastRounding) + own;
    op.workspace[2 * op.outputs + k] = op.rounding ? op.rounding[op.outputs + k] * op.workspace[k] : T(0);
  }
}

// ---- small pairs, through shared memory ----

constexpr int kThreads = 128;
constexpr int kItems = 2;              // outputs of pairs per thread; they share the loads of the nodes
constexpr int kTileBytes = 24 * 1024;  // nine blocks on an sm_90 multiprocessor: some blocks load while others add
constexpr int kSmallPairBytes = kTileBytes / 3;
// stands for a constant output; a share is never negative, and kUnresolved is another number
constexpr double kConstantShare = -2.0;

/// The layout of a block's values in shared memory.
struct Tile {
  std::int32_t pairs;    // pairs of a block
  std::int32_t padding;  // values between two pairs' values
  std::int32_t width;    // lanes that add up a pair's shares, a power of two
};

template <class T>
constexpr int kChunk = int(16 / sizeof(T));  // values in 16 bytes

/// Copies op.interior[begin .. begin + count) to `to`. The first value goes to to[head], where head is the distance of begin
/// from a 16-byte boundary in global memory.
template <class T>
__device__ int copy_values(const PathR2<T>& op, std::int64_t begin, int count, int pair_values, int padding, T* to) {
  const std::int64_t end = op.pairs * pair_values;
  const int head = int(reinterpret_cast<std::uintptr_t>(op.interior + begin) % 16 / sizeof(T));
  const int chunks = (head + count + kChunk<T> - 1) / kChunk<T>;
  for (int chunk = int(threadIdx.x); chunk < chunks; chunk += kThreads) {
    const int offset = chunk * kChunk<T>;
    const std::int64_t from = begin - head + offset;
    T* const target = to + offset + (padding ? offset / pair_values * padding : 0);
    if (from >= 0 && from + kChunk<T> <= end) {
      copy_async16(target, op.interior + from);
    } else {  // first or last values of the whole array
      for (int n = 0; n < kChunk<T>; ++n) {
        if (from + n >= 0 && from + n < end) target[n] = op.interior[from + n];
      }
    }
  }
  return head;
}

// A block takes tile.pairs neighbouring pairs, which are contiguous in memory, and reads them 16 bytes at a time. Then each
// thread takes kItems (pair, output), with the outputs fastest. Then `width` lanes add up each pair's shares.
template <class T, bool kPooled>
__global__ void __launch_bounds__(kThreads) small_pairs_kernel(PathR2<T> op, DeviceNodes<T> nodes, Tile tile) {
  // The share of each (pair, output), or kConstantShare or kUnresolved.
  T* const shares = reinterpret_cast<T*>(dynamic_shared());  // [kItems * kThreads]
  // Of a pooled kernel bend and total follow, as of Share.
  [[maybe_unused]] T *const bends = shares + kItems * kThreads, *const totals = bends + kItems * kThreads;
  T* const values = shares + (kPooled ? 3 : 1) * kItems * kThreads;
  const int outputs = int(op.outputs), pair_values = nodes.interior * outputs, thread = int(threadIdx.x);
  const std::int64_t begin = std::int64_t(blockIdx.x) * tile.pairs;
  const int pairs = int(at_most(tile.pairs, op.pairs - begin));
  const int head = copy_values(op, begin * pair_values, pairs * pair_values, pair_values, tile.padding, values);

  Output<T> items[kItems];
  const T* y[kItems];
#pragma unroll
  for (int n = 0; n < kItems; ++n) {  // while the copies are on their way
    const int item = thread + n * kThreads, pair = item / outputs, k = item % outputs;
    items[n].start(T(0), T(0), T(0));
    y[n] = values + head;
    if (pair < pairs) {
      y[n] += pair * (pair_values + tile.padding) + k;
      const std::int64_t i = op.first[begin + pair], j = op.second[begin + pair];
      const bool known = is_sample(op, i) && is_sample(op, j);
      items[n].start(known ? op.ends[i * outputs + k] : not_a_number<T>(), known ? op.ends[j * outputs + k] : not_a_number<T>(),
                     op.workspace[k]);
    }
  }
  copy_async_wait();
  __syncthreads();
#pragma unroll 4
  for (int m = 0; m < nodes.interior; ++m) {
    const T t = nodes.t[m], weight = nodes.w[m], weight_t = nodes.w_t[m];
#pragma unroll
    for (int n = 0; n < kItems; ++n) items[n].add(y[n][m * outputs], t, weight, weight_t);
  }
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    const int item = thread + n * kThreads, k = item % outputs;
    const Share<T> share = items[n].share(op.workspace[outputs + k], op.workspace[2 * outputs + k], nodes.variance_t,
                                          stabiliser_of<kPooled>(op.stabiliser, op.workspace[k]));
    if constexpr (kPooled) bends[item] = share.bend, totals[item] = share.total;
    shares[item] = share.unresolved > 0 ? T(kUnresolved) : share.constant > 0 ? T(kConstantShare) : share.nonlinear;
  }
  __syncthreads();
  for (int base = 0; base < pairs; base += kThreads / tile.width) {  // whole warps, so the warp sum stays legal
    const int pair = base + thread / tile.width;
    PairSums<kPooled> sums;
    if (pair < pairs) {
      for (int k = thread % tile.width; k < outputs; k += tile.width) {
        const T share = shares[pair * outputs + k];
        const double constant_share = kPooled && op.stabiliser > 0 ? 1.0 : 0.0;
        sums.of[kConstants] += share == T(kConstantShare) ? 1 : 0;
        sums.of[kShares] += share == T(kUnresolved) ? NAN : share == T(kConstantShare) ? constant_share : double(share);
        if constexpr (kPooled) {
          pool_output(op, sums, bends[pair * outputs + k], totals[pair * outputs + k], op.workspace[k]);
        }
      }
    }
    sums.add_lanes(tile.width);
    if (pair < pairs && thread % tile.width == 0) {
      const bool known = is_sample(op, op.first[begin + pair]) && is_sample(op, op.second[begin + pair]);
      store_entry(op, begin + pair, sums, known);
    }
  }
}

template <class T>
bool pools(const PathR2<T>& op) {
  return op.pooled || op.stabiliser > 0;
}

template <class T>
const char* small_pairs(const PathR2<T>& op, const DeviceNodes<T>& nodes, CUstream_st* stream) {
  const int outputs = int(op.outputs), values = nodes.interior * outputs;
  Tile tile{};
  // If neighbouring pairs are a multiple of 32 bytes apart, their values lie in few of the 32 banks. With many outputs this is
  // so only for a multiple of 128 bytes. 16 bytes of padding leave conflicts of five at most.
  const int apart = outputs < 8 ? 2 * kChunk<T> : 8 * kChunk<T>;
  const bool aligned = reinterpret_cast<std::uintptr_t>(op.interior) % 16 == 0;
  tile.padding = aligned && values > 0 && values % apart == 0 ? kChunk<T> : 0;
  const int stride = values + tile.padding;
  const int fitting = stride > 0 ? int(kTileBytes / sizeof(T)) / stride : kItems * kThreads;
  tile.pairs = int(at_most(fitting, kItems * kThreads / outputs));
  for (tile.width = 1; tile.width < kWarp && tile.width < outputs;) tile.width *= 2;
  const int arrays = pools(op) ? 3 : 1;
  const std::size_t values_at = std::size_t(arrays) * kItems * kThreads;
  const std::size_t shared = (values_at + kChunk<T> + std::size_t(tile.pairs) * stride + kChunk<T>)*sizeof(T);
  return launch(pools(op) ? small_pairs_kernel<T, true> : small_pairs_kernel<T, false>, blocks_of(op.pairs, tile.pairs),
                kThreads, shared, stream, op, nodes, tile);
}

// ---- large pairs, directly from global memory ----

constexpr int kMostThreads = 256;
constexpr int kBatchBytes = 64;  // loads on their way per thread, in bytes

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

template <class T, int kWidth>
__device__ Pack<T, kWidth> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kWidth>*>(from);
}

// A block takes one pair, and each thread kWidth neighbouring outputs at a time: neighbouring lanes read neighbouring values.
template <class T, int kWidth, bool kPooled>
__global__ void __launch_bounds__(kMostThreads) large_pairs_kernel(PathR2<T> op, DeviceNodes<T> nodes) {
  using Values = Pack<T, kWidth>;
  constexpr int kBatch = kBatchBytes / int(sizeof(Values)) < 8 ? kBatchBytes / int(sizeof(Values)) : 8;
  __shared__ double of_warps[kSums<kPooled>][kMostThreads / kWarp];
  const std::int64_t pair = blockIdx.x, i = op.first[pair], j = op.second[pair];
  const bool known = is_sample(op, i) && is_sample(op, j);
  const T* const interior = op.interior + pair * nodes.interior * op.outputs;
  PairSums<kPooled> sums;
  for (std::int64_t k = std::int64_t(threadIdx.x) * kWidth; known && k < op.outputs; k += blockDim.x * kWidth) {
    Output<T> items[kWidth];
    {
      const Values first = load<T, kWidth>(op.ends + i * op.outputs + k);
      const Values second = load<T, kWidth>(op.ends + j * op.outputs + k);
      const Values scale = load<T, kWidth>(op.workspace + k);
#pragma unroll
      for (int n = 0; n < kWidth; ++n) items[n].start(first.values[n], second.values[n], scale.values[n]);
    }
    const T* from = interior + k;
    for (int begin = 0; begin < nodes.interior; begin += kBatch) {
      Values y[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (begin + b < nodes.interior) y[b] = load<T, kWidth>(from);
        from += op.outputs;
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (begin + b >= nodes.interior) break;
        const T t = nodes.t[begin + b], weight = nodes.w[begin + b], weight_t = nodes.w_t[begin + b];
#pragma unroll
        for (int n = 0; n < kWidth; ++n) items[n].add(y[b].values[n], t, weight, weight_t);
      }
    }
    const Values rounding = load<T, kWidth>(op.workspace + op.outputs + k);
    const Values least = load<T, kWidth>(op.workspace + 2 * op.outputs + k);
#pragma unroll
    for (int n = 0; n < kWidth; ++n) {
      const Share<T> share = items[n].share(rounding.values[n], least.values[n], nodes.variance_t,
                                            stabiliser_of<kPooled>(op.stabiliser, items[n].scale));
      sums.of[kShares] += share.unresolved > 0 ? NAN : double(share.nonlinear);
      sums.of[kConstants] += double(share.constant);
      if constexpr (kPooled) pool_output(op, sums, share.bend, share.total, items[n].scale);
    }
  }
  sums.add_lanes();
  if (threadIdx.x % kWarp == 0) {
    for (int n = 0; n < kSums<kPooled>; ++n) of_warps[n][threadIdx.x / kWarp] = sums.of[n];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < int(blockDim.x) / kWarp; ++warp) {
    for (int n = 0; n < kSums<kPooled>; ++n) sums.of[n] += of_warps[n][warp];
  }
  store_entry(op, pair, sums, known);
}

template <class T, int kWidth>
const char* large_pairs(const PathR2<T>& op, const DeviceNodes<T>& nodes, CUstream_st* stream) {
  const std::int64_t threads = blocks_of(op.outputs, kWarp * kWidth) * kWarp;
  return launch(pools(op) ? large_pairs_kernel<T, kWidth, true> : large_pairs_kernel<T, kWidth, false>, op.pairs,
                int(at_most(threads, kMostThreads)), 0, stream, op, nodes);
}

// ---- launcher ----

/// Three numbers of each output, as the first three on the CPU; behind them the nodes and spread_of.
template <class T>
std::size_t workspace_of(const PathR2<T>& op) {
  return (3 * std::size_t(op.outputs + op.nodes.interior) + 1) * sizeof(T);
}

template <class T>
const char* path_r2_on(const PathR2<T>& op, CUstream_st* stream) {
  int columns = 1;
  while (columns < kScaleColumns && columns < op.outputs) columns *= 2;
  const char* error = op.pooled ? message(cudaMemsetAsync(spread_of(op), 0, sizeof(T), stream)) : nullptr;
  if (error) return error;
  error = launch(scale_kernel<T>, blocks_of(op.outputs, columns), kScaleThreads, 2 * kScaleThreads * sizeof(T), stream, op,
                 columns);
  if (error) return error;
  DeviceNodes<T> nodes;
  error = store_nodes(op.nodes, op.workspace + 3 * op.outputs, nodes, stream);
  if (error) return error;
  if (op.outputs <= kItems * kThreads && op.nodes.interior * op.outputs * std::int64_t(sizeof(T)) <= kSmallPairBytes) {
    return small_pairs(op, nodes, stream);
  }
  const auto together = reinterpret_cast<std::uintptr_t>(op.interior) | reinterpret_cast<std::uintptr_t>(op.ends) |
                        reinterpret_cast<std::uintptr_t>(op.workspace) | std::uintptr_t(op.outputs * sizeof(T));
  if (together % 16 == 0) return large_pairs<T, kChunk<T>>(op, nodes, stream);
  return large_pairs<T, 1>(op, nodes, stream);
}

}  // namespace

std::size_t cuda_workspace(const PathR2<float>& op) { return workspace_of(op); }
std::size_t cuda_workspace(const PathR2<double>& op) { return workspace_of(op); }
const char* cuda_run(const PathR2<float>& op, CUstream_st* stream) { return path_r2_on(op, stream); }
const char* cuda_run(const PathR2<double>& op, CUstream_st* stream) { return path_r2_on(op, stream); }

}  // namespace lmn
