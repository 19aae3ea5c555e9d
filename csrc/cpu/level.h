// Common to the kernels of one instruction-set level: LMN_LEVEL is the level's namespace, set by the build.
#pragma once
#include "simd.h"

#include "../statistics.h"  // after simd.h, whose functions it uses

#include <omp.h>

namespace lmn {
namespace {

using Arena = ArenaOf<64>;  // a cache line

/// Calls function(constant) with the size as `constant.value`, known to the compiler, where it is 1 to kMost; above with kMost.
template <int kSize>
struct SizeConstant {
  static constexpr int value = kSize;
};
template <int kMost, class Function>
inline void with_size(std::int64_t size, const Function& function) {
  if constexpr (kMost > 1) {
    if (size < kMost) return with_size<kMost - 1>(size, function);
  }
  function(SizeConstant<kMost>{});
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
