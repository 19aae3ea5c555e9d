// What path_connectivity and hermite_connectivity share: a chain along the paths between all samples.
//
// One lane per second sample j. For a first sample i and kLanes samples j: at a few nodes at a time, the chord
// residuals of the hidden units make a panel in L1, the packed weights carry it from layer to layer, and the last
// layer's products go from the accumulators straight into the moments of each output.
#pragma once
#include "level.h"
#include "../activation.h"

namespace lmn {
namespace {

// Register block of the product: kRows outputs x kColumns nodes of accumulators, kColumns panel vectors and one
// broadcast weight; 28 of 32 registers, 16 of 16, or 12 of 16 without a fused multiply-add.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kColumns = 3;
#elif defined(__AVX2__)
constexpr int kRows = 4, kColumns = 3;
#else
constexpr int kRows = 4, kColumns = 2;
#endif

// First samples per task: their tables of exponentials stay in L2 at 100 units and 19 nodes.
constexpr std::int64_t kTaskRows = 64;

// Beyond this |z| a product of two exponentials could overflow or lose its digits; evaluate directly.
template <class T> constexpr T kSeparableLimit = sizeof(T) == 4 ? T(80) : T(700);
// 1 - 2 / (1 + exp(2 z)) is only right to an absolute epsilon; below this mean |z| tanh is evaluated directly.
template <class T> constexpr T kTanhSeparableMean = T(0.25);

inline std::int64_t blocks_of(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }
/// Values of one layer at the samples: [blocks of lanes][width][lanes].
template <class T>
struct Layer {
  std::int64_t width;
  Activation activation;
  T* z = nullptr;       // before the activation
  T* a = nullptr;       // after it; the same memory for the identity
  T* v = nullptr;       // what the next layer takes: a, or memory of its own where an earlier value is added to a
  T* slope = nullptr;   // its derivative, for a stencil alone
  T* rounding = nullptr;  // root of the sum of squares of all that v is computed from; epsilons of it are v's rounding
  T* packed = nullptr;  // weights into this layer, [blocks of kRows][width of the layer before][rows of the block]
};

/// What one thread works on.
template <class T>
struct Scratch {
  using V = Vector<T>;
  V *panel, *next_panel;    // [width][nodes of the block]
  V* kept;                  // [slots] panels of values that are added to later ones
  Moments<V>* moments;      // [outputs]
  V* values;                // [outputs][nodes of the stencil]
  const T *first_z, *first_a, *first_slope;  // [sum of widths], the layers of sample i, one after the other
  V* second_table;          // [widths[0]][nodes], exp(-t z_j)
  T* first_table;           // [kTaskRows][widths[0]][nodes], exp(-(1 - t) z_i)
  std::int64_t table_task;  // whose rows first_table holds; none: -1
  std::int64_t counts[2];   // this thread's share of the op's
};

template <class T>
struct Plan {
  const PathConnectivity<T>& op;
  Stencil<T> stencil;
  std::int64_t lane_blocks = 0, outputs = 0, total_width = 0, widest = 0;
  Layer<T>* layers = nullptr;
  int *added = nullptr, *kept = nullptr;         // [values], slot of what is added to each and is kept of it, none: -1
  T *t = nullptr, *w = nullptr, *w_t = nullptr;  // [interior] nodes, weights, weights times t - mean t
  T* scale = nullptr;                            // [outputs]
  T *y = nullptr, *y_low = nullptr;  // scaled outputs, laid out as a layer; what rounding linear ones to T lost
  T *row_z = nullptr, *row_a = nullptr, *row_slope = nullptr;  // [samples][sum of widths], the layers again
  T *row_y = nullptr, *row_y_low = nullptr;      // [samples][outputs]
  T *rounding = nullptr, *row_rounding = nullptr;  // of the scaled outputs, laid out as y and as row_y
  Scratch<T>* scratch = nullptr;                 // [threads]
  bool separable = false;

