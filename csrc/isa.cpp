#include "isa.h"

#include <cstring>
#if defined(LMN_EMULATED)
#include <cstdio>
#include <cstdlib>

#include "emulator/emulator.h"
#endif

// Each level is a namespace of its own, filled by csrc/cpu compiled with that level's flags.
#define LMN_DECLARE_LEVEL(level)                                                        \
  namespace lmn::level {                                                                \
  std::size_t linear_workspace(const Linear&, int);                                     \
  void linear(const Linear&, int);                                                      \
  std::size_t path_connectivity_workspace(const PathConnectivity<float>&, int);         \
  std::size_t path_connectivity_workspace(const PathConnectivity<double>&, int);        \
  void path_connectivity(const PathConnectivity<float>&, int);                          \
  void path_connectivity(const PathConnectivity<double>&, int);                         \
  std::size_t hermite_connectivity_workspace(const HermiteConnectivity<float>&, int);   \
  std::size_t hermite_connectivity_workspace(const HermiteConnectivity<double>&, int);  \
  void hermite_connectivity(const HermiteConnectivity<float>&, int);                    \
  void hermite_connectivity(const HermiteConnectivity<double>&, int);                   \
  std::size_t jacobian_workspace(const Jacobian<float>&, int);                          \
  std::size_t jacobian_workspace(const Jacobian<double>&, int);                         \
  void jacobian(const Jacobian<float>&, int);                                           \
  void jacobian(const Jacobian<double>&, int);                                          \
  void jacobian_distance(const JacobianDistance<float>&, int);                          \
  void jacobian_distance(const JacobianDistance<double>&, int);                         \
  void path_r2(const PathR2<float>&, int);                                              \
  void path_r2(const PathR2<double>&, int);                                             \
  void check_outputs(const CheckOutputs<float>&, int);                                  \
  void check_outputs(const CheckOutputs<double>&, int);                                 \
  void spectral_entropy(const SpectralEntropy<float>&, int);                            \
  void spectral_entropy(const SpectralEntropy<double>&, int);                           \
  }
#define LMN_KERNELS(level) \
  {level::path_connectivity_workspace, level::path_connectivity, level::hermite_connectivity_workspace, \
   level::hermite_connectivity, level::jacobian_workspace, level::jacobian, level::jacobian_distance,   \
   level::path_r2, level::check_outputs, level::spectral_entropy}
#define LMN_LEVEL(level, supported) {#level, supported, LMN_KERNELS(level), LMN_KERNELS(level), level::linear_workspace, level::linear, true}

LMN_DECLARE_LEVEL(baseline)
#if defined(__x86_64__)
LMN_DECLARE_LEVEL(avx2)
LMN_DECLARE_LEVEL(avx512)
#endif

#if defined(LMN_EMULATED)
// The CUDA kernels behind the CPU's entries, so that every test of a level is also one of theirs.
namespace lmn::emulated {
namespace {

void check(const char* error) {
  if (!error) return;
  std::fprintf(stderr, "emulated CUDA kernel: %s\n", error);
  std::abort();
}

template <class T>
std::size_t path_connectivity_workspace(const PathConnectivity<T>& op, int) {
  return path_connectivity_cuda_workspace(op);
}
template <class T>
void path_connectivity(const PathConnectivity<T>& op, int threads) {
  emulator::set_threads(threads);
  check(path_connectivity_cuda(op, nullptr));
}
template <class T>
std::size_t hermite_connectivity_workspace(const HermiteConnectivity<T>& op, int) {
  return hermite_connectivity_cuda_workspace(op);
}
template <class T>
void hermite_connectivity(const HermiteConnectivity<T>& op, int threads) {
  emulator::set_threads(threads);
  check(hermite_connectivity_cuda(op, nullptr));
}
template <class T>
std::size_t jacobian_workspace(const Jacobian<T>& op, int) {
  return jacobian_cuda_workspace(op);
}
template <class T>
void jacobian(const Jacobian<T>& op, int threads) {
  emulator::set_threads(threads);
  check(jacobian_cuda(op, nullptr));
}
template <class T>
void jacobian_distance(const JacobianDistance<T>& op, int threads) {
  emulator::set_threads(threads);
  check(jacobian_distance_cuda(op, nullptr));
}
template <class T>
void path_r2(const PathR2<T>& op, int threads) {
  emulator::set_threads(threads);
  check(path_r2_cuda(op, nullptr));
}
template <class T>
void check_outputs(const CheckOutputs<T>& op, int threads) {
  emulator::set_threads(threads);
  check(check_outputs_cuda(op, nullptr));
}
template <class T>
void spectral_entropy(const SpectralEntropy<T>& op, int threads) {
  emulator::set_threads(threads);
  check(spectral_entropy_cuda(op, nullptr));
}

}  // namespace
}  // namespace lmn::emulated
#endif

