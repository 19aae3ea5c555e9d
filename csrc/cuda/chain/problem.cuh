// The kernels' view of path_connectivity and hermite_connectivity: layers, the problem, and how a block finds its own network
// where one launch takes several. Every kernel of a chain uses these structs.
#pragma once
#include "../device.h"
#include "../halves.h"

namespace lmn {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = 16;  // hidden units in one step; each of four lanes takes four neighbours

LMN_FN std::int64_t padded(std::int64_t width) { return blocks_of(width, kColumns) * kColumns; }

// ---- several networks in one launch ----
//
// Each network has a workspace of its own with the same layout; the workspaces follow one another. Each network also has blocks
// of its own; their blockIdx.y is the number of the network. A kernel receives the places of the first network, and moves on
// from there to its own. The layers in a workspace already hold the places of their own network.

/// The place in the block's network that corresponds to `first` in the first network. The places of two networks are `apart`
/// bytes from one another. `first` must not be null.
template <class U>
__device__ inline U* in_network(U* first, std::int64_t apart) {
  return reinterpret_cast<U*>(reinterpret_cast<char*>(first) + blockIdx.y * apart);
}
template <class U>
__device__ inline const U* in_network(const U* first, std::int64_t apart) {
  return reinterpret_cast<const U*>(reinterpret_cast<const char*>(first) + blockIdx.y * apart);
}
/// The same; null for null.
template <class U>
__device__ inline U* in_network_if(U* first, std::int64_t apart) {
  return first ? in_network(first, apart) : nullptr;
}

/// One layer at the samples, and the weights into it.
template <class T>
struct Layer {
  std::int64_t width, stride;  // stride: length of a sample's row in z and a, padded with zeros
  ActivationKind kind;
  T alpha, beta;
  T *z, *a, *slope;           // [samples, stride] before the activation, after it, and the activation's derivative or null
  T* v;                       // [samples, stride], the input of the next layer: a, or a plus what the network adds to it
  T* rounding;                // [samples, stride], root of the sum of squares of everything that v is computed from
  const T *weights, *biases;  // [width, width of the layer before], [width] or null
  HalfLayer half;             // used in float
  double2* fragments;         // used in double: weights as fragments, see chain64/samples.cuh
  int added[2], kept[2];  // slots of the residuals that are added to z and v; slots that keep the residuals of z and v; or -1
};

/// What the samples decide for the kernels of halves. Zeros before the first launch.
struct RangeFlags {
  int largest_z;  // bits of the largest |z| of the first layer, as a float
  int careful;    // 1 if the largest |a| of some SiLU unit is below kTinyUnit, but not 0, or is above kHugeUnit
};
constexpr float kTinyUnit = 1e-10f, kHugeUnit = 0x1p40f;

/// The kernels' view of the problem. All pointers are to global memory.
template <class T>
struct Problem {
  Layer<T>* layers;  // [last + 1]
  int last;
  bool ends_linear;   // whether the last layer has no activation
  bool halves_alone;  // float: products may round residuals and weights to one half; otherwise each is two halves
  DeviceNodes<T> nodes;
  std::int64_t samples, outputs;
  // [samples, outputs] scaled; [samples, outputs], the part of linear outputs that rounding to T lost; [outputs]
  T *y, *y_low, *scale;
  T* rounding;   // [samples, outputs], scaled; y's rounding is some epsilons of it
  float4* ends;  // float: the same in the layout of write_end, for kernels of at most kEndOutputs outputs; otherwise null
  T* connectivity;
  T* pooled;  // null, or as connectivity
  std::int64_t* counts;
  double stabiliser;
  T* spread;           // used if pooled: one number, 1 / scale of the output that varies most; 0 if no output varies
  RangeFlags* range;   // used in float
  std::int64_t apart;  // bytes between the workspaces of two networks

  __device__ Layer<T>* own_layers() const { return in_network(layers, apart); }
  __device__ T* own_connectivity() const { return in_network(connectivity, samples * samples * std::int64_t(sizeof(T))); }
  __device__ T* own_pooled() const { return in_network_if(pooled, samples * samples * std::int64_t(sizeof(T))); }
  __device__ std::int64_t* own_counts() const { return in_network(counts, 2 * std::int64_t(sizeof(std::int64_t))); }
};

/// The problem of the block's network. The nodes are common to all networks.
template <class T>
__device__ inline Problem<T> of_network(Problem<T> problem) {
  problem.layers = problem.own_layers();
  problem.y = in_network(problem.y, problem.apart), problem.y_low = in_network(problem.y_low, problem.apart);
  problem.scale = in_network(problem.scale, problem.apart), problem.rounding = in_network(problem.rounding, problem.apart);
  problem.ends = in_network_if(problem.ends, problem.apart), problem.range = in_network_if(problem.range, problem.apart);
  problem.connectivity = problem.own_connectivity(), problem.counts = problem.own_counts();
  problem.pooled = problem.own_pooled(), problem.spread = in_network(problem.spread, problem.apart);
  return problem;
}

/// The layer of the block's network. depth: width of the layer before.
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
