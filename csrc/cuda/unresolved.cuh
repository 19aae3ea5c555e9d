// Pairs that the float32 kernels leave as kUnresolved, measured in float64 immediately after them. This is resolve of
// lmnfast/_unresolved.py without waits for the device. Of half a million pairs usually none to some hundred are unresolved, so
// the kernel is simple. path_connectivity.cu and hermite_connectivity.cu enqueue it.
//
// A block takes as many pairs at a time as have their points in 32 columns (one lane for each), or one pair with more points.
// It carries all values of the network at these points from layer to layer. The points are the path's nodes, or for the
// polynomials both ends (with slopes) and the path's middle. Pairs that are not measured here stay kUnresolved for Python, and
// counts[1] is their number: pairs with a NaN or Inf, pairs beyond a block's share, networks that are too deep or too wide,
// rules of many nodes.
#pragma once
#include "chain.cuh"

namespace lmn {
namespace {
namespace unresolved {

constexpr int kMostLayers = 48, kMostNodes = 64;    // as many as fit the kernel's parameters
constexpr int kMostPairs = 1 << 14;                 // most pairs of a block, because a launch cannot be interrupted
constexpr std::int64_t kMostPanelBytes = 64 << 20;  // most bytes of panels outside shared memory, of all blocks
// if the panels of so few blocks do not fit there, one pair is enough work for torch
constexpr std::int64_t kFewestBlocks = 16;
constexpr int kTaskUnits = 4;         // units of a layer for which a lane reads a value once
constexpr int kEndPoints = 3;         // points of a polynomial's path: both ends and the middle
constexpr double kAgreeingUlps = 16;  // samples that differ by at most this agree, as in lmnfast/_unresolved.py

struct Unit {
  const float *weights, *biases;  // [width, width before], [width] or null
  double alpha, beta;
  int width, kind;
  int shift[2];                    // first column of `exact` that is added to the value before and after the activation
  std::int16_t added[2], kept[2];  // slots, as in Layer; none: -1
};

/// The kernel's parameters. With several networks the pointers are those of the first one; the arrays of the others follow it.
struct Unresolved {
  Unit layers[kMostLayers + 1];
  double t[kMostNodes], w[kMostNodes];  // all nodes and their weights
  double mean_t, variance_t;
  const double* exact;           // [samples, exact_width]
  const float* inputs;           // [samples, input_width]
  float *connectivity, *pooled;  // [samples, samples]; pooled may be null
  std::int64_t* counts;
  double stabiliser;
  double* panels;  // [blocks][block_panels]; null: in shared memory
  std::int64_t samples, exact_width, input_width;
  std::int64_t panel, block_panels;  // sizes in doubles
  int last, nodes, midpoint;
  int points, pairs_at_once, columns;
  bool has_least;      // whether outputs after the last activation have a least magnitude, see _Hoisted.values
  std::int64_t apart;  // bytes between the workspaces of two networks

  __device__ const double* own_exact() const { return exact + blockIdx.y * samples * exact_width; }
  __device__ const float* own_inputs() const { return inputs + blockIdx.y * samples * input_width; }
  __device__ float* own_connectivity() const { return connectivity + blockIdx.y * samples * samples; }
  __device__ float* own_pooled() const { return pooled ? pooled + blockIdx.y * samples * samples : nullptr; }
  __device__ std::int64_t* own_counts() const { return counts + 2 * std::int64_t(blockIdx.y); }
  __device__ const float* own_weights(int l) const {
    return layers[l].weights + std::int64_t(blockIdx.y) * layers[l].width * layers[l - 1].width;
  }
  __device__ const float* own_biases(int l) const {
    return layers[l].biases ? layers[l].biases + std::int64_t(blockIdx.y) * layers[l].width : nullptr;
  }
};
static_assert(sizeof(Unresolved) <= 4096, "a kernel's parameters");

/// A point between two numbers, as in _between of lmnfast/_unresolved.py.
__device__ inline double between(double first, double second, double t) {
  const double step = second - first;
  return t < 0.5 ? first + t * step : second - (1 - t) * step;
}
__device__ inline bool is_finite(double v) { return v - v == 0; }

/// A lane's sums over outputs for pooled r2, in the square of `unit`. An output enters with its covariance with t and its
/// variance times var(t), both for outputs divided by `scale`; the unit becomes the largest scale.
struct Pool {
  double unit = 0, on_line = 0, total = 0;

