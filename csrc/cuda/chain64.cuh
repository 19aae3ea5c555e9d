// path_connectivity and hermite_connectivity in float64, on the FP64 matrix instruction. Two kernels: one hidden layer of
// SiLU, sigmoid or tanh over equally spaced nodes, where a warp makes its matrix fragments itself; and everything else, where a
// block carries panels of residuals from layer to layer.
//
// In both a tile of matrix rows is 8 pairs, of one first sample and 8 second ones, at one node, and a lane's rows,
// g = lane / 4, all belong to one pair. Of 8 hidden units lane q = lane % 4 of a group has 2 q and 2 q + 1, as columns q and
// q + 4 of the instruction's A: its sums for 8 units are then the next layer's fragments.
#pragma once
#include "chain.cuh"

namespace lmn {
namespace {
namespace float64 {

// ---- instructions ----

/// c += a b for a warp's 16 x 8 tile of c, a 16 x 8, b 8 x 8. With g = lane / 4 and q = lane % 4: a0..a3 = (g, q), (g + 8, q),
/// (g, q + 4), (g + 8, q + 4); b0, b1 = (q, g), (q + 4, g); c = (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1).
/// Source: PTX ISA, mma.m16n8k8 and mma.m8n8k4 with .f64. On an H200 the larger one is 1.5 times as fast.
__device__ inline void multiply_add64(double (&c)[4], double a0, double a1, double a2, double a3, double b0, double b1) {
#if defined(LMN_EMULATED)
  emulator::mma_m16n8k8_f64(c, a0, a1, a2, a3, b0, b1);
#elif __CUDA_ARCH__ >= 900
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a0), "d"(a1), "d"(a2), "d"(a3), "d"(b0), "d"(b1));
#else
  const auto small = [](double& c0, double& c1, double a, double b) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(c0), "+d"(c1)
        : "d"(a), "d"(b));
  };
  small(c[0], c[1], a0, b0);
  small(c[2], c[3], a1, b0);
  small(c[0], c[1], a2, b1);
  small(c[2], c[3], a3, b1);
#endif
}

/// 1 / v to about an ulp, for a normal v whose reciprocal is normal: 20 bits and a cubic step.
__device__ inline double reciprocal_fast(double v) {
#if defined(LMN_EMULATED)
  const double x = emulator::reciprocal_f64(v);
#else
  double x;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(x) : "d"(v));
#endif
  const double e = fma(-v, x, 1.0);
  return fma(x, fma(e, e, e), x);
}

LMN_FN int ceiling(int count, int size) { return (count + size - 1) / size; }

// ---- the samples ----

/// What decides whether another kernel than the general one is taken, and the decision.
struct Choice {
  const double* sums;     // [blocks] of the first layer
  std::int64_t blocks;
  double least, limit;    // sum of |z| for the other kernel, and largest |z|; a limit of 0: none
  int* elsewhere;
};

/// Block k scales output k; the block after the last decides between the kernels, and begins the count.
__global__ void scale_kernel(Problem<double> problem, Choice choice) {
  problem = of_network(problem);
  choice.sums = in_network(choice.sums, problem.apart), choice.elsewhere = in_network(choice.elsewhere, problem.apart);
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

/// Weights [width, depth] as fragments: of each 8 inputs lane 4 g + q has {2 q, 2 q + 1} of unit g. A thread per lane.
__global__ void pack_kernel(Layer<double> layer, std::int64_t depth, std::int64_t count, std::int64_t apart) {
  layer = of_network(layer, depth, apart);
  const std::int64_t n = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= count) return;
  const std::int64_t steps = blocks_of(depth, 8), lane = n % kWarp, step = n / kWarp % steps;
  const std::int64_t unit = n / kWarp / steps * 8 + lane / 4, d = 8 * step + 2 * (lane % 4);
  const bool inside = unit < layer.width;
  layer.fragments[n] = make_double2(inside && d < depth ? layer.weights[unit * depth + d] : 0.0,
                                    inside && d + 1 < depth ? layer.weights[unit * depth + d + 1] : 0.0);
}

/// Host's view of the samples' side: everything's place in the workspace.
struct Plan {
  Problem<double> problem{};
  bool slopes = false;
  Choice choice{};
  double* sums = nullptr;
  int* flag = nullptr;
  double* nodes = nullptr;
  Layer<double> first{}, last{};
};

/// Which inputs another kernel takes: all |z| below the limit, their mean at least so large. A limit of 0: none.
struct Range {
  double limit, least_mean;
};

/// Everything but the layers, which come last in the arena, one by one.
inline Plan make_plan(const PathConnectivity<double>& op, bool slopes, Range elsewhere, Arena& arena) {
  Plan plan;
  plan.slopes = slopes;
  plan.problem = make_problem(op, arena);
  plan.nodes = arena.take<double>(3 * std::int64_t(op.nodes.interior));
  plan.flag = arena.take<int>(1);
  const std::int64_t first_blocks = blocks_of(op.samples, kForwardTile) * padded(op.widths[0]) / kForwardTile;
  plan.sums = arena.take<double>(first_blocks);
  plan.choice = {plan.sums, first_blocks, elsewhere.least_mean * double(op.samples * op.widths[0]), elsewhere.limit,
                 plan.flag};
  return plan;
}

