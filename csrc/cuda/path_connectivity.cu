// Two kernels. One hidden layer with a usual activation, in float32: `shallow`, where each thread makes the elements of
// the matrix instruction's fragments that it owns and keeps the moments in registers. Everything else, float64 too:
// `general`, which carries panels of chord residuals from layer to layer. Before them the network at the samples.
#include "device.h"

#include "../activation.h"

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
  T *z, *a;                  // [samples, stride] before and after the activation
  const T *weights, *biases; // [width, width of the layer before], [width] or null
  float4* packed;            // float: weights as fragments, [blocks of 8 units][steps][lanes]
};

/// The kernels' view of the problem, all in the memory of the device.
template <class T>
struct Problem {
  Layer<T>* layers;     // [last + 1]
  int last;
  bool ends_linear;     // the last layer has no activation: its products are the residuals
  bool tf32;
  DeviceNodes<T> nodes;
  std::int64_t samples, outputs;
  T *y, *y_low, *scale; // [samples, outputs] scaled; what rounding linear ones to T lost; [outputs]
  T* connectivity;
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

/// 1 - r2 of output k between samples i and j.
template <class T>
__device__ inline double share_of(const T* y, const T* y_low, std::int64_t outputs, std::int64_t i, std::int64_t j,
                                  std::int64_t k, const Moments<T>& moments, T variance_t) {
  const std::int64_t at_i = i * outputs + k, at_j = j * outputs + k;
  const T first = y[at_i], second = y[at_j];
  const T chord = (second - first) + (y_low[at_j] - y_low[at_i]);
  return double(nonlinear_share<T, T>(chord, moments, larger(absolute(first), absolute(second)), variance_t,
                                      Epsilon<T>::value));
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

/// A block makes 16 samples x 16 units of one layer, one thread per value. Products in double: a node's rounding
/// averages out along a path, the ends' would tilt all of it. `before` null: z itself, and the block's sum of |z| for the
/// choice of the kernel, infinite where one is not below the limit.
template <class T>
__global__ void forward_kernel(Problem<T> problem, Layer<T> layer, int index, const T* z, const T* before,
                               std::int64_t depth, std::int64_t before_stride, double limit, double* sums) {
  __shared__ T a_tile[kForwardTile][kForwardTile + 1], w_tile[kForwardTile][kForwardTile + 1];
  const int row = int(threadIdx.x) / kForwardTile, column = int(threadIdx.x) % kForwardTile;
  const std::int64_t across = layer.stride / kForwardTile;
  const std::int64_t sample = blockIdx.x / across * kForwardTile + row;
  const std::int64_t first_unit = blockIdx.x % across * kForwardTile, unit = first_unit + column;
  if (blockIdx.x == 0 && threadIdx.x == 0) problem.layers[index] = layer;
  const bool valid = sample < problem.samples && unit < layer.width;
  double sum = 0;
  if (before) {
    for (std::int64_t begin = 0; begin < depth; begin += kForwardTile) {
      const std::int64_t d = begin + column, other = first_unit + row;
      a_tile[row][column] = sample < problem.samples && d < depth ? before[sample * before_stride + d] : T(0);
      w_tile[row][column] = other < layer.width && d < depth ? layer.weights[other * depth + d] : T(0);
      __syncthreads();
      for (int d_tile = 0; d_tile < kForwardTile; ++d_tile) {
        sum = ::fma(double(w_tile[column][d_tile]), double(a_tile[row][d_tile]), sum);
      }
      __syncthreads();
    }
    if (valid && layer.biases) sum += double(layer.biases[unit]);
  } else if (valid) {
    sum = double(z[sample * layer.width + unit]);
  }
  const T value = T(sum);
  if (sample < problem.samples) {
    T activated = value;
    with_kind(layer.kind, [&](auto kind) { activated = activate<kind.value, T>(value, layer.alpha, layer.beta); });
    layer.z[sample * layer.stride + unit] = valid ? value : T(0);
    layer.a[sample * layer.stride + unit] = valid ? activated : T(0);
    if (valid && index == problem.last) {
      problem.y_low[sample * layer.width + unit] = problem.ends_linear ? T(sum - double(value)) : T(0);
    }
  }
  if (before) return;
  const double magnitude = ::fabs(sum);  // 0 outside the matrix
  const double total = block_sum(magnitude < limit ? magnitude : HUGE_VAL);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

/// What decides between the kernels, and the decision.
struct Choice {
  const double* sums;     // [blocks] of the first layer
  std::int64_t blocks;
  double least, limit;    // sum of |z| for the shallow kernel, and largest |z|; a limit of 0: none
  int* shallow;
};

/// Block k scales output k to order 1; the block after the last decides between the kernels.
template <class T>
__global__ void scale_kernel(Problem<T> problem, Choice choice) {
  __shared__ double partial[kThreads];
  const std::int64_t k = blockIdx.x;
  if (k == problem.outputs) {
    double sum = 0;
    for (std::int64_t n = threadIdx.x; n < choice.blocks; n += kThreads) sum += choice.sums[n];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *choice.shallow = choice.limit > 0 && sum >= choice.least && !isinf(sum);
    return;
  }
  const Layer<T>& layer = problem.layers[problem.last];
  const T origin = layer.a[k];
  T largest = 0;
  for (std::int64_t n = threadIdx.x; n < problem.samples; n += kThreads) {
    const T difference = absolute(layer.a[n * layer.stride + k] - origin);
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
    problem.y[at] = layer.a[n * layer.stride + k] * scale;
    problem.y_low[at] *= scale;
  }
}

// ---- shallow: float32, one hidden layer, a linear end ----

constexpr int kSide = 16;    // a block's tile: 16 first x 16 second samples; a warp's: 4 x 8
constexpr int kSlab = 128;   // hidden units in shared memory at a time
// Rows 16 words apart in the banks: the two rows and four columns that 8 lanes read side by side do not meet.
constexpr int kRowStride = kSlab + 16;
constexpr int kOutputTiles = 4;  // of 8 outputs, whose moments the registers hold
constexpr int kOutputChunk = 8 * kOutputTiles;
constexpr int kSlabSteps = kSlab / kColumns;
constexpr int kStepFragments = kOutputTiles * kWarp;  // float4 each

// Beyond this |z| a product of two exponentials could overflow or lose its digits; and to_tf32_bits needs finite residuals.
constexpr double kSeparableLimit = 80, kDirectLimit = 1e12;
// 1 - 2 / (1 + exp(2 z)) is only right to an absolute epsilon; below this mean |z| tanh is evaluated directly.
constexpr double kTanhSeparableMean = 0.25;

struct Shallow {
  const float *z, *a;            // [samples, stride]
  const float *y, *y_low;        // [samples, outputs], scaled
  const float4 *high, *low;      // weights and what rounding them to TF32 lost, [chunks][steps][kOutputTiles][lanes]
  DeviceNodes<float> nodes;
  std::int64_t samples, outputs, stride;
  int width, steps;
  float alpha;                   // of the activation
  const int* shallow;
  float* connectivity;
};

/// One array of a side in shared memory.
using Row = float[kRowStride];

// The activations. kTables: exp(-(1 - t) f z_i) and exp(-t f z_j) are made once per sample and node (spec 4.4), and one
// reciprocal a point is left.
struct Silu {
  static constexpr bool kTables = true, kUsesZ = true;
  static constexpr float kFactor = 1, kShift = 0;
};
template <bool kTanh>  // tanh(z) = 2 sigmoid(2 z) - 1: activations are kept 1 higher, residuals do not see it
struct Logistic {
  static constexpr bool kTables = true, kUsesZ = false;
  static constexpr float kFactor = kTanh ? 2 : 1, kShift = kTanh ? 1 : 0;
};
template <ActivationKind kKind_>
struct Direct {
  static constexpr bool kTables = false, kUsesZ = true;
  static constexpr ActivationKind kKind = kKind_;
  static constexpr float kShift = 0;
};
template <class Curve> constexpr bool kIsSilu = Curve::kTables && Curve::kUsesZ;

/// Shared memory of a block: arrays [kSide][kRowStride], and fragments [kSlabSteps][kOutputTiles][lanes].
template <class Curve, bool kSplit>
struct Sides {
  static constexpr bool kScales = kIsSilu<Curve>;
  static constexpr int kArrays = 4 + (Curve::kTables ? 2 : 0) + (kScales ? 2 : 0);
  static constexpr int kFragments = kSlabSteps * kStepFragments;
  static constexpr std::size_t kBytes = kArrays * kSide * sizeof(Row) + (kSplit ? 2 : 1) * kFragments * sizeof(float4);

  float4 *high, *low;
  Row *first_z, *first_a, *second_z, *second_a;
  Row *first_table, *second_table;    // exp(-(1 - t) f z), exp(-t f z) at the current node
  Row *first_scaled_z, *first_scaled_a;  // (1 - t) z, (1 - t) a

  __device__ explicit Sides(unsigned char* memory) {
    high = reinterpret_cast<float4*>(memory);
    low = high + (kSplit ? kFragments : 0);
    Row* const rows = reinterpret_cast<Row*>(low + kFragments);
    first_z = rows;
    first_a = rows + kSide;
    second_z = rows + 2 * kSide;
    second_a = rows + 3 * kSide;
    first_table = rows + 4 * kSide;  // past the end where there are none; never used then
    second_table = rows + 5 * kSide;
    first_scaled_z = rows + 6 * kSide;
    first_scaled_a = rows + 7 * kSide;
  }
};

__device__ inline float4& at(Row* rows, int row, int column) { return *reinterpret_cast<float4*>(rows[row] + column); }

template <class Function>
__device__ inline float4 for_each(const float4& v, const Function& function) {
  return make_float4(function(v.x), function(v.y), function(v.z), function(v.w));
}

/// Brings units [begin, begin + kSlab) of the tile's samples, and the weights from them, to shared memory.
template <class Curve, bool kSplit>
__device__ void load_slab(const Shallow& p, const Sides<Curve, kSplit>& s, int i0, int j0, int begin, int chunk) {
  const int groups = int(at_most(kSlab, p.stride - begin)) / 4;
  for (int n = int(threadIdx.x); n < 2 * kSide * groups; n += kThreads) {
    const int row = n / groups % kSide, column = 4 * (n % groups);
    const bool first = n < kSide * groups;
    const std::int64_t from = at_most((first ? i0 : j0) + row, p.samples - 1) * p.stride + begin + column;
    at(first ? s.first_z : s.second_z, row, column) = *reinterpret_cast<const float4*>(p.z + from);
    at(first ? s.first_a : s.second_a, row, column) =
        for_each(*reinterpret_cast<const float4*>(p.a + from), [](float a) { return a + Curve::kShift; });
  }
  const int step = begin / kColumns;
  const std::int64_t from = (std::int64_t(chunk) * p.steps + step) * kStepFragments;
  const int fragments = int(at_most(kSlabSteps, p.steps - step)) * kStepFragments;
  for (int n = int(threadIdx.x); n < fragments; n += kThreads) {
    s.high[n] = p.high[from + n];
    if constexpr (kSplit) s.low[n] = p.low[from + n];
  }
}

/// Makes what depends on the node t.
template <class Curve, bool kSplit>
__device__ void fill_tables(const Sides<Curve, kSplit>& s, int groups, float t) {
  constexpr float kLog2e = 1.44269504f;
  for (int n = int(threadIdx.x); n < 2 * kSide * groups; n += kThreads) {
    const int row = n / groups % kSide, column = 4 * (n % groups);
    const bool first = n < kSide * groups;
    const float share = first ? 1 - t : t, power = -Curve::kFactor * kLog2e * share;
    const float4 z = at(first ? s.first_z : s.second_z, row, column);
    at(first ? s.first_table : s.second_table, row, column) =
        for_each(z, [power](float v) { return exp2_fast(power * v); });
    if (kIsSilu<Curve> && first) {
      at(s.first_scaled_z, row, column) = for_each(z, [share](float v) { return share * v; });
      at(s.first_scaled_a, row, column) = for_each(at(s.first_a, row, column), [share](float v) { return share * v; });
    }
  }
}

/// kCount neighbouring values of a row.
template <int kCount>
__device__ inline void take(float (&values)[kCount], Row* rows, int row, int column) {
  if constexpr (kCount == 4) {
    const float4 v = at(rows, row, column);
    values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
  } else {
    const float2 v = *reinterpret_cast<const float2*>(rows[row] + column);
    values[0] = v.x, values[1] = v.y;
  }
}

template <int kCount>
__device__ inline void take_bits(std::uint32_t (&bits)[kCount], const float4& v) {
  bits[0] = __float_as_uint(v.x), bits[1] = __float_as_uint(v.y);
  if constexpr (kCount == 4) bits[2] = __float_as_uint(v.z), bits[3] = __float_as_uint(v.w);
}

/// A finite number, such that its upper 19 bits are the nearest TF32 number.
__device__ inline std::uint32_t to_tf32_bits(float v) { return __float_as_uint(v) + 0x1000u; }

/// One step: the residuals of a warp's 32 pairs at 4 kPerLane hidden units, straight into fragments, and their products
/// with the weights. A lane's rows of tile m are the pairs of first sample i + 2 m with second samples j and j + 4.
/// kMeet: two samples of the tile agree in some unit; then it has no residual, where the two exponentials' rounding would
/// leave one.
template <class Curve, bool kSplit, bool kMeet, int kPerLane>
__device__ inline void step(const Sides<Curve, kSplit>& s, int i, int j, int column, int fragment, bool more_outputs,
                            float t, float alpha, float (&sums)[2][kOutputTiles][4]) {
  float first_z[2][kPerLane], first_a[2][kPerLane], first_table[2][kPerLane];
  float residual[2][2][kPerLane];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    if constexpr (Curve::kUsesZ) take(first_z[m], kIsSilu<Curve> ? s.first_scaled_z : s.first_z, i + 2 * m, column);
    take(first_a[m], kIsSilu<Curve> ? s.first_scaled_a : s.first_a, i + 2 * m, column);
    if constexpr (Curve::kTables) take(first_table[m], s.first_table, i + 2 * m, column);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float second_z[kPerLane], second_a[kPerLane], second_table[kPerLane];
    if constexpr (Curve::kUsesZ) take(second_z, s.second_z, j + 4 * half, column);
    take(second_a, s.second_a, j + 4 * half, column);
    if constexpr (Curve::kTables) take(second_table, s.second_table, j + 4 * half, column);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) {
        float e;
        if constexpr (kIsSilu<Curve>) {
          const float logistic = reciprocal(fma(first_table[m][c], second_table[c], 1.0f));
          const float z = fma(t, second_z[c], first_z[m][c]);
          e = fma(z, logistic, -fma(t, second_a[c], first_a[m][c]));
          if (kMeet && first_z[m][c] == (1 - t) * second_z[c]) e = 0;
        } else if constexpr (Curve::kTables) {
          const float logistic = reciprocal(fma(first_table[m][c], second_table[c], 1.0f));
          const float chord = second_a[c] - first_a[m][c];
          e = fma(Curve::kFactor, logistic, -fma(t, chord, first_a[m][c]));
          e = chord == 0 ? 0.0f : e;  // it rises everywhere, so it is constant on such a path
        } else {
          const float z = on_chord(first_z[m][c], second_z[c], t);
          e = activate<Curve::kKind, float>(z, alpha, 0.0f) - on_chord(first_a[m][c], second_a[c], t);
        }
        residual[m][half][c] = e;
      }
    }
  }
  std::uint32_t high[2][kPerLane / 2][4], low[2][kPerLane / 2][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int k = 0; k < kPerLane / 2; ++k) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float e = residual[m][n % 2][2 * k + n / 2];
        high[m][k][n] = to_tf32_bits(e);
        if constexpr (kSplit) {
          high[m][k][n] &= 0xffffe000u;
          low[m][k][n] = __float_as_uint(e - __uint_as_float(high[m][k][n]));
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kOutputTiles; ++n) {
    if (n == kOutputTiles / 2 && !more_outputs) break;
    std::uint32_t w[kPerLane], w_low[kPerLane];
    take_bits(w, s.high[fragment + n * kWarp]);
    if constexpr (kSplit) take_bits(w_low, s.low[fragment + n * kWarp]);
#pragma unroll
    for (int k = 0; k < kPerLane / 2; ++k) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if constexpr (kSplit) {
          multiply_add(sums[m][n], low[m][k], w[2 * k], w[2 * k + 1]);
          multiply_add(sums[m][n], high[m][k], w_low[2 * k], w_low[2 * k + 1]);
        }
        multiply_add(sums[m][n], high[m][k], w[2 * k], w[2 * k + 1]);
      }
    }
  }
}