  const Layer<T>& last() const { return layers[op.layers]; }
  bool ends_linear() const { return op.layers > 0 && last().activation.kind == ActivationKind::kIdentity; }
  /// Whether the outputs' residuals are the last products alone: their scale is in the weights, and none is stored.
  bool ends_in_product() const { return ends_linear() && (!op.skips || op.skips[2 * op.layers] < 0); }
};

/// Slots for the values that are added to later ones, each free again behind the last of those.
template <class T>
void assign_slots(Plan<T>& plan, int* free_from) {
  const std::int32_t* skips = plan.op.skips;
  const int values = 2 * (plan.op.layers + 1);
  for (int value = 0; value < values; ++value) {
    plan.added[value] = skips[value] < 0 ? -1 : plan.kept[skips[value]];
    plan.kept[value] = -1;
    int last = value;
    for (int later = value + 1; later < values; ++later) last = skips[later] == value ? later : last;
    if (last == value) continue;
    int slot = 0;
    while (free_from[slot] > value) ++slot;
    plan.kept[value] = slot;
    free_from[slot] = last;
  }
}

template <class T>
Plan<T> make_plan(const PathConnectivity<T>& op, const Stencil<T>& stencil, Arena& arena, int threads) {
  using V = Vector<T>;
  Plan<T> plan{op, stencil};
  plan.lane_blocks = blocks_of(op.samples, kLanes<T>);
  plan.outputs = op.widths[op.layers];
  for (int l = 0; l <= op.layers; ++l) {
    plan.total_width += op.widths[l];
    plan.widest = op.widths[l] > plan.widest ? op.widths[l] : plan.widest;
  }
  const std::int64_t interior = op.nodes.interior;
  int slots = 0;
  if (op.skips) {
    const int values = 2 * (op.layers + 1);
    for (int value = 0; value < values; ++value) slots += op.skips[value] >= 0;
    plan.added = arena.take<int>(values);
    plan.kept = arena.take<int>(values);
    int* free_from = arena.take<int>(slots);
    if (arena.base) {
      for (int slot = 0; slot < slots; ++slot) free_from[slot] = 0;
      assign_slots(plan, free_from);
    }
  }
  plan.layers = arena.take<Layer<T>>(op.layers + 1);
  plan.t = arena.take<T>(interior);
  plan.w = arena.take<T>(interior);
  plan.w_t = arena.take<T>(interior);
  plan.scale = arena.take<T>(plan.outputs);
  plan.y = arena.take<T>(plan.lane_blocks * plan.outputs * kLanes<T>);
  plan.y_low = arena.take<T>(plan.lane_blocks * plan.outputs * kLanes<T>);
  plan.row_z = arena.take<T>(op.samples * plan.total_width);
  plan.row_a = arena.take<T>(op.samples * plan.total_width);
  plan.row_slope = arena.take<T>(stencil.size == 0 ? 0 : op.samples * plan.total_width);
  plan.row_y = arena.take<T>(op.samples * plan.outputs);
  plan.row_y_low = arena.take<T>(op.samples * plan.outputs);
  plan.rounding = arena.take<T>(plan.lane_blocks * plan.outputs * kLanes<T>);
  plan.row_rounding = arena.take<T>(op.samples * plan.outputs);
  plan.scratch = arena.take<Scratch<T>>(threads);
  for (int l = 0; l <= op.layers; ++l) {
    const std::int64_t values = plan.lane_blocks * op.widths[l] * kLanes<T>;
    Layer<T> layer{op.widths[l], op.activations[l]};
    layer.z = arena.take<T>(values);
    layer.a = layer.activation.kind == ActivationKind::kIdentity ? layer.z : arena.take<T>(values);
    layer.v = op.skips && (op.skips[2 * l + 1] >= 0 || op.shifts[2 * l + 1]) ? arena.take<T>(values) : layer.a;
    layer.slope = stencil.size == 0 ? nullptr : arena.take<T>(values);
    layer.rounding = arena.take<T>(values);
    layer.packed = l == 0 ? nullptr : arena.take<T>(op.widths[l] * op.widths[l - 1]);
    if (arena.base) plan.layers[l] = layer;
  }
  const ActivationKind first = op.activations[0].kind;
  plan.separable = stencil.size == 0 && (first == ActivationKind::kSilu || first == ActivationKind::kSigmoid ||
                                         first == ActivationKind::kTanh);
  for (int thread = 0; thread < threads; ++thread) {
    Scratch<T> s{};
    s.panel = arena.take<V>(plan.widest * kColumns);
    s.next_panel = arena.take<V>(plan.widest * kColumns);
    s.kept = arena.take<V>(slots * plan.widest * kColumns);
    s.moments = arena.take<Moments<V>>(plan.outputs);
    s.values = arena.take<V>(stencil.size * plan.outputs);
    s.second_table = arena.take<V>(plan.separable ? op.widths[0] * interior : 0);
    s.first_table = arena.take<T>(plan.separable ? kTaskRows * op.widths[0] * interior : 0);
    s.table_task = -1;
    s.counts[0] = s.counts[1] = 0;
    if (arena.base) plan.scratch[thread] = s;
  }
  return plan;
}

// ---- product ----

/// sums[r][c] = sum over depth of w[depth][r] panel[depth][c].
template <class T, int kR, int kC>
inline void multiply(const T* w, const Vector<T>* panel, std::int64_t depth, Vector<T> (&sums)[kR][kC]) {
  using V = Vector<T>;
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) sums[r][c] = V{};
  }
  for (std::int64_t d = 0; d < depth; ++d, w += kR, panel += kC) {
    V column[kC];
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) column[c] = panel[c];
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const V weight = splat<V>(w[r]);
#pragma GCC unroll 8
      for (int c = 0; c < kC; ++c) sums[r][c] = fma(weight, column[c], sums[r][c]);
    }
  }
}

template <class T, int kC>
inline void add_moments(Moments<Vector<T>>& moments, const Vector<T> (&e)[kC], const T* w, const T* w_t) {
  Moments<Vector<T>> m = moments;
  for (int c = 0; c < kC; ++c) {
    const Vector<T> weighted = e[c] * w[c];
    m.e += weighted;
    m.te = fma(splat<Vector<T>>(w_t[c]), e[c], m.te);
    m.ee = fma(weighted, e[c], m.ee);
  }
  moments = m;
}

/// One block of rows: into the moments of the outputs (out null), or to a panel.
template <class T, int kR, int kC>
void product(const T* w, const Vector<T>* panel, std::int64_t depth, Vector<T>* out, Moments<Vector<T>>* moments,
             const T* node_w, const T* node_wt) {
  Vector<T> sums[kR][kC];
  multiply<T, kR, kC>(w, panel, depth, sums);
  if (out) {
    for (int r = 0; r < kR; ++r) {
      for (int c = 0; c < kC; ++c) out[r * kC + c] = sums[r][c];
    }
  } else {
    for (int r = 0; r < kR; ++r) add_moments<T, kC>(moments[r], sums[r], node_w, node_wt);
  }
}

template <class T>
using Product = void (*)(const T*, const Vector<T>*, std::int64_t, Vector<T>*, Moments<Vector<T>>*, const T*, const T*);

