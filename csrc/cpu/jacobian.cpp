// Per sample a product of matrices that fit into L1 and L2: J = diag(a_L') W_L ... diag(a_1') W_1 diag(a_0'), from the
// side with fewer rows or columns. Every product runs lanes over the columns of its right factor, and the last one
// writes the result.
#include "level.h"
#include "../activation.h"

namespace lmn {
namespace {

// Register block: kRows broadcast values of the left factor x kColumns vectors of the right one.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kColumns = 3;
#elif defined(__AVX2__)
constexpr int kRows = 4, kColumns = 3;
#else
constexpr int kRows = 4, kColumns = 2;
#endif
constexpr int kUnits = 4;  // of a layer at a time, in the forward pass

/// Row stride of a right factor: whole vectors, and no multiple of 512 bytes, whose rows would share few sets of L1.
template <class T>
std::int64_t padded(std::int64_t columns) {
  const std::int64_t stride = (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  return stride * std::int64_t(sizeof(T)) % 512 == 0 ? stride + 64 / std::int64_t(sizeof(T)) : stride;
}

template <class T>
struct Plan {
  const Jacobian<T>& op;
  bool from_outputs;       // multiply from the outputs' side
  T** right = nullptr;     // [layers], weights as right factors, rows padded with zeros; from the outputs' side
  T* slopes = nullptr;     // [threads][slope_size]
  T* sample = nullptr;     // [threads][total_width], one sample's slopes, layer after layer
  T* values = nullptr;     // [threads][2][widest][kLanes]
  T* panels = nullptr;     // [threads][2][panel_size]
  std::int64_t widest = 0, total_width = 0, panel_size = 0;
};

template <class T>
Plan<T> make_plan(const Jacobian<T>& op, Arena& arena, int threads) {
  Plan<T> plan{op, op.widths[op.layers] <= op.widths[0]};
  std::int64_t tallest = 0, broadest = 0;
  for (int l = 0; l <= op.layers; ++l) {
    plan.total_width += op.widths[l];
    plan.widest = plan.widest < op.widths[l] ? op.widths[l] : plan.widest;
    if (l > 0) tallest = tallest < op.widths[l] ? op.widths[l] : tallest;
    if (l < op.layers) broadest = broadest < padded<T>(op.widths[l]) ? padded<T>(op.widths[l]) : broadest;
  }
  plan.panel_size = plan.from_outputs ? op.widths[op.layers] * broadest : tallest * padded<T>(op.widths[0]);
  plan.right = arena.take<T*>(op.layers);
  for (int l = 0; l + 1 < op.layers && plan.from_outputs; ++l) {
    T* right = arena.take<T>(op.widths[l + 1] * padded<T>(op.widths[l]));
    if (arena.base) plan.right[l] = right;
  }
  plan.slopes = arena.take<T>(threads * plan.total_width * kLanes<T>);
  plan.sample = arena.take<T>(threads * plan.total_width);
  plan.values = arena.take<T>(threads * 2 * plan.widest * kLanes<T>);
  plan.panels = arena.take<T>(threads * 2 * plan.panel_size);
  return plan;
}

// ---- the network at a vector of samples ----

template <class T>
using Values = void (*)(T* values, T* slopes, std::int64_t count, Activation);
template <class T, ActivationKind kKind>
void values_and_slopes(T* values, T* slopes, std::int64_t count, Activation activation) {
  using V = Vector<T>;
  const T alpha = T(activation.alpha), beta = T(activation.beta);
  for (std::int64_t n = 0; n < count; n += kLanes<T>) {
    const V z = load<V>(values + n);
    store<V>(slopes + n, derivative<kKind>(z, alpha, beta));
    store<V>(values + n, activate<kKind>(z, alpha, beta));
  }
}
template <class T, int kKind = 0>
Values<T> find_values(ActivationKind kind) {
  if constexpr (kKind + 1 < int(ActivationKind::kCount)) {
    if (int(kind) != kKind) return find_values<T, kKind + 1>(kind);
  }
  return values_and_slopes<T, ActivationKind(kKind)>;
}

/// slopes: [total_width][kLanes] of the samples from begin on; lanes beyond the last sample repeat it.
/// Sums in double: a slope is as right as its argument, and a kink is on the right side of it.
template <class T>
void slopes_of(const Plan<T>& plan, std::int64_t begin, T* values, T* next, T* slopes) {
  const Jacobian<T>& op = plan.op;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const T* sample = op.x + at_most(begin + lane, op.samples - 1) * op.widths[0];
    for (std::int64_t unit = 0; unit < op.widths[0]; ++unit) values[unit * kLanes<T> + lane] = sample[unit];
  }
  for (int l = 0;; ++l) {
    const std::int64_t width = op.widths[l];
    find_values<T>(op.activations[l].kind)(values, slopes, width * kLanes<T>, op.activations[l]);
    if (l == op.layers) return;
    slopes += width * kLanes<T>;
    for (std::int64_t unit = 0; unit < op.widths[l + 1]; unit += kUnits) {
      double sums[kUnits][kLanes<T>];
      const T* rows[kUnits];
      for (int u = 0; u < kUnits; ++u) {
        const std::int64_t row = at_most(unit + u, op.widths[l + 1] - 1);
        rows[u] = op.weights[l] + row * width;
        for (double& sum : sums[u]) sum = op.biases[l] ? double(op.biases[l][row]) : 0.0;
      }
      for (std::int64_t d = 0; d < width; ++d) {
        for (int u = 0; u < kUnits; ++u) {
          const double weight = double(rows[u][d]);
          for (int lane = 0; lane < kLanes<T>; ++lane) {
            sums[u][lane] += weight * double(values[d * kLanes<T> + lane]);
          }
        }
      }
      for (std::int64_t u = 0; u < at_most(kUnits, op.widths[l + 1] - unit); ++u) {
        for (int lane = 0; lane < kLanes<T>; ++lane) next[(unit + u) * kLanes<T> + lane] = T(sums[u][lane]);
      }
    }
    T* const free = values;
    values = next;
    next = free;
  }
}

// ---- products ----

/// A block of diag(row) left right diag(column).
template <class T>
struct Factors {
  const T* left;       // [rows][left_stride]
  const T* right;      // [depth][right_stride], whole vectors
  const T* row;        // [rows], null: ones
  const T* column;     // [columns], null: ones
  T* out;              // [rows][out_stride]
  std::int64_t rows, depth, columns, left_stride, right_stride, out_stride;
};

template <class T, int kC>
inline void block(const Factors<T>& f, std::int64_t row, std::int64_t column) {
  using V = Vector<T>;
  V sums[kRows][kC];
  const T* left[kRows];
  for (int r = 0; r < kRows; ++r) {
    left[r] = f.left + at_most(row + r, f.rows - 1) * f.left_stride;
    for (int c = 0; c < kC; ++c) sums[r][c] = V{};
  }
  const T* right = f.right + column;
  for (std::int64_t d = 0; d < f.depth; ++d, right += f.right_stride) {
    V values[kC];
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) values[c] = load<V>(right + c * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V value = splat<V>(left[r][d]);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sums[r][c] = fma(value, values[c], sums[r][c]);
    }
  }
  for (int c = 0; c < kC; ++c) {
    const std::int64_t at = column + c * kLanes<T>, count = at_most(kLanes<T>, f.columns - at);
    const V scale = f.column ? load_partial<V>(f.column + at, count) : splat<V>(T(1));
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= f.rows) break;
      const V sum = f.row ? sums[r][c] * scale * f.row[row + r] : sums[r][c] * scale;
      T* const to = f.out + (row + r) * f.out_stride + at;
      if (count == kLanes<T>) {
        store<V>(to, sum);
      } else {
        memcpy(to, &sum, std::size_t(count) * sizeof(T));
      }
    }
  }
}

