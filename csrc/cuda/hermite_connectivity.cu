// The kernels of path_connectivity with two or three residuals a path, from which their polynomial's moments come.
#include "chained.cuh"

namespace lmn {
namespace {

/// Between the ends' slopes alone no activation is evaluated, so one kernel is for all.
using Any = Curve<ActivationKind::kCount>;

ChainedKernel find_chained(const HermiteConnectivity<float>& op) {
  const PathConnectivity<float>& path = op.path;
  ChainedKernel found;
  if (!takes_chained(path)) return found;
  if (path.layers == 1) {
    found = op.midpoint ? chained_kernel_of<Any, 0, 3>(path.tf32) : chained_kernel_of<Any, 0, 2>(path.tf32);
  } else if (!op.midpoint) {
    const std::int64_t widest = path.widths[0] > path.widths[1] ? path.widths[0] : path.widths[1];
    found = chained_kernel_for<Any, 2>(widest, path.tf32);
  }
  if (found.kernel && chained_shared(path, found) > shared_limit()) found.kernel = nullptr;
  return found;
}

const char* hermite_connectivity_on(const HermiteConnectivity<float>& op, CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.path.workspace)};
  const ChainedKernel kernel = find_chained(op);
  if (!kernel.kernel) return "no kernel";
  HalfPlan plan = make_half_plan(op.path, kernel.dialect, arena);
  return enqueue_chained(op.path, kernel, make_stencil<float>(op.path.nodes, op.midpoint), plan, arena, stream);
}
const char* hermite_connectivity_on(const HermiteConnectivity<double>& op, CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.path.workspace)};
  Plan<double> plan = make_plan(op.path, make_stencil<double>(op.path.nodes, op.midpoint), Range{0, 0}, arena);
  if (const char* error = enqueue_samples(op.path, plan, arena, stream)) return error;
  return op.midpoint ? enqueue_general<double, 2, 3>(plan, stream) : enqueue_general<double, 2, 2>(plan, stream);
}

std::size_t workspace_on(const HermiteConnectivity<float>& op) {
  Arena arena{nullptr};
  return half_workspace(op.path, make_half_plan(op.path, find_chained(op).dialect, arena), arena);
}
std::size_t workspace_on(const HermiteConnectivity<double>& op) {
  Arena arena{nullptr};
  const Plan<double> plan = make_plan(op.path, make_stencil<double>(op.path.nodes, op.midpoint), Range{0, 0}, arena);
  return workspace(op.path, plan, arena);
}

}  // namespace

std::size_t hermite_connectivity_cuda_workspace(const HermiteConnectivity<float>& op) { return workspace_on(op); }
std::size_t hermite_connectivity_cuda_workspace(const HermiteConnectivity<double>& op) { return workspace_on(op); }
const char* hermite_connectivity_cuda(const HermiteConnectivity<float>& op, CUstream_st* stream) {
  return hermite_connectivity_on(op, stream);
}
const char* hermite_connectivity_cuda(const HermiteConnectivity<double>& op, CUstream_st* stream) {
  return hermite_connectivity_on(op, stream);
}

}  // namespace lmn