  __device__ static double share_of(double scale, double unit) { return unit > 0 ? scale / unit * (scale / unit) : 0; }
  __device__ void rescale(double wider) {
    const double share = share_of(unit, wider);
    on_line *= share, total *= share, unit = wider;
  }
  __device__ void add(double covariance, double output_total, double scale) {
    if (scale > unit) rescale(scale);
    const double share = share_of(scale, unit);
    on_line = fma(covariance * covariance, share, on_line), total = fma(output_total, share, total);
  }
  /// r2 over the outputs of all lanes, for lane 0. A warp calls this.
  __device__ double r2(double stabiliser) {
    double widest = unit;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) widest = larger(widest, __shfl_xor_sync(kAllLanes, widest, offset));
    rescale(widest);
    const double line = warp_sum(on_line), all = warp_sum(total);
    if (!(widest > 0)) return stabiliser > 0 ? 0.0 : 1.0;
    return line / (all + stabiliser / widest / widest);
  }
};

enum Nearness { kFar, kClose, kSame, kConstant, kLeft };  // kLeft: left to Python

/// How near two samples are. A warp calls this.
__device__ inline int nearness(const Unresolved& p, std::int64_t i, std::int64_t j) {
  const int lane = int(threadIdx.x) % kWarp;
  const double* const exact = p.own_exact();
  const float* const inputs = p.own_inputs();
  bool equal = true, agree = true, finite = true;
  double distance = 0, largest = 0;
  for (std::int64_t d = lane; d < p.input_width; d += kWarp) {
    equal &= inputs[i * p.input_width + d] == inputs[j * p.input_width + d];
  }
  for (std::int64_t d = lane; d < p.exact_width; d += kWarp) {
    const double first = exact[i * p.exact_width + d], second = exact[j * p.exact_width + d];
    const double apart = ::fabs(second - first), size = larger(::fabs(first), ::fabs(second));
    agree &= apart <= kAgreeingUlps * Epsilon<double>::value * size;
    finite &= is_finite(first) && is_finite(second) && is_finite(apart);
    distance = larger(distance, apart), largest = larger(largest, size);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    distance = larger(distance, __shfl_xor_sync(kAllLanes, distance, offset));
    largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, offset));
  }
  equal = __all_sync(kAllLanes, equal), agree = __all_sync(kAllLanes, agree), finite = __all_sync(kAllLanes, finite);
  if (!finite) return kLeft;
  // With a stabiliser, outputs that are constant between two samples count as bent, and only equal samples are one.
  if (!equal && agree && p.stabiliser > 0) return kConstant;
  return equal || agree ? kSame : distance <= kCloseSamples * largest ? kClose : kFar;
}

/// One block's pairs and panels. The panels of a block are: two for the layers in turn, one for least magnitudes, and one for
/// each slot. Each panel is [units][columns + 1], and for the polynomials the slopes follow. The additional column keeps lanes
/// that go over units in different banks.
template <bool kPolynomial>
struct Block {
  const Unresolved& p;
  double* panels;
  const int *first, *second;  // [pairs_at_once], in shared memory
  int here;                   // number of pairs

  __device__ double* turn(int l) const { return panels + l % 2 * p.panel; }
  __device__ double* least() const { return panels + 2 * p.panel; }
  __device__ double* slot(int n) const { return panels + (3 + n) * p.panel; }
  __device__ std::int64_t place(int unit, int column) const { return std::int64_t(unit) * (p.columns + 1) + column; }
  __device__ std::int64_t slopes() const { return p.panel / 2; }
  __device__ double t_of(int point) const { return kPolynomial ? (point == 2 ? 0.5 : double(point)) : p.t[point]; }

  /// A column of `exact` at a point, and its slope.
  __device__ void moving(int column, std::int64_t d, double& z, double& slope) const {
    const int pair = column / p.points;
    const double* const exact = p.own_exact() + d;
    const double from = exact[first[pair] * p.exact_width], to = exact[second[pair] * p.exact_width];
    z = between(from, to, t_of(column % p.points));
    slope = to - from;
  }

  __device__ void add(const Unit& layer, int half, int unit, int column, double& z, double& slope) const {
    const std::int64_t at = place(unit, column);
    if (layer.added[half] >= 0) {
      const double* const from = slot(layer.added[half]);
      z += from[at];
      if constexpr (kPolynomial) slope += from[slopes() + at];
    }
    if (layer.shift[half] >= 0) {
      double shift, its_slope;
      moving(column, layer.shift[half] + unit, shift, its_slope);
      z += shift, slope += its_slope;
    }
    if (layer.kept[half] >= 0) {
      double* const to = slot(layer.kept[half]);
      to[at] = z;
      if constexpr (kPolynomial) to[slopes() + at] = slope;
    }
  }

