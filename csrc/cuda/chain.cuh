// What path_connectivity and hermite_connectivity share: the network at the samples, and the kernel that carries panels of
// residuals from layer to layer, for any depth, width, activations and dtype.
#pragma once
#include "device.h"
#include "halves.h"

#include "../activation.h"  // after device.h, whose functions it uses

namespace lmn {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = 16;  // of hidden units in one step: each of four lanes takes four that lie side by side

LMN_FN std::int64_t padded(std::int64_t width) { return blocks_of(width, kColumns) * kColumns; }

/// One layer at the samples, and the weights into it.
template <class T>
struct Layer {
  std::int64_t width, stride;  // stride: of a sample's row in z and a, padded with zeros
  ActivationKind kind;
  T alpha, beta;
  T *z, *a, *slope;          // [samples, stride] before and after the activation, and its derivative or null
  T* v;                      // [samples, stride], what the next layer takes: a, and what a network adds to it
  T* rounding;               // [samples, stride], root of the sum of squares of all that v is computed from
  const T *weights, *biases; // [width, width of the layer before], [width] or null
  HalfLayer half;            // float
};

/// What the samples leave to the kernels of halves to decide; zeros before.
struct RangeFlags {
  int largest_z;  // bits of the largest |z| of the first layer, as a float
  int tiny;       // 1 where some SiLU unit has no a beyond kTinyUnit, but not 0
};
constexpr float kTinyUnit = 1e-10f;

/// The kernels' view of the problem, all in the memory of the device.
template <class T>
struct Problem {
  Layer<T>* layers;     // [last + 1]
  int last;
  bool ends_linear;     // the last layer has no activation: its products are the residuals
  bool halves_alone;    // float: products may round residuals and weights to halves; else each is two halves
  DeviceNodes<T> nodes;
  std::int64_t samples, outputs;
  T *y, *y_low, *scale; // [samples, outputs] scaled; what rounding linear ones to T lost; [outputs]
  T* rounding;          // [samples, outputs], scaled: epsilons of it are y's rounding
  T* connectivity;
  std::int64_t* counts;
  RangeFlags* range;    // float
};

/// Calls function(integral_constant) for the activation.
template <int kKind>
struct KindConstant {
  static constexpr ActivationKind value = ActivationKind(kKind);
};
template <int kKind = 0, class Function>
__device__ inline void with_kind(ActivationKind kind, const Function& function) {
  if constexpr (kKind + 1 < int(ActivationKind::kCount)) {
    if (int(kind) != kKind) return with_kind<kKind + 1>(kind, function);
  }
  function(KindConstant<kKind>{});
}

/// The chord, written once: z and a must round alike, so that a linear piece leaves no residual at all.
template <class T>
__device__ inline T on_chord(T first, T second, T t) {
  return fma(t, second - first, first);
}

template <class T>
__device__ inline void add_moments(Moments<T>& moments, T e, T w, T w_t) {
  const T weighted = e * w;
  moments.e += weighted;
  moments.te = fma(w_t, e, moments.te);
  moments.ee = fma(weighted, e, moments.ee);
}

/// Sums over the outputs of a pair.
struct PairSums {
  double nonlinear = 0;  // of 1 - r2; a NaN where an output is unresolved
  int constants = 0;     // outputs
};

/// Adds output k between samples i and j. scale: of the output; least: below it an output has underflowed, or is about to.
template <class T>
__device__ inline void add_output(PairSums& sums, const T* y, const T* y_low, const T* rounding, std::int64_t outputs,
                                  std::int64_t i, std::int64_t j, std::int64_t k, const Moments<T>& moments,
                                  T scale, T least, T variance_t) {
  const std::int64_t at_i = i * outputs + k, at_j = j * outputs + k;
  const T first = y[at_i], second = y[at_j];
  const T chord = (second - first) + (y_low[at_j] - y_low[at_i]);
  const T rounding_squared = rounding[at_i] * rounding[at_i] + rounding[at_j] * rounding[at_j];
  const Share<T> share = share_of_output<T, T>(chord, moments, larger(absolute(first), absolute(second)), T(0),
                                               rounding_squared, variance_t, Epsilon<T>::value);
  const bool vanishes = absolute(first) < least || absolute(second) < least;
  const T largest_rounding = larger(rounding[at_i], rounding[at_j]);
  const bool hides = share.constant > 0 && hides_rounding<T, T>(largest_rounding, scale, Epsilon<T>::value) > 0;
  sums.nonlinear += vanishes || hides || share.unresolved > 0 ? NAN : double(share.nonlinear);
  sums.constants += share.constant > 0 ? 1 : 0;
}

/// Whether two samples are close, see kCloseSamples.
template <class T>
__device__ inline bool are_close(const T* z, std::int64_t stride, std::int64_t width, std::int64_t i, std::int64_t j) {
  T distance = 0, largest = 0;
  for (std::int64_t unit = 0; unit < width; ++unit) {
    const T first = z[i * stride + unit], second = z[j * stride + unit];
    distance = larger(distance, absolute(second - first));
    largest = larger(largest, larger(absolute(first), absolute(second)));
  }
  return distance <= largest * T(kCloseSamples);
}

/// Writes the entry of a pair, both halves, and counts. z: [samples, stride], of the first layer.
template <class T>
__device__ inline void store_entry(T* connectivity, std::int64_t* counts, const PairSums& sums, const T* z,
                                   std::int64_t stride, std::int64_t width, std::int64_t samples, std::int64_t outputs,
                                   std::int64_t i, std::int64_t j) {
  T entry = T(1 - sums.nonlinear / double(outputs));
  if (i == j) {
    entry = T(1);
  } else if (isnan(sums.nonlinear) || (sizeof(T) == 4 && sums.constants > 0 && are_close(z, stride, width, i, j))) {
    entry = T(kUnresolved);
    count(counts + 1, 1);
  } else if (sums.constants > 0) {
    count(counts, sums.constants);
  }
  connectivity[i * samples + j] = connectivity[j * samples + i] = entry;
}

/// The n-th tile on or above the diagonal of `blocks` x `blocks`, row after row.
__device__ inline void find_tile(std::int64_t n, std::int64_t blocks, std::int64_t& row, std::int64_t& column) {
  const double b = 2.0 * double(blocks) + 1.0;
  row = std::int64_t((b - ::sqrt(b * b - 8.0 * double(n))) / 2.0);
  const auto start = [blocks](std::int64_t r) { return r * blocks - r * (r - 1) / 2; };
  while (row > 0 && start(row) > n) --row;
  while (start(row + 1) <= n) ++row;
  column = row + (n - start(row));
}

/// Sum over the block, the same for any schedule; valid in its first thread.
__device__ inline double block_sum(double value) {
  __shared__ double partial[kWarps];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 1; warp < kWarps; ++warp) value += partial[warp];
  return value;
}

