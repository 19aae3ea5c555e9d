// The kernels of path_connectivity with two or three residuals a path, from which their polynomial's moments come.
#include "chain64.cuh"
#include "chained.cuh"
#include "panels.cuh"
#include "unresolved.cuh"

namespace lmn {
namespace {

template <class T>
Stencil<T> stencil_of(const HermiteConnectivity<T>& op) {
  return make_stencil<T>(op.path.nodes, op.midpoint);
}

chained::Kernel find_chained(const HermiteConnectivity<float>& op) {
  using Any = chained::Curve<ActivationKind::kCount>;  // slopes at the ends are known, so one kernel is for all activations
  const PathConnectivity<float>& path = op.path;
  chained::Kernel found;
  if (!chained::takes(path)) return found;
  if (path.layers == 1) {
    found = op.midpoint ? chained::kernel_of<Any, 0, 3>(path.halves_alone) : chained::kernel_of<Any, 0, 2>(path.halves_alone);
  } else if (!op.midpoint) {
    found = chained::kernel_for<Any, 2>(path);
  }
  return chained::if_it_fits(path, found);
}

/// Of the kernels of the paths; behind it is that of the unresolved pairs.
std::size_t own_workspace(const HermiteConnectivity<float>& op) {
  const chained::Kernel kernel = find_chained(op);
  return kernel.run ? chained::workspace(op.path, kernel) : panels::workspace_by_panels(op.path, stencil_of(op));
}

}  // namespace

std::size_t hermite_connectivity_cuda_workspace(const HermiteConnectivity<float>& op) {
  return own_workspace(op) + unresolved::workspace(op.path, stencil_of(op).size);
}
std::size_t hermite_connectivity_cuda_workspace(const HermiteConnectivity<double>& op) {
  return op.midpoint ? float64::workspace64<3>(op.path, stencil_of(op)) : float64::workspace64<2>(op.path, stencil_of(op));
}
const char* hermite_connectivity_cuda(const HermiteConnectivity<float>& op, CUstream_st* stream) {
  const chained::Kernel kernel = find_chained(op);
  const Stencil<float> stencil = stencil_of(op);
  const char* error = kernel.run ? chained::enqueue(op.path, kernel, stencil, stream)
                                 : panels::enqueue_by_panels<true>(op.path, stencil, stream);
  void* const behind = static_cast<char*>(op.path.workspace) + own_workspace(op);
  return error ? error : unresolved::enqueue(op.path, stencil.size, behind, stream);
}
const char* hermite_connectivity_cuda(const HermiteConnectivity<double>& op, CUstream_st* stream) {
  return op.midpoint ? float64::connectivity64<3>(op.path, stencil_of(op), stream)
                     : float64::connectivity64<2>(op.path, stencil_of(op), stream);
}

}  // namespace lmn