  /// Goes from a unit's sum to the next layer's input.
  __device__ void settle(int l, int unit, int column, double z, double slope) const {
    const Unit& layer = p.layers[l];
    add(layer, 0, unit, column, z, slope);
    with_kind(ActivationKind(layer.kind), [&](auto kind) {
      if constexpr (kPolynomial) slope *= derivative<kind.value, double>(z, layer.alpha, layer.beta);
      z = activate<kind.value, double>(z, layer.alpha, layer.beta);
    });
    add(layer, 1, unit, column, z, slope);
    double* const to = turn(l);
    to[place(unit, column)] = z;
    if constexpr (kPolynomial) to[slopes() + place(unit, column)] = slope;
  }

  /// Writes the samples' points as layer 0.
  __device__ void begin() const {
    const int used = here * p.points;
    for (std::int64_t n = threadIdx.x; n < std::int64_t(p.layers[0].width) * used; n += kThreads) {
      const int unit = int(n / used), column = int(n % used);
      double z, slope;
      moving(column, unit, z, slope);
      if (p.last == 0) least()[place(unit, column)] = 2 * Epsilon<double>::value * ::fabs(z);
      settle(0, unit, column, z, slope);
    }
  }

  /// Computes layer l from the layer before. A warp takes a few units at a time, and a lane a column, so all lanes read the
  /// same weights.
  __device__ void advance(int l) const {
    const Unit& layer = p.layers[l];
    const int depth = p.layers[l - 1].width, used = here * p.points, lane = int(threadIdx.x) % kWarp;
    const int groups = p.columns / kWarp, tasks = int(blocks_of(layer.width, kTaskUnits)) * groups;
    const double* const from = turn(l - 1);
    const float *const weights = p.own_weights(l), *const biases = p.own_biases(l);
    for (int task = int(threadIdx.x) / kWarp; task < tasks; task += kWarps) {
      const int column = task % groups * kWarp + lane, begin = task / groups * kTaskUnits;
      if (column >= used) continue;
      const double* const values = from + column;
      const float* rows[kTaskUnits];
#pragma unroll
      for (int u = 0; u < kTaskUnits; ++u) {
        rows[u] = weights + at_most(begin + u, layer.width - 1) * std::int64_t(depth);
      }
      double sums[kTaskUnits] = {}, its_slopes[kTaskUnits] = {};
#pragma unroll 4
      for (int d = 0; d < depth; ++d) {
        const std::int64_t at = place(d, 0);
        const double value = values[at];
        [[maybe_unused]] double slope = 0;
        if constexpr (kPolynomial) slope = values[slopes() + at];
#pragma unroll
        for (int u = 0; u < kTaskUnits; ++u) {
          const double w = double(rows[u][d]);
          sums[u] = fma(w, value, sums[u]);
          if constexpr (kPolynomial) its_slopes[u] = fma(w, slope, its_slopes[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < kTaskUnits; ++u) {
        const int unit = begin + u;
        if (unit >= layer.width) break;
        settle(l, unit, column, sums[u] + (biases ? double(biases[unit]) : 0.0), its_slopes[u]);
      }
      if (l < p.last || !p.has_least) continue;
      // The rounding of a sum is some epsilons of the root of the sum of its terms' squares.
      for (int u = 0; u < kTaskUnits && begin + u < layer.width; ++u) {
        double squares = 0;
        for (int d = 0; d < depth; ++d) {
          const double w = double(rows[u][d]), value = values[place(d, 0)];
          squares = fma(w * w, value * value, squares);
        }
        const double bias = biases ? double(biases[begin + u]) : 0.0;
        least()[place(begin + u, column)] = 2 * Epsilon<double>::value * ::sqrt(fma(bias, bias, squares));
      }
    }
  }

  __device__ double output(int pair, int point, int k) const { return turn(p.last)[place(k, pair * p.points + point)]; }
  __device__ double output_slope(int pair, int point, int k) const {
    return turn(p.last)[slopes() + place(k, pair * p.points + point)];
  }
  __device__ double least_of(int pair, int point, int k) const {
    return p.has_least ? least()[place(k, pair * p.points + point)] : -1.0;  // less than any magnitude
  }

  /// Writes the entry of a pair. A warp calls this.
  __device__ void finish(int pair, int near) const {
    const int lane = int(threadIdx.x) % kWarp, outputs = p.layers[p.last].width;
    const std::int64_t i = first[pair], j = second[pair];
    double sum = 0;
    Pool pool;
    int constants = 0;
    bool finite = near != kLeft;
    if (near == kFar || near == kClose) {
      double size = 1;
      if constexpr (kPolynomial) {
        for (int k = lane; k < outputs; k += kWarp) {
          size = larger(size, larger(::fabs(output(pair, 0, k)), ::fabs(output(pair, 1, k))));
        }
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) size = larger(size, __shfl_xor_sync(kAllLanes, size, offset));
      }
      for (int k = lane; k < outputs; k += kWarp) {
        const int end = kPolynomial ? 1 : p.nodes - 1;
        const double y_first = output(pair, 0, k), y_second = output(pair, end, k);
        const double at_ends = larger(least_of(pair, 0, k), least_of(pair, end, k));
        double rounding = larger(::fabs(y_first), ::fabs(y_second));
        rounding *= near == kClose ? Epsilon<double>::value : double(Epsilon<float>::value);
        if (near == kClose) rounding = larger(rounding, at_ends);
        finite &= is_finite(at_ends);
        const auto share = [&](const auto& value) {  // value(m): the output at node m
          const double origin = value(0);
          double mean = 0, scale = 0, covariance = 0, variance = 0;
          for (int m = 0; m < p.nodes; ++m) mean = fma(p.w[m], value(m) - origin, mean);
          for (int m = 0; m < p.nodes; ++m) {
            const double centred = value(m) - origin - mean;
            finite &= is_finite(centred);
            scale = larger(scale, ::fabs(centred));
          }
          const double divisor = scale > 0 ? scale : 1.0;
          for (int m = 0; m < p.nodes; ++m) {
            const double centred = (value(m) - origin - mean) / divisor;
            const double weighted = p.w[m] * centred;
            covariance = fma(weighted, p.t[m] - p.mean_t, covariance);
            variance = fma(weighted, centred, variance);
          }
          const bool constant = scale * ::sqrt(variance) <= kConstantUlps * rounding;
          const double total = p.variance_t * variance;
          const double stable = total + p.stabiliser / divisor / divisor;
          sum += !constant ? covariance * covariance / stable : p.stabiliser > 0 ? 0.0 : 1.0;
          constants += constant;
          if (p.pooled && !constant) pool.add(covariance, total, scale);
        };
        if constexpr (kPolynomial) {
          const double middle = output(pair, 2, k);
          double start = output_slope(pair, 0, k), stop = output_slope(pair, 1, k);
          finite &= is_finite(start) && is_finite(stop) && is_finite(middle);
          // As in _without_dead: if the output is exactly 0 and its slopes are nothing but rounding, the slopes become 0.
          const double slight = Epsilon<double>::value * size;
          const bool zero = y_first == 0 && y_second == 0 && middle == 0;
          if (zero && ::fabs(start) <= slight && ::fabs(stop) <= slight) start = stop = 0;
          const double chord = y_second - y_first;
          start -= chord, stop -= chord;
          const double own = least_of(pair, 2, k), half = ::fabs(middle) <= own ? 0.0 : middle;
          finite &= is_finite(own);
          const double bump = p.midpoint ? half - between(y_first, y_second, 0.5) - (start - stop) / 8 : 0.0;
          share([&](int m) {
            const double t = p.t[m], rest = 1 - t;
            const double e = start * t * rest * rest - stop * t * t * rest + 16 * t * t * rest * rest * bump;
            return y_first + t * chord + e;
          });
        } else {
          share([&](int m) {
            const double y = output(pair, m, k), own = least_of(pair, m, k);
            finite &= is_finite(own);
            return ::fabs(y) <= (m == 0 || m == end ? own : larger(own, at_ends)) ? 0.0 : y;
          });
        }
      }
    }
    sum = warp_sum(sum), constants = warp_sum(constants);
    double pooled = p.pooled ? pool.r2(p.stabiliser) : 1.0;
    if (!__all_sync(kAllLanes, finite) || !is_finite(sum) || !is_finite(pooled) || lane > 0) return;
    const double mean = near == kSame ? 1.0 : near == kConstant ? 0.0 : sum / outputs;
    const float entry = float(mean > 1 ? 1.0 : mean);  // rounding may bring the mean above 1
    float* const connectivity = p.own_connectivity();
    connectivity[i * p.samples + j] = connectivity[j * p.samples + i] = entry;
    if (float* const matrix = p.own_pooled()) {
      pooled = near == kConstant ? 0.0 : near == kSame || pooled > 1 ? 1.0 : pooled;
      matrix[i * p.samples + j] = matrix[j * p.samples + i] = float(pooled);
    }
    if (constants > 0) count(p.own_counts(), constants);
    atomicAdd(reinterpret_cast<unsigned long long*>(p.own_counts() + 1), ~0ull);  // subtracts one
  }
};

/// A block takes every gridDim.x-th row of the matrix from its diagonal on, and measures the unresolved pairs there, a few at a
/// time. Sums have the same order for any number of blocks.
template <bool kPolynomial>
__global__ void __launch_bounds__(kThreads, 1) measure_kernel(const __grid_constant__ Unresolved p) {
  __shared__ int first[kWarp], second[kWarp], near[kWarp];
  __shared__ int2 waiting[kWarp + kThreads];
  __shared__ int found;
  if (threadIdx.x == 0) found = 0;
  // Other blocks decrease the count meanwhile, so threads may read different values.
  if (!__syncthreads_or(p.own_counts()[1] != 0)) return;
  const int warp = int(threadIdx.x) / kWarp;
  double* const panels =
      p.panels ? in_network(p.panels, p.apart) + blockIdx.x * p.block_panels : reinterpret_cast<double*>(dynamic_shared());
  const float* const connectivity = p.own_connectivity();
  const auto measure = [&](int begin, int here) {
    bool any = false;
    for (int pair = warp; pair < here; pair += kWarps) {
      const int2 taken = waiting[begin + pair];
      const int how = nearness(p, taken.x, taken.y);
      any |= how == kFar || how == kClose;
      if (threadIdx.x % kWarp == 0) first[pair] = taken.x, second[pair] = taken.y, near[pair] = how;
    }
    const Block<kPolynomial> block{p, panels, first, second, here};
    if (__syncthreads_or(any)) {
      block.begin();
      __syncthreads();
      for (int l = 1; l <= p.last; ++l) {
        block.advance(l);
        __syncthreads();
      }
    }
    for (int pair = warp; pair < here; pair += kWarps) block.finish(pair, near[pair]);
    __syncthreads();  // all warps have finished with these pairs
  };
  int left = 0, measured = 0;
  const int samples = int(p.samples);
  for (int i = int(blockIdx.x); i < samples && measured < kMostPairs; i += int(gridDim.x)) {
    for (int begin = i + 1; begin < samples && measured < kMostPairs; begin += kThreads) {
      const int j = begin + int(threadIdx.x);
      const bool mine = j < samples && connectivity[std::int64_t(i) * samples + j] == float(kUnresolved);
      if (!__syncthreads_or(mine)) continue;
      if (mine) waiting[atomicAdd(&found, 1)] = make_int2(i, j);
      __syncthreads();
      for (left = found; left >= p.pairs_at_once; left -= p.pairs_at_once) {
        measure(left - p.pairs_at_once, p.pairs_at_once);
        measured += p.pairs_at_once;
      }
      __syncthreads();  // all threads have read `found`
      if (threadIdx.x == 0) found = left;
    }
  }
  if (left > 0) measure(0, left);
}

// ---- the plan ----

/// Everything except the pointer into the workspace. If `blocks` is 0, the pairs are left to Python.
struct Plan {
  Unresolved unresolved{};
  std::int64_t blocks = 0;
  std::size_t shared = 0;
};

inline bool rounds(ActivationKind kind) {
  return kind == ActivationKind::kIdentity || kind == ActivationKind::kRelu || kind == ActivationKind::kLeakyRelu ||
         kind == ActivationKind::kSin;
}

inline Plan make_plan(const PathConnectivity<float>& op, int stencil, Arena& arena) {
  Plan plan;
  Unresolved& p = plan.unresolved;
  const bool too_many = op.samples > 0x7fffffff - 2 * kThreads;
  if (!op.exact || op.samples < 2 || too_many || op.layers > kMostLayers || op.nodes.interior + 2 > kMostNodes) return plan;
  std::int64_t widest = 0, shifts = op.widths[0];
  const Slots slots = assign_slots(op);
  for (int l = 0; l <= op.layers; ++l) {
    Unit& layer = p.layers[l];
    if (op.widths[l] > widest) widest = op.widths[l];
    layer.weights = l > 0 ? op.weights[l - 1] : nullptr;
    layer.biases = l > 0 ? op.biases[l - 1] : nullptr;
    layer.alpha = op.activations[l].alpha, layer.beta = op.activations[l].beta;
    layer.width = int(op.widths[l]), layer.kind = int(op.activations[l].kind);
    for (int half = 0; half < 2; ++half) {
      const int value = 2 * l + half, source = op.skips ? op.skips[value] : -1;
      const bool shifted = op.skips && op.shifts[value];
      layer.added[half] = std::int16_t(source < 0 ? -1 : slots.of[std::size_t(source)]);
      layer.kept[half] = std::int16_t(op.skips ? slots.of[std::size_t(value)] : -1);
      layer.shift[half] = shifted ? int(shifts) : -1;
      if (shifted) shifts += op.widths[l];
    }
  }
  p.last = op.layers;
  p.nodes = op.nodes.interior + 2;
  double inside = 0, moment = 0;
  for (int m = 0; m < op.nodes.interior; ++m) {
    p.t[m + 1] = op.nodes.t[m], p.w[m + 1] = op.nodes.weights[m];
    inside += op.nodes.weights[m], moment += op.nodes.weights[m] * op.nodes.t[m];
  }
  p.t[0] = 0, p.t[p.nodes - 1] = 1;
  const auto without_rounding = [](double weight) { return weight > 4 * Epsilon<double>::value ? weight : 0.0; };
  p.w[p.nodes - 1] = without_rounding(op.nodes.mean_t - moment);
  p.w[0] = without_rounding(1 - inside - p.w[p.nodes - 1]);
  p.mean_t = op.nodes.mean_t, p.variance_t = op.nodes.variance_t;
  p.midpoint = stencil == 3;
  p.points = stencil > 0 ? kEndPoints : p.nodes;
  p.pairs_at_once = p.points < kWarp ? kWarp / p.points : 1;
  p.columns = int(blocks_of(p.points * p.pairs_at_once, kWarp)) * kWarp;
  p.has_least = rounds(op.activations[op.layers].kind);
  p.exact = op.exact, p.inputs = op.inputs;
  p.exact_width = op.exact_width, p.input_width = op.input_width;
  p.connectivity = op.connectivity, p.pooled = op.pooled, p.counts = op.counts, p.samples = op.samples;
  p.stabiliser = op.stabiliser;
  p.apart = arena.apart;
  p.panel = widest * (p.columns + 1) * (stencil > 0 ? 2 : 1);
  p.block_panels = p.panel * (3 + slots.count);
  const std::int64_t bytes = p.block_panels * std::int64_t(sizeof(double));
  constexpr std::int64_t kOwnShared = 4096;  // more than the kernel's static shared memory
  const bool in_shared = bytes + kOwnShared <= std::int64_t(shared_limit());
  std::int64_t blocks = at_most(2 * device_attribute(cudaDevAttrMultiProcessorCount), op.samples - 1);
  if (!in_shared) {
    if (at_most(kFewestBlocks, blocks) * bytes > kMostPanelBytes) return plan;
    blocks = at_most(blocks, kMostPanelBytes / bytes);
    p.panels = arena.take<double>(blocks * p.block_panels);
  }
  plan.shared = in_shared ? std::size_t(bytes) : 0;
  plan.blocks = blocks;
  return plan;
}

inline std::size_t workspace(const PathConnectivity<float>& op, int stencil) {
  Arena arena{nullptr};
  make_plan(op, stencil, arena);
  return arena.used;
}

/// stencil: 0 for paths, 2 or 3 as Stencil's size. workspace: aligned to 256 bytes. apart: bytes between the workspaces of two
/// networks.
inline const char* enqueue(const PathConnectivity<float>& op, int stencil, void* workspace, std::size_t apart,
                           CUstream_st* stream) {
  Arena arena{static_cast<char*>(workspace), std::int64_t(apart)};
  const Plan plan = make_plan(op, stencil, arena);
  return launch(stencil > 0 ? measure_kernel<true> : measure_kernel<false>, Grid(plan.blocks, op.networks), kThreads,
                plan.shared, stream, plan.unresolved);
}

}  // namespace unresolved
}  // namespace
}  // namespace lmn
