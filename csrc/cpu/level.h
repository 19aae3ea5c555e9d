// Common to the kernels of one instruction-set level: LMN_LEVEL is the level's namespace, set by the build.
#pragma once
#include "../ops.h"
#include "../statistics.h"
#include "simd.h"

#include <omp.h>

namespace lmn {
namespace {

inline std::int64_t at_most(std::int64_t value, std::int64_t limit) { return value < limit ? value : limit; }

/// Hands out 64-byte aligned pieces of a workspace; with a null base it only counts.
struct Arena {
  char* base;
  std::size_t used = 0;
  template <class U> U* take(std::int64_t count) {
    U* piece = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += (std::size_t(count) * sizeof(U) + 63) / 64 * 64;
    return piece;
  }
};

/// Power of two that brings the largest |value - value of the first sample| to [0.5, 1): r2 does not see it, but the
/// squares of very small or large outputs would underflow or overflow.
template <class T>
inline T output_scale(T largest_difference) {
  int exponent = 0;
  if (!(largest_difference > 0) || !isfinite(largest_difference)) return 1;
  frexp(double(largest_difference), &exponent);
  constexpr int kLimit = sizeof(T) == 4 ? 120 : 1000;
  exponent = exponent > kLimit ? kLimit : exponent < -kLimit ? -kLimit : exponent;
  return T(ldexp(1.0, -exponent));
}

/// Whether a loop over so many values is worth waking other threads: they take longer than its 0.1 ms to come, and, where
/// another process has their core, milliseconds.
inline bool worth_threads(std::int64_t values) { return values >= 1 << 17; }

/// The tasks of a kernel's parallel loops. The calling thread, which is OpenMP's thread 0, asks the watch; once it says
/// stop, no thread begins another task.
class Tasks {
 public:
  Tasks(const Watch* watch, std::int64_t count) : watch_(watch), count_(count), asked_(watch ? omp_get_wtime() : 0.0) {}
  /// Before every task, and now and then within a long one; costs the calling thread a look at the clock.
  bool go_on() {
    if (!watch_) return true;
    if (omp_get_thread_num() == 0) ask();
    return !__atomic_load_n(&stopped_, __ATOMIC_RELAXED);
  }
  void count_one() {
    if (watch_) __atomic_fetch_add(&finished_, 1, __ATOMIC_RELAXED);
  }

 private:
  void ask() {
    const double now = omp_get_wtime();
    if (now - asked_ < kSecondsBetween) return;
    asked_ = now;
    const double done = double(__atomic_load_n(&finished_, __ATOMIC_RELAXED)) / double(count_);
    if (watch_->stop(watch_->state, done)) __atomic_store_n(&stopped_, true, __ATOMIC_RELAXED);
  }
  static constexpr double kSecondsBetween = 0.1;  // each time it takes Python's lock
  const Watch* const watch_;
  const std::int64_t count_;
  double asked_;  // of the calling thread alone
  std::int64_t finished_ = 0;
  bool stopped_ = false;
};

/// Sum with the rounding error of each addition carried along (Kahan).
template <class V>
struct CompensatedSum {
  V sum{}, lost{};
  inline void add(V value) {
    const V corrected = value - lost;
    const V next = sum + corrected;
    lost = (next - sum) - corrected;
    sum = next;
  }
};

}  // namespace
}  // namespace lmn