template <class T, int kR, int kC>
Product<T> find_product(std::int64_t rows, int columns) {
  if constexpr (kC > 1) {
    if (columns < kC) return find_product<T, kR, kC - 1>(rows, columns);
  }
  if constexpr (kR > 1) {
    if (rows < kR) return find_product<T, kR - 1, kC>(rows, columns);
  }
  return product<T, kR, kC>;
}

/// All rows of a layer: panel of the layer before -> moments of the outputs, or the layer's own panel.
template <class T>
void multiply_layer(const Layer<T>& layer, std::int64_t depth, int columns, const Vector<T>* panel, Vector<T>* out,
                    Moments<Vector<T>>* moments, const T* node_w, const T* node_wt) {
  const Product<T> full = find_product<T, kRows, kColumns>(kRows, columns);
  for (std::int64_t row = 0; row < layer.width; row += kRows) {
    const std::int64_t rows = at_most(kRows, layer.width - row);
    const Product<T> block = rows == kRows ? full : find_product<T, kRows, kColumns>(rows, columns);
    block(layer.packed + row * depth, panel, depth, out ? out + row * columns : nullptr,
          moments ? moments + row : nullptr, node_w, node_wt);
  }
}

// ---- activations ----

/// The chord, written once: z and a must round alike, so that a linear piece leaves no residual at all.
template <class V>
inline V on_chord(V first, V second, Scalar<V> t) {
  return fma(splat<V>(t), second - first, first);
}

/// z on the path, from its chord and its distance from it. ReLU makes an output of what rounding leaves of 0: where all
/// units before it are off z is 0, or the bias, and that may be all there is along a path.
template <ActivationKind kKind, class V>
inline V off_chord(V on_chord, V residual, V first, V second) {
  const V z = on_chord + residual;
  if constexpr (kKind != ActivationKind::kRelu) return z;
  const V rounding = larger(absolute(first), absolute(second)) * (kRoundedUlps * Epsilon<Scalar<V>>::value);
  return absolute(z) <= rounding ? V{} : z;
}

template <class T>
using Values = void (*)(T* a, T* slope, const T* z, std::int64_t count, Activation);
template <class T, ActivationKind kKind>
void values(T* a, T* slope, const T* z, std::int64_t count, Activation activation) {
  using V = Vector<T>;
  const T alpha = T(activation.alpha), beta = T(activation.beta);
  for (std::int64_t n = 0; n < count; n += kLanes<T>) {
    store<V>(a + n, activate<kKind>(load<V>(z + n), alpha, beta));
    if (slope) store<V>(slope + n, derivative<kKind>(load<V>(z + n), alpha, beta));
  }
}

/// panel[unit][node] = act(z(t)) - chord of act, with z(t) the chord of z plus what the panel holds (kDeviates).
template <class T>
using Residuals = void (*)(Vector<T>* panel, const T* zi, const T* ai, const T* zj, const T* aj, std::int64_t width,
                           const T* t, int columns, Activation);
template <class T, ActivationKind kKind, bool kDeviates>
void residuals(Vector<T>* panel, const T* zi, const T* ai, const T* zj, const T* aj, std::int64_t width, const T* t,
               int columns, Activation activation) {
  using V = Vector<T>;
  const T alpha = T(activation.alpha), beta = T(activation.beta);
  for (std::int64_t unit = 0; unit < width; ++unit) {
    const V z_first = splat<V>(zi[unit]), z_second = load<V>(zj + unit * kLanes<T>);
    const V a_first = splat<V>(ai[unit]), a_second = load<V>(aj + unit * kLanes<T>);
    for (int c = 0; c < columns; ++c) {
      V& residual = panel[unit * columns + c];
      V z = on_chord<V>(z_first, z_second, t[c]);
      if constexpr (kDeviates) z = off_chord<kKind>(z, residual, z_first, z_second);
      residual = activate<kKind>(z, alpha, beta) - on_chord<V>(a_first, a_second, t[c]);
    }
  }
}

template <class T, int kKind = 0>
Values<T> find_values(ActivationKind kind) {
  if constexpr (kKind + 1 < int(ActivationKind::kCount)) {
    if (int(kind) != kKind) return find_values<T, kKind + 1>(kind);
  }
  return values<T, ActivationKind(kKind)>;
}
template <class T, bool kDeviates, int kKind = 0>
Residuals<T> find_residuals(ActivationKind kind) {
  if constexpr (kKind + 1 < int(ActivationKind::kCount)) {
    if (int(kind) != kKind) return find_residuals<T, kDeviates, kKind + 1>(kind);
  }
  return residuals<T, ActivationKind(kKind), kDeviates>;
}

// SiLU, sigmoid and tanh from exp(-z(t)) = exp(-(1 - t) z_i) exp(-t z_j) (tanh: of 2 z).
template <class T>
inline T exponent_factor(ActivationKind kind) {
  return kind == ActivationKind::kTanh ? T(2) : T(1);
}