/// Takes the layers' places, and fills in everything that the samples and the weights determine.
inline const char* enqueue_samples(const PathConnectivity<double>& op, Plan& plan, Arena& arena, CUstream_st* stream) {
  if (device_attribute(cudaDevAttrMultiProcessorCount) == 0) return "no CUDA device";
  if (const char* error = store_nodes(op.nodes, plan.nodes, plan.problem.nodes, stream)) return error;
  const auto layer_at = [&](int l) { return layer_of(op, l, plan.slopes, arena); };
  const char* error = enqueue_forward(op, plan.problem, plan.choice.limit, plan.sums, stream, layer_at,
                                      [&](int l, const Layer<double>& layer) -> const char* {
    if (l == 0) plan.first = layer;
    plan.last = layer;
    if (l == 0) return nullptr;
    const std::int64_t count = blocks_of(layer.width, 8) * blocks_of(op.widths[l - 1], 8) * kWarp;
    return launch(pack_kernel, Grid(blocks_of(count, kThreads), op.networks), kThreads, 0, stream, layer, op.widths[l - 1],
                  count, plan.problem.apart);
  });
  if (error) return error;
  return launch(scale_kernel, Grid(plan.problem.outputs + 1, op.networks), kThreads, 0, stream, plan.problem, plan.choice);
}

inline std::size_t workspace(const PathConnectivity<double>& op, const Plan& plan, Arena& arena) {
  for (int l = 0; l <= op.layers; ++l) layer_of(op, l, plan.slopes, arena);
  return arena.used;
}

// ---- one hidden layer: SiLU, sigmoid, tanh ----

constexpr int kShallowThreads64 = 384;  // 12 warps of 168 registers fill a multiprocessor
constexpr int kShallowWarps64 = kShallowThreads64 / kWarp;
constexpr int kShallowTiles64 = 4;      // of 8 outputs, whose products the registers hold; the moments are in shared memory
constexpr int kShallowMoments64 = 6 * kShallowTiles64 * kShallowThreads64;  // doubles
constexpr int kShallowChunks64 = 3;     // of so many tiles; each costs all activations again
constexpr int kGroup = 4;               // nodes at a time
// With f = 1 or 2 for tanh, exp(-f z(t)) = exp(-f (1 - t) z_i) exp(-f t z_j). At the first of four nodes it comes from a table
// per sample, and from one node to the next it changes by exp(f h z_i) exp(-f h z_j), where h is the nodes' spacing.
constexpr int kBefore = 3;  // arrays before the tables: z, a, exp(+-f h z)

// Two nodes share a reciprocal, so that (1 + E)^2 has to be finite, also at nodes that fill up the last four.
constexpr double kShallowLimit64 = 340;
// 1 - 2 / (1 + exp(2 z)) is only right to an absolute epsilon; below this mean |z| tanh is evaluated directly.
constexpr double kShallowTanhMean64 = 0.25;

struct Shallow64 {
  Problem<double> problem;
  const double2 *first, *second;  // [samples][steps][arrays][4], [blocks of 8 samples][steps][arrays][lanes]
  const double2* fragments;       // weights
  const double* z;                // [samples, stride]
  std::int64_t stride, width, units;
  int steps, groups, chunks;      // of 8 hidden units, of nodes, of outputs
  const int* take;                // where 0, another kernel does it

  LMN_FN int arrays() const { return kBefore + groups; }
};

/// What residuals of 2 hidden units at 4 nodes are made from, for one sample.
struct Side {
  double2 z, a, ratio, table;
};
__device__ inline Side load_side(const double2* from, int apart, int group) {
  return {from[0], from[apart], from[2 * apart], from[(kBefore + group) * apart]};
}

/// e = act(z(t)) - chord of act for one unit at 4 nodes; a is one higher for tanh.
template <ActivationKind kKind>
__device__ inline void shallow_residuals(double (&e)[kGroup], const double (&t)[kGroup], double z_first, double z_second,
                                         double a_first, double a_second, double ratio, double power) {
  const double z_chord = z_second - z_first, a_chord = a_second - a_first, ratio_squared = ratio * ratio;
  const double next = power * ratio;
  const double powers[kGroup] = {power, next, power * ratio_squared, next * ratio_squared};
#pragma unroll
  for (int r = 0; r < kGroup; r += 2) {
    const double up = 1.0 + powers[r + 1], inverse = reciprocal_fast(fma(powers[r], up, up));
    const double chord[2] = {fma(t[r], a_chord, a_first), fma(t[r + 1], a_chord, a_first)};
    if constexpr (kKind == ActivationKind::kSilu) {
      const double z[2] = {fma(t[r], z_chord, z_first), fma(t[r + 1], z_chord, z_first)};
      e[r] = fma(fma(z[0], powers[r + 1], z[0]), inverse, -chord[0]);
      e[r + 1] = fma(fma(z[1], powers[r], z[1]), inverse, -chord[1]);
    } else {
      constexpr double kHeight = kKind == ActivationKind::kTanh ? 2.0 : 1.0;
      e[r] = fma(kHeight * up, inverse, -chord[0]);
      e[r + 1] = fma(kHeight, fma(powers[r], inverse, inverse), -chord[1]);
    }
  }
  // A unit that does not move has no residual; the two exponentials' rounding would leave one.
#pragma unroll
  for (int r = 0; r < kGroup; ++r) e[r] = z_chord == 0 ? 0.0 : e[r];
}

