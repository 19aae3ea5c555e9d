// What path_connectivity and hermite_connectivity share on CUDA, in both dtypes: the network at the samples, and the statistics
// of a pair. The kernels of the paths are in chained.cuh, panels.cuh (float) and chain64.cuh (double).
#pragma once
#include "device.h"
#include "halves.h"

#include <cstdlib>
#include <vector>

#include "../activation.h"  // these two after device.h, whose functions they use
#include "../statistics.h"

namespace lmn {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = 16;  // of hidden units in one step: each of four lanes takes four that lie side by side

LMN_FN std::int64_t padded(std::int64_t width) { return blocks_of(width, kColumns) * kColumns; }

// ---- several networks in one launch ----
//
// Each network has the same places in a workspace of its own, one workspace behind the other, and blocks of its own, whose
// blockIdx.y is its number. A kernel is given the first one's places, and moves on from there. The layers that it finds in the
// workspace have their own network's places.

/// What the block's network has in place of something of the first one's; `apart` bytes behind that is the second one's. Not of
/// null.
template <class U>
__device__ inline U* in_network(U* first, std::int64_t apart) {
  return reinterpret_cast<U*>(reinterpret_cast<char*>(first) + blockIdx.y * apart);
}
template <class U>
__device__ inline const U* in_network(const U* first, std::int64_t apart) {
  return reinterpret_cast<const U*>(reinterpret_cast<const char*>(first) + blockIdx.y * apart);
}
/// The same; of null null.
template <class U>
__device__ inline U* in_network_if(U* first, std::int64_t apart) {
  return first ? in_network(first, apart) : nullptr;
}

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
  double2* fragments;        // double: weights as fragments, see chain64.cuh
  int added[2], kept[2];     // slots of the residuals that are added to, and kept of, z and v; none: -1
};

/// What the samples leave to the kernels of halves to decide; zeros before.
struct RangeFlags {
  int largest_z;  // bits of the largest |z| of the first layer, as a float
  int careful;    // 1 where some SiLU unit's largest |a| is below kTinyUnit, but not 0, or above kHugeUnit
};
constexpr float kTinyUnit = 1e-10f, kHugeUnit = 0x1p40f;

/// The kernels' view of the problem, all in the memory of the device.
template <class T>
struct Problem {
  Layer<T>* layers;     // [last + 1]
  int last;
  bool ends_linear;     // the last layer has no activation
  bool halves_alone;    // float: products may round residuals and weights to halves; else each is two halves
  DeviceNodes<T> nodes;
  std::int64_t samples, outputs;
  T *y, *y_low, *scale; // [samples, outputs] scaled; what rounding linear ones to T lost; [outputs]
  T* rounding;          // [samples, outputs], scaled: epsilons of it are y's rounding
  float4* ends;         // float: the same once more for kernels of at most kEndOutputs outputs, see write_end; else null
  T* connectivity;
  std::int64_t* counts;
  RangeFlags* range;    // float
  std::int64_t apart;   // bytes between the workspaces of two networks

  __device__ Layer<T>* own_layers() const { return in_network(layers, apart); }
  __device__ T* own_connectivity() const { return in_network(connectivity, samples * samples * std::int64_t(sizeof(T))); }
  __device__ std::int64_t* own_counts() const { return in_network(counts, 2 * std::int64_t(sizeof(std::int64_t))); }
};

/// As the block's network has it; the nodes are those of all.
template <class T>
__device__ inline Problem<T> of_network(Problem<T> problem) {
  problem.layers = problem.own_layers();
  problem.y = in_network(problem.y, problem.apart), problem.y_low = in_network(problem.y_low, problem.apart);
  problem.scale = in_network(problem.scale, problem.apart), problem.rounding = in_network(problem.rounding, problem.apart);
  problem.ends = in_network_if(problem.ends, problem.apart), problem.range = in_network_if(problem.range, problem.apart);
  problem.connectivity = problem.own_connectivity(), problem.counts = problem.own_counts();
  return problem;
}