namespace lmn {
namespace {

const Level kLevels[] = {
    LMN_LEVEL(baseline, true),  // SSE2 on x86-64, NEON on aarch64
#if defined(__x86_64__)
    LMN_LEVEL(avx2, (__builtin_cpu_init(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))),
    LMN_LEVEL(avx512, (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))),
#endif
#if defined(LMN_EMULATED)
    {"emulated-cuda", true, LMN_KERNELS(emulated), LMN_KERNELS(emulated), baseline::linear_workspace,
     baseline::linear, false},
#endif
};

const Level* highest_supported() {
  const Level* highest = kLevels;
  for (const Level& level : kLevels) {
    if (level.supported && level.is_default) highest = &level;
  }
  return highest;
}

const Level* g_in_use = highest_supported();

template <class T> const Kernels<T>& kernels();
template <> const Kernels<float>& kernels<float>() { return g_in_use->f32; }
template <> const Kernels<double>& kernels<double>() { return g_in_use->f64; }

}  // namespace

const Level* levels() { return kLevels; }
int level_count() { return sizeof(kLevels) / sizeof(kLevels[0]); }
const Level& level_in_use() { return *g_in_use; }

bool use_level(const char* name) {
  for (const Level& level : kLevels) {
    if (level.supported && std::strcmp(level.name, name) == 0) {
      g_in_use = &level;
      return true;
    }
  }
  return false;
}

#define LMN_ENTRIES(T)                                                                                     \
  std::size_t path_connectivity_workspace(const PathConnectivity<T>& op, int threads) {                    \
    return kernels<T>().path_connectivity_workspace(op, threads);                                          \
  }                                                                                                        \
  void path_connectivity_cpu(const PathConnectivity<T>& op, int threads) {                                 \
    kernels<T>().path_connectivity(op, threads);                                                           \
  }                                                                                                        \
  std::size_t hermite_connectivity_workspace(const HermiteConnectivity<T>& op, int threads) {              \
    return kernels<T>().hermite_connectivity_workspace(op, threads);                                       \
  }                                                                                                        \
  void hermite_connectivity_cpu(const HermiteConnectivity<T>& op, int threads) {                           \
    kernels<T>().hermite_connectivity(op, threads);                                                        \
  }                                                                                                        \
  std::size_t jacobian_workspace(const Jacobian<T>& op, int threads) {                                     \
    return kernels<T>().jacobian_workspace(op, threads);                                                   \
  }                                                                                                        \
  void jacobian_cpu(const Jacobian<T>& op, int threads) { kernels<T>().jacobian(op, threads); }            \
  void jacobian_distance_cpu(const JacobianDistance<T>& op, int threads) {                                 \
    kernels<T>().jacobian_distance(op, threads);                                                           \
  }                                                                                                        \
  void path_r2_cpu(const PathR2<T>& op, int threads) { kernels<T>().path_r2(op, threads); }                \
  void check_outputs_cpu(const CheckOutputs<T>& op, int threads) { kernels<T>().check_outputs(op, threads); } \
  void spectral_entropy_cpu(const SpectralEntropy<T>& op, int threads) { kernels<T>().spectral_entropy(op, threads); }

std::size_t linear_workspace(const Linear& op, int threads) { return g_in_use->linear_workspace(op, threads); }
void linear_cpu(const Linear& op, int threads) { g_in_use->linear(op, threads); }

LMN_ENTRIES(float)
LMN_ENTRIES(double)

}  // namespace lmn