// A warp per unit of work, 8 pairs of one first sample, on its own once the weights are in shared memory.
template <ActivationKind kKind>
__global__ void __launch_bounds__(kShallowThreads64, 1) shallow64_kernel(Shallow64 p) {
  if (!*in_network(p.take, p.problem.apart)) return;
  const Problem<double>& problem = p.problem;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const std::int64_t samples = problem.samples, outputs = problem.outputs;
  double2* const weights = reinterpret_cast<double2*>(dynamic_shared());  // [chunks][steps][tiles][lanes], scaled
  const int fragments = p.chunks * p.steps * kShallowTiles64 * kWarp;
  double* const nodes = reinterpret_cast<double*>(weights + fragments);   // [t, weight, weight times t - mean t][4 groups]
  for (int n = int(threadIdx.x); n < fragments; n += kShallowThreads64) {
    const int tile = n / (kShallowTiles64 * kWarp) / p.steps * kShallowTiles64 + n / kWarp % kShallowTiles64;
    const int step = n / (kShallowTiles64 * kWarp) % p.steps, k = 8 * tile + n % kWarp / 4;
    double2 w = make_double2(0, 0);
    if (k < outputs) {
      const double scale = in_network(problem.scale, problem.apart)[k];
      w = in_network(p.fragments, problem.apart)[(std::int64_t(tile) * p.steps + step) * kWarp + n % kWarp];
      w = make_double2(w.x * scale, w.y * scale);
    }
    weights[n] = w;
  }
  const int padded_nodes = kGroup * p.groups;
  double* const moments = nodes + 3 * padded_nodes + threadIdx.x;  // [tiles][2 outputs][e, te, ee][threads]
  for (int n = int(threadIdx.x); n < padded_nodes; n += kShallowThreads64) {
    const bool inside = n < problem.nodes.interior;
    nodes[n] = inside ? problem.nodes.t[n] : 0.0;
    nodes[padded_nodes + n] = inside ? problem.nodes.w[n] : 0.0;
    nodes[2 * padded_nodes + n] = inside ? problem.nodes.w_t[n] : 0.0;
  }
  __syncthreads();
  const int arrays = p.arrays();
  for (std::int64_t unit = std::int64_t(blockIdx.x) * kShallowWarps64 + warp; unit < p.units;
       unit += std::int64_t(gridDim.x) * kShallowWarps64) {
    __syncwarp();  // the lanes that have stored an entry are back
    std::int64_t i, block;
    find_unit(unit, std::int64_t(8), i, block);
    const double2* const first = in_network(p.first, problem.apart) + i * p.steps * arrays * 4 + lane % 4;
    const double2* const second = in_network(p.second, problem.apart) + block * p.steps * arrays * kWarp + lane;
    const std::int64_t j = 8 * block + lane / 4;
    PairSums pair_sums;
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      const double2* const chunk_weights = weights + chunk * p.steps * kShallowTiles64 * kWarp + lane;
      const int tiles = int(at_most(kShallowTiles64, blocks_of(outputs, 8) - chunk * kShallowTiles64));
      for (int n = 0; n < 6 * kShallowTiles64; ++n) moments[n * kShallowThreads64] = 0;
#pragma unroll 1
      for (int group = 0; group < p.groups; ++group) {
        double t[kGroup], sums[kGroup / 2][kShallowTiles64][4] = {};
#pragma unroll
        for (int r = 0; r < kGroup; ++r) t[r] = nodes[kGroup * group + r];
#pragma unroll 1
        for (int step = 0; step < p.steps; ++step) {
          const Side a = load_side(first + step * arrays * 4, 4, group);
          const Side b = load_side(second + step * arrays * kWarp, kWarp, group);
          double x[kGroup], y[kGroup];
          shallow_residuals<kKind>(x, t, a.z.x, b.z.x, a.a.x, b.a.x, a.ratio.x * b.ratio.x, a.table.x * b.table.x);
          shallow_residuals<kKind>(y, t, a.z.y, b.z.y, a.a.y, b.a.y, a.ratio.y * b.ratio.y, a.table.y * b.table.y);
#pragma unroll
          for (int n = 0; n < kShallowTiles64; ++n) {
            if (n >= tiles) break;
            const double2 w = chunk_weights[(step * kShallowTiles64 + n) * kWarp];
#pragma unroll
            for (int m = 0; m < kGroup / 2; ++m) {
              multiply_add64(sums[m][n], x[2 * m], x[2 * m + 1], y[2 * m], y[2 * m + 1], w.x, w.y);
            }
          }
        }
        const double *const w = nodes + padded_nodes + kGroup * group, *const w_t = w + padded_nodes;
#pragma unroll
        for (int n = 0; n < kShallowTiles64; ++n) {
          if (n >= tiles) break;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            double* const at = moments + (6 * n + 3 * half) * kShallowThreads64;
            Moments<double> m{at[0], at[kShallowThreads64], at[2 * kShallowThreads64]};
#pragma unroll
            for (int r = 0; r < kGroup; ++r) add_moments(m, sums[r / 2][n][2 * (r % 2) + half], w[r], w_t[r]);
            at[0] = m.e;
            at[kShallowThreads64] = m.te;
            at[2 * kShallowThreads64] = m.ee;
            __syncwarp();  // else the compiler loads all moments at once, and spills
          }
        }
      }
#pragma unroll 1
      for (int n = 0; n < 2 * tiles; ++n) {
        const double* const at = moments + 3 * n * kShallowThreads64;
        const std::int64_t k = 8 * (chunk * kShallowTiles64 + n / 2) + 2 * (lane % 4) + n % 2;
        if (k >= outputs) break;
        const Moments<double> m{at[0], at[kShallowThreads64], at[2 * kShallowThreads64]};
        const Problem<double> own = of_network(problem);
        add_output(pair_sums, own.y, own.y_low, own.rounding, outputs, i, at_most(j, samples - 1), k, m, own.scale[k], 0.0,
                   own.nodes.variance_t);
      }
    }
    pair_sums.nonlinear = warp_sum(pair_sums.nonlinear, 4);
    pair_sums.constants = warp_sum(pair_sums.constants, 4);
    if (lane % 4 == 0 && i <= j && j < samples) {
      store_entry(problem.own_connectivity(), problem.own_counts(), pair_sums, in_network(p.z, problem.apart), p.stride,
                  p.width, samples, outputs, i, j);
    }
  }
}