/// All nodes for one chunk of outputs: the moments of a lane's outputs along its four pairs.
template <class Curve, bool kSplit, bool kMeet>
__device__ void path_moments(const Shallow& p, const Sides<Curve, kSplit>& s, int i0, int j0, int chunk,
                             Moments<float> (&moments)[2][kOutputTiles][4]) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int i = 4 * (warp % 4) + lane / 16, j = 8 * (warp / 4) + lane / 4 % 4;
  const bool more_outputs = p.outputs - chunk * kOutputChunk > kOutputChunk / 2;  // than half of the tiles hold
  const bool one_slab = p.width <= kSlab;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kOutputTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) moments[m][n][c] = Moments<float>{0, 0, 0};
    }
  }
  for (int node = 0; node < p.nodes.interior; ++node) {
    const float t = p.nodes.t[node];
    float sums[2][kOutputTiles][4] = {};
    for (int begin = 0; begin < p.width; begin += kSlab) {
      if (!one_slab || node == 0) {
        __syncthreads();  // all have done with the slab before
        load_slab(p, s, i0, j0, begin, chunk);
      }
      const int units = int(at_most(kSlab, p.width - begin));
      if constexpr (Curve::kTables) {
        __syncthreads();  // the slab is there, or the tables of the node before are done with
        fill_tables(s, int(at_most(kSlab, p.stride - begin)) / 4, t);
      }
      if (Curve::kTables || !one_slab || node == 0) __syncthreads();
      const int whole = units / kColumns + (units % kColumns > 8), rest = units % kColumns;
      for (int n = 0; n < whole; ++n) {
        step<Curve, kSplit, kMeet, 4>(s, i, j, n * kColumns + 4 * (lane % 4), n * kStepFragments + lane, more_outputs, t,
                                      p.alpha, sums);
      }
      if (rest > 0 && rest <= 8) {
        step<Curve, kSplit, kMeet, 2>(s, i, j, whole * kColumns + 2 * (lane % 4), whole * kStepFragments + lane,
                                      more_outputs, t, p.alpha, sums);
      }
    }
    const float w = p.nodes.w[node], w_t = p.nodes.w_t[node];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kOutputTiles; ++n) {
        if (n == kOutputTiles / 2 && !more_outputs) break;
#pragma unroll
        for (int c = 0; c < 4; ++c) add_moments(moments[m][n][c], sums[m][n][c], w, w_t);
      }
    }
  }
}