// ---- the network at the samples ----

constexpr int kForwardTile = 16;
static_assert(kForwardTile * kForwardTile == kThreads);

/// Notes a block's largest |a| of each unit, and of the first layer the largest |z|.
__device__ inline void note_range(const Problem<float>& problem, const Layer<float>& layer, std::int64_t first_unit, int row,
                                  int column, float z, float a, bool is_first) {
  __shared__ int largest[kForwardTile];  // as integers positive floats have the same order
  if (row == 0) largest[column] = 0;
  __syncthreads();
  atomicMax(&largest[column], int(__float_as_uint(a)));
  __syncthreads();
  if (row == 0 && first_unit + column < layer.width) {
    atomicMax(reinterpret_cast<int*>(layer.half.largest) + first_unit + column, largest[column]);
  }
  if (!is_first) return;
  int largest_z = int(__float_as_uint(z));
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int other = __shfl_xor_sync(kAllLanes, largest_z, offset);
    largest_z = other > largest_z ? other : largest_z;
  }
  if (threadIdx.x % kWarp == 0) atomicMax(&problem.range->largest_z, largest_z);
}

/// What is added to one of a layer's values at the samples: an earlier value and its rounding, [samples, stride], and what is
/// affine in the samples, [samples, width]; each may be null.
template <class T>
struct Earlier {
  const T *value, *rounding, *shift;
};

/// Adds them to a sum, and to the sum of squares of all it is computed from.
template <class T>
__device__ inline void add_earlier(const Earlier<T>& earlier, const Layer<T>& layer, std::int64_t sample, std::int64_t unit,
                                   double& sum, double& squares) {
  if (earlier.value) {
    const double rounding = double(earlier.rounding[sample * layer.stride + unit]);
    sum += double(earlier.value[sample * layer.stride + unit]);
    squares = ::fma(rounding, rounding, squares);
  }
  if (earlier.shift) {
    const double term = double(earlier.shift[sample * layer.width + unit]);
    sum += term;
    squares = ::fma(term, term, squares);
  }
}

