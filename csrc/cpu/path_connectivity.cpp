#include "chain.h"

namespace lmn {
namespace {

struct LinearScratch {
  double* packed;           // weights, as a layer's
  Vector<double>* panels;   // [threads][inputs + outputs][kColumns]
};
LinearScratch split(const Linear& op, Arena& arena, int threads) {
  double* const packed = arena.take<double>(op.outputs * op.inputs);
  return {packed, arena.take<Vector<double>>(threads * (op.inputs + op.outputs) * kColumns)};
}

/// A panel of samples against blocks of outputs, as the layers of a chain are multiplied.
void linear_on(const Linear& op, int threads) {
  constexpr std::int64_t kLane = kLanes<double>, kPanel = kColumns * kLane;
  Arena arena{static_cast<char*>(op.workspace)};
  const LinearScratch scratch = split(op, arena, threads);
  pack_weights(op.weight, op.outputs, op.inputs, scratch.packed);
  Layer<double> layer{op.outputs, {}};
  layer.packed = scratch.packed;
  const std::int64_t count = blocks_of(op.samples, kPanel);
  Tasks tasks(op.watch, count);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (worth_threads(op.samples * op.inputs * op.outputs / 16))
  for (std::int64_t task = 0; task < count; ++task) {
    if (!tasks.go_on()) continue;
    Vector<double>* const panel = scratch.panels + omp_get_thread_num() * (op.inputs + op.outputs) * kColumns;
    Vector<double>* const sums = panel + op.inputs * kColumns;
    const std::int64_t begin = task * kPanel, samples = at_most(kPanel, op.samples - begin);
    for (std::int64_t n = 0; n < kPanel; ++n) {
      const double* sample = op.x + (begin + at_most(n, samples - 1)) * op.inputs;
      for (std::int64_t d = 0; d < op.inputs; ++d) panel[d * kColumns + n / kLane][n % kLane] = sample[d];
    }
    multiply_layer<double>(layer, op.inputs, kColumns, panel, sums, nullptr, nullptr, nullptr);
    for (std::int64_t n = 0; n < samples; ++n) {
      double* const z = op.z + (begin + n) * op.outputs;
      for (std::int64_t k = 0; k < op.outputs; ++k) {
        z[k] = sums[k * kColumns + n / kLane][n % kLane] + (op.bias ? op.bias[k] : 0.0);
      }
    }
  }
}

}  // namespace
}  // namespace lmn

namespace lmn::LMN_LEVEL {

std::size_t linear_workspace(const Linear& op, int threads) {
  Arena arena{nullptr};
  split(op, arena, threads);
  return arena.used;
}
void linear(const Linear& op, int threads) { linear_on(op, threads); }

std::size_t path_connectivity_workspace(const PathConnectivity<float>& op, int threads) {
  return workspace(op, {}, threads);
}
std::size_t path_connectivity_workspace(const PathConnectivity<double>& op, int threads) {
  return workspace(op, {}, threads);
}
void path_connectivity(const PathConnectivity<float>& op, int threads) { connectivity_on<false>(op, {}, threads); }
void path_connectivity(const PathConnectivity<double>& op, int threads) { connectivity_on<false>(op, {}, threads); }

}  // namespace lmn::LMN_LEVEL