/// depth: the width of the layer before.
template <class T>
__device__ inline Layer<T> of_network(Layer<T> layer, std::int64_t depth, std::int64_t apart) {
  layer.z = in_network(layer.z, apart), layer.a = in_network(layer.a, apart), layer.v = in_network(layer.v, apart);
  layer.rounding = in_network(layer.rounding, apart), layer.slope = in_network_if(layer.slope, apart);
  layer.weights = in_network_if(layer.weights, layer.width * depth * std::int64_t(sizeof(T)));
  layer.biases = in_network_if(layer.biases, layer.width * std::int64_t(sizeof(T)));
  layer.fragments = in_network_if(layer.fragments, apart);
  HalfLayer& half = layer.half;
  half.largest = in_network_if(half.largest, apart), half.records = in_network_if(half.records, apart);
  half.units = in_network_if(half.units, apart), half.weights = in_network_if(half.weights, apart);
  return layer;
}

constexpr int kEndOutputs = 32;
/// All that a pair's statistics want of output k at one sample, to be read at once: y, what rounding it lost, its rounding's
/// square, and 1 where an activation may hide that rounding. [samples][kEndOutputs]: lane 4 g + q has outputs 16 h + 4 q + m at
/// 4 (4 h + m) + q.
__device__ inline void write_end(float4* ends, std::int64_t sample, std::int64_t k, float y, float y_low, float rounding,
                                 float scale) {
  const std::int64_t place = 4 * (k / 16 * 4 + k % 4) + k % 16 / 4;
  const float hides = hides_rounding<float, float>(rounding, scale, Epsilon<float>::value);
  ends[sample * kEndOutputs + place] = make_float4(y, y_low, rounding * rounding, hides);
}

/// Sums over the outputs of a pair.
struct PairSums {
  double nonlinear = 0;  // of 1 - r2; a NaN where an output is unresolved
  int constants = 0;     // outputs
};

/// 1 - r2 of an output as share_of_output has it, in a fourth of the instructions; false where that may find the output constant
/// or unresolved, and `share` may be anything. te: of the moments; bend: variance_t var(e) - te^2; factor: of te, squared of bend;
/// magnitude: the larger |y| of the two ends.
__device__ inline bool ordinary_share(float te, float bend, float factor, float chord, float magnitude, float rounding_squared,
                                      float variance_t, float& share) {
  constexpr float kConstant = float(kConstantUlps) * Epsilon<float>::value;
  constexpr float kResolved = float(kResolvedUlps32) * Epsilon<float>::value;
  const float covariance = fma(te, factor, chord * variance_t), residual = bend * (factor * factor);
  const float total = fma(covariance, covariance, residual);
  const float squares = fma(magnitude * (kConstant * kConstant), magnitude, rounding_squared * (kResolved * kResolved));
  share = ::fmaxf(residual, 0.0f) * reciprocal(total);
  // One sum in place of the larger of three bounds. No comparison holds for a NaN.
  return total > fma(squares, variance_t, float(kLeastTotal32)) && total < float(kLargestTotal32);
}

__device__ inline float bend_of(const Moments<float>& m, float variance_t) {
  return fma(variance_t, fma(-m.e, m.e, m.ee), -(m.te * m.te));
}

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

/// Sum over the block, the same for any schedule; valid in its first thread.
__device__ inline double block_sum(double value) {
  __shared__ double partial[kWarps];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 1; warp < kWarps; ++warp) value += partial[warp];
  return value;
}

// ---- units of work ----

