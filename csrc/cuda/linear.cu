// A Linear at the samples, by the kernel that takes Jacobians' samples through a layer.
#include "jacobian.cuh"

namespace lmn {
namespace {

template <class T>
const char* linear_on(const Linear<T>& op, CUstream_st* stream) {
  constexpr ActivationKind kNone = ActivationKind::kIdentity;
  const ForwardLayer<T, double, double> layer{op.x,       op.weight, op.bias,    op.z, nullptr,
                                              op.samples, op.inputs, op.outputs, 0,    Activation{kNone, 0, 0}};
  if (op.networks == 1) return forward_as<T, double, double, kNone>(layer, stream);
  const std::int64_t blocks = blocks_of(op.samples, kForwardTile) * blocks_of(op.outputs, kForwardTile);
  for (std::int64_t first = 0; first < op.networks; first += kMostNetworks) {
    ForwardLayer<T, double, double> part = layer;
    part.in += first * op.samples * op.inputs, part.weights += first * op.outputs * op.inputs;
    if (op.bias) part.bias += first * op.outputs;
    part.values += first * op.samples * op.outputs;
    const Grid grid(blocks, at_most(kMostNetworks, op.networks - first));
    const char* error = launch(forward_kernel<T, double, double, kNone, true>, grid, kForwardThreads, 0, stream, part);
    if (error) return error;
  }
  return nullptr;
}

}  // namespace

std::size_t cuda_workspace(const Linear<float>&) { return 0; }
std::size_t cuda_workspace(const Linear<double>&) { return 0; }
const char* cuda_run(const Linear<float>& op, CUstream_st* stream) { return linear_on(op, stream); }
const char* cuda_run(const Linear<double>& op, CUstream_st* stream) { return linear_on(op, stream); }

}  // namespace lmn
