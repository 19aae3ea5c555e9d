// Every row is read once. The results are counts and maxima of positive numbers, so they do not depend on the order.
#include "level.h"

namespace lmn {
namespace {

struct Failing {
  std::int64_t count = 0, reach = 0;
  void add(std::int64_t index, std::int64_t size) {
    ++count;
    reach = size - index > reach ? size - index : reach;
  }
};

template <class T>
bool all_finite(const T* values, std::int64_t count) {
  T sum = 0;
  for (std::int64_t n = 0; n < count; ++n) sum += values[n] * 0;  // value * 0 is NaN if the value is not finite
  return sum == 0;
}

template <class T>
void check_outputs_on(const CheckOutputs<T>& op, int threads) {
  const std::int64_t samples = op.samples, outputs = op.outputs;
  const double tolerance = kSameOutputUlps * op.epsilon;
  Failing x, y, entries;
  std::int64_t unlike = 0;
  double excess = 0, magnitude = 0;
  for (std::int64_t n = 0; n < samples; ++n) {
    if (!all_finite(op.x + n * op.inputs, op.inputs)) x.add(n, samples);
    if (!all_finite(op.y + n * outputs, outputs)) y.add(n, samples);
    for (std::int64_t k = n * outputs; op.expected && k < (n + 1) * outputs; ++k) {
      const double found = op.y[k], expected = op.expected[k];
      if (isfinite(expected)) {
        const double size = expected < 0 ? -expected : expected, difference = found - expected;
        const double over = (difference < 0 ? -difference : difference) / tolerance - size;
        if (!isfinite(over))
          ++unlike;
        else
          excess = over > excess ? over : excess;
        magnitude = size > magnitude ? size : magnitude;
      } else if (!(found == expected) && !(found != found && expected != expected)) {
        ++unlike;
      }
    }
  }
#pragma omp parallel for num_threads(threads) if (worth_threads(samples * op.columns))
  for (std::int64_t n = 0; n < samples * (op.matrix != nullptr); ++n) {
    const T* row = op.matrix + n * op.columns;
    if (all_finite(row, op.columns)) continue;
    for (std::int64_t i = 0; i < op.columns; ++i) {
      if (isfinite(row[i])) continue;
#pragma omp critical
      entries.add(n * op.columns + i, samples * op.columns);
    }
  }
  std::int64_t others = 0;
  for (std::int64_t k = 0; op.again && k < outputs; ++k) {
    T high = op.y[k], low = op.y[k], apart = 0;
    bool known = true;
    for (std::int64_t n = k; n < samples * outputs; n += outputs) {
      const T value = op.y[n], difference = op.again[n] - value, size = difference < 0 ? -difference : difference;
      known = known && value == value && size == size;
      high = value > high ? value : high;
      low = value < low ? value : low;
      apart = size > apart ? size : apart;
    }
    others += !known || !isfinite(apart) || !is_same_output(double(high), double(low), double(apart), op.epsilon);
  }
  const double largest[] = {excess, magnitude};
  const std::int64_t found[] = {x.count,
                                x.reach,
                                y.count,
                                y.reach,
                                unlike,
                                0,
                                0,
                                others,
                                entries.count,
                                entries.reach,
                                op.counts ? op.counts[0] : 0,
                                op.counts ? op.counts[1] : 0};
  for (int n = 0; n < kFindings; ++n) op.found[n] = found[n];
  __builtin_memcpy(op.found + 5, largest, sizeof(largest));
}

}  // namespace

namespace LMN_LEVEL {
void run(const CheckOutputs<float>& op, int threads) { check_outputs_on(op, threads); }
void run(const CheckOutputs<double>& op, int threads) { check_outputs_on(op, threads); }
}  // namespace LMN_LEVEL

}  // namespace lmn