/// A thread per sample and two hidden units; samples after the last repeat it.
template <ActivationKind kKind>
__global__ void pack_shallow64_kernel(Shallow64 p, Layer<double> layer, double spacing, double2* first, double2* second) {
  constexpr double kFactor = kKind == ActivationKind::kTanh ? 2.0 : 1.0, kShift = kKind == ActivationKind::kTanh ? 1.0 : 0.0;
  const std::int64_t apart = p.problem.apart;
  layer.z = in_network(layer.z, apart), layer.a = in_network(layer.a, apart);
  first = in_network(first, apart), second = in_network(second, apart);
  const std::int64_t n = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int q = int(n % 4), arrays = p.arrays();
  const std::int64_t step = n / 4 % p.steps, sample = n / 4 / p.steps;
  if (sample >= 8 * blocks_of(p.problem.samples, 8)) return;
  const std::int64_t from = at_most(sample, p.problem.samples - 1) * layer.stride + 8 * step + 2 * q;
  const double2 z = *reinterpret_cast<const double2*>(layer.z + from), a = *reinterpret_cast<const double2*>(layer.a + from);
  const auto power = [z](double factor) { return make_double2(exp(factor * z.x), exp(factor * z.y)); };
  double2* const to_second = second + ((sample / 8 * p.steps + step) * arrays * 8 + sample % 8) * 4 + q;
  double2* const to_first = first + (sample * p.steps + step) * arrays * 4 + q;
  const double2 shifted = make_double2(a.x + kShift, a.y + kShift);
  to_second[0] = z;
  to_second[kWarp] = shifted;
  to_second[2 * kWarp] = power(-kFactor * spacing);
  for (int group = 0; group < p.groups; ++group) {
    to_second[(kBefore + group) * kWarp] = power(-kFactor * p.problem.nodes.t[kGroup * group]);
  }
  if (sample >= p.problem.samples) return;
  to_first[0] = z;
  to_first[4] = shifted;
  to_first[8] = power(kFactor * spacing);
  for (int group = 0; group < p.groups; ++group) {
    to_first[(kBefore + group) * 4] = power(kFactor * (p.problem.nodes.t[kGroup * group] - 1.0));
  }
}

// ---- general ----

constexpr int kPanelTiles64 = 8;  // of rows in a panel, at most
constexpr int kSecondBlocks = 4;  // of 8 second samples in a unit of work, at most: where there are few nodes
constexpr int kPairs64 = 8 * kSecondBlocks;
constexpr std::size_t kStaticShared64 = 4608;  // of the kernel's own, beside what it is launched with

struct General64 {
  Problem<double> problem;
  Stencil<double> stencil;
  std::int64_t units;
  std::int64_t panel_size, slot_size;  // fragments of 16 bytes
  int passes, second_blocks;           // over the nodes; of 8 second samples
  int chunk;                           // tiles of 8 outputs at a time
  int slots;
  double2* panels;                     // [blocks of the grid, 2, panel_size], null: in shared memory
  double2* kept;                       // [blocks of the grid, slots, slot_size]
  double* moments;                     // [blocks of the grid, outputs / 8, 6, lanes], null: in shared memory
  const int* skip;                     // where 1, another kernel does it
};

/// What a block works on: a row tile is a block of 8 second samples at one node, [second_blocks][nodes].
struct Work64 {
  std::int64_t i, j0;
  int begin, nodes, tiles;  // first node, their number, and that of row tiles
};

/// One residual: act(z(t)) - chord of act, with z(t) the chord of z plus the deviation.
template <ActivationKind kKind>
__device__ inline double residual_at(const Layer<double>& layer, double t, double z_first, double z_second, double a_first,
                                     double a_second, double deviation, bool deviates) {
  double z = on_chord(z_first, z_second, t) + deviation;
  if constexpr (kKind == ActivationKind::kRelu) {  // which makes an output of what rounding leaves of 0
    const double largest = larger(absolute(z_first), absolute(z_second));
    if (deviates && absolute(z) <= largest * (kRoundedUlps * Epsilon<double>::value)) z = 0;
  }
  return activate<kKind, double>(z, layer.alpha, layer.beta) - on_chord(a_first, a_second, t);
}

/// Slope of the residual at an end of the path.
__device__ inline double slope_residual(double slope, double z_first, double z_second, double a_first, double a_second,
                                        double deviation) {
  return fma(slope, (z_second - z_first) + deviation, -(a_second - a_first));
}

