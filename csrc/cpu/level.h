// Common to the kernels of one instruction-set level: LMN_LEVEL is the level's namespace, set by the build.
#pragma once
#include "simd.h"

#include "../statistics.h"  // after simd.h, whose functions it uses

#include <omp.h>

namespace lmn {
namespace {

using Arena = ArenaOf<64>;  // a cache line

/// The number rounded up to whole vectors.
template <class T>
constexpr std::int64_t whole_vectors(std::int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

/// Calls function(constant), where `constant.value` is the size, known to the compiler. Sizes above kMost count as kMost.
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

/// Whether a loop over this many values is worth waking other threads. At the limit the loop takes 0.1 ms on one thread.
/// Other threads take longer to start, and milliseconds if another process has their core.
inline bool worth_threads(std::int64_t values) { return values >= 1 << 17; }

/// The tasks of a kernel's parallel loops. The calling thread, OpenMP's thread 0, asks the watch. After the watch says stop,
/// no thread begins another task.
class Tasks {
 public:
  Tasks(const Watch* watch, std::int64_t count) : watch_(watch), count_(count), asked_(watch ? omp_get_wtime() : 0.0) {}
  /// To be called before every task, and at intervals within a long task. It costs the calling thread a look at the clock.
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
  static constexpr double kSecondsBetween = 0.1;  // between two questions; each takes Python's lock
  const Watch* const watch_;
  const std::int64_t count_;
  double asked_;  // time of the last question; only the calling thread uses it
  std::int64_t finished_ = 0;
  bool stopped_ = false;
};

/// Sum that carries the rounding error of each addition along (Kahan).
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
