// Float32: the kernel of panels.cuh. Float64: the general kernel of chain.cuh.
#include "panels.cuh"

namespace lmn {

std::size_t path_connectivity_cuda_workspace(const PathConnectivity<float>& op) {
  return workspace_by_panels(op, Stencil<float>{});
}
std::size_t path_connectivity_cuda_workspace(const PathConnectivity<double>& op) {
  Arena arena{nullptr};
  const Plan<double> plan = make_plan(op, Stencil<double>{}, Range{0, 0}, arena);
  return workspace(op, plan, arena);
}
const char* path_connectivity_cuda(const PathConnectivity<float>& op, CUstream_st* stream) {
  return enqueue_by_panels<false>(op, Stencil<float>{}, stream);
}
const char* path_connectivity_cuda(const PathConnectivity<double>& op, CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.workspace)};
  Plan<double> plan = make_plan(op, Stencil<double>{}, Range{0, 0}, arena);
  const char* error = enqueue_samples(op, plan, arena, stream);
  return error ? error : enqueue_general<double, 2, 0>(plan, stream);
}

}  // namespace lmn