/// The n-th unit of work: a first sample i and the n-th block of `size` second samples, those from i on being in it. Units of
/// one block are side by side, so that the warps that share a cache read the same second samples.
template <class Index>
LMN_FN void find_unit(Index n, Index size, Index& i, Index& block) {
  const auto start = [size](Index b) { return size * (b * (b + 1) / 2); };
  block = Index((::sqrt(1.0 + 8.0 * double(n) / double(size)) - 1.0) / 2.0);
  while (block > 0 && start(block) > n) --block;
  while (start(block + 1) <= n) ++block;
  i = n - start(block);
}
inline std::int64_t count_units(std::int64_t samples, std::int64_t size) {
  const std::int64_t blocks = blocks_of(samples, size);
  return size * (blocks * (blocks - 1) / 2) + samples;
}

// ---- the network at the samples ----

constexpr int kForwardTile = 16;
static_assert(kForwardTile * kForwardTile == kThreads);

/// What is added to one of a layer's values at the samples: an earlier value and its rounding, [samples, stride], and what is
/// affine in the samples, [samples, width]; each may be null.
template <class T>
struct Earlier {
  const T *value, *rounding, *shift;
};

template <class T>
__device__ inline Earlier<T> of_network(const Earlier<T>& earlier, const Layer<T>& layer, const Problem<T>& problem) {
  return {in_network_if(earlier.value, problem.apart), in_network_if(earlier.rounding, problem.apart),
          in_network_if(earlier.shift, problem.samples * layer.width * std::int64_t(sizeof(T)))};
}

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

/// Notes a block's largest |a| and |v| of each unit, of finite ones; and of the first layer the largest |z|, a NaN too.
__device__ inline void note_range(const Problem<float>& problem, const Layer<float>& layer, std::int64_t first_unit, int row,
                                  int column, float z, float a, bool is_first) {
  __shared__ int largest[kForwardTile];  // as integers positive floats have the same order
  if (row == 0) largest[column] = 0;
  __syncthreads();
  if (a <= 0x1.fffffep127f) atomicMax(&largest[column], int(__float_as_uint(a)));
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

/// A block makes 16 samples x 16 units of one layer, one thread per value. Products in double: a node's rounding
/// averages out along a path, the ends' would tilt all of it. `before` null: z itself. into_z, into_v: what the network adds
/// there. In double the first layer's blocks sum |z| for the choice of the kernel, infinite where one is not below the limit.
template <class T>
__global__ void forward_kernel(Problem<T> problem, Layer<T> layer, int index, const T* z, const T* before,
                               const T* before_rounding, std::int64_t depth, std::int64_t before_stride,
                               Earlier<T> into_z, Earlier<T> into_v, double limit, double* sums) {
  problem = of_network(problem);
  layer = of_network(layer, depth, problem.apart);
  z = in_network(z, problem.samples * layer.width * std::int64_t(sizeof(T)));  // the first layer's
  before = in_network_if(before, problem.apart), before_rounding = in_network_if(before_rounding, problem.apart);
  into_z = of_network(into_z, layer, problem), into_v = of_network(into_v, layer, problem);
  sums = in_network_if(sums, problem.apart);
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
      if constexpr (sizeof(T) == 4) {  // the half's own rounding, of the largest |a| of all samples
        const float quantum = inside ? problem.layers[index - 1].half.largest[d] * kHalfRounding : 0.0f;
        rounding_tile[row][column] = float(::hypot(double(rounding_tile[row][column]), double(quantum)));
      }
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
      layer.rounding[sample * layer.stride + unit] = valid ? T(::sqrt(squares)) : T(0);  // of z, which may be added to a
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
    note_range(problem, layer, first_unit, row, column, valid ? absolute(value) : 0.0f,
               valid ? larger(absolute(activated), absolute(left)) : 0.0f, !before);
    if (!before && valid && unit == 0) problem.connectivity[sample * (problem.samples + 1)] = 1;
    return;
  }
  if (before) return;
  const double magnitude = ::fabs(sum);  // 0 outside the matrix
  const double total = block_sum(magnitude < limit ? magnitude : HUGE_VAL);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

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
    if constexpr (sizeof(T) == 4) {
      if (problem.ends) write_end(problem.ends, n, k, problem.y[at], problem.y_low[at], problem.rounding[at], scale);
    }
  }
}