/// Residuals of 8 units at row tiles [begin, begin + rows), by one warp. out: the lane's fragments of those, which hold the
/// deviations (`deviates`). Adds and keeps what a network's sums ask for.
template <int kStencil>
__device__ void make_residuals64(const General64& p, const Layer<double>& layer, const Work64& work, int tile,
                                 double2* out, int begin, int rows, bool deviates) {
  const bool affine = layer.kind == ActivationKind::kIdentity;
  const int added_z = layer.added[0], added_v = layer.added[1], kept_z = layer.kept[0], kept_v = layer.kept[1];
  if (deviates && affine && added_z < 0 && added_v < 0 && kept_z < 0 && kept_v < 0) return;
  const int lane = int(threadIdx.x) % kWarp;
  const std::int64_t unit = 8 * std::int64_t(tile) + 2 * (lane % 4);
  const auto load = [&](const double* values, std::int64_t sample) {
    return *reinterpret_cast<const double2*>(values + sample * layer.stride + unit);
  };
  double2* const kept = in_network(p.kept + blockIdx.x * p.slots * p.slot_size, p.problem.apart) +
                        (std::int64_t(tile) * work.tiles + begin) * kWarp + lane;
  const auto slot = [&](int number, int row) -> double2& { return kept[number * p.slot_size + row * kWarp]; };
  const double2 z_first = load(layer.z, work.i), a_first = load(layer.a, work.i);
  with_kind(layer.kind, [&](auto kind) {
    constexpr bool kPairs = kind.value == ActivationKind::kSilu || kind.value == ActivationKind::kSigmoid ||
                            kind.value == ActivationKind::kRelu || kind.value == ActivationKind::kLeakyRelu;
    double2 z_second{}, a_second{};
    std::int64_t j = 0;
    int node = begin % work.nodes, block = begin / work.nodes;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      if (row == 0 || node == 0) {
        j = at_most(work.j0 + 8 * block + lane / 4, p.problem.samples - 1);
        z_second = load(layer.z, j);
        a_second = load(layer.a, j);
      }
      double2 e = deviates ? out[row * kWarp] : make_double2(0, 0);
      if (added_z >= 0) {
        const double2 earlier = slot(added_z, row);
        e = make_double2(e.x + earlier.x, e.y + earlier.y);
      }
      if (kept_z >= 0) slot(kept_z, row) = e;
      if (kStencil > 0 && node < 2) {
        const double2 slope = load(layer.slope, node == 0 ? work.i : j);
        e.x = slope_residual(slope.x, z_first.x, z_second.x, a_first.x, a_second.x, e.x);
        e.y = slope_residual(slope.y, z_first.y, z_second.y, a_first.y, a_second.y, e.y);
      } else if (!(deviates && kind.value == ActivationKind::kIdentity)) {
        const double t = kStencil > 0 ? 0.5 : p.problem.nodes.t[work.begin + node];
        if constexpr (kPairs) {
          e.x = residual_at<kind.value>(layer, t, z_first.x, z_second.x, a_first.x, a_second.x, e.x, deviates);
          e.y = residual_at<kind.value>(layer, t, z_first.y, z_second.y, a_first.y, a_second.y, e.y, deviates);
        } else {
#pragma unroll 1
          for (int half = 0; half < 2; ++half) {
            const auto of = [half](const double2& v) { return half == 0 ? v.x : v.y; };
            const double residual = residual_at<kind.value>(layer, t, of(z_first), of(z_second), of(a_first), of(a_second),
                                                            of(e), deviates);
            e = half == 0 ? make_double2(residual, e.y) : make_double2(e.x, residual);
          }
        }
      }
      e = make_double2(unit < layer.width ? e.x : 0, unit + 1 < layer.width ? e.y : 0);
      if (added_v >= 0) {
        const double2 earlier = slot(added_v, row);
        e = make_double2(e.x + earlier.x, e.y + earlier.y);
      }
      if (kept_v >= 0) slot(kept_v, row) = e;
      out[row * kWarp] = e;
      if (++node == work.nodes) node = 0, ++block;
    }
  });
}

constexpr int kTaskRows64 = 4;  // row tiles that a warp multiplies at a time

/// Products of `rows` row tiles of the panel with the weights of `units` tiles of 8 units, at most kTaskRows64 and kN, by one
/// warp. weights, panel, out: the lane's fragments of the first; steps: of the panel's 8 units; tiles: its row tiles.
template <int kN>
__device__ void multiply64(const double2* weights, int steps, int units, const double2* panel, int rows, int tiles,
                           double2* out) {
  constexpr int kM = kTaskRows64 / 2;
  double sums[kM][kN][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    double2 w[kN];
#pragma unroll
    for (int n = 0; n < kN; ++n) w[n] = n < units ? weights[n * steps * kWarp] : make_double2(0, 0);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (2 * m >= rows) break;
      const double2 a = panel[2 * m * kWarp];
      const double2 b = 2 * m + 1 < rows ? panel[(2 * m + 1) * kWarp] : make_double2(0, 0);
#pragma unroll
      for (int n = 0; n < kN; ++n) multiply_add64(sums[m][n], a.x, b.x, a.y, b.y, w[n].x, w[n].y);
    }
    panel += tiles * kWarp;
    weights += kWarp;
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    if (n >= units) break;
#pragma unroll
    for (int row = 0; row < kTaskRows64; ++row) {
      if (row >= rows) break;
      const double(&c)[4] = sums[row / 2][n];
      out[(n * tiles + row) * kWarp] = make_double2(c[2 * (row % 2)], c[2 * (row % 2) + 1]);
    }
  }
}

/// The block's moments, [tiles of outputs][2][e, te, ee][lanes].
__device__ inline double* moments_of(const General64& p) {
  if (p.moments) return in_network(p.moments, p.problem.apart) + blockIdx.x * blocks_of(p.problem.outputs, 8) * 6 * kWarp;
  return reinterpret_cast<double*>(dynamic_shared() + (p.panels ? 0 : 2 * sizeof(double2) * p.panel_size));
}

