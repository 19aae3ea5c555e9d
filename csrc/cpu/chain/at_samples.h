// The part of the gradients that depends on one sample at a time: what is summed of the pairs goes back from the samples'
// outputs through the layers.
#pragma once
#include "kept.h"

namespace lmn {
namespace {

/// Multiplies the adjoints of a sample by the slopes of a layer's activation.
template <class T>
void multiply_slopes(const Layer<T>& layer, std::int64_t sample, double* adjoint) {
  const T* z = layer.z + sample / kLanes<T> * layer.width * kLanes<T> + sample % kLanes<T>;
  with_kind(layer.activation.kind, [&](auto kind) {
    for (std::int64_t unit = 0; unit < layer.width; unit += kLanes<double>) {
      const int count = int(at_most(kLanes<double>, layer.width - unit));
      D own{};
      for (int n = 0; n < count; ++n) own[n] = double(z[(unit + n) * kLanes<T>]);
      own = derivative<decltype(kind)::value>(own, layer.activation.alpha, layer.activation.beta);
      for (int n = 0; n < count; ++n) adjoint[unit + n] *= own[n];
    }
  });
}

/// exchange() at a sample, and the adjoint's part of the value's sums.
template <class T>
void arrive(const Backward<T>& b, const Plan<T>& plan, const bool* waits, int value, std::int64_t sample, double* adjoint) {
  const std::int64_t width = b.op.widths[value / 2], row = sample * plan.widest, all = b.op.samples * plan.widest;
  if (b.source[value] >= 0 && waits[value]) {
    const double* waiting = b.pending + b.source[value] * all + row;
    for (std::int64_t n = 0; n < width; ++n) adjoint[n] += waiting[n];
  }
  const int added = b.op.skips ? b.op.skips[value] : -1;
  if (added >= 0) {
    double* waiting = b.pending + b.source[added] * all + row;
    for (std::int64_t n = 0; n < width; ++n) waiting[n] = waits[added] ? waiting[n] + adjoint[n] : adjoint[n];
  }
  if (b.summed[value] < 0) return;
  double* sums = b.op.sums + b.summed[value] * b.op.samples + sample * width;
  for (std::int64_t n = 0; n < width; ++n) sums[n] += adjoint[n];
}

/// sums[n] += sum over the rows of factors[row * factor_stride] rows[row * width + n]. Some rows are added at a time, as most
/// of the time is that of reading and writing the sums.
template <class S>
void add_rows(double* sums, std::int64_t width, const double* factors, std::int64_t factor_stride, const S* rows,
              std::int64_t count) {
  std::int64_t row = 0;
  for (; row + 4 <= count; row += 4, rows += 4 * width, factors += 4 * factor_stride) {
    const double a = factors[0], b = factors[factor_stride], c = factors[2 * factor_stride], d = factors[3 * factor_stride];
    const S *second = rows + width, *third = second + width, *fourth = third + width;
#pragma omp simd
    for (std::int64_t n = 0; n < width; ++n) {
      sums[n] += (a * double(rows[n]) + b * double(second[n])) + (c * double(third[n]) + d * double(fourth[n]));
    }
  }
  for (; row < count; ++row, rows += width, factors += factor_stride) {
    for (std::int64_t n = 0; n < width; ++n) sums[n] += factors[0] * double(rows[n]);
  }
}

/// Adds to the sums and to the products what depends on a sample alone: the adjoints at the samples themselves (`ends`), which
/// go back through the layers; and the part of the products that belongs to the chords, the sums times the inputs' values.
template <class T>
void go_back_at_samples(const Backward<T>& b, const Plan<T>& plan, int threads) {
  const PathConnectivityBackward<T>& op = b.op;
  const std::int64_t outputs = plan.outputs;
  bool* const waits = b.scratch[0].waits;
  for (int value = 0; value < 2 * (op.layers + 1); ++value) waits[value] = false;
  double *adjoints = b.adjoint, *before = b.before, *products = op.products + b.product_count;
  for (std::int64_t i = 0; i < op.samples; ++i) {
    memcpy(adjoints + i * plan.widest, op.ends + i * outputs, std::size_t(outputs) * sizeof(double));
  }
  for (int l = op.layers; l >= 0; --l) {
    const Layer<T>& layer = plan.layers[l];
    const bool bends = layer.activation.kind != ActivationKind::kIdentity;
    const std::int64_t width = layer.width, inputs = l > 0 ? op.widths[l - 1] : 0;
    const T* const weights = l > 0 ? op.weights[l - 1] : nullptr;
    const auto leave = [&](int value) {
      if (op.skips && op.skips[value] >= 0) waits[op.skips[value]] = true;
    };
    if (bends) {
#pragma omp parallel for num_threads(threads) if (worth_threads(op.samples * width))
      for (std::int64_t i = 0; i < op.samples; ++i) {
        arrive(b, plan, waits, 2 * l + 1, i, adjoints + i * plan.widest);
        multiply_slopes(layer, i, adjoints + i * plan.widest);
      }
      leave(2 * l + 1);
    }
#pragma omp parallel for num_threads(threads) if (worth_threads(op.samples * width * (1 + inputs)))
    for (std::int64_t i = 0; i < op.samples; ++i) {
      double* const adjoint = adjoints + i * plan.widest;
      arrive(b, plan, waits, 2 * l, i, adjoint);
      if (l == 0) continue;
      double *const next = before + i * plan.widest, *const own = b.inputs + i * inputs;
      const Layer<T>& earlier = plan.layers[l - 1];
      const T* v = earlier.v + i / kLanes<T> * inputs * kLanes<T> + i % kLanes<T>;
      for (std::int64_t n = 0; n < inputs; ++n) next[n] = 0, own[n] = double(v[n * kLanes<T>]);
      add_rows(next, inputs, adjoint, 1, weights, width);
    }
    leave(2 * l);
    if (l == 0) break;
    products -= width * inputs;
    const double* const sums = op.sums + b.summed[2 * l] * op.samples;
#pragma omp parallel for num_threads(threads) if (worth_threads(op.samples * width * inputs))
    for (std::int64_t k = 0; k < width; ++k) {
      add_rows(products + k * inputs, inputs, sums + k, width, b.inputs, op.samples);
    }
    double* const swapped = adjoints;
    adjoints = before;
    before = swapped;
  }
}

}  // namespace
}  // namespace lmn