// ---- places in the workspace ----

/// Of the first network's workspace; apart: bytes between the workspaces of two networks.
struct Arena : ArenaOf<256> {
  std::int64_t apart = 0;
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
  layer.v = op.skips && (op.skips[2 * l + 1] >= 0 || op.shifts[2 * l + 1]) ? arena.take<T>(op.samples * layer.stride)
                                                                          : layer.a;
  layer.slope = slopes ? arena.take<T>(op.samples * layer.stride) : nullptr;
  layer.rounding = arena.take<T>(op.samples * layer.stride);
  layer.added[0] = layer.added[1] = layer.kept[0] = layer.kept[1] = -1;
  if (l == 0) return layer;
  layer.weights = op.weights[l - 1];
  layer.biases = op.biases[l - 1];
  if (sizeof(T) == 8) {
    layer.fragments = arena.take<double2>(blocks_of(layer.width, 8) * blocks_of(op.widths[l - 1], 8) * kWarp);
  }
  return layer;
}

/// The problem but for its nodes and its range.
template <class T>
Problem<T> make_problem(const PathConnectivity<T>& op, Arena& arena) {
  Problem<T> problem{};
  problem.last = op.layers;
  problem.ends_linear = op.layers > 0 && op.activations[op.layers].kind == ActivationKind::kIdentity;
  problem.halves_alone = op.halves_alone;
  problem.apart = arena.apart;
  problem.samples = op.samples;
  problem.outputs = op.widths[op.layers];
  problem.connectivity = op.connectivity;
  problem.counts = op.counts;
  problem.layers = arena.take<Layer<T>>(op.layers + 1);
  problem.y = arena.take<T>(op.samples * problem.outputs);
  problem.y_low = arena.take<T>(op.samples * problem.outputs);
  problem.rounding = arena.take<T>(op.samples * problem.outputs);
  problem.scale = arena.take<T>(problem.outputs);
  return problem;
}

/// Of the workspaces of all networks that are measured at a time; networks that want more are not short of blocks.
inline std::int64_t stack_bytes() {
#if defined(LMN_EMULATED)
  if (const char* const bytes = std::getenv("LMNFAST_EMULATED_STACK")) return std::atoll(bytes);  // few, for a test
#endif
  return std::int64_t(256) << 20;
}

/// How many networks are measured at a time, whose workspaces have so many bytes each.
inline std::int64_t networks_at_once(std::int64_t networks, std::size_t bytes) {
  const std::int64_t most = at_most(stack_bytes() / std::int64_t(bytes), kMostNetworks);
  return at_most(networks, most > 1 ? most : 1);
}

/// Calls enqueue(op) for so many of the op's networks at a time.
template <class T, class Enqueue>
const char* in_parts(const PathConnectivity<T>& op, std::size_t bytes, const Enqueue& enqueue) {
  const std::int64_t most = networks_at_once(op.networks, bytes);
  const std::size_t values = op.skips ? 2 * std::size_t(op.layers + 1) : 0;
  for (std::int64_t first = 0; first < op.networks; first += most) {
    PathConnectivity<T> part = op;
    std::vector<const T*> weights(op.weights, op.weights + op.layers), biases(op.biases, op.biases + op.layers);
    std::vector<const T*> shifts(op.shifts, op.shifts + values);
    for (int l = 0; l < op.layers; ++l) {
      weights[std::size_t(l)] += first * op.widths[l] * op.widths[l + 1];
      if (op.biases[l]) biases[std::size_t(l)] += first * op.widths[l + 1];
    }
    for (std::size_t value = 0; value < values; ++value) {
      if (op.shifts[value]) shifts[value] += first * op.samples * op.widths[value / 2];
    }
    part.networks = at_most(most, op.networks - first);
    part.z += first * op.samples * op.widths[0];
    part.weights = weights.data(), part.biases = biases.data();
    if (op.skips) part.shifts = shifts.data();
    part.connectivity += first * op.samples * op.samples;
    part.counts += 2 * first;
    if (op.exact) part.exact += first * op.samples * op.exact_width, part.inputs += first * op.samples * op.input_width;
    if (const char* error = enqueue(part)) return error;
  }
  return nullptr;
}

