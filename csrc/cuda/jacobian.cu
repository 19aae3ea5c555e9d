// J = diag(a_L') W_L ... diag(a_1') W_1 diag(a_0'), computed for one chunk of samples at a time, layer by layer. The
// multiplication begins at the side with fewer rows or columns.
#include "jacobian.cuh"

#include <utility>

namespace lmn {
namespace {

// Limit of the workspace in bytes. It bounds the samples of a chunk, but a chunk has at least one sample.
constexpr std::size_t kChunkBytes = std::size_t(64) << 20;

template <class T>
struct Plan {
  const Jacobian<T>& op;
  bool from_outputs;
  std::int64_t chunk = 1, total_width = 0, widest = 0, panel_size = 0;

  explicit Plan(const Jacobian<T>& of) : op(of), from_outputs(of.widths[of.layers] <= of.widths[0]) {
    std::int64_t widest_hidden = 0;
    for (int l = 0; l <= op.layers; ++l) {
      total_width += op.widths[l];
      widest = larger_of(widest, op.widths[l]);
      if (l > 0 && l < op.layers) widest_hidden = larger_of(widest_hidden, op.widths[l]);
    }
    if (op.layers > 2) panel_size = widest_hidden * (from_outputs ? op.widths[op.layers] : op.widths[0]);
    chunk = at_most(std::int64_t(kChunkBytes / (sample_values() * sizeof(T))), op.samples);
    chunk = larger_of(chunk, 1);
  }
  std::size_t sample_values() const { return std::size_t(total_width + 2 * widest + 2 * panel_size); }
  std::size_t bytes() const { return std::size_t(chunk) * sample_values() * sizeof(T); }

 private:
  static std::int64_t larger_of(std::int64_t a, std::int64_t b) { return a < b ? b : a; }
};

// ---- one layer ----

constexpr int kScaleThreads = 256;

// The Jacobians of a network with a single layer. A thread computes one value, and neighbouring threads write neighbouring
// values.
template <class T>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(Product<T> p) {
  const std::int64_t at = std::int64_t(blockIdx.x) * kScaleThreads + threadIdx.x;
  if (at >= p.samples * p.rows * p.columns) return;
  const std::int64_t column = at % p.columns, row = at / p.columns % p.rows, n = at / (p.rows * p.columns);
  T value = p.left.values[row * p.columns + column];
  if (p.row) value *= p.row[n * p.slope_stride + row];
  if (p.column) value *= p.column[n * p.slope_stride + column];
  p.out[at] = value;
}

// ---- launcher ----

template <class T>
const char* chunk_of(const Plan<T>& plan, std::int64_t begin, std::int64_t samples, CUstream_st* stream) {
  const Jacobian<T>& op = plan.op;
  const std::int64_t inputs = op.widths[0], outputs = op.widths[op.layers];
  T* const slopes = static_cast<T*>(op.workspace);
  T* values = slopes + plan.chunk * plan.total_width;
  T* next = values + plan.chunk * plan.widest;
  T* panel = next + plan.chunk * plan.widest;
  T* next_panel = panel + plan.chunk * plan.panel_size;
  const auto is_linear = [&op](int l) { return op.activations[l].kind == ActivationKind::kIdentity; };
  // The slopes of layer l, which begin at `from`. Null stands for ones.
  const auto diagonal = [&](int l, const T* from) -> const T* { return is_linear(l) ? nullptr : from; };

  int last_asked = op.layers;  // last layer whose values are needed; layers beyond it are linear
  while (!op.outputs && last_asked >= 0 && is_linear(last_asked)) --last_asked;
  const T* in = op.x + begin * inputs;
  std::int64_t offset = 0;
  for (int l = 0; l <= last_asked; ++l) {
    T* const to = l < last_asked ? next : op.outputs ? op.outputs + begin * outputs : nullptr;
    if (l > 0 || !is_linear(l)) {
      const char* error =
          forward<T, T, T>({in, l == 0 ? nullptr : op.weights[l - 1], l == 0 ? nullptr : op.biases[l - 1], to,
                            is_linear(l) ? nullptr : slopes + offset, samples, l == 0 ? inputs : op.widths[l - 1], op.widths[l],
                            plan.total_width, op.activations[l]},
                           stream);
      if (error) return error;
      in = to;
      next = values;
      values = to;
    }
    offset += op.widths[l];
  }

  const T* const last = slopes + plan.total_width - outputs;
  const T* const row = diagonal(op.layers, last);
  const T* const column = diagonal(0, slopes);
  T* const result = op.jacobian + begin * outputs * inputs;
  Product<T> p{{op.weights[0], 0}, {}, row, nullptr, column, result, samples, outputs, 0, inputs, plan.total_width};
  if (op.layers == 1) {
    return launch(scale_kernel<T>, blocks_of(samples * outputs * inputs, kScaleThreads), kScaleThreads, 0, stream, p);
  }
  Matrices<T> product{op.weights[plan.from_outputs ? op.layers - 1 : 0], 0};
  const T* slope = plan.from_outputs ? last : slopes + inputs;  // of the layer that the product has reached
  for (int step = 1; step < op.layers; ++step) {
    const int l = plan.from_outputs ? op.layers - 1 - step : step;  // the weights of this step
    const bool ends = step + 1 == op.layers;
    if (plan.from_outputs) {
      slope -= op.widths[l + 1];
      p.left = product;
      p.right = {op.weights[l], 0};
      p.middle = diagonal(l + 1, slope);
    } else {
      p.left = {op.weights[l], 0};
      p.right = product;
      p.middle = diagonal(l, slope);
      slope += op.widths[l];
    }
    p.rows = plan.from_outputs ? outputs : op.widths[l + 1];
    p.depth = plan.from_outputs ? op.widths[l + 1] : op.widths[l];
    p.columns = plan.from_outputs ? op.widths[l] : inputs;
    p.row = ends ? row : nullptr;
    p.column = ends ? column : nullptr;
    p.out = ends ? result : panel;
    const char* error = multiply(p, plan.from_outputs, stream);
    if (error) return error;
    product = {panel, p.rows * p.columns};
    std::swap(panel, next_panel);
  }
  return nullptr;
}

template <class T>
const char* jacobian_on(const Jacobian<T>& op, CUstream_st* stream) {
  const Plan<T> plan(op);
  for (std::int64_t begin = 0; begin < op.samples; begin += plan.chunk) {
    const char* error = chunk_of(plan, begin, at_most(plan.chunk, op.samples - begin), stream);
    if (error) return error;
  }
  return nullptr;
}

}  // namespace

std::size_t cuda_workspace(const Jacobian<float>& op) { return Plan<float>(op).bytes(); }
std::size_t cuda_workspace(const Jacobian<double>& op) { return Plan<double>(op).bytes(); }
const char* cuda_run(const Jacobian<float>& op, CUstream_st* stream) { return jacobian_on(op, stream); }
const char* cuda_run(const Jacobian<double>& op, CUstream_st* stream) { return jacobian_on(op, stream); }

}  // namespace lmn
