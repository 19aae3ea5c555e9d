// At the slopes at a path's ends, and its midpoint. Float32: panels.cuh. Float64: the general kernel of chain.cuh.
#include "panels.cuh"

namespace lmn {
namespace {

template <class T>
Stencil<T> stencil_of(const HermiteConnectivity<T>& op) {
  return make_stencil<T>(op.path.nodes, op.midpoint);
}

}  // namespace

std::size_t hermite_connectivity_cuda_workspace(const HermiteConnectivity<float>& op) {
  return workspace_by_panels(op.path, stencil_of(op));
}
std::size_t hermite_connectivity_cuda_workspace(const HermiteConnectivity<double>& op) {
  Arena arena{nullptr};
  const Plan<double> plan = make_plan(op.path, stencil_of(op), Range{0, 0}, arena);
  return workspace(op.path, plan, arena);
}
const char* hermite_connectivity_cuda(const HermiteConnectivity<float>& op, CUstream_st* stream) {
  return enqueue_by_panels<true>(op.path, stencil_of(op), stream);
}
const char* hermite_connectivity_cuda(const HermiteConnectivity<double>& op, CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.path.workspace)};
  Plan<double> plan = make_plan(op.path, stencil_of(op), Range{0, 0}, arena);
  if (const char* error = enqueue_samples(op.path, plan, arena, stream)) return error;
  return op.midpoint ? enqueue_general<double, 2, 3>(plan, stream) : enqueue_general<double, 2, 2>(plan, stream);
}

}  // namespace lmn