/// A block makes 16 samples x 16 units of one layer, one thread per value. Products in double: a node's rounding
/// averages out along a path, the ends' would tilt all of it. `before` null: z itself, and the block's sum of |z| for the
/// choice of the kernel, infinite where one is not below the limit.
template <class T>
__global__ void forward_kernel(Problem<T> problem, Layer<T> layer, int index, const T* z, const T* before,
                               const T* before_rounding, std::int64_t depth, std::int64_t before_stride,
                               Earlier<T> into_z, Earlier<T> into_v, double limit, double* sums) {
  __shared__ T a_tile[kForwardTile][kForwardTile + 1], w_tile[kForwardTile][kForwardTile + 1];
  __shared__ T rounding_tile[kForwardTile][kForwardTile + 1];
  const int row = int(threadIdx.x) / kForwardTile, column = int(threadIdx.x) % kForwardTile;
  const std::int64_t across = layer.stride / kForwardTile;
  const std::int64_t sample = blockIdx.x / across * kForwardTile + row;
  const std::int64_t first_unit = blockIdx.x % across * kForwardTile, unit = first_unit + column;
  if (blockIdx.x == 0 && threadIdx.x == 0) problem.layers[index] = layer;
  const bool valid = sample < problem.samples && unit < layer.width;
  double sum = 0, squares = 0;
  if (before) {
    for (std::int64_t begin = 0; begin < depth; begin += kForwardTile) {
      const std::int64_t d = begin + column, other = first_unit + row;
      const bool inside = sample < problem.samples && d < depth;
      a_tile[row][column] = inside ? before[sample * before_stride + d] : T(0);
      rounding_tile[row][column] = inside ? before_rounding[sample * before_stride + d] : T(0);
      w_tile[row][column] = other < layer.width && d < depth ? layer.weights[other * depth + d] : T(0);
      __syncthreads();
      for (int d_tile = 0; d_tile < kForwardTile; ++d_tile) {
        const double w = double(w_tile[column][d_tile]), term = w * double(rounding_tile[row][d_tile]);
        sum = ::fma(w, double(a_tile[row][d_tile]), sum);
        squares = ::fma(term, term, squares);
      }
      __syncthreads();
    }
    if (valid && layer.biases) {
      const double bias = double(layer.biases[unit]);
      sum += bias;
      squares = ::fma(bias, bias, squares);
    }
    if (valid) add_earlier(into_z, layer, sample, unit, sum, squares);
  } else if (valid) {
    sum = double(z[sample * layer.width + unit]);
  }
  const T value = T(sum);
  T activated = value, left = value;
  if (sample < problem.samples) {
    T slope = T(0);
    with_kind(layer.kind, [&](auto kind) {
      activated = activate<kind.value, T>(value, layer.alpha, layer.beta);
      if (layer.slope) slope = derivative<kind.value, T>(value, layer.alpha, layer.beta);
    });
    if (layer.slope) layer.slope[sample * layer.stride + unit] = valid ? slope : T(0);
    layer.z[sample * layer.stride + unit] = valid ? value : T(0);
    layer.a[sample * layer.stride + unit] = valid ? activated : T(0);
    squares += sum * sum;
    left = activated;
    if (layer.v != layer.a) {
      double total = double(activated);
      if (valid) add_earlier(into_v, layer, sample, unit, total, squares);
      left = T(total);
      layer.v[sample * layer.stride + unit] = valid ? left : T(0);
    }
    squares += double(left) * double(left);
    layer.rounding[sample * layer.stride + unit] = valid ? T(::sqrt(squares)) : T(0);
    if (valid && index == problem.last) {
      problem.y_low[sample * layer.width + unit] = problem.ends_linear ? T(sum - double(value)) : T(0);
    }
  }
  if constexpr (sizeof(T) == 4) {
    const float largest = larger(absolute(activated), absolute(left));
    note_range(problem, layer, first_unit, row, column, valid ? absolute(value) : 0.0f, valid ? largest : 0.0f, !before);
    if (!before && valid && unit == 0) problem.connectivity[sample * (problem.samples + 1)] = 1;
    return;
  }
  if (before) return;
  const double magnitude = ::fabs(sum);  // 0 outside the matrix
  const double total = block_sum(magnitude < limit ? magnitude : HUGE_VAL);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

/// What decides whether another kernel than the general one is taken, and the decision.
struct Choice {
  const double* sums;     // [blocks] of the first layer
  std::int64_t blocks;
  double least, limit;    // sum of |z| for the other kernel, and largest |z|; a limit of 0: none
  int* elsewhere;
};

/// Scales output k to order 1; the whole block.
template <class T>
__device__ void scale_output(const Problem<T>& problem, std::int64_t k) {
  __shared__ double partial[kThreads];
  const Layer<T>& layer = problem.layers[problem.last];
  const T origin = layer.v[k];
  T largest = 0;
  for (std::int64_t n = threadIdx.x; n < problem.samples; n += kThreads) {
    const T difference = absolute(layer.v[n * layer.stride + k] - origin);
    largest = largest < difference ? difference : largest;
  }
  partial[threadIdx.x] = double(largest);
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half && partial[threadIdx.x] < partial[threadIdx.x + half]) {
      partial[threadIdx.x] = partial[threadIdx.x + half];
    }
    __syncthreads();
  }
  const T scale = output_scale(T(partial[0]));
  if (threadIdx.x == 0) problem.scale[k] = scale;
  for (std::int64_t n = threadIdx.x; n < problem.samples; n += kThreads) {
    const std::int64_t at = n * problem.outputs + k;
    problem.y[at] = layer.v[n * layer.stride + k] * scale;
    problem.y_low[at] *= scale;
    problem.rounding[at] = layer.rounding[n * layer.stride + k] * scale;
  }
}

/// Block k scales output k; the block after the last decides between the kernels, and begins the count.
template <class T>
__global__ void scale_kernel(Problem<T> problem, Choice choice) {
  const std::int64_t k = blockIdx.x;
  if (k < problem.outputs) return scale_output(problem, k);
  double sum = 0;
  for (std::int64_t n = threadIdx.x; n < choice.blocks; n += kThreads) sum += choice.sums[n];
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *choice.elsewhere = choice.limit > 0 && sum >= choice.least && !isinf(sum);
    problem.counts[0] = problem.counts[1] = 0;
  }
}

// ---- float: what the kernels of halves read ----

/// Four values of a layer for a lane, of samples' values [samples, stride]; in a tail two.
__device__ inline float4 lane_values(const float* values, std::int64_t stride, std::int64_t sample, const HalfLayer& half,
                                     int step, int q) {
  const float* const from = values + sample * stride + step * kStepUnits;
  if (step < half.steps.full) return *reinterpret_cast<const float4*>(from + 4 * q);
  const float2 two = *reinterpret_cast<const float2*>(from + 2 * q);
  return make_float4(two.x, two.y, 0, 0);
}

/// Element n of the records: a group's, a step's, a lane's. Beyond the last sample stand the last one's values.
__device__ inline void write_record(const Layer<float>& layer, std::int64_t samples, std::int64_t n) {
  const HalfLayer& half = layer.half;
  const int lane = int(n % kWarp), q = lane % 4, step = int(n / kWarp % half.steps.all());
  const std::int64_t group = n / kWarp / half.steps.all();
  if (group >= blocks_of(samples, kGroup)) return;
  const std::int64_t sample = at_most(group * kGroup + lane / 4, samples - 1);
  const int values = step < half.steps.full ? 4 : 2;
  const float4 z = lane_values(layer.z, layer.stride, sample, half, step, q);
  const float4 a = lane_values(layer.a, layer.stride, sample, half, step, q);
  float4 slope = z;
  if (half.arrays > kSlope) slope = lane_values(layer.slope, layer.stride, sample, half, step, q);
  const float from[3][4] = {{z.x, z.y, z.z, z.w}, {a.x, a.y, a.z, a.w}, {slope.x, slope.y, slope.z, slope.w}};
  float* const to = half.records + group * half.group_floats() + half.step_floats(step) + lane * values;
  for (int v = 0; v < values; ++v) {
    const float scale = half_scale(half.largest[step * kStepUnits + values * q + v]);
    to[v] = from[kZ][v] * half.factor;
    to[kWarp * values + v] = from[kA][v] * half.factor * scale;
    if (half.arrays > kSlope) to[2 * kWarp * values + v] = from[kSlope][v] * scale;
  }
}

