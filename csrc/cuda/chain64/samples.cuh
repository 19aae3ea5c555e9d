// The network at the samples in float64: places in the workspace, the forward pass, the weights as fragments, the outputs'
// scale, and the device's choice between the two kernels of the paths. chain64.cuh calls make_plan and enqueue_samples.
#pragma once
#include "../chain.cuh"

namespace lmn {
namespace {
namespace float64 {

/// The input and the result of the choice between the general and the shallow kernel.
struct Choice {
  const double* sums;  // [blocks], sums of |z| of the first layer
  std::int64_t blocks;
  // The shallow kernel needs a sum of |z| of at least `least`, and every |z| below `limit`; a limit of 0: never the shallow
  // kernel.
  double least, limit;
  int* takes_shallow;  // the result: 1 for the shallow kernel, 0 for the general one
};

/// Block k scales output k. The block after the last output chooses the kernel and sets the counts to 0.
__global__ void scale_kernel(Problem<double> problem, Choice choice) {
  problem = of_network(problem);
  choice.sums = in_network(choice.sums, problem.apart), choice.takes_shallow = in_network(choice.takes_shallow, problem.apart);
  const std::int64_t k = blockIdx.x;
  if (k < problem.outputs) return scale_output(problem, k);
  double sum = 0;
  for (std::int64_t n = threadIdx.x; n < choice.blocks; n += kThreads) sum += choice.sums[n];
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *choice.takes_shallow = choice.limit > 0 && sum >= choice.least && !isinf(sum);
    problem.counts[0] = problem.counts[1] = 0;
  }
}

/// Weights [width, depth] as fragments. Of each 8 inputs lane 4 g + q has inputs {2 q, 2 q + 1} of unit g. A thread per lane.
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

/// The host's plan for the samples' side: everything's place in the workspace.
struct Plan {
  Problem<double> problem{};
  bool slopes = false;
  Choice choice{};
  double* sums = nullptr;
  int* flag = nullptr;
  double* nodes = nullptr;
  Layer<double> first{}, last{};
};

/// The inputs that the shallow kernel takes: all |z| are below the limit, and the mean |z| is at least least_mean. A limit of
/// 0: none.
struct Range {
  double limit, least_mean;
};

/// Takes the places of everything except the layers. The layers come last in the arena, one by one.
inline Plan make_plan(const PathConnectivity<double>& op, bool slopes, Range shallow, Arena& arena) {
  Plan plan;
  plan.slopes = slopes;
  plan.problem = make_problem(op, arena);
  plan.nodes = arena.take<double>(3 * std::int64_t(op.nodes.interior));
  plan.flag = arena.take<int>(1);
  const std::int64_t first_blocks = blocks_of(op.samples, kForwardTile) * padded(op.widths[0]) / kForwardTile;
  plan.sums = arena.take<double>(first_blocks);
  plan.choice = {plan.sums, first_blocks, shallow.least_mean * double(op.samples * op.widths[0]), shallow.limit, plan.flag};
  return plan;
}

/// Takes the layers' places, and enqueues everything that the samples and the weights determine.
inline const char* enqueue_samples(const PathConnectivity<double>& op, Plan& plan, Arena& arena, CUstream_st* stream) {
  if (device_attribute(cudaDevAttrMultiProcessorCount) == 0) return "no CUDA device";
  if (const char* error = store_nodes(op.nodes, plan.nodes, plan.problem.nodes, stream)) return error;
  const auto layer_at = [&](int l) { return layer_of(op, l, plan.slopes, arena); };
  const char* error = enqueue_forward(
      op, plan.problem, plan.choice.limit, plan.sums, stream, layer_at, [&](int l, const Layer<double>& layer) -> const char* {
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

}  // namespace float64
}  // namespace
}  // namespace lmn