template <class T, ActivationKind kKind, int kC>
void separated_residuals(Vector<T>* panel, const T* zi, const T* ai, const T* zj, const T* aj, std::int64_t width,
                         const T* t, const T* first_table, const Vector<T>* second_table, std::int64_t stride) {
  using V = Vector<T>;
  T node[kC];
  for (int c = 0; c < kC; ++c) node[c] = t[c];
  for (std::int64_t unit = 0; unit < width; ++unit) {
    const V z_first = splat<V>(zi[unit]), z_second = load<V>(zj + unit * kLanes<T>);
    const V a_first = splat<V>(ai[unit]), a_second = load<V>(aj + unit * kLanes<T>);
    const V z_chord = z_second - z_first, a_chord = a_second - a_first;
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) {
      const V first = splat<V>(first_table[unit * stride + c]);
      const V logistic = reciprocal(fma(first, second_table[unit * stride + c], splat<V>(T(1))));
      const V chord = fma(splat<V>(node[c]), a_chord, a_first);
      V residual;
      if constexpr (kKind == ActivationKind::kSilu) {
        residual = fma(fma(splat<V>(node[c]), z_chord, z_first), logistic, -chord);
      } else if constexpr (kKind == ActivationKind::kSigmoid) {
        residual = logistic - chord;
      } else {
        residual = fma(splat<V>(T(2)), logistic, T(-1) - chord);
      }
      // A unit that does not move has no residual; the two exponentials' rounding would leave one.
      panel[unit * kC + c] = z_second == z_first ? V{} : residual;
    }
  }
}

template <class T>
using Separated = void (*)(Vector<T>*, const T*, const T*, const T*, const T*, std::int64_t, const T*, const T*,
                           const Vector<T>*, std::int64_t);
template <class T, int kC>
Separated<T> find_separated(ActivationKind kind, int columns) {
  if constexpr (kC > 1) {
    if (columns < kC) return find_separated<T, kC - 1>(kind, columns);
  }
  if (kind == ActivationKind::kSilu) return separated_residuals<T, ActivationKind::kSilu, kC>;
  if (kind == ActivationKind::kSigmoid) return separated_residuals<T, ActivationKind::kSigmoid, kC>;
  return separated_residuals<T, ActivationKind::kTanh, kC>;
}

// ---- the network at the samples ----

template <class T>
void pack_weights(const T* weights, std::int64_t rows, std::int64_t depth, T* packed) {
  for (std::int64_t row = 0; row < rows; row += kRows) {
    const std::int64_t height = at_most(kRows, rows - row);
    for (std::int64_t d = 0; d < depth; ++d) {
      for (std::int64_t r = 0; r < height; ++r) *packed++ = weights[(row + r) * depth + d];
    }
  }
}

/// Adds to one unit of a value what the network adds there, at the samples of a block; and to the sum of the squares of
/// all that the value is computed from.
template <class T>
void add_earlier(const Plan<T>& plan, int value, std::int64_t block, std::int64_t unit, double (&sums)[kLanes<T>],
                 double (&squares)[kLanes<T>]) {
  const PathConnectivity<T>& op = plan.op;
  if (!op.skips) return;
  const std::int64_t width = op.widths[value / 2];
  if (op.skips[value] >= 0) {
    const Layer<T>& source = plan.layers[op.skips[value] / 2];
    const T* earlier = (op.skips[value] % 2 ? source.v : source.z) + (block * width + unit) * kLanes<T>;
    const T* rounding = source.rounding + (block * width + unit) * kLanes<T>;
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      sums[lane] += double(earlier[lane]);
      squares[lane] += double(rounding[lane]) * double(rounding[lane]);
    }
  }
  if (const T* shift = op.shifts[value]) {
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const double term = double(shift[at_most(block * kLanes<T> + lane, op.samples - 1) * width + unit]);
      sums[lane] += term;
      squares[lane] += term * term;
    }
  }
}

/// Fills z, a, v and rounding of every layer for one block of lanes; lanes beyond the last sample repeat it.
/// Products in double: a node's rounding averages out along a path, the ends' would tilt all of it.
template <class T>
void forward_block(const Plan<T>& plan, std::int64_t block) {
  const PathConnectivity<T>& op = plan.op;
  for (int l = 0; l <= op.layers; ++l) {
    const Layer<T>& layer = plan.layers[l];
    const std::int64_t start = block * layer.width * kLanes<T>;
    T *z = layer.z + start, *rounding = layer.rounding + start;
    if (l == 0) {
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        const T* sample = op.z + at_most(block * kLanes<T> + lane, op.samples - 1) * layer.width;
        for (std::int64_t unit = 0; unit < layer.width; ++unit) z[unit * kLanes<T> + lane] = sample[unit];
      }
      for (std::int64_t n = 0; n < layer.width * kLanes<T>; ++n) rounding[n] = z[n] < 0 ? -z[n] : z[n];
    } else {
      const Layer<T>& before = plan.layers[l - 1];
      const T* a = before.v + block * before.width * kLanes<T>;
      const T* a_rounding = before.rounding + block * before.width * kLanes<T>;
      for (std::int64_t unit = 0; unit < layer.width; ++unit) {
        const double bias = op.biases[l - 1] ? double(op.biases[l - 1][unit]) : 0.0;
        double sums[kLanes<T>], squares[kLanes<T>];
        for (double& sum : sums) sum = bias;
        for (double& square : squares) square = bias * bias;
        const T* weights = op.weights[l - 1] + unit * before.width;
        for (std::int64_t d = 0; d < before.width; ++d) {
          const double weight = double(weights[d]);
          for (int lane = 0; lane < kLanes<T>; ++lane) {
            const double term = weight * double(a_rounding[d * kLanes<T> + lane]);
            sums[lane] += weight * double(a[d * kLanes<T> + lane]);
            squares[lane] += term * term;
          }
        }
        add_earlier(plan, 2 * l, block, unit, sums, squares);
        for (int lane = 0; lane < kLanes<T>; ++lane) {
          z[unit * kLanes<T> + lane] = T(sums[lane]);
          rounding[unit * kLanes<T> + lane] = T(sqrt(squares[lane] + sums[lane] * sums[lane]));
          if (l == op.layers) {
            plan.y_low[start + unit * kLanes<T> + lane] = T(sums[lane] - double(T(sums[lane])));
          }
        }
      }
    }
    if (layer.a != layer.z || layer.slope) {
      find_values<T>(layer.activation.kind)(layer.a + start, layer.slope ? layer.slope + start : nullptr, z,
                                            layer.width * kLanes<T>, layer.activation);
    }
    for (std::int64_t unit = 0; layer.v != layer.z && unit < layer.width; ++unit) {
      const std::int64_t at = unit * kLanes<T>;
      double sums[kLanes<T>], squares[kLanes<T>];
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        sums[lane] = double(layer.a[start + at + lane]);
        squares[lane] = double(rounding[at + lane]) * double(rounding[at + lane]);
      }
      if (layer.v != layer.a) {
        add_earlier(plan, 2 * l + 1, block, unit, sums, squares);
        for (int lane = 0; lane < kLanes<T>; ++lane) layer.v[start + at + lane] = T(sums[lane]);
      }
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        rounding[at + lane] = T(sqrt(squares[lane] + sums[lane] * sums[lane]));
      }
    }
  }
}

