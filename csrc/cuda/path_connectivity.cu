// Float32: chains of one or two hidden layers by the kernel of chained.cuh where it takes them, all others by the general
// kernel of panels.cuh. Float64: chain64.cuh.
#include "chained.cuh"

namespace lmn {
namespace {

ChainedKernel find_chained(const PathConnectivity<float>& op) {
  ChainedKernel found;
  if (!takes_chained(op)) return found;
  const ActivationKind kind = op.activations[0].kind;
  if (op.layers == 2) {
    if (kind == ActivationKind::kSilu && op.activations[1].kind == ActivationKind::kSilu) {
      const std::int64_t widest = op.widths[0] > op.widths[1] ? op.widths[0] : op.widths[1];
      found = chained_kernel_for<Curve<ActivationKind::kSilu>, 0>(widest, op.tf32);
    }
  } else {
    const auto of = [&](auto curve) { return chained_kernel_of<decltype(curve), 0, 0>(op.tf32); };
    switch (kind) {
      case ActivationKind::kSilu: found = of(Curve<ActivationKind::kSilu>{}); break;
      case ActivationKind::kSigmoid: found = of(Curve<ActivationKind::kSigmoid>{}); break;
      case ActivationKind::kTanh: found = of(Curve<ActivationKind::kTanh>{}); break;
      case ActivationKind::kRelu:
      case ActivationKind::kLeakyRelu: found = of(Curve<ActivationKind::kLeakyRelu>{}); break;  // ReLU leaks 0
      case ActivationKind::kGelu: found = of(Curve<ActivationKind::kGelu>{}); break;
      case ActivationKind::kGeluTanh: found = of(Curve<ActivationKind::kGeluTanh>{}); break;
      default: break;
    }
  }
  if (found.kernel && chained_shared(op, found) > shared_limit()) found.kernel = nullptr;
  return found;
}

const char* path_connectivity_on(const PathConnectivity<float>& op, CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.workspace)};
  const ChainedKernel kernel = find_chained(op);
  if (!kernel.kernel) return "no kernel";
  HalfPlan plan = make_half_plan(op, kernel.dialect, arena);
  return enqueue_chained(op, kernel, Stencil<float>{}, plan, arena, stream);
}
const char* path_connectivity_on(const PathConnectivity<double>& op, CUstream_st* stream) {
  Arena arena{static_cast<char*>(op.workspace)};
  Plan<double> plan = make_plan(op, Stencil<double>{}, Range{0, 0}, arena);
  const char* error = enqueue_samples(op, plan, arena, stream);
  return error ? error : enqueue_general<double, 2, 0>(plan, stream);
}

std::size_t workspace_on(const PathConnectivity<float>& op) {
  Arena arena{nullptr};
  const ChainedKernel kernel = find_chained(op);
  return half_workspace(op, make_half_plan(op, kernel.dialect, arena), arena);
}
std::size_t workspace_on(const PathConnectivity<double>& op) {
  Arena arena{nullptr};
  const Plan<double> plan = make_plan(op, Stencil<double>{}, Range{0, 0}, arena);
  return workspace(op, plan, arena);
}

}  // namespace

std::size_t path_connectivity_cuda_workspace(const PathConnectivity<float>& op) { return workspace_on(op); }
std::size_t path_connectivity_cuda_workspace(const PathConnectivity<double>& op) { return workspace_on(op); }
const char* path_connectivity_cuda(const PathConnectivity<float>& op, CUstream_st* stream) {
  return path_connectivity_on(op, stream);
}
const char* path_connectivity_cuda(const PathConnectivity<double>& op, CUstream_st* stream) {
  return path_connectivity_on(op, stream);
}

}  // namespace lmn
