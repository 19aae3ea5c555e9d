#include "levels.h"

#include <cstring>
#if defined(LMN_EMULATED)
#include "emulator/emulator.h"
#endif

#define LMN_DECLARE(Op)                          \
  std::size_t workspace(const Op&, int threads); \
  void run(const Op&, int threads);

#define LMN_OVERRIDE(Op)                                                     \
  std::size_t workspace(const Op& op, int threads) const override {          \
    if constexpr (kHasWorkspace<Op>) return kernels::workspace(op, threads); \
    return (void)op, (void)threads, 0;                                       \
  }                                                                          \
  const char* run(const Op& op, int threads) const override { return kernels::run(op, threads), nullptr; }

// Each level has its own namespace. csrc/cpu is compiled once per level, with that level's flags, into that namespace.
#define LMN_DEFINE_LEVEL(level)   \
  namespace lmn::level {          \
  LMN_CPU_OPS(LMN_DECLARE)        \
  namespace {                     \
  namespace kernels = lmn::level; \
  struct Kernels : Level {        \
    using Level::Level;           \
    LMN_CPU_OPS(LMN_OVERRIDE)     \
  };                              \
  }                               \
  }

LMN_DEFINE_LEVEL(baseline)
#if defined(LMN_HAS_AVX2)
LMN_DEFINE_LEVEL(avx2)
#endif
#if defined(LMN_HAS_AVX512)
LMN_DEFINE_LEVEL(avx512)
#endif

#if defined(LMN_EMULATED)
// The CUDA kernels behind the entries of a CPU level, so that every test of the levels also tests the CUDA kernels.
namespace lmn::emulated {
namespace {

#define LMN_EMULATE(Op)                                         \
  std::size_t workspace(const Op& op, int) const override {     \
    if constexpr (kHasWorkspace<Op>) return cuda_workspace(op); \
    return (void)op, 0;                                         \
  }                                                             \
  const char* run(const Op& op, int threads) const override {   \
    emulator::set_threads(threads);                             \
    return cuda_run(op, nullptr);                               \
  }
struct Kernels : Level {
  using Level::Level;
  LMN_OPS(LMN_EMULATE)
};

}  // namespace
}  // namespace lmn::emulated
#endif

namespace lmn {
namespace {

const baseline::Kernels kBaseline("baseline", true);  // SSE2 on x86-64, NEON on aarch64
#if defined(LMN_HAS_AVX2)
const avx2::Kernels kAvx2("avx2", (__builtin_cpu_init(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")));
#endif
#if defined(LMN_HAS_AVX512)
const avx512::Kernels kAvx512("avx512", (__builtin_cpu_init(), __builtin_cpu_supports("avx512f")) &&
                                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                                            __builtin_cpu_supports("avx512vl"));
#endif
#if defined(LMN_EMULATED)
const emulated::Kernels kEmulated("emulated-cuda", true, true);
#endif

const Level* const kLevels[] = {
    &kBaseline,
#if defined(LMN_HAS_AVX2)
    &kAvx2,
#endif
#if defined(LMN_HAS_AVX512)
    &kAvx512,
#endif
#if defined(LMN_EMULATED)
    &kEmulated,
#endif
};

const Level* highest_supported() {
  const Level* highest = kLevels[0];
  for (const Level* level : kLevels) {
    if (level->supported && !level->emulates_cuda) highest = level;
  }
  return highest;
}

const Level* g_in_use = highest_supported();

}  // namespace

const Level* const* levels() { return kLevels; }
int level_count() { return sizeof(kLevels) / sizeof(kLevels[0]); }
const Level& level_in_use() { return *g_in_use; }

bool use_level(const char* name) {
  for (const Level* level : kLevels) {
    if (level->supported && std::strcmp(level->name, name) == 0) {
      g_in_use = level;
      return true;
    }
  }
  return false;
}

}  // namespace lmn