/// Scales each output to order 1; a last product takes the factor into its weights.
template <class T>
void scale_outputs(const Plan<T>& plan) {
  const Layer<T>& last = plan.last();
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    T largest = 0;
    for (std::int64_t block = 0; block < plan.lane_blocks; ++block) {
      const T *y = last.v + (block * plan.outputs + k) * kLanes<T>, origin = last.v[k * kLanes<T>];
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        const T difference = y[lane] < origin ? origin - y[lane] : y[lane] - origin;
        largest = largest < difference ? difference : largest;
      }
    }
    plan.scale[k] = output_scale(largest);
    for (std::int64_t block = 0; block < plan.lane_blocks; ++block) {
      const std::int64_t start = (block * plan.outputs + k) * kLanes<T>;
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        plan.y[start + lane] = last.v[start + lane] * plan.scale[k];
        plan.y_low[start + lane] = plan.ends_linear() ? plan.y_low[start + lane] * plan.scale[k] : 0;
        plan.rounding[start + lane] = last.rounding[start + lane] * plan.scale[k];
      }
    }
  }
  if (!plan.ends_in_product()) return;
  const std::int64_t depth = plan.layers[plan.op.layers - 1].width;
  T* packed = last.packed;
  for (std::int64_t row = 0; row < plan.outputs; row += kRows) {
    const std::int64_t height = at_most(kRows, plan.outputs - row);
    for (std::int64_t d = 0; d < depth; ++d) {
      for (std::int64_t r = 0; r < height; ++r) *packed++ *= plan.scale[row + r];
    }
  }
}

template <class T>
bool separable_here(const Plan<T>& plan) {
  if (!plan.separable) return false;
  const ActivationKind kind = plan.op.activations[0].kind;
  const std::int64_t count = plan.op.samples * plan.op.widths[0];
  T largest = 0;
  double sum = 0;
  for (std::int64_t n = 0; n < count; ++n) {
    const T magnitude = plan.op.z[n] < 0 ? -plan.op.z[n] : plan.op.z[n];
    largest = largest < magnitude ? magnitude : largest;
    sum += double(magnitude);
  }
  if (!(largest * exponent_factor<T>(kind) < kSeparableLimit<T>)) return false;
  return kind != ActivationKind::kTanh || sum >= double(kTanhSeparableMean<T>) * double(count);
}

// ---- pairs ----

/// Adds to a value's residuals those of the earlier one, and keeps them for a later one.
template <class T>
void join(const Plan<T>& plan, const Scratch<T>& s, int value, Vector<T>* panel, std::int64_t size) {
  if (!plan.op.skips) return;
  const std::int64_t slot = plan.widest * kColumns;
  if (plan.added[value] >= 0) {
    const Vector<T>* earlier = s.kept + plan.added[value] * slot;
    for (std::int64_t n = 0; n < size; ++n) panel[n] += earlier[n];
  }
  if (plan.kept[value] >= 0) memcpy(s.kept + plan.kept[value] * slot, panel, std::size_t(size) * sizeof(Vector<T>));
}