/// Row `unit` of the weights into layer l, scaled, as halves; and the unit's scales. A warp.
__device__ inline void write_row(const Problem<float>& problem, int l, std::int64_t unit) {
  const Layer<float>& layer = problem.layers[l];
  const HalfLayer& half = layer.half;
  const int lane = int(threadIdx.x) % kWarp;
  const int step = int(unit / kStepUnits), rest = int(unit % kStepUnits);
  const bool is_full = step < half.steps.full, valid = unit < layer.width;
  float unscale = 0;
  if (l > 0) {
    const Layer<float>& before = problem.layers[l - 1];
    const Steps steps = before.half.steps;
    const auto scaled = [&](std::int64_t d) {
      if (!valid || d >= before.width) return 0.0;
      return double(layer.weights[unit * before.width + d]) / double(half_scale(before.half.largest[d]));
    };
    double largest = 0;
    for (std::int64_t d = lane; d < before.width; d += kWarp) largest = larger(::fabs(scaled(d)), largest);
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      largest = larger(__shfl_xor_sync(kAllLanes, largest, offset), largest);
    }
    const double scale = half_scale(largest);
    unscale = float(double(half.factor) / scale);
    // Where this unit is a column of the instruction, see the order of units above.
    const int tile = is_full ? rest % 4 / 2 : 0, g = is_full ? rest / 4 * 2 + rest % 2 : rest;
    for (int n = lane; n < 4 * steps.all(); n += kWarp) {
      const int from_step = n / 4, q = n % 4;
      const bool from_full = from_step < steps.full;
      float w[4] = {}, low[4];
      for (int v = 0; v < (from_full ? 4 : 2); ++v) {
        w[v] = float(scaled(from_step * kStepUnits + (from_full ? 4 : 2) * q + v) * scale);
      }
      for (int v = 0; v < 4; ++v) {
        const float high = half.parts == 1 ? w[v] : upper_half(w[v]);
        low[v] = w[v] - high;
        w[v] = high;
      }
      uint2* const to = half.weights + ((std::int64_t(step) * steps.all() + from_step) * kWarp + 4 * g + q) * 2;
      to[tile] = make_uint2(to_halves(w[0], w[1]), to_halves(w[2], w[3]));
      if (!is_full) to[1] = make_uint2(0, 0);
      if (half.parts == 1) continue;
      uint2* const to_low = to + half.part_fragments(steps);
      to_low[tile] = make_uint2(to_halves(low[0], low[1]), to_halves(low[2], low[3]));
      if (!is_full) to_low[1] = make_uint2(0, 0);
    }
  }
  if (lane > 0) return;
  const float largest = half.largest[unit], scale = half_scale(largest);
  float* const to = half.units + std::int64_t(step) * 2 * kStepUnits + rest;
  to[0] = half.inverse ? 1 / scale : scale;
  to[is_full ? kStepUnits : kTailUnits] = unscale;
  if (layer.kind == ActivationKind::kSilu && largest > 0 && largest < kTinyUnit) atomicOr(&problem.range->tiny, 1);
}

/// Blocks of one layer in finish_kernel.
struct FinishBlocks {
  std::int64_t records, rows;
};
template <class T>
LMN_FN FinishBlocks finish_blocks(const Layer<T>& layer, std::int64_t samples) {
  const std::int64_t lanes = blocks_of(samples, kGroup) * layer.half.steps.all() * kWarp;
  return {layer.half.records ? blocks_of(lanes, kThreads) : 0, blocks_of(layer.half.steps.units(), kWarps)};
}

/// Everything that the samples' values and the weights determine, once the forward pass is done: scales of outputs, records,
/// weights.
__global__ void finish_kernel(Problem<float> problem) {
  std::int64_t block = blockIdx.x;
  if (block == 0 && threadIdx.x == 0) problem.counts[0] = problem.counts[1] = 0;
  if (block < problem.outputs) return scale_output(problem, block);
  block -= problem.outputs;
  for (int l = 0; l <= problem.last; ++l) {
    const Layer<float>& layer = problem.layers[l];
    const FinishBlocks blocks = finish_blocks(layer, problem.samples);
    if (block < blocks.records) return write_record(layer, problem.samples, block * kThreads + threadIdx.x);
    block -= blocks.records;
    if (block < blocks.rows) {
      const std::int64_t row = block * kWarps + threadIdx.x / kWarp;
      if (row < layer.half.steps.units()) write_row(problem, l, row);
      return;
    }
    block -= blocks.rows;
  }
}

// ---- general: any depth, width, activations; float64 too ----

constexpr int kPanelSide = 8;                         // a block's tile: 8 first x 8 second samples
constexpr int kPanelRows = kPanelSide * kPanelSide;
constexpr int kPanelTiles = kPanelRows / 16;          // of the matrix instruction's rows

template <class T>
struct General {
  Problem<T> problem;
  std::int64_t panel_stride;  // of a row
  std::int64_t tiles;
  T* panels;                  // [blocks of the grid, 2, kPanelRows, panel_stride], null: in shared memory
  const int* skip;            // where 1, another kernel does it
  Stencil<T> stencil;
};

