// panels_kernel: all layers of a unit of work, from the samples' records to entries of the matrix. panels.cuh launches it after
// the kernels of halves.cuh have filled the records and the weights.
#pragma once
#include "outputs.cuh"
#include "residuals.cuh"

namespace lmn {
namespace {
namespace panels {

// Persistent blocks. A block takes one unit of work at a time; a warp takes a chunk of units or outputs at a set of tiles.
// kPolynomial: the stencil's residuals take the place of the nodes' residuals, and all tiles are one set and one pass.
template <int kTiles, bool kSplit, bool kStraight, bool kPolynomial, bool kPooled>
__global__ void __launch_bounds__(kPanelThreads, 1) panels_kernel(Panels p) {
  static_assert(!kStraight || !(kPolynomial || kPooled));
  // With more tiles, 64-bit addresses of panels would take too many registers.
  constexpr bool kAlwaysShared = kTiles > kFewTiles;
  // fewer for outputs, because their moments take registers
  constexpr int kAhead = kSplit ? 1 : 2, kOutputsAhead = kSplit ? 0 : 1;
  __shared__ PairSums<kPooled> totals[kPanelWarps][kGroup];  // [warp][second sample], sums over the warp's outputs
  static_assert(sizeof(totals) + kPanelWarps * sizeof(Work) <= kStaticShared);
  const Problem<float>& problem = p.problem;
  const auto warp_here = [] { return afresh(int(threadIdx.x)) / kWarp; };
  const int warps = int(blockDim.x) / kWarp;
  const auto add_total = [&](const PairSums<kPooled>& of_lane, bool is_first) {
    const int lane = lane_here();
    PairSums<kPooled>& total = totals[warp_here()][lane / 4];
    const PairSums<kPooled> sums = of_lane.over_lanes(4);
    if (lane % 4 > 0) return;
    total = is_first ? sums : total.plus(sums);
  };
  const auto sets_here = [] { return (work_of_warp().here + kTiles - 1) / kTiles; };
  const auto layer_chunks = [&] { return (layer_here(p)->half.steps.all() + kChunkSteps - 1) / kChunkSteps; };
  // The first tile (within the pass) and the first step of a task.
  const auto set_of_task = [&] { return work_of_warp().task % sets_here() * kTiles; };
  const auto step_of_task = [&] { return work_of_warp().task / sets_here() * kChunkSteps; };
  const auto is_last = [&] { return work_of_warp().first_tile + p.pass_tiles >= p.tiles; };
  for (work_of_warp().unit = blockIdx.x; work_of_warp().unit < p.units; advance(&Work::unit, gridDim.x)) {
    {
      std::int64_t i, group;
      find_unit(work_of_warp().unit, std::int64_t(kGroup), i, group);
      work_of_warp().i = int(i), work_of_warp().group = int(group);
    }
    for (work_of_warp().first_tile = 0; work_of_warp().first_tile < p.tiles; advance(&Work::first_tile, p.pass_tiles)) {
      if (work_of_warp().first_tile > 0) __syncthreads();  // all warps have finished with the panels of the pass before
      const int left = p.tiles - work_of_warp().first_tile;
      work_of_warp().here = left < p.pass_tiles ? left : p.pass_tiles;
      for (work_of_warp().layer = 0; work_of_warp().layer < p.hidden - kStraight; advance(&Work::layer, 1)) {
        for (work_of_warp().task = warp_here(); work_of_warp().task < sets_here() * layer_chunks();
             advance(&Work::task, warps)) {
          Sums<kTiles> sums;
          if (work_of_warp().layer > 0) {
            multiply_chunk<kTiles, kSplit, kAhead, kAlwaysShared>(sums, p, set_of_task(), step_of_task());
          } else {
            clear<kTiles>(sums);
          }
          residuals_of<kTiles, kSplit, kPolynomial>(p, sums, set_of_task(), step_of_task());
          const int set_tile = set_of_task(), first_step = step_of_task(), steps = layer_here(p)->half.steps.all();
          const int here = work_of_warp().here, part = p.pass_tiles * steps * kWarp;
          uint4* const memory = kAlwaysShared || !p.panels ? block_memory<true>(p) : block_memory<false>(p);
          uint4* to = memory + (panel_begin(p, work_of_warp().layer) + (set_tile * steps + first_step) * kWarp + lane_here());
#pragma unroll
          for (int m = 0; m < kTiles; ++m, to += steps * kWarp) {
            if (set_tile + m >= here) break;
#pragma unroll
            for (int g = 0; g < kChunkSteps; ++g) {
              if (first_step + g >= steps) break;
              const Fragment<kSplit> e = fragment_of<kSplit>(sums[g * kTiles + m]);
              to[g * kWarp] = make_uint4(e.high[0], e.high[1], e.high[2], e.high[3]);
              if constexpr (kSplit) to[g * kWarp + part] = make_uint4(e.low[0], e.low[1], e.low[2], e.low[3]);
            }
          }
        }
        __syncthreads();  // the panel is complete
      }
      if constexpr (kStraight) {
        work_of_warp().layer = p.hidden - 1;
        const int own_sums = kTiles * p.output_steps * 2 * kWarp;
        // The warps' sums, [warps][kTiles][output_steps][2][lanes].
        const auto partial = [&] { return reinterpret_cast<float4*>(block_memory<true>(p) + p.partial_sums) + lane_here(); };
        if (p.hidden == 1) __syncthreads();  // the first warp has read the sums of the unit before
        for (int at = 0; at < own_sums; at += kWarp) partial()[warp_here() * own_sums + at] = make_float4(0, 0, 0, 0);
        // Adds the outputs' products with a chunk of residuals to the warp's sums.
        const auto emit = [&](const Sums<kTiles>& residuals, int first_step) {
          __syncwarp();
          Fragment<kSplit> fragments[kTiles * kChunkSteps];
#pragma unroll
          for (int n = 0; n < kTiles * kChunkSteps; ++n) fragments[n] = fragment_of<kSplit>(residuals[n]);
          const Layer<float>* const layer = afresh(problem.own_layers() + problem.last);
          const int steps = layer[-1].half.steps.all(), low = p.output_steps * steps * kWarp;
          const int count = steps - first_step < kChunkSteps ? steps - first_step : kChunkSteps;  // steps in this chunk
          const uint4* weights = reinterpret_cast<const uint4*>(layer->half.weights) + (first_step * kWarp + lane_here());
          float4* to = partial() + warp_here() * own_sums;
#pragma unroll 1
          for (int out = 0; out < p.output_steps; ++out, weights += steps * kWarp, to += 2 * kWarp) {
            uint4 w[kChunkSteps], w_low[kChunkSteps];
#pragma unroll
            for (int g = 0; g < kChunkSteps; ++g) {
              w[g] = w_low[g] = take_weights(weights + (g < count ? g * kWarp : 0));
              if constexpr (kSplit) w_low[g] = take_weights(weights + (g < count ? g * kWarp + low : low));
            }
            float y[kTiles][2][4];
#pragma unroll
            for (int n = 0; n < 2 * kTiles; ++n) {
              take4(y[n / 2][n % 2], reinterpret_cast<const float*>(to + (n / 2 * p.output_steps * 2 + n % 2) * kWarp));
            }
#pragma unroll
            for (int g = 0; g < kChunkSteps; ++g) {
              if (g > 0 && g >= count) break;
#pragma unroll
              for (int m = 0; m < kTiles; ++m) {
                multiply_fragment<kSplit>(y[m][0], y[m][1], fragments[g * kTiles + m], w[g], w_low[g]);
              }
            }
#pragma unroll
            for (int n = 0; n < 2 * kTiles; ++n) {
              const float (&v)[4] = y[n / 2][n % 2];
              to[(n / 2 * p.output_steps * 2 + n % 2) * kWarp] = make_float4(v[0], v[1], v[2], v[3]);
            }
          }
        };
        // A warp stays with one set of tiles; `sharing` warps share a set.
        const auto sharing = [&] { return warps / sets_here(); };
        work_of_warp().task = warp_here() < sharing() * sets_here() ? warp_here() : layer_chunks() * sets_here();
        for (; work_of_warp().task < layer_chunks() * sets_here(); advance(&Work::task, sharing() * sets_here())) {
          Sums<kTiles> sums;
          if (work_of_warp().layer > 0) {
            multiply_chunk<kTiles, kSplit, kAhead, kAlwaysShared>(sums, p, set_of_task(), step_of_task());
          } else {
            clear<kTiles>(sums);
          }
          residuals_of<kTiles, kSplit, kPolynomial>(p, sums, set_of_task(), step_of_task());
          emit(sums, step_of_task());
        }
        __syncthreads();
        const int tile_items = p.output_steps * 2;
        for (int item = warp_here(); item < work_of_warp().here * tile_items; item += warps) {
          const int set = item / tile_items / kTiles;
          float4* const at = partial() + set * own_sums + (item - set * kTiles * tile_items) * kWarp;
          float4 total = *at;
          for (int other = 1; other < sharing(); ++other) {
            const float4 more = at[other * sets_here() * own_sums];
            total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
          }
          *at = total;
        }
        __syncthreads();
        if (warp_here() > 0) continue;  // the other warps go on to the next pass
        for (int out = 0; out < p.output_steps; ++out) {
          float* const waiting = in_network(p.moments, problem.apart) + lane_here() +
                                 (std::int64_t(blockIdx.x) * p.chunks * kChunkSteps + out) * 4 * kMoments * kWarp;
          Moments<float> moments[4] = {};
          if (work_of_warp().first_tile > 0) load_moments(moments, waiting);
          for (int tile = 0; tile < work_of_warp().here; ++tile) {
            const int set = tile / kTiles;
            const float2 w = at_tile(problem.nodes.w, work_of_warp().first_tile + tile);
            const float2 w_t = at_tile(problem.nodes.w_t, work_of_warp().first_tile + tile);
            const float4* const from = partial() + set * own_sums + ((tile - set * kTiles) * p.output_steps + out) * 2 * kWarp;
#pragma unroll
            for (int x = 0; x < 2; ++x) {
              float e[4];
              take4(e, reinterpret_cast<const float*>(from + x * kWarp));
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                add_moments(moments[2 * x + c % 2], e[c], c < 2 ? w.x : w.y, c < 2 ? w_t.x : w_t.y);
              }
            }
          }
          if (!is_last()) {
            store_moments(moments, waiting);
            continue;
          }
          PairSums<kPooled> pair_sums;
          add_four(pair_sums, problem, true, out, moments);
          add_total(pair_sums, out == 0);
        }
      } else {
        if (p.hidden == 0) __syncthreads();  // the totals of the unit before have been read
        work_of_warp().layer = problem.last;
        work_of_warp().in_products = problem.ends_linear && !(p.kept && layer_here(p)->added[0] >= 0);
        for (work_of_warp().task = warp_here(); work_of_warp().task < p.chunks; advance(&Work::task, warps)) {
          const auto first_step = [] { return work_of_warp().task * kChunkSteps; };
          const auto waiting = [&] {
            const std::int64_t place = std::int64_t(blockIdx.x) * p.chunks + work_of_warp().task;
            return in_network(p.moments, problem.apart) + place * kLaneOutputs * kMoments * kWarp + lane_here();
          };
          Moments<float> moments[kLaneOutputs] = {};
          if (work_of_warp().first_tile > 0) load_moments(moments, waiting());
          for (int set_tile = 0; set_tile < work_of_warp().here; set_tile += kTiles) {
            Sums<kTiles> sums;
            if (problem.last > 0) {
              multiply_chunk<kTiles, kSplit, kOutputsAhead, kAlwaysShared>(sums, p, set_tile, first_step());
            } else {
              clear<kTiles>(sums);
            }
            if (!work_of_warp().in_products) {
              store_moments(moments, waiting());  // any_residuals leaves no registers for the moments
              any_residuals<kTiles, kPolynomial>(p, sums, set_tile, first_step());
              load_moments(moments, waiting());
            }
            if constexpr (kPolynomial) {
#pragma unroll
              for (int output = 0; output < kLaneOutputs; ++output) {
                const int g = output / 4, x = output / 2 % 2, b = output % 2;
                const float value[3] = {sums[g * kTiles][x][b], sums[g * kTiles][x][2 + b],
                                        sums[g * kTiles + kTiles - 1][x][b]};
                moments[output] =
                    p.stencil.size == 3 ? stencil_moments<3>(p.stencil, value) : stencil_moments<2>(p.stencil, value);
              }
            } else {
              const int first_tile = work_of_warp().first_tile, here = work_of_warp().here;
#pragma unroll
              for (int m = 0; m < kTiles; ++m) {
                if (set_tile + m >= here) break;
                const float2 w = at_tile(problem.nodes.w, first_tile + set_tile + m);
                const float2 w_t = at_tile(problem.nodes.w_t, first_tile + set_tile + m);
#pragma unroll
                for (int output = 0; output < kLaneOutputs; ++output) {
                  const float (&e)[4] = sums[output / 4 * kTiles + m][output / 2 % 2];
                  add_moments(moments[output], e[output % 2], w.x, w_t.x);
                  add_moments(moments[output], e[2 + output % 2], w.y, w_t.y);
                }
              }
            }
          }
          if (!is_last()) {
            store_moments(moments, waiting());
            continue;
          }
          PairSums<kPooled> pair_sums;
#pragma unroll
          for (int g = 0; g < kChunkSteps; ++g) {
            const Moments<float> four[4] = {moments[4 * g], moments[4 * g + 1], moments[4 * g + 2], moments[4 * g + 3]};
            const int step = first_step() + g;
            if (step < p.output_steps) add_four(pair_sums, problem, work_of_warp().in_products, step, four);
          }
          add_total(pair_sums, work_of_warp().task == warp_here());
        }
      }
    }
    if constexpr (!kStraight) __syncthreads();  // the totals are complete, and all warps have finished with the panels
    if (warp_here() > 0) continue;
    const int lane = lane_here();
    PairSums<kPooled> pair_sums;
    for (int other = 0; other < (kStraight ? 1 : p.chunks < warps ? p.chunks : warps); ++other) {
      pair_sums = pair_sums.plus(totals[other][lane / 4]);
    }
    const std::int64_t i = work_of_warp().i, j = std::int64_t(work_of_warp().group) * kGroup + lane / 4;
    if (lane % 4 == 0 && i < j && j < problem.samples) {
      store_entry(problem, pair_sums, problem.own_layers()[0], i, j);
    }
  }
}

}  // namespace panels
}  // namespace
}  // namespace lmn
