// What path_connectivity and hermite_connectivity share on CUDA, on the host's side: places in the workspace, several networks
// in one launch, and the launches for the network at the samples. The device's side is in chain/. The kernels of the paths are
// in chained.cuh and panels.cuh (float32) and in chain64.cuh (float64).
#pragma once
#include <cstdlib>
#include <vector>

#include "chain/samples.cuh"

namespace lmn {
namespace {

/// Places in the first network's workspace. apart: bytes between the workspaces of two networks.
struct Arena : ArenaOf<256> {
  std::int64_t apart = 0;
};

template <class T>
Layer<T> layer_of(const PathConnectivity<T>& op, int l, bool slopes, Arena& arena) {
  Layer<T> layer{};
  layer.width = op.widths[l];
  layer.stride = padded(layer.width);
  layer.kind = op.activations[l].kind;
  layer.alpha = T(op.activations[l].alpha);
  layer.beta = T(op.activations[l].beta);
  layer.z = arena.take<T>(op.samples * layer.stride);
  layer.a = arena.take<T>(op.samples * layer.stride);
  layer.v = op.skips && (op.skips[2 * l + 1] >= 0 || op.shifts[2 * l + 1]) ? arena.take<T>(op.samples * layer.stride) : layer.a;
  layer.slope = slopes ? arena.take<T>(op.samples * layer.stride) : nullptr;
  layer.rounding = arena.take<T>(op.samples * layer.stride);
  layer.added[0] = layer.added[1] = layer.kept[0] = layer.kept[1] = -1;
  if (l == 0) return layer;
  layer.weights = op.weights[l - 1];
  layer.biases = op.biases[l - 1];
  if (sizeof(T) == 8) {
    layer.fragments = arena.take<double2>(blocks_of(layer.width, 8) * blocks_of(op.widths[l - 1], 8) * kWarp);
  }
  return layer;
}

/// The problem without its nodes and its range.
template <class T>
Problem<T> make_problem(const PathConnectivity<T>& op, Arena& arena) {
  Problem<T> problem{};
  problem.last = op.layers;
  problem.ends_linear = op.layers > 0 && op.activations[op.layers].kind == ActivationKind::kIdentity;
  problem.halves_alone = op.halves_alone;
  problem.apart = arena.apart;
  problem.samples = op.samples;
  problem.outputs = op.widths[op.layers];
  problem.connectivity = op.connectivity;
  problem.pooled = op.pooled;
  problem.counts = op.counts;
  problem.stabiliser = op.stabiliser;
  problem.layers = arena.take<Layer<T>>(op.layers + 1);
  problem.y = arena.take<T>(op.samples * problem.outputs);
  problem.y_low = arena.take<T>(op.samples * problem.outputs);
  problem.rounding = arena.take<T>(op.samples * problem.outputs);
  problem.scale = arena.take<T>(problem.outputs);
  problem.spread = arena.take<T>(1);
  return problem;
}

/// Whether an op needs a kernel with kPooled, see PairSums. Of those there are panels_kernel and general64_kernel, which take
/// every network.
template <class T>
bool pools(const PathConnectivity<T>& op) {
  return op.pools || op.stabiliser > 0;
}

/// Limit in bytes for the workspaces of all networks that are measured at a time. Networks with larger workspaces have enough
/// blocks each.
inline std::int64_t stack_bytes() {
#if defined(LMN_EMULATED)
  if (const char* const bytes = std::getenv("LMNFAST_EMULATED_STACK")) return std::atoll(bytes);  // a test needs a small limit
#endif
  return std::int64_t(256) << 20;
}

/// How many networks are measured at a time. bytes: the workspace of one network.
inline std::int64_t networks_at_once(std::int64_t networks, std::size_t bytes) {
  const std::int64_t most = at_most(stack_bytes() / std::int64_t(bytes), kMostNetworks);
  return at_most(networks, most > 1 ? most : 1);
}

/// Calls enqueue(op) for as many of the op's networks at a time as networks_at_once says.
template <class T, class Enqueue>
const char* in_parts(const PathConnectivity<T>& op, std::size_t bytes, const Enqueue& enqueue) {
  if (op.first) return "lists of pairs are for the CPU";
  if (op.pools != (op.pooled != nullptr)) return "pools does not say whether there is a result pooled";
  const std::int64_t most = networks_at_once(op.networks, bytes);
  const std::size_t values = op.skips ? 2 * std::size_t(op.layers + 1) : 0;
  for (std::int64_t first = 0; first < op.networks; first += most) {
    PathConnectivity<T> part = op;
    std::vector<const T*> weights(op.weights, op.weights + op.layers), biases(op.biases, op.biases + op.layers);
    std::vector<const T*> shifts(op.shifts, op.shifts + values);
    for (int l = 0; l < op.layers; ++l) {
      weights[std::size_t(l)] += first * op.widths[l] * op.widths[l + 1];
      if (op.biases[l]) biases[std::size_t(l)] += first * op.widths[l + 1];
    }
    for (std::size_t value = 0; value < values; ++value) {
      if (op.shifts[value]) shifts[value] += first * op.samples * op.widths[value / 2];
    }
    part.networks = at_most(most, op.networks - first);
    part.z += first * op.samples * op.widths[0];
    part.weights = weights.data(), part.biases = biases.data();
    if (op.skips) part.shifts = shifts.data();
    part.connectivity += first * op.samples * op.samples;
    if (op.pooled) part.pooled += first * op.samples * op.samples;
    part.counts += 2 * first;
    if (op.exact) part.exact += first * op.samples * op.exact_width, part.inputs += first * op.samples * op.input_width;
    if (const char* error = enqueue(part)) return error;
  }
  return nullptr;
}

/// A slot for each value whose residuals are added to later values. A slot is free again after the last addition. -1: no slot.
struct Slots {
  std::vector<int> of;  // [values]
  int count = 0;
};
template <class T>
Slots assign_slots(const PathConnectivity<T>& op) {
  Slots slots;
  const int values = op.skips ? 2 * (op.layers + 1) : 0;
  std::vector<int> free_from(static_cast<std::size_t>(values));
  slots.of.resize(std::size_t(values));
  slots.count = assign_slots(op.skips, values, slots.of.data(), free_from.data());
  return slots;
}

template <class T>
void give_slots(const PathConnectivity<T>& op, const Slots& slots, int l, Layer<T>& layer) {
  for (int half = 0; op.skips && half < 2; ++half) {
    const int value = 2 * l + half, source = op.skips[value];
    layer.added[half] = source < 0 ? -1 : slots.of[std::size_t(source)];
    layer.kept[half] = slots.of[std::size_t(value)];
  }
}

/// What the network adds to value 2 l (half 0) or 2 l + 1 (half 1) at the samples. layers: the layers up to l.
template <class T>
Earlier<T> earlier_of(const PathConnectivity<T>& op, int l, int half, const std::vector<Layer<T>>& layers) {
  Earlier<T> earlier{nullptr, nullptr, nullptr};
  if (!op.skips) return earlier;
  earlier.shift = op.shifts[2 * l + half];
  const int source = op.skips[2 * l + half];
  if (source < 0) return earlier;
  const Layer<T>& layer = layers[std::size_t(source / 2)];
  earlier.value = source % 2 ? layer.v : layer.z;
  earlier.rounding = layer.rounding;
  return earlier;
}

/// One launch for each layer computes its values at the samples. layer_at(l) gives the layer's place and is called in order;
/// seen(l, layer) is called after the launch.
template <class T, class LayerAt, class Seen>
const char* enqueue_forward(const PathConnectivity<T>& op, const Problem<T>& problem, double limit, double* sums,
                            CUstream_st* stream, const LayerAt& layer_at, const Seen& seen) {
  const Slots slots = assign_slots(op);
  std::vector<Layer<T>> layers;
  const char* error = nullptr;
  for (int l = 0; l <= op.layers && !error; ++l) {
    layers.push_back(layer_at(l));
    Layer<T>& layer = layers.back();
    give_slots(op, slots, l, layer);
    const Layer<T> before = l > 0 ? layers[std::size_t(l - 1)] : Layer<T>{};
    const std::int64_t blocks = blocks_of(op.samples, kForwardTile) * (layer.stride / kForwardTile);
    const T *const before_v = before.v, *const before_rounding = before.rounding;
    error = launch(forward_kernel<T>, Grid(blocks, op.networks), kForwardTile * kForwardTile, 0, stream, problem, layer, l,
                   op.z, before_v, before_rounding, before.width, before.stride, earlier_of(op, l, 0, layers),
                   earlier_of(op, l, 1, layers), limit, sums);
    if (!error) error = seen(l, layer);
  }
  return error;
}

/// The spacing of equally spaced nodes; negative if they are not equally spaced.
inline double spacing_of(const PathNodes& nodes) {
  const double spacing = nodes.interior > 1 ? (nodes.t[nodes.interior - 1] - nodes.t[0]) / (nodes.interior - 1) : 0.0;
  for (int m = 0; m < nodes.interior; ++m) {
    if (!(std::fabs(nodes.t[m] - (nodes.t[0] + m * spacing)) <= 4 * Epsilon<double>::value)) return -1;
  }
  return spacing;
}

inline std::size_t shared_limit() { return std::size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }

}  // namespace
}  // namespace lmn
