// The float64 kernel for every other network: any depth, widths, activations, nodes and sums, for paths and for polynomials. A
// block carries panels of residuals from layer to layer. chain64.cuh launches it after enqueue_samples.
#pragma once
#include "instructions.cuh"

namespace lmn {
namespace {
namespace float64 {

constexpr int kPanelTiles64 = 8;  // row tiles in a panel, at most
constexpr int kSecondBlocks = 4;  // blocks of 8 second samples in a unit of work, at most; more than one if there are few nodes
constexpr int kPairs64 = 8 * kSecondBlocks;
/// The kernel's static shared memory, beside the dynamic.
LMN_FN constexpr std::size_t static_shared64(bool pooled) { return pooled ? 8704 : 4608; }

struct General64 {
  Problem<double> problem;
  Stencil<double> stencil;
  std::int64_t units;
  std::int64_t panel_size, slot_size;  // fragments of 16 bytes
  int passes, second_blocks;           // passes over the nodes; blocks of 8 second samples
  int chunk;                           // tiles of 8 outputs at a time
  int slots;
  double2* panels;  // [blocks of the grid, 2, panel_size], null: in shared memory
  double2* kept;    // [blocks of the grid, slots, slot_size]
  double* moments;  // [blocks of the grid, outputs / 8, 6, lanes], null: in shared memory
  const int* skip;  // 1: the shallow kernel measures this network
};

/// What a block works on. A row tile is a block of 8 second samples at one node, [second_blocks][nodes].
struct Work64 {
  std::int64_t i, j0;
  int begin, nodes, tiles;  // first node, number of nodes, number of row tiles
};

/// One residual: act(z(t)) - chord of act, where z(t) is the chord of z plus the deviation.
template <ActivationKind kKind>
__device__ inline double residual_at(const Layer<double>& layer, double t, double z_first, double z_second, double a_first,
                                     double a_second, double deviation, bool deviates) {
  double z = on_chord(z_first, z_second, t) + deviation;
  if constexpr (kKind == ActivationKind::kRelu) {  // ReLU would pass rounding on as an output
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

/// Residuals of 8 units at row tiles [begin, begin + rows), by one warp. out: the lane's fragments of these tiles; they hold
/// the deviations if `deviates` is set. This function also adds and keeps the residuals that the network's sums need.
template <int kStencil>
__device__ void make_residuals64(const General64& p, const Layer<double>& layer, const Work64& work, int tile, double2* out,
                                 int begin, int rows, bool deviates) {
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
            const double residual =
                residual_at<kind.value>(layer, t, of(z_first), of(z_second), of(a_first), of(a_second), of(e), deviates);
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

/// Products of `rows` row tiles of the panel (at most kTaskRows64) with the weights of `units` tiles of 8 units (at most kN),
/// by one warp. weights, panel, out: the lane's fragments of the first tile. steps: blocks of 8 units in the panel. tiles: row
/// tiles in the panel.
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
      const double (&c)[4] = sums[row / 2][n];
      out[(n * tiles + row) * kWarp] = make_double2(c[2 * (row % 2)], c[2 * (row % 2) + 1]);
    }
  }
}

/// The block's moments, [tiles of outputs][2][e, te, ee][lanes].
__device__ inline double* moments_of(const General64& p) {
  if (p.moments) return in_network(p.moments, p.problem.apart) + blockIdx.x * blocks_of(p.problem.outputs, 8) * 6 * kWarp;
  return reinterpret_cast<double*>(dynamic_shared() + (p.panels ? 0 : 2 * sizeof(double2) * p.panel_size));
}

/// Adds the outputs of tiles [begin, begin + units), whose residuals are in `out`, to the moments. In the last pass it adds the
/// shares of these outputs to the pairs' sums. A warp takes 8 outputs of 8 pairs.
template <int kStencil, bool kPooled>
__device__ void add_outputs64(const General64& p, const Work64& work, const double2* out, int begin, int units, int pass,
                              PairSums<kPooled>* totals) {
  const Problem<double> problem = of_network(p.problem);
  const bool last_pass = pass + 1 == p.passes;
  const double vanishing = never_zero(problem.layers[problem.last].kind) ? Vanishing<double>::value : 0.0;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  for (int block = 0; block < p.second_blocks; ++block) {
    PairSums<kPooled> pair_sums;
    const std::int64_t j = at_most(work.j0 + 8 * block + lane / 4, problem.samples - 1);
    for (int n = warp; n < units; n += kWarps) {
      const std::int64_t k = 8 * std::int64_t(begin + n) + 2 * (lane % 4);
      const double scale[2] = {k < problem.outputs ? problem.scale[k] : 0, k + 1 < problem.outputs ? problem.scale[k + 1] : 0};
      const double2* const values = out + (std::int64_t(n) * work.tiles + block * work.nodes) * kWarp + lane;
      Moments<double> m[2];
      if constexpr (kStencil == 0) {
        double* const sums = moments_of(p) + std::int64_t(begin + n) * 6 * kWarp + lane;  // used if there are several passes
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
        add_output(pair_sums, problem, work.i, j, k + half, half == 0 ? m[0] : m[1], scale[half], vanishing * scale[half]);
      }
    }
    if (!last_pass) continue;
    pair_sums = pair_sums.over_lanes(4);
    if (lane % 4 == 0) {
      PairSums<kPooled>& total = totals[warp * kPairs64 + 8 * block + lane / 4];
      total = total.plus(pair_sums);
    }
  }
}

/// Residuals of layer l, of tiles [begin, begin + units) of 8 units, from the residuals of the layer before in `panel`. A
/// warp's task is some row tiles at some tiles of units.
template <int kStencil>
__device__ void run_layer64(const General64& p, const Work64& work, int l, int begin, int units, const double2* panel,
                            double2* out) {
  const Layer<double>* const layers = p.problem.own_layers();
  const Layer<double>& layer = layers[l];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int steps = l > 0 ? int(blocks_of(layers[l - 1].width, 8)) : 0;
  const int task_rows = l == 0 ? 2 : kTaskRows64, row_groups = ceiling(work.tiles, task_rows);
  // Large tasks (two tiles of units) read the panel less often: 6 loads for 4 matrix instructions in place of 10. This is worth
  // half as many instructions again. Small tasks keep all warps busy.
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

// A block takes one unit of work after the other: a first sample and up to 32 second samples. Panels are
// [8 units][row tiles][lanes]. kStencil: the size of the stencil; 0: residuals at every node.
template <int kStencil, bool kPooled>
__global__ void __launch_bounds__(kThreads, 2) general64_kernel(const __grid_constant__ General64 p) {
  if (*in_network(p.skip, p.problem.apart)) return;
  const Problem<double>& problem = p.problem;
  __shared__ PairSums<kPooled> totals[kWarps * kPairs64];
  __shared__ Work64 work;  // in registers it would leave too few registers for the products
  static_assert(sizeof(totals) + sizeof(work) <= static_shared64(kPooled));
  double2* const panels = p.panels ? in_network(p.panels, problem.apart) + blockIdx.x * 2 * p.panel_size
                                   : reinterpret_cast<double2*>(dynamic_shared());
  const int pairs = 8 * p.second_blocks;
  for (std::int64_t unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    for (int n = int(threadIdx.x); n < kWarps * kPairs64; n += kThreads) totals[n] = PairSums<kPooled>{};
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
          add_outputs64<kStencil, kPooled>(p, work, out, begin, units, pass, totals);
          __syncthreads();
        }
      }
    }
    if (int(threadIdx.x) < pairs) {
      const std::int64_t j = work.j0 + threadIdx.x;
      PairSums<kPooled> total;
#pragma unroll(kPooled ? 1 : kWarps)  // unrolled, the pooled kernel would spill
      for (int part = 0; part < kWarps; ++part) total = total.plus(totals[part * kPairs64 + threadIdx.x]);
      if (work.i <= j && j < problem.samples) {
        store_entry(problem, total, problem.own_layers()[0], work.i, j);
      }
    }
    __syncthreads();  // all threads have read `totals` and `work`
  }
}

}  // namespace float64
}  // namespace
}  // namespace lmn