/// Moments of all outputs along the paths from sample i to the block's lanes.
template <class T>
void path_moments(const Plan<T>& plan, const Scratch<T>& s, std::int64_t i, std::int64_t block) {
  const PathConnectivity<T>& op = plan.op;
  const int interior = op.nodes.interior;
  const int node_blocks = int(blocks_of(interior, kColumns));
  for (std::int64_t k = 0; k < plan.outputs; ++k) s.moments[k] = Moments<Vector<T>>{};
  for (int part = 0; part < node_blocks; ++part) {  // of nearly equal sizes: a lone node would waste the registers
    const int begin = int(std::int64_t(interior) * part / node_blocks);
    const int columns = int(std::int64_t(interior) * (part + 1) / node_blocks) - begin;
    const T* t = plan.t + begin;
    const T *w = plan.w + begin, *w_t = plan.w_t + begin;
    Vector<T> *panel = s.panel, *next = s.next_panel;
    const T *zi = s.first_z, *ai = s.first_a;
    for (int l = 0; l <= op.layers; ++l) {
      const Layer<T>& layer = plan.layers[l];
      const T* zj = layer.z + block * layer.width * kLanes<T>;
      const T* aj = layer.a + block * layer.width * kLanes<T>;
      if (l == 0 && plan.separable) {
        const T* first_table = s.first_table + i % kTaskRows * layer.width * interior + begin;
        find_separated<T, kColumns>(layer.activation.kind, columns)(panel, zi, ai, zj, aj, layer.width, t, first_table,
                                                                    s.second_table + begin, interior);
      } else if (l == 0) {
        find_residuals<T, false>(layer.activation.kind)(panel, zi, ai, zj, aj, layer.width, t, columns,
                                                        layer.activation);
      } else {
        const std::int64_t depth = plan.layers[l - 1].width;
        if (l == op.layers && plan.ends_in_product()) {
          multiply_layer<T>(layer, depth, columns, panel, nullptr, s.moments, w, w_t);
          break;
        }
        multiply_layer<T>(layer, depth, columns, panel, next, nullptr, nullptr, nullptr);
        join(plan, s, 2 * l, next, layer.width * columns);
        if (layer.activation.kind != ActivationKind::kIdentity) {
          find_residuals<T, true>(layer.activation.kind)(next, zi, ai, zj, aj, layer.width, t, columns,
                                                         layer.activation);
        }
        Vector<T>* const swapped = panel;
        panel = next;
        next = swapped;
      }
      join(plan, s, 2 * l + 1, panel, layer.width * columns);
      if (l == op.layers) {
        for (std::int64_t k = 0; k < plan.outputs; ++k) {
          for (int c = 0; c < columns; ++c) {
            const Vector<T> e[1] = {panel[k * columns + c] * plan.scale[k]};
            add_moments<T, 1>(s.moments[k], e, w + c, w_t + c);
          }
        }
      }
      zi += layer.width;
      ai += layer.width;
    }
  }
}

/// The stencil's residuals at one layer: panel[unit][node] from what the panel holds (kDeviates), slopes before the
/// midpoint. Nodes from `begin` on.
template <class T, ActivationKind kKind, bool kDeviates>
void stencil_residuals(const Layer<T>& layer, Vector<T>* panel, const T* zi, const T* ai, const T* slope_i,
                       std::int64_t block, int begin, int columns) {
  using V = Vector<T>;
  const bool slopes = begin == 0, midpoint = begin + columns == 3;
  const T alpha = T(layer.activation.alpha), beta = T(layer.activation.beta);
  const std::int64_t start = block * layer.width * kLanes<T>;
  for (std::int64_t unit = 0; unit < layer.width; ++unit) {
    const V z_first = splat<V>(zi[unit]), z_second = load<V>(layer.z + start + unit * kLanes<T>);
    const V a_first = splat<V>(ai[unit]), a_second = load<V>(layer.a + start + unit * kLanes<T>);
    const V z_chord = z_second - z_first, a_chord = a_second - a_first;
    V* const residual = panel + unit * columns;
    if (slopes) {
      const V slope_second = load<V>(layer.slope + start + unit * kLanes<T>);
      residual[0] = fma(splat<V>(slope_i[unit]), kDeviates ? z_chord + residual[0] : z_chord, -a_chord);
      residual[1] = fma(slope_second, kDeviates ? z_chord + residual[1] : z_chord, -a_chord);
    }
    if (midpoint) {
      V& middle = residual[columns - 1];
      V z = on_chord<V>(z_first, z_second, T(0.5));
      if constexpr (kDeviates) z = off_chord<kKind>(z, middle, z_first, z_second);
      middle = activate<kKind>(z, alpha, beta) - on_chord<V>(a_first, a_second, T(0.5));
    }
  }
}
template <class T>
using StencilResiduals = void (*)(const Layer<T>&, Vector<T>*, const T*, const T*, const T*, std::int64_t, int, int);
template <class T, bool kDeviates, int kKind = 0>
StencilResiduals<T> find_stencil_residuals(ActivationKind kind) {
  if constexpr (kKind + 1 < int(ActivationKind::kCount)) {
    if (int(kind) != kKind) return find_stencil_residuals<T, kDeviates, kKind + 1>(kind);
  }
  return stencil_residuals<T, ActivationKind(kKind), kDeviates>;
}

/// path_moments() of the stencil's polynomials.
template <class T>
void polynomial_moments(const Plan<T>& plan, const Scratch<T>& s, std::int64_t block) {
  using V = Vector<T>;
  const PathConnectivity<T>& op = plan.op;
  const Stencil<T>& stencil = plan.stencil;
  const int size = stencil.size;
  const V* values = s.values;
  for (int begin = 0; begin < size; begin += kColumns) {
    const int columns = int(at_most(kColumns, size - begin));
    V *panel = s.panel, *next = s.next_panel;
    const T *zi = s.first_z, *ai = s.first_a, *slope_i = s.first_slope;
    for (int l = 0; l <= op.layers; ++l) {
      const Layer<T>& layer = plan.layers[l];
      if (l == 0) {
        find_stencil_residuals<T, false>(layer.activation.kind)(layer, panel, zi, ai, slope_i, block, begin, columns);
      } else {
        multiply_layer<T>(layer, plan.layers[l - 1].width, columns, panel, next, nullptr, nullptr, nullptr);
        join(plan, s, 2 * l, next, layer.width * columns);
        if (layer.activation.kind != ActivationKind::kIdentity) {
          find_stencil_residuals<T, true>(layer.activation.kind)(layer, next, zi, ai, slope_i, block, begin, columns);
        }
        V* const swapped = panel;
        panel = next;
        next = swapped;
      }
      join(plan, s, 2 * l + 1, panel, layer.width * columns);
      zi += layer.width;
      ai += layer.width;
      slope_i += layer.width;
    }
    if (plan.ends_in_product() && columns == size) {  // the scale is in the weights
      values = panel;
      break;
    }
    for (std::int64_t k = 0; k < plan.outputs; ++k) {
      const T scale = plan.ends_in_product() ? T(1) : plan.scale[k];
      for (int c = 0; c < columns; ++c) s.values[k * size + begin + c] = panel[k * columns + c] * scale;
    }
  }
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    const V* value = values + k * size;
    s.moments[k] = size == 2 ? stencil_moments<2>(stencil, value) : stencil_moments<3>(stencil, value);
  }
}

