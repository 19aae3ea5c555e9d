// Tables of exponentials, for a first layer that is computed from two exponentials (residuals.h).
#pragma once
#include "samples.h"

namespace lmn {
namespace {

/// exp(factor share(t) z) of the block's own samples, at every node t: [unit][node].
template <class T, class Share>
void fill_lanes(const Plan<T>& plan, std::int64_t block, const Share& share, Vector<T>* table) {
  const T factor = exponent_factor<T>(plan.op.activations[0].kind);
  const int interior = plan.op.nodes.interior;
  const Layer<T>& layer = plan.layers[0];
  for (std::int64_t unit = 0; unit < layer.width; ++unit) {
    const Vector<T> z = load<Vector<T>>(layer.z + (block * layer.width + unit) * kLanes<T>);
    for (int m = 0; m < interior; ++m) table[unit * interior + m] = exp(z * (factor * share(plan.t[m])));
  }
}

/// The tables of a block as second samples, and as the first samples of its triangle. The factor is a power of two, so the
/// latter has the bits of fill_first_table().
template <class T>
void fill_second_table(const Plan<T>& plan, const Scratch<T>& s, std::int64_t block) {
  fill_lanes(plan, block, [](T t) { return -t; }, s.second_table);
}
template <class T>
void fill_lanes_table(const Plan<T>& plan, const Scratch<T>& s, std::int64_t block) {
  fill_lanes(plan, block, [](T t) { return t - 1; }, s.lanes_table);
}

template <class T>
void fill_first_table(const Plan<T>& plan, const Scratch<T>& s, std::int64_t begin, std::int64_t end) {
  using V = Vector<T>;
  const T factor = exponent_factor<T>(plan.op.activations[0].kind);
  const std::int64_t width = plan.op.widths[0];
  T* row = s.first_table;
  for (const T* z = plan.op.z + begin * width; z < plan.op.z + end * width; z += width) {
    for (int m = 0; m < plan.op.nodes.interior; ++m, row += whole_vectors<T>(width)) {
      const V share = splat<V>(plan.t[m] - 1);
      for (std::int64_t unit = 0; unit < width; unit += kLanes<T>) {
        const V value = load_partial<V>(z + unit, at_most(kLanes<T>, width - unit));
        store<V>(row + unit, exp(value * factor * share));
      }
    }
  }
}

/// The tables of exponentials from node `begin` on, for sample i and the block's lanes, or for the lanes' own pairs.
template <class T>
Tables<T> tables_of(const Plan<T>& plan, const Scratch<T>& s, std::int64_t i, int begin) {
  const int interior = plan.op.nodes.interior;
  const Vector<T>* const second = s.second_table + begin;
  if (s.paired) return {nullptr, s.lanes_table + begin, second, interior, s.pairing.lower, s.pairing.upper};
  const T* const first = s.first_table + (i % plan.rows * interior + begin) * whole_vectors<T>(plan.layers[0].width);
  return {first, nullptr, second, interior, Bits<Vector<T>>{}, Bits<Vector<T>>{}};
}

/// The first layer's residuals, and slopes if kSlopes, from tables of exponentials.
template <bool kSlopes, class T>
void separated(const Plan<T>& plan, const Scratch<T>& s, const Ends<T>& ends, std::int64_t i, int begin, int columns,
               Vector<T>* panel, Vector<T>* slopes) {
  const Tables<T> tables = tables_of(plan, s, i, begin);
  const T* const t = plan.t + begin;
  with_kind(plan.layers[0].activation.kind, [&](auto kind) {
    constexpr ActivationKind kKind = kind.value;
    if constexpr (is_separable(kKind)) {
      with_size<kBlockColumns>(columns, [&](auto count) {
        constexpr int kC = decltype(count)::value;
        if (s.paired) {
          separated_residuals<T, kKind, kC, kSlopes, true>(ends, t, tables, panel, slopes);
        } else {
          separated_residuals<T, kKind, kC, kSlopes, false>(ends, t, tables, panel, slopes);
        }
      });
    }
  });
}

}  // namespace
}  // namespace lmn