/// The outputs of tiles [begin, begin + units), whose residuals are in `out`, into the moments; with the last nodes, into the
/// pairs' sums. A warp takes 8 outputs of 8 pairs.
template <int kStencil>
__device__ void add_outputs64(const General64& p, const Work64& work, const double2* out, int begin, int units, int pass,
                              PairSums* totals) {
  const Problem<double> problem = of_network(p.problem);
  const bool last_pass = pass + 1 == p.passes;
  const double vanishing = never_zero(problem.layers[problem.last].kind) ? Vanishing<double>::value : 0.0;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  for (int block = 0; block < p.second_blocks; ++block) {
    PairSums pair_sums;
    const std::int64_t j = at_most(work.j0 + 8 * block + lane / 4, problem.samples - 1);
    for (int n = warp; n < units; n += kWarps) {
      const std::int64_t k = 8 * std::int64_t(begin + n) + 2 * (lane % 4);
      const double scale[2] = {k < problem.outputs ? problem.scale[k] : 0, k + 1 < problem.outputs ? problem.scale[k + 1] : 0};
      const double2* const values = out + (std::int64_t(n) * work.tiles + block * work.nodes) * kWarp + lane;
      Moments<double> m[2];
      if constexpr (kStencil == 0) {
        double* const sums = moments_of(p) + std::int64_t(begin + n) * 6 * kWarp + lane;  // of several passes
        for (int half = 0; half < 2; ++half) {
          m[half] = Moments<double>{0, 0, 0};
          if (pass == 0) continue;
          double* const from = sums + 3 * half * kWarp;
          m[half] = Moments<double>{from[0], from[kWarp], from[2 * kWarp]};
        }
#pragma unroll 1
        for (int node = 0; node < work.nodes; ++node) {
          const double2 e = values[node * kWarp];
          const double w = problem.nodes.w[work.begin + node], w_t = problem.nodes.w_t[work.begin + node];
          add_moments(m[0], e.x * scale[0], w, w_t);
          add_moments(m[1], e.y * scale[1], w, w_t);
        }
        if (!last_pass) {
          for (int half = 0; half < 2; ++half) {
            double* const to = sums + 3 * half * kWarp;
            to[0] = m[half].e;
            to[kWarp] = m[half].te;
            to[2 * kWarp] = m[half].ee;
          }
        }
      } else {
        double x[kStencil], y[kStencil];
#pragma unroll
        for (int v = 0; v < kStencil; ++v) {
          const double2 e = values[v * kWarp];
          x[v] = e.x * scale[0];
          y[v] = e.y * scale[1];
        }
        m[0] = stencil_moments<kStencil>(p.stencil, x);
        m[1] = stencil_moments<kStencil>(p.stencil, y);
      }
      if (!last_pass) continue;
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        if (k + half >= problem.outputs) break;
        add_output(pair_sums, problem.y, problem.y_low, problem.rounding, problem.outputs, work.i, j, k + half,
                   half == 0 ? m[0] : m[1], scale[half], vanishing * scale[half], problem.nodes.variance_t);
      }
    }
    if (!last_pass) continue;
    pair_sums.nonlinear = warp_sum(pair_sums.nonlinear, 4);
    pair_sums.constants = warp_sum(pair_sums.constants, 4);
    if (lane % 4 == 0) {
      PairSums& total = totals[warp * kPairs64 + 8 * block + lane / 4];
      total.nonlinear += pair_sums.nonlinear;
      total.constants += pair_sums.constants;
    }
  }
}

/// Residuals of layer l, of tiles [begin, begin + units) of 8 units, from those of the layer before in `panel`. A warp takes
/// row tiles and tiles of units together, in tasks.
template <int kStencil>
__device__ void run_layer64(const General64& p, const Work64& work, int l, int begin, int units, const double2* panel,
                            double2* out) {
  const Layer<double>* const layers = p.problem.own_layers();
  const Layer<double>& layer = layers[l];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int steps = l > 0 ? int(blocks_of(layers[l - 1].width, 8)) : 0;
  const int task_rows = l == 0 ? 2 : kTaskRows64, row_groups = ceiling(work.tiles, task_rows);
  // Large tasks, of two tiles of units, read the panel less often, small ones keep all warps busy: 6 loads for 4 matrix
  // instructions in place of 10 are worth half as many instructions more.
  const int cost_large = 2 * ceiling(row_groups * ceiling(units, 2), kWarps);
  const int cost_small = ceiling(row_groups * units, kWarps);
  const bool large = l > 0 && 2 * cost_large <= 3 * cost_small;
  const int task_units = large ? 2 : 1, tasks = row_groups * ceiling(units, task_units);
  for (int task = warp; task < tasks; task += kWarps) {
    const int row = task % row_groups * task_rows, rows = int(at_most(task_rows, work.tiles - row));
    const int n = task / row_groups * task_units, count = int(at_most(task_units, units - n));
    double2* const to = out + (std::int64_t(n) * work.tiles + row) * kWarp + lane;
    if (l > 0) {
      const double2* const weights = layer.fragments + std::int64_t(begin + n) * steps * kWarp + lane;
      const double2* const from = panel + row * kWarp + lane;
      if (large) {
        multiply64<2>(weights, steps, count, from, rows, work.tiles, to);
      } else {
        multiply64<1>(weights, steps, count, from, rows, work.tiles, to);
      }
    }
#pragma unroll 1
    for (int u = 0; u < count; ++u) {
      make_residuals64<kStencil>(p, layer, work, begin + n + u, to + u * work.tiles * kWarp, row, rows, l > 0);
    }
  }
}