/// Whether two different samples of the tile agree in some unit.
__device__ inline bool tile_meets(const Shallow& p, int i0, int j0) {
  const std::int64_t i = i0 + int(threadIdx.x) / kSide, j = j0 + int(threadIdx.x) % kSide;
  int meets = 0;
  if (i < j && j < p.samples) {
    const float4* first = reinterpret_cast<const float4*>(p.z + i * p.stride);
    const float4* second = reinterpret_cast<const float4*>(p.z + j * p.stride);
    for (int n = 0; n < p.width / 4; ++n) {
      const float4 a = first[n], b = second[n];
      meets |= (a.x == b.x) | (a.y == b.y) | (a.z == b.z) | (a.w == b.w);
    }
    for (int n = p.width / 4 * 4; n < p.width; ++n) meets |= p.z[i * p.stride + n] == p.z[j * p.stride + n];
  }
  return __syncthreads_or(meets) != 0;
}

// A block per tile of 16 x 16 pairs, a warp per 4 x 8 of them.
template <class Curve, bool kSplit>
__global__ void __launch_bounds__(kThreads, 1) shallow_kernel(Shallow p) {
  if (!*p.shallow) return;
  const Sides<Curve, kSplit> s(dynamic_shared());
  std::int64_t row, column;
  find_tile(blockIdx.x, blocks_of(p.samples, kSide), row, column);
  const int i0 = int(row) * kSide, j0 = int(column) * kSide;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int i = i0 + 4 * (warp % 4) + lane / 16, j = j0 + 8 * (warp / 4) + lane / 4 % 4;
  bool meets = false;
  if constexpr (kIsSilu<Curve>) meets = tile_meets(p, i0, j0);
  double nonlinear[2][2] = {};  // sums of 1 - r2
  for (int chunk = 0; chunk * kOutputChunk < p.outputs; ++chunk) {
    Moments<float> moments[2][kOutputTiles][4];
    if (kIsSilu<Curve> && meets) {
      path_moments<Curve, kSplit, true>(p, s, i0, j0, chunk, moments);
    } else {
      path_moments<Curve, kSplit, false>(p, s, i0, j0, chunk, moments);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kOutputTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const std::int64_t k = chunk * kOutputChunk + 8 * n + 2 * (lane % 4) + c % 2;
          if (k >= p.outputs) continue;
          const std::int64_t first = at_most(i + 2 * m, p.samples - 1), second = at_most(j + 4 * (c / 2), p.samples - 1);
          nonlinear[m][c / 2] += share_of(p.y, p.y_low, p.outputs, first, second, k, moments[m][n][c], p.nodes.variance_t);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const double total = warp_sum(nonlinear[m][half], 4);
      const std::int64_t first = i + 2 * m, second = j + 4 * half;
      if (lane % 4 != 0 || second >= p.samples || first > second) continue;
      const float r2 = first == second ? 1.0f : float(1 - total / double(p.outputs));
      p.connectivity[first * p.samples + second] = p.connectivity[second * p.samples + first] = r2;
    }
  }
}

