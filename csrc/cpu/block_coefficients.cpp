// One row, a pair of samples, at a time; lanes run over its units. Two vectors of units are evaluated at every node, and their
// residuals stay in L1 while all degrees are summed. That costs interior * degrees multiply-adds per unit: 380 with 21 points.
// The block's last Linear then takes 5000 for 7 terms and 768 outputs. Rows do not depend on each other, so the bits are the
// same for any thread count.
#include "level.h"

#include "../activation.h"

namespace lmn {
namespace {

// Summed at a time: 4 degrees of 2 vectors. So many chains of multiply-adds hide the latency of one, and a load serves two.
constexpr int kDegrees = 4, kVectors = 2;

/// What all rows share.
template <class T>
struct BlockRule {
  T t[kMostCoefficients];
  T polynomials[kMostCoefficients * kMostCoefficients + kDegrees * kMostCoefficients];  // [degrees / 4][interior][4]

  explicit BlockRule(const BlockCoefficients<T>& op) {
    for (int m = 0; m < op.interior; ++m) t[m] = T(op.t[m]);
    for (int d = 0; d < op.degrees + kDegrees - 1; ++d) {
      for (int m = 0; m < op.interior; ++m) {
        const T value = d < op.degrees ? T(op.polynomials[d * op.interior + m]) : T(0);
        polynomials[(d / kDegrees * op.interior + m) * kDegrees + d % kDegrees] = value;
      }
    }
  }
};

/// The normalisation along a row's path. All factors are 1 where there is none.
template <class T>
struct RowScales {
  T first = 1, second = 1, nodes[kMostCoefficients];

  RowScales(const BlockCoefficients<T>& op, std::int64_t row) {
    if (!op.own) return;
    const double i = op.own[op.first[row]], j = op.own[op.second[row]], cross = op.cross[row];
    first = T(normalisation_factor(i, j, cross, op.epsilon, 0));
    second = T(normalisation_factor(i, j, cross, op.epsilon, 1));
    for (int m = 0; m < op.interior; ++m) nodes[m] = T(normalisation_factor(i, j, cross, op.epsilon, op.t[m]));
  }
};

/// A vector of pre-activations along a path.
template <class T>
struct PathUnits {
  using V = Vector<T>;
  V first, second, shift{};

  static inline V values(const T* from, std::int64_t count) {
    return count == kLanes<T> ? load<V>(from) : load_partial<V>(from, count);
  }
  PathUnits(const BlockCoefficients<T>& op, std::int64_t row, std::int64_t unit, std::int64_t count) {
    const std::int64_t width = op.units * (op.gated ? 2 : 1);
    first = values(op.z + op.first[row] * width + unit, count);
    second = values(op.z + op.second[row] * width + unit, count);
    if (op.shift) shift = values(op.shift + unit, count);
  }
  inline V at(V z, bool scaled, T scale) const { return (scaled ? z * scale : z) + shift; }
};

/// The residuals of a vector of hidden units at the interior nodes.
template <ActivationKind kKind, class T>
inline void block_residuals(const BlockCoefficients<T>& op, const BlockRule<T>& rule, const RowScales<T>& scales,
                            std::int64_t row, std::int64_t unit, std::int64_t count, Vector<T>* residual) {
  using V = Vector<T>;
  const T alpha = T(op.activation.alpha), beta = T(op.activation.beta);
  const bool scaled = op.own != nullptr, gated = op.gated;
  const PathUnits<T> units(op, row, unit, count);
  const PathUnits<T> gates = gated ? PathUnits<T>(op, row, op.units + unit, count) : units;
  const auto hidden = [&](V z, V gate, T scale) {
    const V value = activate<kKind>(units.at(z, scaled, scale), alpha, beta);
    return gated ? value * gates.at(gate, scaled, scale) : value;
  };
  const V first = hidden(units.first, gates.first, scales.first), second = hidden(units.second, gates.second, scales.second);
  for (int m = 0; m < op.interior; ++m) {
    const T t = rule.t[m], scale = scaled ? scales.nodes[m] : T(1);
    const V z = on_chord(units.first, units.second, t), gate = gated ? on_chord(gates.first, gates.second, t) : z;
    residual[m] = hidden(z, gate, scale) - on_chord(first, second, t);
  }
}

/// The coefficients of kVectors vectors of units from `unit` on.
template <ActivationKind kKind, int kVectors, class T>
inline void block_units(const BlockCoefficients<T>& op, const BlockRule<T>& rule, const RowScales<T>& scales, std::int64_t row,
                        std::int64_t unit, Vector<T>* energy) {
  using V = Vector<T>;
  V residual[kVectors][kMostCoefficients];
  std::int64_t count[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const std::int64_t from = unit + v * kLanes<T>;
    count[v] = at_most(kLanes<T>, op.units - from);
    block_residuals<kKind>(op, rule, scales, row, from, count[v], residual[v]);
  }
  const T* polynomial = rule.polynomials;
  for (int d = 0; d < op.degrees; d += kDegrees) {
    V sums[kDegrees][kVectors] = {};
    for (int m = 0; m < op.interior; ++m, polynomial += kDegrees) {
#pragma GCC unroll 4
      for (int n = 0; n < kDegrees; ++n) {
        const V value = splat<V>(polynomial[n]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[n][v] = fma(value, residual[v][m], sums[n][v]);
      }
    }
    for (int n = 0; n < kDegrees; ++n) {
      for (int v = 0; v < kVectors; ++v) {
        for (std::int64_t lane = count[v]; lane < kLanes<T>; ++lane) sums[n][v][lane] = 0;
        const V value = sums[n][v] * op.scale;
        energy[d + n] = fma(value, value, energy[d + n]);
        if (op.begin <= d + n && d + n < op.end) {
          T* const to = op.coefficients + ((d + n - op.begin) * op.rows + row) * op.units + unit + v * kLanes<T>;
          memcpy(to, &sums[n][v], std::size_t(count[v]) * sizeof(T));
        }
      }
    }
  }
}

template <ActivationKind kKind, class T>
void block_row(const BlockCoefficients<T>& op, const BlockRule<T>& rule, std::int64_t row) {
  const RowScales<T> scales(op, row);
  Vector<T> energy[kMostCoefficients + kDegrees] = {};
  std::int64_t unit = 0;
  for (; unit + kVectors * kLanes<T> <= op.units; unit += kVectors * kLanes<T>) {
    block_units<kKind, kVectors>(op, rule, scales, row, unit, energy);
  }
  for (; unit < op.units; unit += kLanes<T>) block_units<kKind, 1>(op, rule, scales, row, unit, energy);
  for (int d = 0; d < op.degrees; ++d) {
    double total = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) total += double(energy[d][lane]);
    op.energy[row * op.degrees + d] = total;
  }
}

template <class T>
void block_coefficients_on(const BlockCoefficients<T>& op, int threads) {
  const BlockRule<T> rule(op);
  with_kind(op.activation.kind, [&](auto kind) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (worth_threads(op.rows * op.units * op.interior))
    for (std::int64_t row = 0; row < op.rows; ++row) block_row<decltype(kind)::value>(op, rule, row);
  });
}

}  // namespace

namespace LMN_LEVEL {
void run(const BlockCoefficients<float>& op, int threads) { block_coefficients_on(op, threads); }
void run(const BlockCoefficients<double>& op, int threads) { block_coefficients_on(op, threads); }
}  // namespace LMN_LEVEL

}  // namespace lmn
