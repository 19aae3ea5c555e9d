// The Jacobian of each sample is a product of matrices that fit into L1 and L2:
// J = diag(a_L') W_L ... diag(a_1') W_1 diag(a_0'). The multiplication begins at the side with fewer rows or columns. In
// every product lanes run over the columns of the right factor. The last product writes the result.
#include "level.h"

#include "../activation.h"  // after level.h, whose functions it uses

namespace lmn {
namespace {

constexpr int kUnits = 4;                                    // units of a layer computed at a time in the forward pass
constexpr std::int64_t kTaskSamples = 128, kTaskPanels = 4;  // size of a task in multiply_at_once()
template <class T>
constexpr int kPanel = kBlockColumns * kLanes<T>;

/// Row stride of a right factor: whole vectors, but no multiple of 512 bytes. Rows at such multiples share few sets of L1.
template <class T>
std::int64_t padded(std::int64_t columns) {
  const std::int64_t stride = (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  return stride * std::int64_t(sizeof(T)) % 512 == 0 ? stride + 64 / std::int64_t(sizeof(T)) : stride;
}

template <class T>
struct Plan {
  const Jacobian<T>& op;
  bool one_product;     // one hidden layer and no other activation: all samples in one product
  bool from_outputs;    // multiply from the outputs' side
  T** right = nullptr;  // [layers], weights as right factors, rows padded with zeros; used from the outputs' side
  T* slopes = nullptr;  // [threads][slope_size]
  T* sample = nullptr;  // [threads][total_width], one sample's slopes, layer after layer
  T* hidden = nullptr;  // [samples][widths[1]], slopes; used with one product only
  T* values = nullptr;  // [threads][2][widest][kLanes]
  T* panels = nullptr;  // [threads][panel_size]: two panels of a sample, or with one product [widths[1]][kPanel]
  std::int64_t widest = 0, total_width = 0, panel_size = 0;
};

template <class T>
bool is_identity(const Jacobian<T>& op, int l) {
  return op.activations[l].kind == ActivationKind::kIdentity;
}

template <class T>
Plan<T> make_plan(const Jacobian<T>& op, Arena& arena, int threads) {
  Plan<T> plan{op, op.layers == 2 && is_identity(op, 0) && is_identity(op, 2), op.widths[op.layers] <= op.widths[0]};
  std::int64_t tallest = 0, broadest = 0;
  for (int l = 0; l <= op.layers; ++l) {
    plan.total_width += op.widths[l];
    plan.widest = plan.widest < op.widths[l] ? op.widths[l] : plan.widest;
    if (l > 0) tallest = tallest < op.widths[l] ? op.widths[l] : tallest;
    if (l < op.layers) broadest = broadest < padded<T>(op.widths[l]) ? padded<T>(op.widths[l]) : broadest;
  }
  plan.panel_size = plan.one_product    ? op.widths[1] * kPanel<T>
                    : plan.from_outputs ? 2 * op.widths[op.layers] * broadest
                                        : 2 * tallest * padded<T>(op.widths[0]);
  plan.right = arena.take<T*>(op.layers);
  for (int l = 0; l + 1 < op.layers && plan.from_outputs && !plan.one_product; ++l) {
    T* right = arena.take<T>(op.widths[l + 1] * padded<T>(op.widths[l]));
    if (arena.base) plan.right[l] = right;
  }
  plan.slopes = arena.take<T>(threads * plan.total_width * kLanes<T>);
  plan.sample = arena.take<T>(threads * plan.total_width);
  plan.values = arena.take<T>(threads * 2 * plan.widest * kLanes<T>);
  plan.panels = arena.take<T>(threads * plan.panel_size);
  if (plan.one_product) plan.hidden = arena.take<T>(op.samples * op.widths[1]);
  return plan;
}

// ---- the network at a vector of samples ----

template <class T, ActivationKind kKind>
__attribute__((noinline)) void values_and_slopes(T* values, T* slopes, std::int64_t count, Activation activation) {
  using V = Vector<T>;
  const T alpha = T(activation.alpha), beta = T(activation.beta);
  for (std::int64_t n = 0; n < count; n += kLanes<T>) {
    const V z = load<V>(values + n);
    store<V>(slopes + n, derivative<kKind>(z, alpha, beta));
    store<V>(values + n, activate<kKind>(z, alpha, beta));
  }
}

/// slopes: [total_width][kLanes] of the samples from begin on; lanes beyond the last sample repeat the last sample.
/// The sums are in double: a slope is only as right as its argument, and the argument must be on the right side of a kink.
template <class T>
void slopes_of(const Plan<T>& plan, std::int64_t begin, T* values, T* next, T* slopes) {
  constexpr int kParts = kLanes<T> / kLanes<double>;
  const Jacobian<T>& op = plan.op;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const T* sample = op.x + at_most(begin + lane, op.samples - 1) * op.widths[0];
    for (std::int64_t unit = 0; unit < op.widths[0]; ++unit) values[unit * kLanes<T> + lane] = sample[unit];
  }
  for (int l = 0;; ++l) {
    const std::int64_t width = op.widths[l];
    with_kind(op.activations[l].kind,
              [&](auto kind) { values_and_slopes<T, kind.value>(values, slopes, width * kLanes<T>, op.activations[l]); });
    if (l == op.layers) return;
    slopes += width * kLanes<T>;
    if (l + 1 == op.layers && is_identity(op, op.layers)) {  // slope 1, whatever the outputs are
      for (std::int64_t n = 0; n < op.widths[op.layers] * kLanes<T>; ++n) slopes[n] = T(1);
      return;
    }
    for (std::int64_t unit = 0; unit < op.widths[l + 1]; unit += kUnits) {
      D sums[kUnits][kParts];
      const T* rows[kUnits];
      for (int u = 0; u < kUnits; ++u) {
        const std::int64_t row = at_most(unit + u, op.widths[l + 1] - 1);
        rows[u] = op.weights[l] + row * width;
        for (D& sum : sums[u]) sum = splat<D>(op.biases[l] ? double(op.biases[l][row]) : 0.0);
      }
      for (std::int64_t d = 0; d < width; ++d) {
        double wide[kLanes<T>];
        for (int lane = 0; lane < kLanes<T>; ++lane) wide[lane] = double(values[d * kLanes<T> + lane]);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          const D value = load<D>(wide + part * kLanes<double>);
#pragma GCC unroll 4
          for (int u = 0; u < kUnits; ++u) sums[u][part] = fma(splat<D>(double(rows[u][d])), value, sums[u][part]);
        }
      }
      for (std::int64_t u = 0; u < at_most(kUnits, op.widths[l + 1] - unit); ++u) {
        double wide[kLanes<T>];
        for (int part = 0; part < kParts; ++part) store<D>(wide + part * kLanes<double>, sums[u][part]);
        for (int lane = 0; lane < kLanes<T>; ++lane) next[(unit + u) * kLanes<T> + lane] = T(wide[lane]);
      }
    }
    T* const swapped = values;
    values = next;
    next = swapped;
  }
}

// ---- products ----

/// The factors of a product out = diag(row) left right diag(column).
template <class T>
struct Factors {
  const T* left;    // [rows][left_stride]
  const T* right;   // [depth][right_stride], whole vectors
  const T* row;     // [rows], null: ones
  const T* column;  // [columns], null: ones
  T* out;           // [rows][out_stride]
  std::int64_t rows, depth, columns, left_stride, right_stride, out_stride;
};

template <class T, int kC>
inline void block(const Factors<T>& f, std::int64_t row, std::int64_t column) {
  using V = Vector<T>;
  V sums[kBlockRows][kC];
  const T* left[kBlockRows];
  for (int r = 0; r < kBlockRows; ++r) {
    left[r] = f.left + at_most(row + r, f.rows - 1) * f.left_stride;
    for (int c = 0; c < kC; ++c) sums[r][c] = V{};
    // Stores that miss the cache retire one after the other, so their lines are prefetched. They arrive during the product.
    const char* const out = reinterpret_cast<const char*>(f.out + at_most(row + r, f.rows - 1) * f.out_stride + column);
    for (int line = 0; line <= kC * kVectorBytes / 64; ++line) __builtin_prefetch(out + line * 64, 1);
  }
  const T* right = f.right + column;
  for (std::int64_t d = 0; d < f.depth; ++d, right += f.right_stride) {
    V values[kC];
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) values[c] = load<V>(right + c * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kBlockRows; ++r) {
      const V value = splat<V>(left[r][d]);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sums[r][c] = fma(value, values[c], sums[r][c]);
    }
  }
  for (int c = 0; c < kC; ++c) {
    const std::int64_t at = column + c * kLanes<T>, count = at_most(kLanes<T>, f.columns - at);
    const V scale = f.column ? load_partial<V>(f.column + at, count) : splat<V>(T(1));
    for (int r = 0; r < kBlockRows; ++r) {
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
  while (vectors > 0) {
    // Four vectors are taken as two and two, not as three and one: a block of one vector has too few sums to hide the
    // latency of a multiply-add.
    const int step = vectors > kBlockColumns + 1 || vectors == kBlockColumns ? kBlockColumns : vectors > 1 ? 2 : 1;
    for (std::int64_t row = 0; row < f.rows; row += kBlockRows) {
      if (step == kBlockColumns) {
        block<T, kBlockColumns>(f, row, column);
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

/// to = diag(row) weights diag(column); null stands for ones.
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
      T* const swapped = panel;
      panel = next;
      next = swapped;
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
      T* const swapped = panel;
      panel = next;
      next = swapped;
    }
  }
}

template <class T>
std::int64_t tasks_at_once(const Plan<T>& plan) {
  const std::int64_t columns = plan.op.widths[2] * plan.op.widths[0], chunk = kTaskPanels * kPanel<T>;
  return (plan.op.samples + kTaskSamples - 1) / kTaskSamples * ((columns + chunk - 1) / chunk);
}

/// All Jacobians of a network with one hidden layer, in one product: J[n] = sum_h slope[n, h] W_2[:, h] W_1[h, :]. Rows are
/// samples, columns are pairs (output, input). Each panel of columns is made just before its use.
template <class T>
void multiply_at_once(const Plan<T>& plan, Tasks& tasks, int threads) {
  const Jacobian<T>& op = plan.op;
  const std::int64_t inputs = op.widths[0], units = op.widths[1], outputs = op.widths[2], columns = outputs * inputs;
  const std::int64_t chunk = kTaskPanels * kPanel<T>, chunks = (columns + chunk - 1) / chunk;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t task = 0; task < tasks_at_once(plan); ++task) {
    if (!tasks.go_on()) continue;
    T* const panel = plan.panels + omp_get_thread_num() * plan.panel_size;
    const std::int64_t begin = task / chunks * kTaskSamples, from = task % chunks * chunk;
    for (std::int64_t at = from; at < at_most(from + chunk, columns); at += kPanel<T>) {
      const std::int64_t count = at_most(kPanel<T>, columns - at);
      std::int64_t output = at / inputs, input = at % inputs;
      for (std::int64_t c = 0; c < count;) {
        const std::int64_t run = at_most(inputs - input, count - c);  // columns of one output
        for (std::int64_t h = 0; h < units; ++h) {
          const T weight = op.weights[1][output * units + h], *row = op.weights[0] + h * inputs + input;
          for (std::int64_t n = 0; n < run; ++n) panel[h * kPanel<T> + c + n] = weight * row[n];
        }
        c += run;
        output += 1;
        input = 0;
      }
      product<T>({plan.hidden + begin * units, panel, nullptr, nullptr, op.jacobian + begin * columns + at,
                  at_most(kTaskSamples, op.samples - begin), units, count, units, kPanel<T>, columns});
    }
    tasks.count_one();
  }
}

template <class T>
void jacobian_on(const Jacobian<T>& op, int threads) {
  Arena arena{static_cast<char*>(op.workspace)};
  const Plan<T> plan = make_plan(op, arena, threads);
  for (int l = 0; l + 1 < op.layers && plan.from_outputs && !plan.one_product; ++l) {
    const std::int64_t width = op.widths[l], stride = padded<T>(width);
    for (std::int64_t row = 0; row < op.widths[l + 1]; ++row) {
      T* const to = plan.right[l] + row * stride;
      memcpy(to, op.weights[l] + row * width, std::size_t(width) * sizeof(T));
      for (std::int64_t c = width; c < stride; ++c) to[c] = 0;
    }
  }
  memset(plan.panels, 0, std::size_t(threads * plan.panel_size) * sizeof(T));  // the padding of right factors
  Tasks tasks(op.watch, plan.one_product ? tasks_at_once(plan) : op.samples);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t begin = 0; begin < op.samples; begin += kLanes<T>) {
    if (!tasks.go_on()) continue;
    const int thread = omp_get_thread_num();
    T* const slopes = plan.slopes + thread * plan.total_width * kLanes<T>;
    T* const sample = plan.sample + thread * plan.total_width;
    T* const values = plan.values + thread * 2 * plan.widest * kLanes<T>;
    T* const panel = plan.panels + thread * plan.panel_size;
    slopes_of(plan, begin, values, values + plan.widest * kLanes<T>, slopes);
    for (std::int64_t lane = 0; lane < at_most(kLanes<T>, op.samples - begin); ++lane) {
      const std::int64_t n = begin + lane;
      if (plan.one_product) {
        const T* const hidden = slopes + op.widths[0] * kLanes<T>;
        for (std::int64_t h = 0; h < op.widths[1]; ++h) plan.hidden[n * op.widths[1] + h] = hidden[h * kLanes<T> + lane];
        continue;
      }
      if (!tasks.go_on()) break;
      for (std::int64_t unit = 0; unit < plan.total_width; ++unit) sample[unit] = slopes[unit * kLanes<T> + lane];
      jacobian_of(plan, sample, panel, panel + plan.panel_size / 2, op.jacobian + n * op.widths[op.layers] * op.widths[0]);
      tasks.count_one();
    }
  }
  if (plan.one_product && tasks.go_on()) multiply_at_once(plan, tasks, threads);
}

template <class T>
std::size_t workspace_of(const Jacobian<T>& op, int threads) {
  Arena arena{nullptr};
  make_plan(op, arena, threads);
  return arena.used;
}

}  // namespace

namespace LMN_LEVEL {
std::size_t workspace(const Jacobian<float>& op, int threads) { return workspace_of(op, threads); }
std::size_t workspace(const Jacobian<double>& op, int threads) { return workspace_of(op, threads); }
void run(const Jacobian<float>& op, int threads) { jacobian_on(op, threads); }
void run(const Jacobian<double>& op, int threads) { jacobian_on(op, threads); }
}  // namespace LMN_LEVEL

}  // namespace lmn