/// A sample's values side by side, as they are needed where it is the first of a pair.
template <class T>
void fill_rows(const Plan<T>& plan, std::int64_t i) {
  const std::int64_t lane_block = i / kLanes<T>, lane = i % kLanes<T>;
  T *z = plan.row_z + i * plan.total_width, *a = plan.row_a + i * plan.total_width;
  T* slope = plan.row_slope + (plan.stencil.size == 0 ? 0 : i * plan.total_width);
  for (int l = 0; l <= plan.op.layers; ++l) {
    const Layer<T>& layer = plan.layers[l];
    const std::int64_t start = lane_block * layer.width * kLanes<T> + lane;
    for (std::int64_t unit = 0; unit < layer.width; ++unit) {
      *z++ = layer.z[start + unit * kLanes<T>];
      *a++ = layer.a[start + unit * kLanes<T>];
      if (layer.slope) *slope++ = layer.slope[start + unit * kLanes<T>];
    }
  }
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    const std::int64_t from = (lane_block * plan.outputs + k) * kLanes<T> + lane;
    plan.row_y[i * plan.outputs + k] = plan.y[from];
    plan.row_y_low[i * plan.outputs + k] = plan.y_low[from];
    plan.row_rounding[i * plan.outputs + k] = plan.rounding[from];
  }
}

template <class T>
void fill_second_table(const Plan<T>& plan, const Scratch<T>& s, std::int64_t block) {
  const T factor = exponent_factor<T>(plan.op.activations[0].kind);
  const int interior = plan.op.nodes.interior;
  const Layer<T>& layer = plan.layers[0];
  for (std::int64_t unit = 0; unit < layer.width; ++unit) {
    const Vector<T> z = load<Vector<T>>(layer.z + (block * layer.width + unit) * kLanes<T>);
    for (int m = 0; m < interior; ++m) s.second_table[unit * interior + m] = exp(z * (-factor * plan.t[m]));
  }
}

template <class T>
void fill_first_table(const Plan<T>& plan, const Scratch<T>& s, std::int64_t begin, std::int64_t end) {
  using V = Vector<T>;
  const T factor = exponent_factor<T>(plan.op.activations[0].kind);
  const int interior = plan.op.nodes.interior;
  T* row = s.first_table;
  for (const T* z = plan.op.z + begin * plan.op.widths[0]; z < plan.op.z + end * plan.op.widths[0]; ++z) {
    for (int m = 0; m < interior; m += kLanes<T>) {
      const std::int64_t count = at_most(kLanes<T>, interior - m);
      const V t = load_partial<V>(plan.t + m, count);
      const V value = exp(*z * factor * (t - 1));
      memcpy(row, &value, std::size_t(count) * sizeof(T));
      row += count;
    }
  }
}

/// 1 in each lane whose sample is close to sample i, see kCloseSamples; else 0.
template <class T>
Vector<T> close_samples(const Plan<T>& plan, const Scratch<T>& s, std::int64_t block) {
  using V = Vector<T>;
  const Layer<T>& layer = plan.layers[0];
  const T* zj = layer.z + block * layer.width * kLanes<T>;
  V distance{}, first{}, second{};
  for (std::int64_t unit = 0; unit < layer.width; ++unit) {
    const V z_first = splat<V>(s.first_z[unit]), z_second = load<V>(zj + unit * kLanes<T>);
    distance = larger(distance, absolute(z_second - z_first));
    first = larger(first, absolute(z_first));
    second = larger(second, absolute(z_second));
  }
  return distance <= larger(first, second) * T(kCloseSamples) ? splat<V>(T(1)) : V{};
}