// A block per unit of work, one after the other: a first sample and up to 32 second ones. Panels are
// [8 units][row tiles][lanes]. kStencil: the size of the stencil; 0: at every node.
template <int kStencil>
__global__ void __launch_bounds__(kThreads, 2) general64_kernel(const __grid_constant__ General64 p) {
  if (*in_network(p.skip, p.problem.apart)) return;
  const Problem<double>& problem = p.problem;
  __shared__ PairSums totals[kWarps * kPairs64];
  __shared__ Work64 work;  // in registers it would push the products out of them
  static_assert(sizeof(totals) + sizeof(work) <= kStaticShared64);
  double2* const panels = p.panels ? in_network(p.panels, problem.apart) + blockIdx.x * 2 * p.panel_size
                                   : reinterpret_cast<double2*>(dynamic_shared());
  const int pairs = 8 * p.second_blocks;
  for (std::int64_t unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    for (int n = int(threadIdx.x); n < kWarps * kPairs64; n += kThreads) totals[n] = PairSums{};
    for (int pass = 0; pass < p.passes; ++pass) {
      if (threadIdx.x == 0) {
        const std::int64_t nodes = kStencil > 0 ? kStencil : problem.nodes.interior;
        std::int64_t column;
        find_unit(unit, std::int64_t(pairs), work.i, column);
        work.j0 = column * pairs;
        work.begin = int(nodes * pass / p.passes);
        work.nodes = int(nodes * (pass + 1) / p.passes) - work.begin;
        work.tiles = work.nodes * p.second_blocks;
      }
      __syncthreads();
      for (int l = 0; l <= problem.last; ++l) {
        const int layer_tiles = int(blocks_of(problem.own_layers()[l].width, 8));
        const int chunk = l == problem.last ? p.chunk : layer_tiles;
        double2 *const out = panels + l % 2 * p.panel_size, *const panel = panels + (l + 1) % 2 * p.panel_size;
        for (int begin = 0; begin < layer_tiles; begin += chunk) {
          const int units = int(at_most(chunk, layer_tiles - begin));
          run_layer64<kStencil>(p, work, l, begin, units, panel, out);
          __syncthreads();
          if (l < problem.last) continue;
          add_outputs64<kStencil>(p, work, out, begin, units, pass, totals);
          __syncthreads();
        }
      }
    }
    if (int(threadIdx.x) < pairs) {
      const std::int64_t j = work.j0 + threadIdx.x;
      PairSums total;
      for (int part = 0; part < kWarps; ++part) {
        total.nonlinear += totals[part * kPairs64 + threadIdx.x].nonlinear;
        total.constants += totals[part * kPairs64 + threadIdx.x].constants;
      }
      if (work.i <= j && j < problem.samples) {
        const Layer<double>& layer = problem.own_layers()[0];
        store_entry(problem.own_connectivity(), problem.own_counts(), total, layer.z, layer.stride, layer.width,
                    problem.samples, problem.outputs, work.i, j);
      }
    }
    __syncthreads();  // totals and work are read
  }
}

// ---- the plan ----

/// Host's view of both kernels.
struct Plan64 {
  Plan plan;
  General64 general{};
  std::int64_t general_blocks = 0, shallow_blocks = 0;
  std::size_t general_shared = 0, shallow_shared = 0;
  Shallow64 shallow{};
  double2 *first = nullptr, *second = nullptr;  // the shallow kernel's, null: it is not for this network
  double spacing = 0;
};

/// The range in which the shallow kernel takes a network; none: a limit of 0.
inline Range shallow_range(const PathConnectivity<double>& op, std::size_t shared) {
  constexpr int kGroups = 16;  // of four nodes: of so many tables per sample
  const ActivationKind kind = op.activations[0].kind;
  const bool tanh = kind == ActivationKind::kTanh;
  if (op.layers != 1 || op.activations[1].kind != ActivationKind::kIdentity || (op.skips && op.skips[2] >= 0) ||
      !(kind == ActivationKind::kSilu || kind == ActivationKind::kSigmoid || tanh) ||
      op.nodes.interior > kGroup * kGroups || spacing_of(op.nodes) < 0 ||
      op.widths[1] > 8 * kShallowTiles64 * kShallowChunks64 || shared > shared_limit()) {
    return {0, 0};
  }
  const double past = op.nodes.t[0] + double(blocks_of(op.nodes.interior, kGroup) * kGroup - 1) * spacing_of(op.nodes);
  const double reach = past > 1 ? 2 * past - 1 : 1;  // of |z| over the largest at a sample
  return {kShallowLimit64 / reach / (tanh ? 2 : 1), tanh ? kShallowTanhMean64 : 0};
}

