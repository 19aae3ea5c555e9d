// Two kernels in float32. One hidden layer with a usual activation: `shallow`, where each thread makes the elements of
// the matrix instruction's fragments that it owns and keeps the moments in registers. Everything else: the general kernel of
// chain.cuh. float64: chain64.cuh.
#include "chain64.cuh"

namespace lmn {
namespace {

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
  const float *y, *y_low, *rounding;  // [samples, outputs], scaled by
  const float* scale;                 // [outputs]
  const float4 *high, *low;      // weights and what rounding them to TF32 lost, [chunks][steps][kOutputTiles][lanes]
  DeviceNodes<float> nodes;
  std::int64_t samples, outputs, stride;
  int width, steps;
  float alpha;                   // of the activation
  const int* shallow;
  float* connectivity;
  std::int64_t* counts;
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
  // Four lanes share four pairs, and the first of these lanes alone reads and writes the pairs' sums. They are in shared memory,
  // because in registers they would live through the loop over the nodes, which would then spill.
  __shared__ PairSums totals[kThreads / 4][2][2];
  static_assert(sizeof(totals) <= kStaticShared);
  PairSums(&group_totals)[2][2] = totals[threadIdx.x / 4];
  for (int chunk = 0; chunk * kOutputChunk < p.outputs; ++chunk) {
    Moments<float> moments[2][kOutputTiles][4];
    if (kIsSilu<Curve> && meets) {
      path_moments<Curve, kSplit, true>(p, s, i0, j0, chunk, moments);
    } else {
      path_moments<Curve, kSplit, false>(p, s, i0, j0, chunk, moments);
    }
    PairSums pair_sums[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kOutputTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const std::int64_t k = chunk * kOutputChunk + 8 * n + 2 * (lane % 4) + c % 2;
          if (k >= p.outputs) continue;
          const std::int64_t first = at_most(i + 2 * m, p.samples - 1), second = at_most(j + 4 * (c / 2), p.samples - 1);
          add_output(pair_sums[m][c / 2], p.y, p.y_low, p.rounding, p.outputs, first, second, k, moments[m][n][c],
                     p.scale[k], 0.0f, p.nodes.variance_t);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        PairSums sums = pair_sums[m][half];
        sums.nonlinear = warp_sum(sums.nonlinear, 4);
        sums.constants = warp_sum(sums.constants, 4);
        if (lane % 4 != 0) continue;
        if (chunk > 0) {
          sums.nonlinear += group_totals[m][half].nonlinear;
          sums.constants += group_totals[m][half].constants;
        }
        group_totals[m][half] = sums;
      }
    }
  }
  if (lane % 4 != 0) return;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t first = i + 2 * m, second = j + 4 * half;
      if (second >= p.samples || first > second) continue;
      store_entry(p.connectivity, p.counts, group_totals[m][half], p.z, p.stride, p.width, p.samples, p.outputs, first,
                  second);
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

// ---- the choice ----

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
  if (found.shared + kStaticShared > shared_limit) found.kernel = nullptr;
  return found;
}

/// The shallow kernel's weights in the workspace.
struct Packed {
  float4 *high, *low;
};

Packed take_packed(const PathConnectivity<float>& op, const ShallowKernel& kernel, Arena& arena) {
  if (!kernel.kernel) return {nullptr, nullptr};
  const std::int64_t fragments =
      blocks_of(op.widths[1], kOutputChunk) * blocks_of(op.widths[0], kColumns) * kStepFragments;
  float4* const high = arena.take<float4>(fragments);
  return {high, arena.take<float4>(fragments)};
}

Range range_of(const ShallowKernel& kernel) {
  return kernel.kernel ? Range{kernel.limit, kernel.least_mean} : Range{0, 0};
}

const char* run_shallow(const PathConnectivity<float>& op, const Plan<float>& plan, const ShallowKernel& kernel,
                        const Packed& packed, CUstream_st* stream) {
  const Layer<float>& first = plan.first;
  const Problem<float>& problem = plan.problem;
  const std::int64_t steps = blocks_of(first.width, kColumns);
  const std::int64_t count = blocks_of(problem.outputs, kOutputChunk) * steps * kStepFragments;
  const char* error = launch(pack_shallow_kernel, blocks_of(count, kThreads), kThreads, 0, stream, op.weights[0],
                             problem.scale, problem.outputs, first.width, steps, count, packed.high, packed.low);
  if (error) return error;
  const float alpha = first.kind == ActivationKind::kRelu ? 0.0f : first.alpha;
  const Shallow shallow{first.z, first.a, problem.y, problem.y_low, problem.rounding, problem.scale, packed.high, packed.low,
                        problem.nodes, problem.samples, problem.outputs, first.stride, int(first.width), int(steps), alpha,
                        plan.flag, problem.connectivity, problem.counts};
  const std::int64_t sides = blocks_of(op.samples, kSide);
  return launch(kernel.kernel, sides * (sides + 1) / 2, kThreads, kernel.shared, stream, shallow);
}

const char* path_connectivity_on(const PathConnectivity<double>& op, CUstream_st* stream) {
  return connectivity64<0>(op, Stencil<double>{}, stream);
}
const char* path_connectivity_on(const PathConnectivity<float>& op, CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.workspace)};
  const ShallowKernel kernel = find_shallow(op, shared_limit());
  Plan<float> plan = make_plan(op, Stencil<float>{}, range_of(kernel), arena);
  const Packed packed = take_packed(op, kernel, arena);
  const char* error = enqueue_samples(op, plan, arena, stream);
  if (!error && kernel.kernel) error = run_shallow(op, plan, kernel, packed, stream);
  if (error) return error;
  constexpr std::int64_t kFew = 32;  // outputs that one chunk of the smaller kernel takes
  if (plan.problem.outputs > kFew) return enqueue_general<float, 4, 0>(plan, stream);
  return enqueue_general<float, 2, 0>(plan, stream);
}

std::size_t path_connectivity_workspace_on(const PathConnectivity<double>& op) {
  return workspace64<0>(op, Stencil<double>{});
}
std::size_t path_connectivity_workspace_on(const PathConnectivity<float>& op) {
  Arena arena{nullptr};
  const ShallowKernel kernel = find_shallow(op, shared_limit());
  const Plan<float> plan = make_plan(op, Stencil<float>{}, range_of(kernel), arena);
  take_packed(op, kernel, arena);
  return workspace(op, plan, arena);
}

}  // namespace

std::size_t path_connectivity_cuda_workspace(const PathConnectivity<float>& op) {
  return path_connectivity_workspace_on(op);
}
std::size_t path_connectivity_cuda_workspace(const PathConnectivity<double>& op) {
  return path_connectivity_workspace_on(op);
}
const char* path_connectivity_cuda(const PathConnectivity<float>& op, CUstream_st* stream) {
  return path_connectivity_on(op, stream);
}
const char* path_connectivity_cuda(const PathConnectivity<double>& op, CUstream_st* stream) {
  return path_connectivity_on(op, stream);
}

}  // namespace lmn
