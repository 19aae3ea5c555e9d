// J = diag(a_L') W_L ... diag(a_1') W_1 diag(a_0') for a chunk of samples at a time, layer by layer, from the side with
// fewer rows or columns.
#include "device.h"

#include "../activation.h"

namespace lmn {
namespace {

constexpr std::size_t kChunkBytes = std::size_t(64) << 20;  // of the workspace, which bounds the samples of a chunk

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

// ---- the network at the samples ----

constexpr int kForwardThreads = 128;

template <class T>
struct ForwardLayer {
  const T* in;         // [samples][depth]
  const T* weights;    // [width][depth], null: in is what the activation gets
  const T* bias;       // null: none
  T* values;           // [samples][width]
  T* slopes;           // [samples][slope_stride]
  std::int64_t samples, depth, width, slope_stride;
  Activation activation;
};

// One warp per unit of a sample, lanes over what it sums: neighbouring lanes read neighbouring values. Sums in double:
// a slope is as right as its argument, and a kink is on the right side of it.
template <class T, ActivationKind kKind>
__global__ void __launch_bounds__(kForwardThreads) forward_kernel(ForwardLayer<T> layer) {
  const std::int64_t warp = (std::int64_t(blockIdx.x) * kForwardThreads + threadIdx.x) / kWarp;
  const std::int64_t n = warp / layer.width, unit = warp % layer.width;
  if (n >= layer.samples) return;  // whole warps leave together, so the warp sum stays legal
  T z;
  if (layer.weights) {
    double sum = 0;
    for (std::int64_t d = threadIdx.x % kWarp; d < layer.depth; d += kWarp) {
      sum = fma(double(layer.weights[unit * layer.depth + d]), double(layer.in[n * layer.depth + d]), sum);
    }
    sum = warp_sum(sum);
    z = T(layer.bias ? sum + double(layer.bias[unit]) : sum);
  } else {
    z = layer.in[n * layer.width + unit];
  }
  if (threadIdx.x % kWarp != 0) return;
  const T alpha = T(layer.activation.alpha), beta = T(layer.activation.beta);
  layer.values[n * layer.width + unit] = activate<kKind>(z, alpha, beta);
  layer.slopes[n * layer.slope_stride + unit] = derivative<kKind>(z, alpha, beta);
}

template <class T, int kKind = 0>
const char* forward(const ForwardLayer<T>& layer, CUstream_st* stream) {
  if constexpr (kKind + 1 < int(ActivationKind::kCount)) {
    if (int(layer.activation.kind) != kKind) return forward<T, kKind + 1>(layer, stream);
  }
  return launch(forward_kernel<T, ActivationKind(kKind)>, blocks_of(layer.samples * layer.width, kForwardThreads / kWarp),
                kForwardThreads, 0, stream, layer);
}

// ---- products ----

constexpr int kThreadRows = 4, kThreadColumns = 2, kWarps = 8;
constexpr int kTileRows = kThreadRows * kWarps, kTileColumns = kThreadColumns * kWarp, kTileDepth = 32;

/// A matrix per sample, or with stride 0 one for all.
template <class T>
struct Matrices {
  const T* values;
  std::int64_t stride;
};

/// out[n] = diag(row[n]) left[n] diag(middle[n]) right[n] diag(column[n]); the diagonals' stride is slope_stride, null: ones.
template <class T>
struct Product {
  Matrices<T> left, right;             // [rows][depth], [depth][columns]
  const T *row, *middle, *column;
  T* out;                              // [samples][rows][columns]
  std::int64_t samples, rows, depth, columns, slope_stride;
};

// A block takes a tile of a sample's product, each warp every eighth row of it, each lane two columns 32 apart:
// neighbouring lanes read and write neighbouring columns.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp) product_kernel(Product<T> p) {
  __shared__ T left[kTileRows][kTileDepth];
  __shared__ T right[kTileDepth][kTileColumns];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const std::int64_t column_tiles = blocks_of(p.columns, kTileColumns), row_tiles = blocks_of(p.rows, kTileRows);
  const std::int64_t n = blockIdx.x / (row_tiles * column_tiles);
  const std::int64_t first_row = blockIdx.x / column_tiles % row_tiles * kTileRows;
  const std::int64_t first_column = blockIdx.x % column_tiles * kTileColumns;
  const T *const left_of = p.left.values + n * p.left.stride, *const right_of = p.right.values + n * p.right.stride;
  const std::int64_t slopes = n * p.slope_stride;
  T sums[kThreadRows][kThreadColumns] = {};
  for (std::int64_t depth = 0; depth < p.depth; depth += kTileDepth) {
    __syncthreads();  // the tiles before may still be read
    for (int r = warp; r < kTileRows; r += kWarps) {
      const bool inside = first_row + r < p.rows && depth + lane < p.depth;
      const T value = inside ? left_of[(first_row + r) * p.depth + depth + lane] : T(0);
      left[r][lane] = inside && p.middle ? value * p.middle[slopes + depth + lane] : value;
    }
    for (int d = warp; d < kTileDepth; d += kWarps) {
      for (int c = lane; c < kTileColumns; c += kWarp) {
        const bool inside = depth + d < p.depth && first_column + c < p.columns;
        right[d][c] = inside ? right_of[(depth + d) * p.columns + first_column + c] : T(0);
      }
    }
    __syncthreads();
    const int count = int(at_most(kTileDepth, p.depth - depth));
    for (int d = 0; d < count; ++d) {
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
        for (int c = 0; c < kThreadColumns; ++c) {
          sums[r][c] = fma(left[warp + r * kWarps][d], right[d][lane + c * kWarp], sums[r][c]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const std::int64_t row = first_row + warp + r * kWarps;
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const std::int64_t column = first_column + lane + c * kWarp;
      if (row >= p.rows || column >= p.columns) continue;
      T value = sums[r][c];
      if (p.row) value *= p.row[slopes + row];
      if (p.column) value *= p.column[slopes + column];
      p.out[(n * p.rows + row) * p.columns + column] = value;
    }
  }
}

template <class T>
const char* multiply(const Product<T>& p, CUstream_st* stream) {
  const std::int64_t tiles = blocks_of(p.rows, kTileRows) * blocks_of(p.columns, kTileColumns);
  return launch(product_kernel<T>, p.samples * tiles, kWarps * kWarp, 0, stream, p);
}

constexpr int kScaleThreads = 256;

// The Jacobians of a single layer: neighbouring threads write neighbouring values.
template <class T>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(Product<T> p) {
  const std::int64_t at = std::int64_t(blockIdx.x) * kScaleThreads + threadIdx.x;
  if (at >= p.samples * p.rows * p.columns) return;
  const std::int64_t column = at % p.columns, row = at / p.columns % p.rows, n = at / (p.rows * p.columns);
  const T* const slopes = p.row + n * p.slope_stride;
  p.out[at] = p.left.values[row * p.columns + column] * slopes[row] * p.column[n * p.slope_stride + column];
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

  std::int64_t offset = 0;
  for (int l = 0; l <= op.layers; ++l) {
    const char* error = forward<T>({l == 0 ? op.x + begin * inputs : values, l == 0 ? nullptr : op.weights[l - 1],
                                    l == 0 ? nullptr : op.biases[l - 1], next, slopes + offset, samples,
                                    l == 0 ? inputs : op.widths[l - 1], op.widths[l], plan.total_width,
                                    op.activations[l]}, stream);
    if (error) return error;
    offset += op.widths[l];
    T* const free = values;
    values = next;
    next = free;
  }

  const T* const last = slopes + plan.total_width - outputs;
  T* const result = op.jacobian + begin * outputs * inputs;
  Product<T> p{{op.weights[0], 0}, {}, last, nullptr, slopes, result, samples, outputs, 0, inputs, plan.total_width};
  if (op.layers == 1) {
    return launch(scale_kernel<T>, blocks_of(samples * outputs * inputs, kScaleThreads), kScaleThreads, 0, stream, p);
  }
  Matrices<T> product{op.weights[plan.from_outputs ? op.layers - 1 : 0], 0};
  const T* slope = plan.from_outputs ? last : slopes + inputs;  // of the layer that the product has come to
  for (int step = 1; step < op.layers; ++step) {
    const int l = plan.from_outputs ? op.layers - 1 - step : step;  // the weights of this step
    const bool ends = step + 1 == op.layers;
    if (plan.from_outputs) {
      slope -= op.widths[l + 1];
      p.left = product;
      p.right = {op.weights[l], 0};
    } else {
      p.left = {op.weights[l], 0};
      p.right = product;
    }
    p.middle = slope;
    if (!plan.from_outputs) slope += op.widths[l];
    p.rows = plan.from_outputs ? outputs : op.widths[l + 1];
    p.depth = plan.from_outputs ? op.widths[l + 1] : op.widths[l];
    p.columns = plan.from_outputs ? op.widths[l] : inputs;
    p.row = ends ? last : nullptr;
    p.column = ends ? slopes : nullptr;
    p.out = ends ? result : panel;
    const char* error = multiply(p, stream);
    if (error) return error;
    product = {panel, p.rows * p.columns};
    T* const free = panel;
    panel = next_panel;
    next_panel = free;
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

std::size_t jacobian_cuda_workspace(const Jacobian<float>& op) { return Plan<float>(op).bytes(); }
std::size_t jacobian_cuda_workspace(const Jacobian<double>& op) { return Plan<double>(op).bytes(); }
const char* jacobian_cuda(const Jacobian<float>& op, CUstream_st* stream) { return jacobian_on(op, stream); }
const char* jacobian_cuda(const Jacobian<double>& op, CUstream_st* stream) { return jacobian_on(op, stream); }

}  // namespace lmn
