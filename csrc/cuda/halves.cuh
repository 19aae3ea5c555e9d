// Preparation of the float32 kernels of paths: the samples' records and the weights as halves in the layout of halves.h, by
// kernels that run before those of chained.cuh and panels.cuh; and the host's plan for both.
#pragma once
#include "chain.cuh"

namespace lmn {
namespace {

/// Four values of a layer for a lane (two in a tail), from values [samples, stride].
__device__ inline float4 lane_values(const float* values, std::int64_t stride, std::int64_t sample, const HalfLayer& half,
                                     int step, int q) {
  if (step * kStepUnits >= stride) return make_float4(0, 0, 0, 0);
  const float* const from = values + sample * stride + step * kStepUnits;
  if (step < half.steps.full) return *reinterpret_cast<const float4*>(from + 4 * q);
  const float2 two = *reinterpret_cast<const float2*>(from + 2 * q);
  return make_float4(two.x, two.y, 0, 0);
}

/// Writes element n of the records, which belongs to a group, a step and a lane. The last sample's values fill up the last
/// group.
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
    const int unit = step * kStepUnits + values * q + v;
    const float scale = half_scale(half.largest[unit]);
    to[v] = from[kZ][v] * half.factor;
    // The units that fill up a layer get a different z for each sample, so that samples never seem to agree there. The weights
    // of these units are 0.
    if (half.inverse && unit >= layer.width) to[v] = float(sample) * 0x1p-20f;
    to[kWarp * values + v] = from[kA][v] * half.factor * scale;
    if (half.arrays > kSlope) to[2 * kWarp * values + v] = from[kSlope][v] * scale;
  }
}

/// Writes row `unit` of the weights into layer l, scaled, as halves, and the unit's scales. A warp calls this.
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
    unscale = float(double(half.factor) / (double(before.half.factor) * scale));
    // The column of the instruction that this unit is; halves.h describes the order of units.
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
  const bool ordinary = largest == 0 || (largest >= kTinyUnit && largest <= kHugeUnit);
  if (layer.kind == ActivationKind::kSilu && !ordinary) atomicOr(&problem.range->careful, 1);
}

/// Numbers of blocks in finish_kernel for one layer.
struct FinishBlocks {
  std::int64_t records, rows;
};
template <class T>
LMN_FN FinishBlocks finish_blocks(const Layer<T>& layer, std::int64_t samples) {
  const std::int64_t lanes = blocks_of(samples, kGroup) * layer.half.steps.all() * kWarp;
  return {layer.half.records ? blocks_of(lanes, kThreads) : 0, blocks_of(layer.half.steps.units(), kWarps)};
}