template <class T>
void product(const Factors<T>& f) {
  std::int64_t column = 0, vectors = (f.columns + kLanes<T> - 1) / kLanes<T>;
  for (; vectors > 0;) {
    // Not three and one: a block of one vector has too few sums to hide the latency of a multiply-add.
    const int step = vectors > kColumns + 1 || vectors == kColumns ? kColumns : vectors > 1 ? 2 : 1;
    for (std::int64_t row = 0; row < f.rows; row += kRows) {
      if (step == kColumns) {
        block<T, kColumns>(f, row, column);
      } else if (step == 2) {
        block<T, 2>(f, row, column);
      } else {
        block<T, 1>(f, row, column);
      }
    }
    column += step * kLanes<T>;
    vectors -= step;
  }
}

/// diag(row) weights diag(column), null: ones.
template <class T>
void scale(const T* weights, std::int64_t rows, std::int64_t columns, const T* row, const T* column, T* to,
           std::int64_t stride) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const T factor = row ? row[r] : T(1);
    if (column) {
      for (std::int64_t c = 0; c < columns; ++c) to[r * stride + c] = weights[r * columns + c] * column[c] * factor;
    } else {
      for (std::int64_t c = 0; c < columns; ++c) to[r * stride + c] = weights[r * columns + c] * factor;
    }
  }
}