/// Weights [outputs, width] times the outputs' scales, in two TF32 parts, in the order in which step() takes them.
/// A thread per lane of a fragment.
__global__ void pack_shallow_kernel(const float* weights, const float* scale, std::int64_t outputs, std::int64_t width,
                                    std::int64_t steps, std::int64_t count, float4* high, float4* low) {
  const std::int64_t n = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= count) return;
  const int lane = int(n % kWarp), tile = int(n / kWarp % kOutputTiles);
  const std::int64_t step = n / kStepFragments % steps, chunk = n / kStepFragments / steps;
  const std::int64_t k = chunk * kOutputChunk + 8 * tile + lane / 4;
  const std::int64_t rest = width - step * kColumns;
  const int per_lane = rest <= 8 ? 2 : 4;
  float parts[2][4] = {};
  for (int c = 0; c < per_lane; ++c) {
    const std::int64_t unit = step * kColumns + per_lane * (lane % 4) + c;
    if (k >= outputs || unit >= width) continue;
    const float w = weights[k * width + unit] * scale[k];
    parts[0][c] = __uint_as_float(to_tf32(w));
    parts[1][c] = __uint_as_float(to_tf32(w - parts[0][c]));
  }
  high[n] = make_float4(parts[0][0], parts[0][1], parts[0][2], parts[0][3]);
  low[n] = make_float4(parts[1][0], parts[1][1], parts[1][2], parts[1][3]);
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
  const int* shallow;         // 1: not needed
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

