// CPU instruction-set levels: which were built, which the machine has, which is in use.
#pragma once
#include "ops.h"

namespace lmn {

/// Every CPU kernel of one level, per dtype.
template <class T>
struct Kernels {
  std::size_t (*path_connectivity_workspace)(const PathConnectivity<T>&, int threads);
  void (*path_connectivity)(const PathConnectivity<T>&, int threads);
  std::size_t (*hermite_connectivity_workspace)(const HermiteConnectivity<T>&, int threads);
  void (*hermite_connectivity)(const HermiteConnectivity<T>&, int threads);
  std::size_t (*jacobian_workspace)(const Jacobian<T>&, int threads);
  void (*jacobian)(const Jacobian<T>&, int threads);
  void (*jacobian_distance)(const JacobianDistance<T>&, int threads);
  void (*path_r2)(const PathR2<T>&, int threads);
  void (*check_outputs)(const CheckOutputs<T>&, int threads);
  void (*spectral_entropy)(const SpectralEntropy<T>&, int threads);
};

struct Level {
  const char* name;
  bool supported;  // by this machine
  Kernels<float> f32;
  Kernels<double> f64;
  std::size_t (*linear_workspace)(const Linear&, int threads);
  void (*linear)(const Linear&, int threads);
  bool is_default;  // where it is the highest supported; the emulated CUDA kernels never are
};

const Level* levels();  // lowest first
int level_count();
const Level& level_in_use();  // the highest supported one until use_level()
bool use_level(const char* name);  // false: not built, or not supported here

}  // namespace lmn