/// Sums of a warp's tiles: first and second of two rows g and g + 8, outputs 2 q and 2 q + 1, as the matrix instruction has
/// them. Rows from 16 m on, units of every `apart`-th block of 8 from `block` on.
template <int kM, int kN>
__device__ inline void multiply_panel(double (&sums)[kM][kN][4], const Layer<double>& layer, const double* panel,
                                      std::int64_t panel_stride, std::int64_t depth, int m0, std::int64_t block, int apart) {
  const int lane = int(threadIdx.x) % kWarp;
  for (std::int64_t d = 0; d < depth; ++d) {
    double a[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[m][half] = panel[(16 * (m0 + m) + 8 * half + lane / 4) * panel_stride + d];
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const std::int64_t unit = 8 * (block + n * apart) + 2 * (lane % 4) + c;
        const double w = unit < layer.width ? layer.weights[unit * depth + d] : 0.0;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) sums[m][n][2 * half + c] = fma(w, a[m][half], sums[m][n][2 * half + c]);
        }
      }
    }
  }
}

/// Samples of the pair in a row of the panel.
struct Pair {
  std::int64_t first, second;
};
__device__ inline Pair pair_of(std::int64_t i0, std::int64_t j0, int row, std::int64_t samples) {
  return {at_most(i0 + row / kPanelSide, samples - 1), at_most(j0 + row % kPanelSide, samples - 1)};
}

/// What a residual is of: the value at a node, or the slope at an end of the path.
enum class Of { kValue, kFirstSlope, kSecondSlope };

/// panel = act(z(t)) - chord of act, with z(t) the chord of z plus what the panel holds (`deviates`), or the slope of
/// that at an end; zeros beyond the layer's width. A warp per row, neighbouring lanes at neighbouring units.
template <class T>
__device__ void make_residuals(const Layer<T>& layer, std::int64_t i0, std::int64_t j0, std::int64_t samples, Of of, T t,
                               bool deviates, T* panel, std::int64_t panel_stride) {
  if (deviates && layer.kind == ActivationKind::kIdentity) return;
  const auto each = [&](const auto& residual_of) {
    for (int row = int(threadIdx.x) / kWarp; row < kPanelRows; row += kWarps) {
      const Pair pair = pair_of(i0, j0, row, samples);
      const std::int64_t first = pair.first * layer.stride, second = pair.second * layer.stride;
#pragma unroll 1
      for (std::int64_t unit = threadIdx.x % kWarp; unit < layer.stride; unit += kWarp) {
        T& residual = panel[row * panel_stride + unit];
        const T deviation = deviates ? residual : T(0);
        residual = unit < layer.width ? residual_of(first + unit, second + unit, deviation) : T(0);
      }
    }
  };
  if (of == Of::kValue) {
    with_kind(layer.kind, [&](auto kind) {
      each([&](std::int64_t first, std::int64_t second, T deviation) {
        T z = on_chord(layer.z[first], layer.z[second], t) + deviation;
        if constexpr (kind.value == ActivationKind::kRelu) {  // which makes an output of what rounding leaves of 0
          const T largest = larger(absolute(layer.z[first]), absolute(layer.z[second]));
          if (deviates && absolute(z) <= largest * (kRoundedUlps * Epsilon<T>::value)) z = T(0);
        }
        return activate<kind.value, T>(z, layer.alpha, layer.beta) - on_chord(layer.a[first], layer.a[second], t);
      });
    });
  } else {
    each([&](std::int64_t first, std::int64_t second, T deviation) {
      const T slope = layer.slope[of == Of::kFirstSlope ? first : second];
      return fma(slope, (layer.z[second] - layer.z[first]) + deviation, -(layer.a[second] - layer.a[first]));
    });
  }
}

/// What the residuals of the layer before make of this layer's inputs. A warp takes two tiles of rows and four of units
/// at a time.
template <class T>
__device__ void make_deviations(const Layer<T>& layer, std::int64_t depth, const T* panel, T* next,
                                std::int64_t panel_stride) {
  constexpr int kM = 2, kN = 4, kGroups = kPanelTiles / kM;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int m0 = kM * (warp % kGroups);
  for (std::int64_t block = kN * (warp / kGroups); 8 * block < layer.stride; block += kN * kWarps / kGroups) {
    T sums[kM][kN][4] = {};
    multiply_panel<kM, kN>(sums, layer, panel, panel_stride, depth, m0, block, 1);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (8 * (block + n) >= layer.stride) break;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int row = 16 * (m0 + m) + 8 * (c / 2) + lane / 4;
          next[row * panel_stride + 8 * (block + n) + 2 * (lane % 4) + c % 2] = sums[m][n][c];
        }
      }
    }
  }
}

constexpr std::size_t kStaticShared = 4096;  // no kernel has more of its own, beside what it is launched with

