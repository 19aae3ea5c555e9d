// A Linear applied to the samples in double. It multiplies one panel of samples at a time with blocks of weight rows, by the
// same product as a chain's layers (chain/product.h).
#include "chain/product.h"

namespace lmn {
namespace {

struct LinearScratch {
  double* packed;          // weights, packed as in chain/product.h
  Vector<double>* panels;  // [threads][inputs + outputs][kBlockColumns]
};

template <class T>
LinearScratch split(const Linear<T>& op, Arena& arena, int threads) {
  double* const packed = arena.take<double>(op.outputs * op.inputs);
  return {packed, arena.take<Vector<double>>(threads * (op.inputs + op.outputs) * kBlockColumns)};
}

template <class T>
void linear_on(const Linear<T>& op, int threads) {
  constexpr std::int64_t kLane = kLanes<double>, kPanel = kBlockColumns * kLane;
  Arena arena{static_cast<char*>(op.workspace)};
  const LinearScratch scratch = split(op, arena, threads);
  pack_weights(op.weight, op.outputs, op.inputs, scratch.packed);
  const std::int64_t count = blocks_of(op.samples, kPanel);
  Tasks tasks(op.watch, count);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (worth_threads(op.samples * op.inputs * op.outputs / 16))
  for (std::int64_t task = 0; task < count; ++task) {
    if (!tasks.go_on()) continue;
    Vector<double>* const panel = scratch.panels + omp_get_thread_num() * (op.inputs + op.outputs) * kBlockColumns;
    Vector<double>* const sums = panel + op.inputs * kBlockColumns;
    const std::int64_t begin = task * kPanel, samples = at_most(kPanel, op.samples - begin);
    for (std::int64_t n = 0; n < kPanel; ++n) {
      const T* sample = op.x + (begin + at_most(n, samples - 1)) * op.inputs;
      for (std::int64_t d = 0; d < op.inputs; ++d) panel[d * kBlockColumns + n / kLane][n % kLane] = sample[d];
    }
    multiply_columns<double, kBlockColumns>(scratch.packed, op.outputs, op.inputs, panel, sums, nullptr, nullptr, nullptr);
    for (std::int64_t n = 0; n < samples; ++n) {
      double* const z = op.z + (begin + n) * op.outputs;
      for (std::int64_t k = 0; k < op.outputs; ++k) {
        z[k] = sums[k * kBlockColumns + n / kLane][n % kLane] + (op.bias ? double(op.bias[k]) : 0.0);
      }
    }
  }
}

template <class T>
std::size_t workspace_of(const Linear<T>& op, int threads) {
  Arena arena{nullptr};
  split(op, arena, threads);
  return arena.used;
}

}  // namespace

namespace LMN_LEVEL {
std::size_t workspace(const Linear<float>& op, int threads) { return workspace_of(op, threads); }
std::size_t workspace(const Linear<double>& op, int threads) { return workspace_of(op, threads); }
void run(const Linear<float>& op, int threads) { linear_on(op, threads); }
void run(const Linear<double>& op, int threads) { linear_on(op, threads); }
}  // namespace LMN_LEVEL

}  // namespace lmn
