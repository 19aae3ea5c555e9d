// The kernels are those of path_connectivity, with two or three residuals for each path. These residuals determine the path's
// polynomial, and the moments are the polynomial's.
#include "chain64.cuh"
#include "chained.cuh"
#include "panels.cuh"
#include "unresolved.cuh"

namespace lmn {
namespace {

template <class T>
Stencil<T> stencil_of(const HermiteConnectivity<T>& op) {
  return make_stencil<T>(op.nodes, op.midpoint);
}

chained::Kernel find_chained(const HermiteConnectivity<float>& op) {
  using Any = chained::Curve<ActivationKind::kCount>;  // the slopes at the ends are given, so one kernel is enough
  const PathConnectivity<float>& path = op;
  chained::Kernel found;
  if (!chained::takes(path)) return found;
  if (path.layers == 1) {
    found = op.midpoint ? chained::kernel_of<Any, 0, 3>(path.halves_alone) : chained::kernel_of<Any, 0, 2>(path.halves_alone);
  } else if (!op.midpoint) {
    found = chained::kernel_for<Any, 2>(path);
  }
  return chained::if_it_fits(path, found);
}

/// The workspace of one network. paths: bytes for the kernel of the paths. all: these, and behind them the bytes for the kernel
/// of the unresolved pairs.
struct Bytes {
  std::size_t paths, all;
};
Bytes bytes_of(const HermiteConnectivity<float>& op) {
  const chained::Kernel kernel = find_chained(op);
  const Stencil<float> stencil = stencil_of(op);
  const std::size_t paths = kernel.run ? chained::workspace(op, kernel) : panels::workspace_by_panels(op, stencil);
  return {paths, paths + unresolved::workspace(op, stencil.size)};
}

}  // namespace

std::size_t cuda_workspace(const HermiteConnectivity<float>& op) {
  const std::size_t own = bytes_of(op).all;
  return own * std::size_t(networks_at_once(op.networks, own));
}
std::size_t cuda_workspace(const HermiteConnectivity<double>& op) {
  return op.midpoint ? float64::workspace64<3>(op, stencil_of(op)) : float64::workspace64<2>(op, stencil_of(op));
}
const char* cuda_run(const HermiteConnectivity<float>& op, CUstream_st* stream) {
  const chained::Kernel kernel = find_chained(op);
  const Stencil<float> stencil = stencil_of(op);
  const Bytes own = bytes_of(op);
  return in_parts(op, own.all, [&](const PathConnectivity<float>& part) {
    const char* error = kernel.run ? chained::enqueue(part, kernel, stencil, own.all, stream)
                                   : panels::enqueue_by_panels<true>(part, stencil, own.all, stream);
    void* const behind = static_cast<char*>(part.workspace) + own.paths;
    return error ? error : unresolved::enqueue(part, stencil.size, behind, own.all, stream);
  });
}
const char* cuda_run(const HermiteConnectivity<double>& op, CUstream_st* stream) {
  return op.midpoint ? float64::connectivity64<3>(op, stencil_of(op), stream)
                     : float64::connectivity64<2>(op, stencil_of(op), stream);
}

}  // namespace lmn