/// The same tiles in float64: plain multiply-adds.
template <int kM, int kN>
__device__ inline void multiply_panel(double (&sums)[kM][kN][4], const Layer<double>& layer, const double* panel,
                                      std::int64_t panel_stride, std::int64_t depth, int m0, std::int64_t block, int apart,
                                      bool) {
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

/// panel = act(z(t)) - chord of act, with z(t) the chord of z plus what the panel holds (`deviates`); zeros beyond the
/// layer's width. A warp per row, neighbouring lanes at neighbouring units.
template <class T>
__device__ void make_residuals(const Layer<T>& layer, std::int64_t i0, std::int64_t j0, std::int64_t samples, T t,
                               bool deviates, T* panel, std::int64_t panel_stride) {
  with_kind(layer.kind, [&](auto kind) {
    for (int row = int(threadIdx.x) / kWarp; row < kPanelRows; row += kWarps) {
      const Pair pair = pair_of(i0, j0, row, samples);
      const std::int64_t first = pair.first * layer.stride, second = pair.second * layer.stride;
#pragma unroll 1
      for (std::int64_t unit = threadIdx.x % kWarp; unit < layer.stride; unit += kWarp) {
        T& residual = panel[row * panel_stride + unit];
        T z = on_chord(layer.z[first + unit], layer.z[second + unit], t);
        if (deviates) z += residual;
        const T a = activate<kind.value, T>(z, layer.alpha, layer.beta);
        residual = unit < layer.width ? a - on_chord(layer.a[first + unit], layer.a[second + unit], t) : T(0);
      }
    }
  });
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

// A block per tile of 8 x 8 pairs, one after the other; 16 pairs x kUnits tiles of 8 outputs to a warp.
template <class T, int kUnits>
__global__ void __launch_bounds__(kThreads, 1) general_kernel(General<T> p) {
  if (*p.shallow) return;
  const Problem<T>& problem = p.problem;
  const std::int64_t samples = problem.samples, outputs = problem.outputs, panel_values = kPanelRows * p.panel_stride;
  T* const panels = p.panels ? p.panels + blockIdx.x * 2 * panel_values : reinterpret_cast<T*>(dynamic_shared());
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int m0 = warp % kPanelTiles, unit0 = warp / kPanelTiles;
  constexpr int kApart = kWarps / kPanelTiles;
  constexpr int kChunk = 8 * kUnits * kApart;
  __shared__ double totals[kApart][kPanelRows];
  for (std::int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    std::int64_t tile_row, tile_column;
    find_tile(tile, blocks_of(samples, kPanelSide), tile_row, tile_column);
    const std::int64_t i0 = tile_row * kPanelSide, j0 = tile_column * kPanelSide;
    double nonlinear[2] = {0, 0};
    for (std::int64_t chunk = 0; chunk < outputs; chunk += kChunk) {
      Moments<T> moments[kUnits][4];
#pragma unroll
      for (int n = 0; n < kUnits; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) moments[n][c] = Moments<T>{0, 0, 0};
      }
      for (int node = 0; node < problem.nodes.interior; ++node) {
        const T t = problem.nodes.t[node], w = problem.nodes.w[node], w_t = problem.nodes.w_t[node];
        T *panel = panels, *next = panels + panel_values;
        __syncthreads();  // the node before has done with the panels
        make_residuals(problem.layers[0], i0, j0, samples, t, false, panel, p.panel_stride);
        __syncthreads();
        for (int l = 1; l < problem.last + !problem.ends_linear; ++l) {
          const Layer<T>& layer = problem.layers[l];
          make_deviations(layer, problem.layers[l - 1].width, panel, next, p.panel_stride, problem.tf32);
          __syncthreads();
          make_residuals(layer, i0, j0, samples, t, true, next, p.panel_stride);
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
            add_moments(moments[n][c], e * problem.scale[k], w, w_t);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kUnits; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const std::int64_t k = chunk + 8 * (unit0 + n * kApart) + 2 * (lane % 4) + c % 2;
          if (k >= outputs) continue;
          const Pair pair = pair_of(i0, j0, 16 * m0 + 8 * (c / 2) + lane / 4, samples);
          nonlinear[c / 2] += share_of(problem.y, problem.y_low, outputs, pair.first, pair.second, k, moments[n][c],
                                       problem.nodes.variance_t);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const double total = warp_sum(nonlinear[half], 4);
      if (lane % 4 == 0) totals[unit0][16 * m0 + 8 * half + lane / 4] = total;
    }
    __syncthreads();
    if (threadIdx.x < kPanelRows) {
      const std::int64_t first = i0 + threadIdx.x / kPanelSide, second = j0 + threadIdx.x % kPanelSide;
      double total = 0;
      for (int part = 0; part < kApart; ++part) total += totals[part][threadIdx.x];
      if (second < samples && first <= second) {
        const T r2 = first == second ? T(1) : T(1 - total / double(outputs));
        problem.connectivity[first * samples + second] = problem.connectivity[second * samples + first] = r2;
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

/// Which shallow kernel; null: none.
struct ShallowKernel {
  void (*kernel)(Shallow);
  std::size_t shared;
  double limit, least_mean;  // of |z|
};

template <class Curve>
ShallowKernel shallow_kernel_of(bool tf32, double limit, double least_mean = 0) {
  if (tf32) return {shallow_kernel<Curve, false>, Sides<Curve, false>::kBytes, limit, least_mean};
  return {shallow_kernel<Curve, true>, Sides<Curve, true>::kBytes, limit, least_mean};
}

ShallowKernel find_shallow(const PathConnectivity<float>& op, std::size_t shared_limit) {
  ShallowKernel found{nullptr, 0, 0, 0};
  if (op.layers != 1 || op.activations[1].kind != ActivationKind::kIdentity) return found;
  switch (op.activations[0].kind) {
    case ActivationKind::kSilu: found = shallow_kernel_of<Silu>(op.tf32, kSeparableLimit); break;
    case ActivationKind::kSigmoid: found = shallow_kernel_of<Logistic<false>>(op.tf32, kSeparableLimit); break;
    case ActivationKind::kTanh:
      found = shallow_kernel_of<Logistic<true>>(op.tf32, kSeparableLimit / 2, kTanhSeparableMean);
      break;
    case ActivationKind::kRelu:
    case ActivationKind::kLeakyRelu:  // ReLU leaks 0
      found = shallow_kernel_of<Direct<ActivationKind::kLeakyRelu>>(op.tf32, kDirectLimit);
      break;
    case ActivationKind::kGelu: found = shallow_kernel_of<Direct<ActivationKind::kGelu>>(op.tf32, kDirectLimit); break;
    case ActivationKind::kGeluTanh:
      found = shallow_kernel_of<Direct<ActivationKind::kGeluTanh>>(op.tf32, kDirectLimit);
      break;
    default: break;
  }
  if (found.shared > shared_limit) found.kernel = nullptr;
  return found;
}
ShallowKernel find_shallow(const PathConnectivity<double>&, std::size_t) { return {nullptr, 0, 0, 0}; }

/// Host's view: everything's place in the workspace.
template <class T>
struct Plan {
  Problem<T> problem{};
  Shallow shallow{};
  ShallowKernel kernel{};
  General<T> general{};
  std::int64_t general_blocks = 0;
  std::size_t general_shared = 0;
  Choice choice{};
  double* sums = nullptr;
  int* flag = nullptr;
  T* nodes = nullptr;
  float4 *high = nullptr, *low = nullptr;
};

template <class T>
Layer<T> layer_of(const PathConnectivity<T>& op, int l, Arena& arena) {
  Layer<T> layer{};
  layer.width = op.widths[l];
  layer.stride = padded(layer.width);
  layer.kind = op.activations[l].kind;
  layer.alpha = T(op.activations[l].alpha);
  layer.beta = T(op.activations[l].beta);
  layer.z = arena.take<T>(op.samples * layer.stride);
  layer.a = arena.take<T>(op.samples * layer.stride);
  if (l == 0) return layer;
  layer.weights = op.weights[l - 1];
  layer.biases = op.biases[l - 1];
  if (sizeof(T) == 4) {
    layer.packed = arena.take<float4>(blocks_of(layer.width, 8) * blocks_of(op.widths[l - 1], kColumns) * kWarp);
  }
  return layer;
}

constexpr std::size_t kStaticShared = 4096;  // more than the kernels' own

/// Everything but the layers, which come after it in the arena, one by one.
template <class T>
Plan<T> make_plan(const PathConnectivity<T>& op, Arena& arena) {
  Plan<T> plan;
  Problem<T>& problem = plan.problem;
  problem.last = op.layers;
  problem.ends_linear = op.layers > 0 && op.activations[op.layers].kind == ActivationKind::kIdentity;
  problem.tf32 = op.tf32;
  problem.samples = op.samples;
  problem.outputs = op.widths[op.layers];
  problem.connectivity = op.connectivity;
  problem.layers = arena.take<Layer<T>>(op.layers + 1);
  problem.y = arena.take<T>(op.samples * problem.outputs);
  problem.y_low = arena.take<T>(op.samples * problem.outputs);
  problem.scale = arena.take<T>(problem.outputs);
  plan.nodes = arena.take<T>(3 * std::int64_t(op.nodes.interior));
  plan.flag = arena.take<int>(1);
  const std::int64_t first_blocks = blocks_of(op.samples, kForwardTile) * padded(op.widths[0]) / kForwardTile;
  plan.sums = arena.take<double>(first_blocks);

  const std::size_t shared_limit = std::size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  plan.kernel = find_shallow(op, shared_limit);
  plan.choice = {plan.sums, first_blocks, plan.kernel.least_mean * double(op.samples * op.widths[0]),
                 plan.kernel.kernel ? plan.kernel.limit : 0.0, plan.flag};
  std::int64_t widest = 0;
  for (int l = 0; l < op.layers + !problem.ends_linear; ++l) widest = op.widths[l] > widest ? op.widths[l] : widest;
  General<T>& general = plan.general;
  general.shallow = plan.flag;
  general.panel_stride = padded(widest) | kColumns;  // an odd number of steps: neighbouring rows in other banks
  general.tiles = blocks_of(op.samples, kPanelSide) * (blocks_of(op.samples, kPanelSide) + 1) / 2;
  plan.general_blocks = at_most(general.tiles, 2 * device_attribute(cudaDevAttrMultiProcessorCount));
  const std::int64_t panel_values = (op.layers + !problem.ends_linear > 1 ? 2 : 1) * kPanelRows * general.panel_stride;
  plan.general_shared = std::size_t(panel_values) * sizeof(T);
  if (plan.general_shared + kStaticShared > shared_limit) {
    plan.general_shared = 0;
    general.panels = arena.take<T>(plan.general_blocks * 2 * kPanelRows * general.panel_stride);
  }
  const std::int64_t steps = blocks_of(op.widths[0], kColumns);
  const std::int64_t fragments =
      plan.kernel.kernel ? blocks_of(problem.outputs, kOutputChunk) * steps * kStepFragments : 0;
  plan.high = arena.take<float4>(fragments);
  plan.low = arena.take<float4>(fragments);
  return plan;
}

template <class T>
const char* pack_layer(const Layer<T>& layer, std::int64_t depth, CUstream_st* stream) {
  if constexpr (sizeof(T) == 4) {
    const std::int64_t count = blocks_of(layer.width, 8) * blocks_of(depth, kColumns) * kWarp;
    return launch(pack_kernel, blocks_of(count, kThreads), kThreads, 0, stream, layer, depth, count);
  }
  return nullptr;
}

const char* run_shallow(const PathConnectivity<float>& op, const Plan<float>& plan, const Layer<float>& first,
                        CUstream_st* stream) {
  const Problem<float>& problem = plan.problem;
  const std::int64_t steps = blocks_of(first.width, kColumns);
  const std::int64_t count = blocks_of(problem.outputs, kOutputChunk) * steps * kStepFragments;
  const char* error = launch(pack_shallow_kernel, blocks_of(count, kThreads), kThreads, 0, stream, op.weights[0],
                             problem.scale, problem.outputs, first.width, steps, count, plan.high, plan.low);
  if (error) return error;
  const float alpha = first.kind == ActivationKind::kRelu ? 0.0f : first.alpha;
  const Shallow shallow{first.z, first.a, problem.y, problem.y_low, plan.high, plan.low, problem.nodes, problem.samples,
                        problem.outputs, first.stride, int(first.width), int(steps), alpha, plan.flag, problem.connectivity};
  const std::int64_t sides = blocks_of(op.samples, kSide);
  return launch(plan.kernel.kernel, sides * (sides + 1) / 2, kThreads, plan.kernel.shared, stream, shallow);
}
const char* run_shallow(const PathConnectivity<double>&, const Plan<double>&, const Layer<double>&, CUstream_st*) {
  return nullptr;
}

template <class T>
const char* run_general(const Plan<T>& plan, CUstream_st* stream) {
  constexpr std::int64_t kFew = 32;  // outputs that one chunk of the smaller kernel takes
  if constexpr (sizeof(T) == 4) {
    if (plan.problem.outputs > kFew) {
      return launch(general_kernel<T, 4>, plan.general_blocks, kThreads, plan.general_shared, stream, plan.general);
    }
  }
  return launch(general_kernel<T, 2>, plan.general_blocks, kThreads, plan.general_shared, stream, plan.general);
}

template <class T>
const char* path_connectivity_on(const PathConnectivity<T>& op, CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.workspace)};
  Plan<T> plan = make_plan(op, arena);
  if (plan.general_blocks == 0) return "no CUDA device";
  const char* error = store_nodes(op.nodes, plan.nodes, plan.problem.nodes, stream);
  plan.general.problem = plan.problem;
  Layer<T> first{}, before{};
  for (int l = 0; l <= op.layers && !error; ++l) {
    const Layer<T> layer = layer_of(op, l, arena);
    const std::int64_t blocks = blocks_of(op.samples, kForwardTile) * (layer.stride / kForwardTile);
    const T* const before_a = before.a;
    error = launch(forward_kernel<T>, blocks, kForwardTile * kForwardTile, 0, stream, plan.problem, layer, l, op.z,
                   before_a, before.width, before.stride, plan.choice.limit, plan.sums);
    if (!error && l > 0) error = pack_layer(layer, before.width, stream);
    if (l == 0) first = layer;
    before = layer;
  }
  if (error) return error;
  error = launch(scale_kernel<T>, plan.problem.outputs + 1, kThreads, 0, stream, plan.problem, plan.choice);
  if (!error && plan.kernel.kernel) error = run_shallow(op, plan, first, stream);
  return error ? error : run_general(plan, stream);
}

template <class T>
std::size_t workspace(const PathConnectivity<T>& op) {
  Arena arena{nullptr};
  make_plan(op, arena);
  for (int l = 0; l <= op.layers; ++l) layer_of(op, l, arena);
  return arena.used;
}

}  // namespace

std::size_t path_connectivity_cuda_workspace(const PathConnectivity<float>& op) { return workspace(op); }
std::size_t path_connectivity_cuda_workspace(const PathConnectivity<double>& op) { return workspace(op); }
const char* path_connectivity_cuda(const PathConnectivity<float>& op, CUstream_st* stream) {
  return path_connectivity_on(op, stream);
}
const char* path_connectivity_cuda(const PathConnectivity<double>& op, CUstream_st* stream) {
  return path_connectivity_on(op, stream);
}

}  // namespace lmn
