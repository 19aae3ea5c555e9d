// In float32 the kernel of chained.cuh measures the chains of one or two hidden layers that it takes, and the kernel of
// panels.cuh measures all others. The kernel of unresolved.cuh comes after either. In float64 the kernels are in chain64.cuh.
#include "chain64.cuh"
#include "chained.cuh"
#include "panels.cuh"
#include "unresolved.cuh"

namespace lmn {
namespace {

chained::Kernel find_chained(const PathConnectivity<float>& op) {
  using chained::Curve;
  chained::Kernel found;
  if (!chained::takes(op)) return found;
  const ActivationKind kind = op.activations[0].kind;
  if (op.layers == 2) {
    if (kind == ActivationKind::kSilu && op.activations[1].kind == ActivationKind::kSilu) {
      found = chained::kernel_for<Curve<ActivationKind::kSilu>, 0>(op);
    }
  } else {
    const auto of = [&](auto curve) { return chained::kernel_of<decltype(curve), 0, 0>(op.halves_alone); };
    switch (kind) {
      case ActivationKind::kSilu:
        found = of(Curve<ActivationKind::kSilu>{});
        break;
      case ActivationKind::kSigmoid:
        found = of(Curve<ActivationKind::kSigmoid>{});
        break;
      case ActivationKind::kTanh:
        found = of(Curve<ActivationKind::kTanh>{});
        break;
      case ActivationKind::kRelu:
      case ActivationKind::kLeakyRelu:
        found = of(Curve<ActivationKind::kLeakyRelu>{});
        break;  // a ReLU leaks with slope 0
      case ActivationKind::kGelu:
        found = of(Curve<ActivationKind::kGelu>{});
        break;
      case ActivationKind::kGeluTanh:
        found = of(Curve<ActivationKind::kGeluTanh>{});
        break;
      default:
        break;
    }
  }
  return chained::if_it_fits(op, found);
}

/// The workspace of one network. paths: bytes for the kernel of the paths. all: these, and behind them the bytes for the kernel
/// of the unresolved pairs.
struct Bytes {
  std::size_t paths, all;
};
Bytes bytes_of(const PathConnectivity<float>& op) {
  const chained::Kernel kernel = find_chained(op);
  const std::size_t paths = kernel.run ? chained::workspace(op, kernel) : panels::workspace_by_panels(op, Stencil<float>{});
  return {paths, paths + unresolved::workspace(op, 0)};
}

}  // namespace

std::size_t cuda_workspace(const PathConnectivity<float>& op) {
  const std::size_t own = bytes_of(op).all;
  return own * std::size_t(networks_at_once(op.networks, own));
}
std::size_t cuda_workspace(const PathConnectivity<double>& op) { return float64::workspace64<0>(op, Stencil<double>{}); }
const char* cuda_run(const PathConnectivity<float>& op, CUstream_st* stream) {
  const chained::Kernel kernel = find_chained(op);
  const Bytes own = bytes_of(op);
  return in_parts(op, own.all, [&](const PathConnectivity<float>& part) {
    const char* error = kernel.run ? chained::enqueue(part, kernel, Stencil<float>{}, own.all, stream)
                                   : panels::enqueue_by_panels<false>(part, Stencil<float>{}, own.all, stream);
    return error ? error : unresolved::enqueue(part, 0, static_cast<char*>(part.workspace) + own.paths, own.all, stream);
  });
}
const char* cuda_run(const PathConnectivity<double>& op, CUstream_st* stream) {
  return float64::connectivity64<0>(op, Stencil<double>{}, stream);
}

}  // namespace lmn