// A block per tile of 8 x 8 pairs, one after the other; 16 pairs x kUnits tiles of 8 outputs to a warp. kStencil: the
// size of the stencil; 0: at every node.
template <class T, int kUnits, int kStencil>
__global__ void __launch_bounds__(kThreads, 1) general_kernel(General<T> p) {
  if (*p.skip) return;
  const Problem<T>& problem = p.problem;
  const std::int64_t samples = problem.samples, outputs = problem.outputs, panel_values = kPanelRows * p.panel_stride;
  T* const panels = p.panels ? p.panels + blockIdx.x * 2 * panel_values : reinterpret_cast<T*>(dynamic_shared());
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int m0 = warp % kPanelTiles, unit0 = warp / kPanelTiles;
  constexpr int kApart = kWarps / kPanelTiles;
  constexpr int kChunk = 8 * kUnits * kApart;
  __shared__ PairSums totals[kApart][kPanelRows];
  static_assert(sizeof(totals) <= kStaticShared);
  const T vanishing = never_zero(problem.layers[problem.last].kind) ? Vanishing<T>::value : T(0);
  for (std::int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    std::int64_t tile_row, tile_column;
    find_tile(tile, blocks_of(samples, kPanelSide), tile_row, tile_column);
    const std::int64_t i0 = tile_row * kPanelSide, j0 = tile_column * kPanelSide;
    PairSums pair_sums[2];
    for (std::int64_t chunk = 0; chunk < outputs; chunk += kChunk) {
      Moments<T> moments[kUnits][4];
      T values[kUnits][4][kStencil > 0 ? kStencil : 1];
#pragma unroll
      for (int n = 0; n < kUnits; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) moments[n][c] = Moments<T>{0, 0, 0};
      }
      for (int node = 0; node < (kStencil > 0 ? kStencil : problem.nodes.interior); ++node) {
        T t = T(0.5), w = 0, w_t = 0;
        Of of = Of::kValue;
        if constexpr (kStencil == 0) {
          t = problem.nodes.t[node], w = problem.nodes.w[node], w_t = problem.nodes.w_t[node];
        } else if (node < 2) {
          of = node == 0 ? Of::kFirstSlope : Of::kSecondSlope;
        }
        T *panel = panels, *next = panels + panel_values;
        __syncthreads();  // the node before has done with the panels
        make_residuals(problem.layers[0], i0, j0, samples, of, t, false, panel, p.panel_stride);
        __syncthreads();
        for (int l = 1; l < problem.last + !problem.ends_linear; ++l) {
          const Layer<T>& layer = problem.layers[l];
          make_deviations(layer, problem.layers[l - 1].width, panel, next, p.panel_stride);
          __syncthreads();
          make_residuals(layer, i0, j0, samples, of, t, true, next, p.panel_stride);
          __syncthreads();
          T* const swapped = panel;
          panel = next;
          next = swapped;
        }
        T sums[1][kUnits][4] = {};
        if (problem.ends_linear) {
          multiply_panel<1, kUnits>(sums, problem.layers[problem.last], panel, p.panel_stride,
                                    problem.layers[problem.last - 1].width, m0, chunk / 8 + unit0, kApart);
        }
#pragma unroll
        for (int n = 0; n < kUnits; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const std::int64_t k = chunk + 8 * (unit0 + n * kApart) + 2 * (lane % 4) + c % 2;
            if (k >= outputs) continue;
            T e = sums[0][n][c];
            if (!problem.ends_linear) e = panel[(16 * m0 + 8 * (c / 2) + lane / 4) * p.panel_stride + k];
            e *= problem.scale[k];
            if constexpr (kStencil == 0) {
              add_moments(moments[n][c], e, w, w_t);
            } else {
#pragma unroll
              for (int v = 0; v < kStencil; ++v) values[n][c][v] = v == node ? e : values[n][c][v];
            }
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kUnits; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const std::int64_t k = chunk + 8 * (unit0 + n * kApart) + 2 * (lane % 4) + c % 2;
          if (k >= outputs) continue;
          if constexpr (kStencil > 0) moments[n][c] = stencil_moments<kStencil>(p.stencil, values[n][c]);
          const Pair pair = pair_of(i0, j0, 16 * m0 + 8 * (c / 2) + lane / 4, samples);
          add_output(pair_sums[c / 2], problem.y, problem.y_low, problem.rounding, outputs, pair.first, pair.second, k,
                     moments[n][c], problem.scale[k], vanishing * problem.scale[k], problem.nodes.variance_t);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      PairSums total;
      total.nonlinear = warp_sum(pair_sums[half].nonlinear, 4);
      total.constants = warp_sum(pair_sums[half].constants, 4);
      if (lane % 4 == 0) totals[unit0][16 * m0 + 8 * half + lane / 4] = total;
    }
    __syncthreads();
    if (threadIdx.x < kPanelRows) {
      const std::int64_t first = i0 + threadIdx.x / kPanelSide, second = j0 + threadIdx.x % kPanelSide;
      PairSums total;
      for (int part = 0; part < kApart; ++part) {
        total.nonlinear += totals[part][threadIdx.x].nonlinear;
        total.constants += totals[part][threadIdx.x].constants;
      }
      if (second < samples && first <= second) {
        const Layer<T>& layer = problem.layers[0];
        store_entry(problem.connectivity, problem.counts, total, layer.z, layer.stride, layer.width, samples, outputs,
                    first, second);
      }
    }
    __syncthreads();  // totals are read
  }
}

// ---- the plan ----

/// Hands out 256-byte aligned pieces of a workspace; with a null base it only counts.
struct Arena {
  char* base;
  std::size_t used = 0;
  template <class U> U* take(std::int64_t count) {
    U* const piece = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += (std::size_t(count) * sizeof(U) + 255) / 256 * 256;
    return piece;
  }
};

/// Host's view: everything's place in the workspace.
template <class T>
struct Plan {
  Problem<T> problem{};
  General<T> general{};
  std::int64_t general_blocks = 0;
  std::size_t general_shared = 0;
  Choice choice{};
  double* sums = nullptr;
  int* flag = nullptr;
  T* nodes = nullptr;
  Layer<T> first{};
};

template <class T>
Layer<T> layer_of(const PathConnectivity<T>& op, int l, bool slopes, Arena& arena) {
  Layer<T> layer{};
  layer.width = op.widths[l];
  layer.stride = padded(layer.width);
  layer.kind = op.activations[l].kind;
  layer.alpha = T(op.activations[l].alpha);
  layer.beta = T(op.activations[l].beta);
  layer.z = arena.take<T>(op.samples * layer.stride);
  layer.a = arena.take<T>(op.samples * layer.stride);
  layer.v = op.skips && (op.skips[2 * l + 1] >= 0 || op.shifts[2 * l + 1]) ? arena.take<T>(op.samples * layer.stride) : layer.a;
  layer.slope = slopes ? arena.take<T>(op.samples * layer.stride) : nullptr;
  layer.rounding = arena.take<T>(op.samples * layer.stride);
  if (l == 0) return layer;
  layer.weights = op.weights[l - 1];
  layer.biases = op.biases[l - 1];
  return layer;
}

inline std::size_t shared_limit() {
  return std::size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

/// Which inputs another kernel takes: all |z| below the limit, their mean at least so large. A limit of 0: none.
struct Range {
  double limit, least_mean;
};

/// Everything but the layers, which come last in the arena, one by one.
template <class T>
Plan<T> make_plan(const PathConnectivity<T>& op, const Stencil<T>& stencil, Range elsewhere, Arena& arena) {
  Plan<T> plan;
  Problem<T>& problem = plan.problem;
  problem.last = op.layers;
  problem.ends_linear = op.layers > 0 && op.activations[op.layers].kind == ActivationKind::kIdentity;
  problem.samples = op.samples;
  problem.outputs = op.widths[op.layers];
  problem.connectivity = op.connectivity;
  problem.counts = op.counts;
  problem.layers = arena.take<Layer<T>>(op.layers + 1);
  problem.y = arena.take<T>(op.samples * problem.outputs);
  problem.y_low = arena.take<T>(op.samples * problem.outputs);
  problem.rounding = arena.take<T>(op.samples * problem.outputs);
  problem.scale = arena.take<T>(problem.outputs);
  plan.nodes = arena.take<T>(3 * std::int64_t(op.nodes.interior));
  plan.flag = arena.take<int>(1);
  const std::int64_t first_blocks = blocks_of(op.samples, kForwardTile) * padded(op.widths[0]) / kForwardTile;
  plan.sums = arena.take<double>(first_blocks);

  plan.choice = {plan.sums, first_blocks, elsewhere.least_mean * double(op.samples * op.widths[0]), elsewhere.limit,
                 plan.flag};
  std::int64_t widest = 0;
  for (int l = 0; l < op.layers + !problem.ends_linear; ++l) widest = op.widths[l] > widest ? op.widths[l] : widest;
  General<T>& general = plan.general;
  general.skip = plan.flag;
  general.stencil = stencil;
  general.panel_stride = padded(widest) | kColumns;  // an odd number of steps: neighbouring rows in other banks
  general.tiles = blocks_of(op.samples, kPanelSide) * (blocks_of(op.samples, kPanelSide) + 1) / 2;
  plan.general_blocks = at_most(general.tiles, 2 * device_attribute(cudaDevAttrMultiProcessorCount));
  const std::int64_t panel_values = (op.layers + !problem.ends_linear > 1 ? 2 : 1) * kPanelRows * general.panel_stride;
  plan.general_shared = std::size_t(panel_values) * sizeof(T);
  if (plan.general_shared + kStaticShared > shared_limit()) {
    plan.general_shared = 0;
    general.panels = arena.take<T>(plan.general_blocks * 2 * kPanelRows * general.panel_stride);
  }
  return plan;
}

/// Takes the layers' places, and fills in everything that the samples and the weights determine.
template <class T>
const char* enqueue_samples(const PathConnectivity<T>& op, Plan<T>& plan, Arena& arena, CUstream_st* stream) {
  if (plan.general_blocks == 0) return "no CUDA device";
  const char* error = store_nodes(op.nodes, plan.nodes, plan.problem.nodes, stream);
  plan.general.problem = plan.problem;
  Layer<T> before{};
  for (int l = 0; l <= op.layers && !error; ++l) {
    const Layer<T> layer = layer_of(op, l, plan.general.stencil.size > 0, arena);
    const std::int64_t blocks = blocks_of(op.samples, kForwardTile) * (layer.stride / kForwardTile);
    const T *const before_a = before.a, *const before_rounding = before.rounding;
    error = launch(forward_kernel<T>, blocks, kForwardTile * kForwardTile, 0, stream, plan.problem, layer, l, op.z,
                   before_a, before_rounding, before.width, before.stride, Earlier<T>{}, Earlier<T>{}, plan.choice.limit,
                   plan.sums);
    if (l == 0) plan.first = layer;
    before = layer;
  }
  return error ? error : launch(scale_kernel<T>, plan.problem.outputs + 1, kThreads, 0, stream, plan.problem, plan.choice);
}

template <class T>
std::size_t workspace(const PathConnectivity<T>& op, const Plan<T>& plan, Arena& arena) {
  for (int l = 0; l <= op.layers; ++l) layer_of(op, l, plan.general.stencil.size > 0, arena);
  return arena.used;
}

template <class T, int kUnits, int kStencil>
const char* enqueue_general(const Plan<T>& plan, CUstream_st* stream) {
  return launch(general_kernel<T, kUnits, kStencil>, plan.general_blocks, kThreads, plan.general_shared, stream,
                plan.general);
}

// ---- float: the plan ----

/// What a kernel of halves wants of the layers.
struct Dialect {
  bool tails;   // widths may end in a step of 8 units
  bool silu;    // z and a in units of -log2(e), and 1 / scale: SiLU's exponentials are then ex2 of z
  bool slopes;  // records have slopes
};

/// Host's view of a float problem: everything's place in the workspace.
struct HalfPlan {
  Problem<float> problem{};
  Dialect dialect{};
  float* zeros = nullptr;  // RangeFlags, then each layer's largest |a|
  std::int64_t zero_count = 0;
  float* nodes = nullptr;
};

/// Everything but the layers, which come last in the arena, one by one.
inline HalfPlan make_half_plan(const PathConnectivity<float>& op, const Dialect& dialect, Arena& arena) {
  HalfPlan plan;
  plan.dialect = dialect;
  Problem<float>& problem = plan.problem;
  problem.last = op.layers;
  problem.ends_linear = op.layers > 0 && op.activations[op.layers].kind == ActivationKind::kIdentity;
  problem.halves_alone = op.tf32;
  problem.samples = op.samples;
  problem.outputs = op.widths[op.layers];
  problem.connectivity = op.connectivity;
  problem.counts = op.counts;
  problem.layers = arena.take<Layer<float>>(op.layers + 1);
  problem.y = arena.take<float>(op.samples * problem.outputs);
  problem.y_low = arena.take<float>(op.samples * problem.outputs);
  problem.rounding = arena.take<float>(op.samples * problem.outputs);
  problem.scale = arena.take<float>(problem.outputs);
  plan.nodes = arena.take<float>(3 * std::int64_t(op.nodes.interior));
  plan.zero_count = sizeof(RangeFlags) / sizeof(float);
  for (int l = 0; l <= op.layers; ++l) plan.zero_count += steps_of(op.widths[l], dialect.tails).units();
  plan.zeros = arena.take<float>(plan.zero_count);
  problem.range = reinterpret_cast<RangeFlags*>(plan.zeros);
  return plan;
}

/// Values below v that are added to later ones. Value 0 is the samples': it has no residual.
inline int sources_before(const PathConnectivity<float>& op, int v) {
  int count = 0;
  for (int source = 1; op.skips && source < v; ++source) {
    bool is_added = false;
    for (int later = source + 1; later < 2 * (op.layers + 1); ++later) is_added |= op.skips[later] == source;
    count += is_added;
  }
  return count;
}

/// Layer l's place in the workspace; to be called for all layers in order.
inline Layer<float> half_layer_of(const PathConnectivity<float>& op, const HalfPlan& plan, int l, Arena& arena) {
  Layer<float> layer = layer_of(op, l, plan.dialect.slopes, arena);
  HalfLayer& half = layer.half;
  half.steps = steps_of(layer.width, plan.dialect.tails);
  half.arrays = plan.dialect.slopes ? 3 : 2;
  half.parts = plan.problem.halves_alone ? 1 : 2;
  half.factor = plan.dialect.silu ? float(-1.4426950408889634) : 1.0f;
  half.inverse = plan.dialect.silu;
  std::int64_t largest = sizeof(RangeFlags) / sizeof(float);
  for (int before = 0; before < l; ++before) largest += steps_of(op.widths[before], plan.dialect.tails).units();
  half.largest = plan.zeros + largest;
  for (int after = 0; after < 2; ++after) {
    const int value = 2 * l + after, source = op.skips ? op.skips[value] : -1;
    half.added[after] = source > 0 ? sources_before(op, source) : -1;
    half.kept[after] = sources_before(op, value + 1) > sources_before(op, value) ? sources_before(op, value) : -1;
  }
  if (l < op.layers || !plan.problem.ends_linear) {
    half.records = arena.take<float>(blocks_of(op.samples, kGroup) * half.group_floats());
  }
  half.units = arena.take<float>(2 * half.steps.units());
  if (l > 0) {
    half.weights = arena.take<uint2>(half.parts * half.part_fragments(steps_of(op.widths[l - 1], plan.dialect.tails)));
  }
  return layer;
}

/// Takes the layers' places, and fills in everything that the samples and the weights determine. take(l, layer) sees each.
template <class Take>
const char* enqueue_half_samples(const PathConnectivity<float>& op, HalfPlan& plan, Arena& arena, CUstream_st* stream,
                                 const Take& take) {
  const char* error =
      message(cudaMemsetAsync(plan.zeros, 0, std::size_t(plan.zero_count) * sizeof(float), stream));
  std::int64_t blocks = plan.problem.outputs;
  const Arena layers_from = arena;
  Layer<float> before{};
  const auto earlier_of = [&](int value) {
    Earlier<float> earlier{};
    if (!op.skips) return earlier;
    earlier.shift = op.shifts[value];
    const int source = op.skips[value];
    if (source < 0) return earlier;
    Arena again = layers_from;  // places of a layer are cheaper found again than kept
    Layer<float> layer{};
    for (int l = 0; l <= source / 2; ++l) layer = half_layer_of(op, plan, l, again);
    earlier.value = source % 2 ? layer.v : layer.z;
    earlier.rounding = layer.rounding;
    return earlier;
  };
  for (int l = 0; l <= op.layers && !error; ++l) {
    const Layer<float> layer = half_layer_of(op, plan, l, arena);
    take(l, layer);
    const std::int64_t tiles = blocks_of(op.samples, kForwardTile) * (layer.stride / kForwardTile);
    const float *const before_v = before.v, *const before_rounding = before.rounding;
    const Earlier<float> into_z = earlier_of(2 * l), into_v = earlier_of(2 * l + 1);
    error = launch(forward_kernel<float>, tiles, kForwardTile * kForwardTile, 0, stream, plan.problem, layer, l, op.z,
                   before_v, before_rounding, before.width, before.stride, into_z, into_v, 0.0,
                   static_cast<double*>(nullptr));
    const FinishBlocks finish = finish_blocks(layer, op.samples);
    blocks += finish.records + finish.rows;
    before = layer;
  }
  return error ? error : launch(finish_kernel, blocks, kThreads, 0, stream, plan.problem);
}

inline std::size_t half_workspace(const PathConnectivity<float>& op, const HalfPlan& plan, Arena& arena) {
  for (int l = 0; l <= op.layers; ++l) half_layer_of(op, plan, l, arena);
  return arena.used;
}

}  // namespace
}  // namespace lmn
