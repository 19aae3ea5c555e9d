// What path_connectivity and hermite_connectivity share: the network at the samples, and the kernel that carries panels of
// residuals from layer to layer, for any depth, width, activations and dtype.
#pragma once
#include "device.h"

#include <vector>

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
  float4* packed;            // float: weights as fragments, [blocks of 8 units][steps][lanes]
  double2* fragments;        // double: the same, see chain64.cuh
  int added[2], kept[2];     // slots of the residuals that are added to, and kept of, z and v; none: -1
};

/// The kernels' view of the problem, all in the memory of the device.
template <class T>
struct Problem {
  Layer<T>* layers;     // [last + 1]
  int last;
  bool ends_linear;     // the last layer has no activation
  bool tf32;
  DeviceNodes<T> nodes;
  std::int64_t samples, outputs;
  T *y, *y_low, *scale; // [samples, outputs] scaled; what rounding linear ones to T lost; [outputs]
  T* rounding;          // [samples, outputs], scaled: epsilons of it are y's rounding
  T* connectivity;
  std::int64_t* counts;
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
/// choice of the kernel, infinite where one is not below the limit. into_z, into_v: what the network adds there.
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
  if (sample < problem.samples) {
    T activated = value;
    T slope = T(0);
    with_kind(layer.kind, [&](auto kind) {
      activated = activate<kind.value, T>(value, layer.alpha, layer.beta);
      if (layer.slope) slope = derivative<kind.value, T>(value, layer.alpha, layer.beta);
    });
    if (layer.slope) layer.slope[sample * layer.stride + unit] = valid ? slope : T(0);
    layer.z[sample * layer.stride + unit] = valid ? value : T(0);
    layer.a[sample * layer.stride + unit] = valid ? activated : T(0);
    squares += sum * sum;
    T left = activated;
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

/// Block k scales output k to order 1; the block after the last decides between the kernels, and begins the count.
template <class T>
__global__ void scale_kernel(Problem<T> problem, Choice choice) {
  __shared__ double partial[kThreads];
  const std::int64_t k = blockIdx.x;
  if (k == problem.outputs) {
    double sum = 0;
    for (std::int64_t n = threadIdx.x; n < choice.blocks; n += kThreads) sum += choice.sums[n];
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
      *choice.elsewhere = choice.limit > 0 && sum >= choice.least && !isinf(sum);
      problem.counts[0] = problem.counts[1] = 0;
    }
    return;
  }
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

/// Sums of a warp's tiles: first and second of two rows g and g + 8, outputs 2 q and 2 q + 1, as multiply_add() has them.
/// Rows from 16 m on, units of every `apart`-th block of 8 from `block` on.
template <int kM, int kN>
__device__ inline void multiply_panel(float (&sums)[kM][kN][4], const Layer<float>& layer, const float* panel,
                                      std::int64_t panel_stride, std::int64_t depth, int m0, std::int64_t block, int apart,
                                      bool tf32) {
  const int lane = int(threadIdx.x) % kWarp;
  const std::int64_t steps = blocks_of(depth, kColumns), blocks = blocks_of(layer.width, 8);
  for (std::int64_t step = 0; step < steps; ++step) {
    float a[kM][2][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* row = panel + (16 * (m0 + m) + 8 * half + lane / 4) * panel_stride + step * kColumns;
        const float4 v = *reinterpret_cast<const float4*>(row + 4 * (lane % 4));
        a[m][half][0] = v.x, a[m][half][1] = v.y, a[m][half][2] = v.z, a[m][half][3] = v.w;
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (block + n * apart >= blocks) break;
      const float4 v = layer.packed[((block + n * apart) * steps + step) * kWarp + lane];
      const float w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        std::uint32_t w_high[2], w_low[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          w_high[c] = to_tf32(w[k + c]);
          w_low[c] = to_tf32(w[k + c] - __uint_as_float(w_high[c]));
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          std::uint32_t high[4], low[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float e = a[m][c % 2][k + c / 2];
            high[c] = to_tf32(e);
            low[c] = to_tf32(e - __uint_as_float(high[c]));
          }
          if (!tf32) {
            multiply_add(sums[m][n], low, w_high[0], w_high[1]);
            multiply_add(sums[m][n], high, w_low[0], w_low[1]);
          }
          multiply_add(sums[m][n], high, w_high[0], w_high[1]);
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
                                std::int64_t panel_stride, bool tf32) {
  constexpr int kM = 2, kN = 4, kGroups = kPanelTiles / kM;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int m0 = kM * (warp % kGroups);
  for (std::int64_t block = kN * (warp / kGroups); 8 * block < layer.stride; block += kN * kWarps / kGroups) {
    T sums[kM][kN][4] = {};
    multiply_panel<kM, kN>(sums, layer, panel, panel_stride, depth, m0, block, 1, tf32);
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
          make_deviations(layer, problem.layers[l - 1].width, panel, next, p.panel_stride, problem.tf32);
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
                                    problem.layers[problem.last - 1].width, m0, chunk / 8 + unit0, kApart, problem.tf32);
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

/// Weights [width, depth] in the order in which multiply_panel() takes them. A thread per lane of a fragment.
__global__ void pack_kernel(Layer<float> layer, std::int64_t depth, std::int64_t count) {
  const std::int64_t n = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= count) return;
  const std::int64_t steps = blocks_of(depth, kColumns), lane = n % kWarp, step = n / kWarp % steps;
  const std::int64_t unit = n / kWarp / steps * 8 + lane / 4, d = step * kColumns + 4 * (lane % 4);
  float w[4];
  for (int c = 0; c < 4; ++c) w[c] = unit < layer.width && d + c < depth ? layer.weights[unit * depth + d + c] : 0.0f;
  layer.packed[n] = make_float4(w[0], w[1], w[2], w[3]);
}

/// The same in float64: {2 q, 2 q + 1} of each 8 inputs.
__global__ void pack64_kernel(Layer<double> layer, std::int64_t depth, std::int64_t count) {
  const std::int64_t n = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= count) return;
  const std::int64_t steps = blocks_of(depth, 8), lane = n % kWarp, step = n / kWarp % steps;
  const std::int64_t unit = n / kWarp / steps * 8 + lane / 4, d = 8 * step + 2 * (lane % 4);
  const bool inside = unit < layer.width;
  layer.fragments[n] = make_double2(inside && d < depth ? layer.weights[unit * depth + d] : 0.0,
                                    inside && d + 1 < depth ? layer.weights[unit * depth + d + 1] : 0.0);
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
  Layer<T> first{}, last{};
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
  if (sizeof(T) == 4) {
    layer.packed = arena.take<float4>(blocks_of(layer.width, 8) * blocks_of(op.widths[l - 1], kColumns) * kWarp);
  } else {
    layer.fragments = arena.take<double2>(blocks_of(layer.width, 8) * blocks_of(op.widths[l - 1], 8) * kWarp);
  }
  return layer;
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
  slots.of.assign(std::size_t(values), -1);
  std::vector<int> last(slots.of), free_from;
  for (int value = 0; value < values; ++value) {
    if (op.skips[value] >= 0) last[std::size_t(op.skips[value])] = value;
  }
  for (int value = 0; value < values; ++value) {
    if (last[std::size_t(value)] < 0) continue;
    std::size_t slot = 0;
    while (slot < free_from.size() && free_from[slot] > value) ++slot;
    if (slot == free_from.size()) free_from.push_back(0);
    free_from[slot] = last[std::size_t(value)];
    slots.of[std::size_t(value)] = int(slot);
  }
  slots.count = int(free_from.size());
  return slots;
}

/// What the network adds to value 2 l (half 0) or 2 l + 1, at the samples. arena: at the first layer's place.
template <class T>
Earlier<T> earlier_of(const PathConnectivity<T>& op, int l, int half, bool slopes, Arena arena) {
  Earlier<T> earlier{nullptr, nullptr, nullptr};
  if (!op.skips) return earlier;
  earlier.shift = op.shifts[2 * l + half];
  const int source = op.skips[2 * l + half];
  if (source < 0) return earlier;
  Layer<T> layer{};
  for (int n = 0; n <= source / 2; ++n) layer = layer_of(op, n, slopes, arena);
  earlier.value = source % 2 ? layer.v : layer.z;
  earlier.rounding = layer.rounding;
  return earlier;
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
  problem.tf32 = op.tf32;
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
  plan.general.stencil = stencil;
  if (sizeof(T) == 8) return plan;
  std::int64_t widest = 0;
  for (int l = 0; l < op.layers + !problem.ends_linear; ++l) widest = op.widths[l] > widest ? op.widths[l] : widest;
  General<T>& general = plan.general;
  general.skip = plan.flag;
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

template <class T>
const char* pack_layer(const Layer<T>& layer, std::int64_t depth, CUstream_st* stream) {
  const std::int64_t count = blocks_of(layer.width, 8) * blocks_of(depth, sizeof(T) == 4 ? kColumns : 8) * kWarp;
  if constexpr (sizeof(T) == 4) {
    return launch(pack_kernel, blocks_of(count, kThreads), kThreads, 0, stream, layer, depth, count);
  } else {
    return launch(pack64_kernel, blocks_of(count, kThreads), kThreads, 0, stream, layer, depth, count);
  }
}

/// Takes the layers' places, and fills in everything that the samples and the weights determine.
template <class T>
const char* enqueue_samples(const PathConnectivity<T>& op, Plan<T>& plan, Arena& arena, CUstream_st* stream) {
  if (device_attribute(cudaDevAttrMultiProcessorCount) == 0) return "no CUDA device";
  const char* error = store_nodes(op.nodes, plan.nodes, plan.problem.nodes, stream);
  plan.general.problem = plan.problem;
  const bool slopes = plan.general.stencil.size > 0;
  const Arena first = arena;
  const Slots slots = assign_slots(op);
  Layer<T> before{};
  for (int l = 0; l <= op.layers && !error; ++l) {
    Layer<T> layer = layer_of(op, l, slopes, arena);
    for (int half = 0; op.skips && half < 2; ++half) {
      const int value = 2 * l + half, source = op.skips[value];
      layer.added[half] = source < 0 ? -1 : slots.of[std::size_t(source)];
      layer.kept[half] = slots.of[std::size_t(value)];
    }
    const std::int64_t blocks = blocks_of(op.samples, kForwardTile) * (layer.stride / kForwardTile);
    const T *const before_v = before.v, *const before_rounding = before.rounding;
    error = launch(forward_kernel<T>, blocks, kForwardTile * kForwardTile, 0, stream, plan.problem, layer, l, op.z,
                   before_v, before_rounding, before.width, before.stride, earlier_of(op, l, 0, slopes, first),
                   earlier_of(op, l, 1, slopes, first), plan.choice.limit, plan.sums);
    if (!error && l > 0) error = pack_layer(layer, before.width, stream);
    if (l == 0) plan.first = layer;
    plan.last = layer;
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

}  // namespace
}  // namespace lmn
