// A batch of pairs: what the kernels of path_connectivity_backward work on at a time. Its paths have a row for each interior
// node in every panel, [pairs][nodes]. Rows of a pair are neighbours.
#pragma once
#include "../chain.cuh"

namespace lmn {
namespace {
namespace backward {

/// The pairs of two groups of samples, each first sample with each second sample; or all pairs of one group.
struct Batch {
  std::int64_t first, second;  // the groups' first samples
  int firsts, seconds;         // samples in the groups
  bool within;                 // whether the two groups are the same one
  int pairs;

  /// The number of the pair of the a-th first and the b-th second sample; within a group a < b.
  LMN_FN int place(int a, int b) const { return within ? b * (b - 1) / 2 + a : a * seconds + b; }
  /// The samples of a pair.
  __device__ int2 samples(int pair) const {
    int a = 0, b = 0;
    if (within) {
      b = int((1.0 + ::sqrt(1.0 + 8.0 * double(pair))) / 2.0);
      while (b * (b - 1) / 2 > pair) --b;
      while ((b + 1) * b / 2 <= pair) ++b;
      a = pair - b * (b - 1) / 2;
    } else {
      a = pair / seconds, b = pair % seconds;
    }
    return make_int2(int(first) + a, int(second) + b);
  }
};

inline Batch batch_within(std::int64_t first, std::int64_t samples) {
  return {first, first, int(samples), int(samples), true, int(samples * (samples - 1) / 2)};
}
inline Batch batch_between(std::int64_t first, std::int64_t firsts, std::int64_t second, std::int64_t seconds) {
  return {first, second, int(firsts), int(seconds), false, int(firsts * seconds)};
}

}  // namespace backward
}  // namespace
}  // namespace lmn