/// Everything that the samples' values and the weights determine, after the forward pass: the outputs' scales, the records, and
/// the weights as halves. A block does one part of one of these.
__global__ void finish_kernel(Problem<float> problem) {
  problem = of_network(problem);
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

// ---- the plan ----

/// What a kernel of halves needs from the layers.
struct Dialect {
  bool tails;  // whether hidden widths may end in a step of 8 units
  int blocks;  // blocks of 8 units to which hidden widths are padded; 0: as many as each width needs
  bool silu;  // whether z and a are in units of -log2(e), and `units` holds 1 / scale, so that SiLU's exponentials are ex2 of z
  bool slopes;        // whether records have slopes
  bool ends = false;  // whether the samples' outputs are also stored in the layout of write_end
};

inline Steps half_steps(const PathConnectivity<float>& op, const Dialect& dialect, int l) {
  if (l == op.layers) return steps_of(op.widths[l], false);
  return dialect.blocks > 0 ? Steps{dialect.blocks / 2, dialect.blocks % 2} : steps_of(op.widths[l], dialect.tails);
}

/// The host's plan for a float problem: everything's place in the workspace.
struct HalfPlan {
  Problem<float> problem{};
  Dialect dialect{};
  float* zeros = nullptr;  // RangeFlags, and then each layer's largest |a|
  std::int64_t zero_count = 0;
  float* nodes = nullptr;
};

/// Takes the places of everything except the layers. The layers come last in the arena, one by one.
inline HalfPlan make_half_plan(const PathConnectivity<float>& op, const Dialect& dialect, Arena& arena) {
  HalfPlan plan;
  plan.dialect = dialect;
  plan.problem = make_problem(op, arena);
  if (dialect.ends) plan.problem.ends = arena.take<float4>(op.samples * kEndOutputs);
  // one more, for a kernel that needs an even number
  plan.nodes = arena.take<float>(3 * (std::int64_t(op.nodes.interior) + 1));
  plan.zero_count = sizeof(RangeFlags) / sizeof(float);
  for (int l = 0; l <= op.layers; ++l) plan.zero_count += half_steps(op, dialect, l).units();
  plan.zeros = arena.take<float>(plan.zero_count);
  plan.problem.range = reinterpret_cast<RangeFlags*>(plan.zeros);
  return plan;
}

/// Takes layer l's place in the workspace. This has to be called for all layers in order.
inline Layer<float> half_layer_of(const PathConnectivity<float>& op, const HalfPlan& plan, int l, Arena& arena) {
  Layer<float> layer = layer_of(op, l, plan.dialect.slopes, arena);
  HalfLayer& half = layer.half;
  half.steps = half_steps(op, plan.dialect, l);
  half.arrays = plan.dialect.slopes ? 3 : 2;
  half.parts = plan.problem.halves_alone ? 1 : 2;
  half.factor = plan.dialect.silu && l < op.layers ? float(-1.4426950408889634) : 1.0f;
  half.inverse = plan.dialect.silu;
  std::int64_t largest = sizeof(RangeFlags) / sizeof(float);
  for (int before = 0; before < l; ++before) largest += half_steps(op, plan.dialect, before).units();
  half.largest = plan.zeros + largest;
  if (l < op.layers || !plan.problem.ends_linear) {
    half.records = arena.take<float>(blocks_of(op.samples, kGroup) * half.group_floats());
  }
  half.units = arena.take<float>(2 * half.steps.units());
  if (l > 0) {
    half.weights = arena.take<uint2>(half.parts * half.part_fragments(half_steps(op, plan.dialect, l - 1)));
  }
  return layer;
}

/// Takes the layers' places, and enqueues everything that the samples and the weights determine. seen(l, layer) is called for
/// each layer.
template <class Seen>
const char* enqueue_half_samples(const PathConnectivity<float>& op, HalfPlan& plan, Arena& arena, CUstream_st* stream,
                                 const Seen& seen) {
  if (device_attribute(cudaDevAttrMultiProcessorCount) == 0) return "no CUDA device";
  const std::size_t zeros = std::size_t(plan.zero_count) * sizeof(float);
  const char* error = message(op.networks == 1 ? cudaMemsetAsync(plan.zeros, 0, zeros, stream)
                                               : cudaMemset2DAsync(plan.zeros, std::size_t(plan.problem.apart), 0, zeros,
                                                                   std::size_t(op.networks), stream));
  if (error) return error;
  std::int64_t blocks = plan.problem.outputs;
  const auto layer_at = [&](int l) { return half_layer_of(op, plan, l, arena); };
  error = enqueue_forward(op, plan.problem, 0.0, nullptr, stream, layer_at, [&](int l, const Layer<float>& layer) {
    const FinishBlocks finish = finish_blocks(layer, op.samples);
    blocks += finish.records + finish.rows;
    seen(l, layer);
    return static_cast<const char*>(nullptr);
  });
  return error ? error : launch(finish_kernel, Grid(blocks, op.networks), kThreads, 0, stream, plan.problem);
}

inline std::size_t half_workspace(const PathConnectivity<float>& op, const HalfPlan& plan, Arena& arena) {
  for (int l = 0; l <= op.layers; ++l) half_layer_of(op, plan, l, arena);
  return arena.used;
}

}  // namespace
}  // namespace lmn
