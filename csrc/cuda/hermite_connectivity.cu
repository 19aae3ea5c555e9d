// The general kernels of chain.cuh and chain64.cuh with two or three residuals a path, from which their polynomial's moments
// come.
#include "chain64.cuh"

namespace lmn {
namespace {

Plan<float> plan_of(const HermiteConnectivity<float>& op, Arena& arena) {
  return make_plan(op.path, make_stencil<float>(op.path.nodes, op.midpoint), Range{0, 0}, arena);
}

const char* hermite_connectivity_on(const HermiteConnectivity<float>& op, CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.path.workspace)};
  Plan<float> plan = plan_of(op, arena);
  if (const char* error = enqueue_samples(op.path, plan, arena, stream)) return error;
  return op.midpoint ? enqueue_general<float, 2, 3>(plan, stream) : enqueue_general<float, 2, 2>(plan, stream);
}
const char* hermite_connectivity_on(const HermiteConnectivity<double>& op, CUstream_st* stream) {
  const Stencil<double> stencil = make_stencil<double>(op.path.nodes, op.midpoint);
  return op.midpoint ? connectivity64<3>(op.path, stencil, stream) : connectivity64<2>(op.path, stencil, stream);
}

std::size_t hermite_connectivity_workspace_on(const HermiteConnectivity<double>& op) {
  const Stencil<double> stencil = make_stencil<double>(op.path.nodes, op.midpoint);
  return op.midpoint ? workspace64<3>(op.path, stencil) : workspace64<2>(op.path, stencil);
}
std::size_t hermite_connectivity_workspace_on(const HermiteConnectivity<float>& op) {
  Arena arena{nullptr};
  const Plan<float> plan = plan_of(op, arena);
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