/// slopes: [total_width] of one sample.
template <class T>
void jacobian_of(const Plan<T>& plan, const T* slopes, T* panel, T* next, T* result) {
  const Jacobian<T>& op = plan.op;
  const std::int64_t inputs = op.widths[0], outputs = op.widths[op.layers];
  const T* last = slopes + plan.total_width - outputs;
  if (op.layers == 1) return scale(op.weights[0], outputs, inputs, last, slopes, result, inputs);
  if (plan.from_outputs) {
    const T* slope = last - op.widths[op.layers - 1];
    std::int64_t stride = padded<T>(op.widths[op.layers - 1]);
    scale(op.weights[op.layers - 1], outputs, op.widths[op.layers - 1], last, slope, panel, stride);
    for (int l = op.layers - 2; l >= 0; --l) {
      const std::int64_t width = op.widths[l], right_stride = padded<T>(width);
      slope -= width;
      product<T>({panel, plan.right[l], nullptr, slope, l == 0 ? result : next, outputs, op.widths[l + 1], width, stride,
                  right_stride, l == 0 ? inputs : right_stride});
      stride = right_stride;
      T* const free = panel;
      panel = next;
      next = free;
    }
  } else {
    const std::int64_t stride = padded<T>(inputs);
    const T* slope = slopes + inputs;
    scale(op.weights[0], op.widths[1], inputs, slope, slopes, panel, stride);
    for (int l = 1; l < op.layers; ++l) {
      const bool ends = l + 1 == op.layers;
      slope += op.widths[l];
      product<T>({op.weights[l], panel, slope, nullptr, ends ? result : next, op.widths[l + 1], op.widths[l], inputs,
                  op.widths[l], stride, ends ? inputs : stride});
      T* const free = panel;
      panel = next;
      next = free;
    }
  }
}

template <class T>
void jacobian_on(const Jacobian<T>& op, int threads) {
  Arena arena{static_cast<char*>(op.workspace)};
  const Plan<T> plan = make_plan(op, arena, threads);
  for (int l = 0; l + 1 < op.layers && plan.from_outputs; ++l) {
    const std::int64_t width = op.widths[l], stride = padded<T>(width);
    for (std::int64_t row = 0; row < op.widths[l + 1]; ++row) {
      T* const to = plan.right[l] + row * stride;
      memcpy(to, op.weights[l] + row * width, std::size_t(width) * sizeof(T));
      for (std::int64_t c = width; c < stride; ++c) to[c] = 0;
    }
  }
  memset(plan.panels, 0, std::size_t(threads * 2 * plan.panel_size) * sizeof(T));  // what pads a right factor
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t begin = 0; begin < op.samples; begin += kLanes<T>) {
    const int thread = omp_get_thread_num();
    T* const slopes = plan.slopes + thread * plan.total_width * kLanes<T>;
    T* const sample = plan.sample + thread * plan.total_width;
    T* const values = plan.values + thread * 2 * plan.widest * kLanes<T>;
    T* const panel = plan.panels + thread * 2 * plan.panel_size;
    slopes_of(plan, begin, values, values + plan.widest * kLanes<T>, slopes);
    for (std::int64_t lane = 0; lane < at_most(kLanes<T>, op.samples - begin); ++lane) {
      for (std::int64_t unit = 0; unit < plan.total_width; ++unit) sample[unit] = slopes[unit * kLanes<T> + lane];
      jacobian_of(plan, sample, panel, panel + plan.panel_size, op.jacobian + (begin + lane) * op.widths[op.layers] * op.widths[0]);
    }
  }
}

template <class T>
std::size_t workspace_of(const Jacobian<T>& op, int threads) {
  Arena arena{nullptr};
  make_plan(op, arena, threads);
  return arena.used;
}

}  // namespace

namespace LMN_LEVEL {
std::size_t jacobian_workspace(const Jacobian<float>& op, int threads) { return workspace_of(op, threads); }
std::size_t jacobian_workspace(const Jacobian<double>& op, int threads) { return workspace_of(op, threads); }
void jacobian(const Jacobian<float>& op, int threads) { jacobian_on(op, threads); }
void jacobian(const Jacobian<double>& op, int threads) { jacobian_on(op, threads); }
}  // namespace LMN_LEVEL

}  // namespace lmn
