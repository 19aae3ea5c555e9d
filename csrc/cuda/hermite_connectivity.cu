// The general kernel of chain.cuh with two or three residuals a path, from which their polynomial's moments come.
#include "chain.cuh"

namespace lmn {
namespace {

template <class T>
Plan<T> plan_of(const HermiteConnectivity<T>& op, Arena& arena) {
  return make_plan(op.path, make_stencil<T>(op.path.nodes, op.midpoint), Range{0, 0}, arena);
}

template <class T>
const char* hermite_connectivity_on(const HermiteConnectivity<T>& op, CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.path.workspace)};
  Plan<T> plan = plan_of(op, arena);
  if (const char* error = enqueue_samples(op.path, plan, arena, stream)) return error;
  return op.midpoint ? enqueue_general<T, 2, 3>(plan, stream) : enqueue_general<T, 2, 2>(plan, stream);
}

template <class T>
std::size_t hermite_connectivity_workspace_on(const HermiteConnectivity<T>& op) {
  Arena arena{nullptr};
  const Plan<T> plan = plan_of(op, arena);
  return workspace(op.path, plan, arena);
}

}  // namespace

std::size_t hermite_connectivity_cuda_workspace(const HermiteConnectivity<float>& op) {
  return hermite_connectivity_workspace_on(op);
}
std::size_t hermite_connectivity_cuda_workspace(const HermiteConnectivity<double>& op) {
  return hermite_connectivity_workspace_on(op);
}
const char* hermite_connectivity_cuda(const HermiteConnectivity<float>& op, CUstream_st* stream) {
  return hermite_connectivity_on(op, stream);
}
const char* hermite_connectivity_cuda(const HermiteConnectivity<double>& op, CUstream_st* stream) {
  return hermite_connectivity_on(op, stream);
}

}  // namespace lmn