/// Places of everything but the layers.
template <int kStencil>
Plan64 make_plan64(const PathConnectivity<double>& op, const Stencil<double>& stencil, Arena& arena) {
  Plan64 plan;
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const std::int64_t output_tiles = blocks_of(op.widths[op.layers], 8);
  Range range{0, 0};
  if constexpr (kStencil == 0) {
    Shallow64& shallow = plan.shallow;
    shallow.steps = int(blocks_of(op.widths[0], 8));
    shallow.groups = int(blocks_of(op.nodes.interior, kGroup));
    shallow.chunks = int(blocks_of(output_tiles, kShallowTiles64));
    plan.shallow_shared = std::size_t(shallow.chunks) * std::size_t(shallow.steps) * kShallowTiles64 * kWarp * sizeof(double2) +
                          (3 * kGroup * std::size_t(shallow.groups) + kShallowMoments64) * sizeof(double);
    range = shallow_range(op, plan.shallow_shared);
    if (range.limit > 0) {
      const std::int64_t size = std::int64_t(shallow.steps) * shallow.arrays() * 4;
      plan.first = arena.take<double2>(op.samples * size);
      plan.second = arena.take<double2>(8 * blocks_of(op.samples, 8) * size);
      plan.spacing = spacing_of(op.nodes);
      shallow.first = plan.first;
      shallow.second = plan.second;
      shallow.units = count_units(op.samples, 8);
      plan.shallow_blocks = at_most(blocks_of(shallow.units, kShallowWarps64), processors);
    }
  }
  plan.plan = make_plan(op, kStencil > 0, range, arena);

  General64& general = plan.general;
  general.stencil = stencil;
  general.skip = plan.plan.flag;
  general.slots = assign_slots(op).count;
  std::int64_t widest = 0, widest_kept = 0;
  for (int l = 0; l < op.layers; ++l) widest = op.widths[l] > widest ? op.widths[l] : widest;
  for (int l = 0; general.slots > 0 && l <= op.layers; ++l) {
    widest_kept = op.widths[l] > widest_kept ? op.widths[l] : widest_kept;
  }
  const std::int64_t panel_tiles = blocks_of(widest, 8);
  general.chunk = int(at_most(output_tiles, panel_tiles > kWarps ? panel_tiles : kWarps));
  const std::int64_t tiles = panel_tiles > general.chunk ? panel_tiles : general.chunk;
  const std::int64_t nodes = kStencil > 0 ? kStencil : op.nodes.interior;
  // Two blocks to a multiprocessor, else one, else panels in the device's memory; half the rows rather than those.
  const std::size_t reserved = std::size_t(device_attribute(cudaDevAttrReservedSharedMemoryPerBlock));
  const std::size_t half = std::size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)) / 2;
  std::int64_t moments = 0;  // bytes
  const auto plan_rows = [&](int rows) {
    general.passes = int(blocks_of(nodes, rows));
    general.second_blocks = general.passes > 1 ? 1 : int(at_most(kSecondBlocks, rows / nodes));
    general.panel_size = tiles * general.second_blocks * blocks_of(nodes, general.passes) * kWarp;
    moments = general.passes > 1 ? std::int64_t(output_tiles * 6 * kWarp * sizeof(double)) : 0;
    plan.general_shared = std::size_t(2 * general.panel_size) * sizeof(double2);
    return plan.general_shared + kStaticShared64 <= shared_limit();
  };
  int rows = kPanelTiles64;
  while (rows > kPanelTiles64 / 2 && !plan_rows(rows)) --rows;
  const bool fits = plan_rows(rows);
  if (!fits) plan_rows(kPanelTiles64);
  general.units = count_units(op.samples, 8 * general.second_blocks);
  if (!fits) plan.general_shared = 0;
  const bool two = plan.general_shared + kStaticShared64 + reserved <= half;
  const std::size_t room = (two ? half - reserved : shared_limit()) - kStaticShared64;
  const bool moments_fit = plan.general_shared + std::size_t(moments) <= room;
  if (moments_fit) plan.general_shared += std::size_t(moments);
  plan.general_blocks = at_most(general.units, (two ? 2 : 1) * std::int64_t(processors));
  if (!fits) general.panels = arena.take<double2>(plan.general_blocks * 2 * general.panel_size);
  if (moments > 0 && !moments_fit) general.moments = arena.take<double>(plan.general_blocks * output_tiles * 6 * kWarp);
  general.slot_size = blocks_of(widest_kept, 8) * general.second_blocks * blocks_of(nodes, general.passes) * kWarp;
  general.kept = arena.take<double2>(plan.general_blocks * general.slots * general.slot_size);
  return plan;
}

template <ActivationKind kKind>
const char* enqueue_shallow64(const Plan64& plan, std::int64_t networks, CUstream_st* stream) {
  const Shallow64& shallow = plan.shallow;
  const std::int64_t threads = 8 * blocks_of(shallow.problem.samples, 8) * shallow.steps * 4;
  const char* const error = launch(pack_shallow64_kernel<kKind>, Grid(blocks_of(threads, kThreads), networks), kThreads, 0,
                                   stream, shallow, plan.plan.first, plan.spacing, plan.first, plan.second);
  if (error) return error;
  return launch(shallow64_kernel<kKind>, Grid(plan.shallow_blocks, networks), kShallowThreads64, plan.shallow_shared, stream,
                shallow);
}

/// apart: bytes between the workspaces of two networks.
template <int kStencil>
const char* enqueue64(const PathConnectivity<double>& op, const Stencil<double>& stencil, std::size_t apart,
                      CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.workspace), std::int64_t(apart)};
  Plan64 plan = make_plan64<kStencil>(op, stencil, arena);
  if (const char* error = enqueue_samples(op, plan.plan, arena, stream)) return error;
  plan.general.problem = plan.plan.problem;
  if constexpr (kStencil == 0) {
    if (plan.first) {
      Shallow64& shallow = plan.shallow;
      const Layer<double>& layer = plan.plan.first;
      shallow.problem = plan.plan.problem;
      shallow.fragments = plan.plan.last.fragments;
      shallow.z = layer.z;
      shallow.stride = layer.stride;
      shallow.width = layer.width;
      shallow.take = plan.plan.flag;
      const char* const error =
          layer.kind == ActivationKind::kSilu      ? enqueue_shallow64<ActivationKind::kSilu>(plan, op.networks, stream)
          : layer.kind == ActivationKind::kSigmoid ? enqueue_shallow64<ActivationKind::kSigmoid>(plan, op.networks, stream)
                                                   : enqueue_shallow64<ActivationKind::kTanh>(plan, op.networks, stream);
      if (error) return error;
    }
  }
  return launch(general64_kernel<kStencil>, Grid(plan.general_blocks, op.networks), kThreads, plan.general_shared, stream,
                plan.general);
}

/// Of one network.
template <int kStencil>
std::size_t own_workspace64(const PathConnectivity<double>& op, const Stencil<double>& stencil) {
  Arena arena{nullptr};
  const Plan64 plan = make_plan64<kStencil>(op, stencil, arena);
  return workspace(op, plan.plan, arena);
}
template <int kStencil>
std::size_t workspace64(const PathConnectivity<double>& op, const Stencil<double>& stencil) {
  const std::size_t own = own_workspace64<kStencil>(op, stencil);
  return own * std::size_t(networks_at_once(op.networks, own));
}
template <int kStencil>
const char* connectivity64(const PathConnectivity<double>& op, const Stencil<double>& stencil, CUstream_st* stream) {
  const std::size_t own = own_workspace64<kStencil>(op, stencil);
  return in_parts(op, own, [&](const PathConnectivity<double>& part) {
    return enqueue64<kStencil>(part, stencil, own, stream);
  });
}

}  // namespace float64
}  // namespace
}  // namespace lmn
