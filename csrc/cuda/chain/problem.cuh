// The kernels' view of path_connectivity and hermite_connectivity: layers, the problem, and how a block finds its own network
// where one launch takes several. Every kernel of a chain uses these structs.
#pragma once
#include "../device.h"
#include "../halves.h"

namespace lmn {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = 16;  // of hidden units in one step: each of four lanes takes four that lie side by side

LMN_FN std::int64_t padded(std::int64_t width) { return blocks_of(width, kColumns) * kColumns; }

// ---- several networks in one launch ----
//
// Each network has the same places in a workspace of its own, one workspace behind the other, and blocks of its own, whose
// blockIdx.y is its number. A kernel is given the first one's places, and moves on from there. The layers that it finds in the
// workspace have their own network's places.

/// What the block's network has in place of something of the first one's; `apart` bytes behind that is the second one's. Not of
/// null.
template <class U>
__device__ inline U* in_network(U* first, std::int64_t apart) {
  return reinterpret_cast<U*>(reinterpret_cast<char*>(first) + blockIdx.y * apart);
}
template <class U>
__device__ inline const U* in_network(const U* first, std::int64_t apart) {
  return reinterpret_cast<const U*>(reinterpret_cast<const char*>(first) + blockIdx.y * apart);
}
/// The same; of null null.
template <class U>
__device__ inline U* in_network_if(U* first, std::int64_t apart) {
  return first ? in_network(first, apart) : nullptr;
}

/// One layer at the samples, and the weights into it.
template <class T>
struct Layer {
  std::int64_t width, stride;  // stride: of a sample's row in z and a, padded with zeros
  ActivationKind kind;
  T alpha, beta;
  T *z, *a, *slope;          // [samples, stride] before and after the activation, and its derivative or null
  T* v;                      // [samples, stride], what the next layer takes: a, and what a network adds to it
  T* rounding;               // [samples, stride], root of the sum of squares of all that v is computed from
  const T *weights, *biases; // [width, width of the layer before], [width] or null
  HalfLayer half;            // float
  double2* fragments;        // double: weights as fragments, see chain64.cuh
  int added[2], kept[2];     // slots of the residuals that are added to, and kept of, z and v; none: -1
};

/// What the samples leave to the kernels of halves to decide; zeros before.
struct RangeFlags {
  int largest_z;  // bits of the largest |z| of the first layer, as a float
  int careful;    // 1 where some SiLU unit's largest |a| is below kTinyUnit, but not 0, or above kHugeUnit
};
constexpr float kTinyUnit = 1e-10f, kHugeUnit = 0x1p40f;

/// The kernels' view of the problem, all in the memory of the device.
template <class T>
struct Problem {
  Layer<T>* layers;     // [last + 1]
  int last;
  bool ends_linear;     // the last layer has no activation
  bool halves_alone;    // float: products may round residuals and weights to halves; else each is two halves
  DeviceNodes<T> nodes;
  std::int64_t samples, outputs;
  T *y, *y_low, *scale; // [samples, outputs] scaled; what rounding linear ones to T lost; [outputs]
  T* rounding;          // [samples, outputs], scaled: epsilons of it are y's rounding
  float4* ends;         // float: the same once more for kernels of at most kEndOutputs outputs, see write_end; else null
  T* connectivity;
  std::int64_t* counts;
  RangeFlags* range;    // float
  std::int64_t apart;   // bytes between the workspaces of two networks

  __device__ Layer<T>* own_layers() const { return in_network(layers, apart); }
  __device__ T* own_connectivity() const { return in_network(connectivity, samples * samples * std::int64_t(sizeof(T))); }
  __device__ std::int64_t* own_counts() const { return in_network(counts, 2 * std::int64_t(sizeof(std::int64_t))); }
};

/// As the block's network has it; the nodes are those of all.
template <class T>
__device__ inline Problem<T> of_network(Problem<T> problem) {
  problem.layers = problem.own_layers();
  problem.y = in_network(problem.y, problem.apart), problem.y_low = in_network(problem.y_low, problem.apart);
  problem.scale = in_network(problem.scale, problem.apart), problem.rounding = in_network(problem.rounding, problem.apart);
  problem.ends = in_network_if(problem.ends, problem.apart), problem.range = in_network_if(problem.range, problem.apart);
  problem.connectivity = problem.own_connectivity(), problem.counts = problem.own_counts();
  return problem;
}

/// depth: the width of the layer before.
template <class T>
__device__ inline Layer<T> of_network(Layer<T> layer, std::int64_t depth, std::int64_t apart) {
  layer.z = in_network(layer.z, apart), layer.a = in_network(layer.a, apart), layer.v = in_network(layer.v, apart);
  layer.rounding = in_network(layer.rounding, apart), layer.slope = in_network_if(layer.slope, apart);
  layer.weights = in_network_if(layer.weights, layer.width * depth * std::int64_t(sizeof(T)));
  layer.biases = in_network_if(layer.biases, layer.width * std::int64_t(sizeof(T)));
  layer.fragments = in_network_if(layer.fragments, apart);
  HalfLayer& half = layer.half;
  half.largest = in_network_if(half.largest, apart), half.records = in_network_if(half.records, apart);
  half.units = in_network_if(half.units, apart), half.weights = in_network_if(half.weights, apart);
  return layer;
}

}  // namespace
}  // namespace lmn