/// A slot for each value whose residuals are added to later ones, free again behind the last of those; -1 for the others.
struct Slots {
  std::vector<int> of;  // [values]
  int count = 0;
};
template <class T>
Slots assign_slots(const PathConnectivity<T>& op) {
  Slots slots;
  const int values = op.skips ? 2 * (op.layers + 1) : 0;
  std::vector<int> free_from(static_cast<std::size_t>(values));
  slots.of.resize(std::size_t(values));
  slots.count = assign_slots(op.skips, values, slots.of.data(), free_from.data());
  return slots;
}

template <class T>
void give_slots(const PathConnectivity<T>& op, const Slots& slots, int l, Layer<T>& layer) {
  for (int half = 0; op.skips && half < 2; ++half) {
    const int value = 2 * l + half, source = op.skips[value];
    layer.added[half] = source < 0 ? -1 : slots.of[std::size_t(source)];
    layer.kept[half] = slots.of[std::size_t(value)];
  }
}

/// What the network adds to value 2 l (half 0) or 2 l + 1, at the samples. layers: those up to l.
template <class T>
Earlier<T> earlier_of(const PathConnectivity<T>& op, int l, int half, const std::vector<Layer<T>>& layers) {
  Earlier<T> earlier{nullptr, nullptr, nullptr};
  if (!op.skips) return earlier;
  earlier.shift = op.shifts[2 * l + half];
  const int source = op.skips[2 * l + half];
  if (source < 0) return earlier;
  const Layer<T>& layer = layers[std::size_t(source / 2)];
  earlier.value = source % 2 ? layer.v : layer.z;
  earlier.rounding = layer.rounding;
  return earlier;
}

/// A launch for each layer: its values at the samples. layer_at(l): its place, to be asked for in order; seen(l, layer).
template <class T, class LayerAt, class Seen>
const char* enqueue_forward(const PathConnectivity<T>& op, const Problem<T>& problem, double limit, double* sums,
                            CUstream_st* stream, const LayerAt& layer_at, const Seen& seen) {
  const Slots slots = assign_slots(op);
  std::vector<Layer<T>> layers;
  const char* error = nullptr;
  for (int l = 0; l <= op.layers && !error; ++l) {
    layers.push_back(layer_at(l));
    Layer<T>& layer = layers.back();
    give_slots(op, slots, l, layer);
    const Layer<T> before = l > 0 ? layers[std::size_t(l - 1)] : Layer<T>{};
    const std::int64_t blocks = blocks_of(op.samples, kForwardTile) * (layer.stride / kForwardTile);
    const T *const before_v = before.v, *const before_rounding = before.rounding;
    error = launch(forward_kernel<T>, Grid(blocks, op.networks), kForwardTile * kForwardTile, 0, stream, problem, layer, l,
                   op.z, before_v, before_rounding, before.width, before.stride, earlier_of(op, l, 0, layers),
                   earlier_of(op, l, 1, layers), limit, sums);
    if (!error) error = seen(l, layer);
  }
  return error;
}

/// The spacing of equally spaced nodes; negative where they are not.
inline double spacing_of(const PathNodes& nodes) {
  const double spacing = nodes.interior > 1 ? (nodes.t[nodes.interior - 1] - nodes.t[0]) / (nodes.interior - 1) : 0.0;
  for (int m = 0; m < nodes.interior; ++m) {
    if (!(std::fabs(nodes.t[m] - (nodes.t[0] + m * spacing)) <= 4 * Epsilon<double>::value)) return -1;
  }
  return spacing;
}

inline std::size_t shared_limit() {
  return std::size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

}  // namespace
}  // namespace lmn