template <class T>
void finish_pairs(const Plan<T>& plan, Scratch<T>& s, std::int64_t i, std::int64_t block) {
  using V = Vector<T>;
  const PathConnectivity<T>& op = plan.op;
  const T *first_y = plan.row_y + i * plan.outputs, *first_y_low = plan.row_y_low + i * plan.outputs;
  const T* first_rounding = plan.row_rounding + i * plan.outputs;
  const std::int64_t start_j = block * plan.outputs * kLanes<T>;
  // An output of these that is as good as 0 at an end has underflowed, or is about to.
  const T vanishing = never_zero(plan.last().activation.kind) ? Vanishing<T>::value : T(0);
  CompensatedSum<V> nonlinear;
  V constants{}, unresolved{};
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    const std::int64_t at_j = start_j + k * kLanes<T>;
    const V first = splat<V>(first_y[k]), second = load<V>(plan.y + at_j);
    const V rounding = load<V>(plan.rounding + at_j);
    const V magnitude = larger(absolute(first), absolute(second));
    const V chord = (second - first) + (load<V>(plan.y_low + at_j) - first_y_low[k]);
    const V rounding_squared = fma(rounding, rounding, splat<V>(first_rounding[k] * first_rounding[k]));
    const Share<V> share = share_of_output<V, T>(chord, s.moments[k], magnitude, V{}, rounding_squared,
                                                 T(op.nodes.variance_t), Epsilon<T>::value);
    nonlinear.add(share.nonlinear);
    constants += share.constant;
    unresolved += share.unresolved;
    const V largest_rounding = larger(splat<V>(first_rounding[k]), rounding);
    unresolved += share.constant * hides_rounding<V, T>(largest_rounding, plan.scale[k], Epsilon<T>::value);
    const V least = splat<V>(vanishing * plan.scale[k]);
    unresolved += smaller(absolute(first), absolute(second)) < least ? splat<V>(T(1)) : V{};
  }
  // In float64 the samples are what they are; there is nothing wider to see more in.
  if (sizeof(T) == 4 && any<V>(constants > V{})) {
    unresolved += constants > V{} ? close_samples(plan, s, block) : V{};
  }
  const V r2 = 1 - nonlinear.sum / T(plan.outputs);
  const V entries = unresolved > V{} ? splat<V>(T(kUnresolved)) : r2;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const std::int64_t j = block * kLanes<T> + lane;
    if (j <= i || j >= op.samples) continue;
    op.connectivity[i * op.samples + j] = op.connectivity[j * op.samples + i] = entries[lane];
    const bool resolved = !(unresolved[lane] > 0);
    s.counts[0] += resolved ? std::int64_t(constants[lane]) : 0;
    s.counts[1] += !resolved;
  }
}

template <bool kStencil, class T>
void run_task(const Plan<T>& plan, Scratch<T>& s, std::int64_t task, std::int64_t block, Tasks& tasks) {
  constexpr std::int64_t kRowsBetween = 8;  // looks at the clock: of a wide, deep chain a task may take seconds
  const std::int64_t begin = task * kTaskRows, end = at_most(begin + kTaskRows, plan.op.samples);
  if (plan.separable) {
    fill_second_table(plan, s, block);
    if (s.table_task != task) fill_first_table(plan, s, begin, end);
    s.table_task = task;
  }
  for (std::int64_t i = begin; i < at_most(end, (block + 1) * kLanes<T>); ++i) {
    if (i % kRowsBetween == 0 && !tasks.go_on()) return;
    s.first_z = plan.row_z + i * plan.total_width;
    s.first_a = plan.row_a + i * plan.total_width;
    s.first_slope = kStencil ? plan.row_slope + i * plan.total_width : nullptr;
    if constexpr (kStencil) {
      polynomial_moments(plan, s, block);
    } else {
      path_moments(plan, s, i, block);
    }
    finish_pairs(plan, s, i, block);
  }
}

template <bool kStencil, class T>
void connectivity_on(const PathConnectivity<T>& op, const Stencil<T>& stencil, int threads) {
  Arena arena{static_cast<char*>(op.workspace)};
  Plan<T> plan = make_plan(op, stencil, arena, threads);
  for (int m = 0; m < op.nodes.interior; ++m) {
    plan.t[m] = T(op.nodes.t[m]);
    plan.w[m] = T(op.nodes.weights[m]);
    plan.w_t[m] = T(op.nodes.weights[m] * (op.nodes.t[m] - op.nodes.mean_t));
  }
  for (int l = 1; l <= op.layers; ++l) {
    pack_weights(op.weights[l - 1], op.widths[l], op.widths[l - 1], plan.layers[l].packed);
  }

  // Tasks: kTaskRows first samples x one block of lanes, on and above the diagonal, row after row of tasks, so that
  // a thread mostly keeps its table of first samples. Every pair is computed alike whichever thread takes it.
  static_assert(kTaskRows % kLanes<T> == 0);
  constexpr std::int64_t kBlocksPerTask = kTaskRows / kLanes<T>;
  const std::int64_t task_rows = blocks_of(op.samples, kTaskRows);
  const std::int64_t count = task_rows * plan.lane_blocks - kBlocksPerTask * (task_rows * (task_rows - 1) / 2);
  Tasks tasks(op.watch, count);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (std::int64_t block = 0; block < plan.lane_blocks; ++block) {
    if (tasks.go_on()) forward_block(plan, block);
  }
  if (!tasks.go_on()) return;
  scale_outputs(plan);
#pragma omp parallel for num_threads(threads) if (worth_threads(op.samples * plan.total_width))
  for (std::int64_t i = 0; i < op.samples; ++i) fill_rows(plan, i);
  plan.separable = separable_here(plan);
  for (std::int64_t i = 0; i < op.samples; ++i) op.connectivity[i * (op.samples + 1)] = T(1);
#pragma omp parallel num_threads(threads)
  {
    Scratch<T>& scratch = plan.scratch[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
    for (std::int64_t n = 0; n < count; ++n) {
      if (!tasks.go_on()) continue;
      std::int64_t row = 0, rest = n;
      while (rest >= plan.lane_blocks - row * kBlocksPerTask) rest -= plan.lane_blocks - row++ * kBlocksPerTask;
      run_task<kStencil>(plan, scratch, row, row * kBlocksPerTask + rest, tasks);
      tasks.count_one();
    }
  }
  for (int n = 0; n < 2; ++n) {
    op.counts[n] = 0;
    for (int thread = 0; thread < threads; ++thread) op.counts[n] += plan.scratch[thread].counts[n];
  }
}

template <class T>
std::size_t workspace(const PathConnectivity<T>& op, const Stencil<T>& stencil, int threads) {
  Arena arena{nullptr};
  make_plan(op, stencil, arena, threads);
  return arena.used;
}

}  // namespace
}  // namespace lmn
