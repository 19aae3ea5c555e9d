// chained_kernel: it copies parameters and weights to shared memory, and gives each warp one unit of work after the other.
// chained.cuh launches it after the kernels of halves.cuh have filled the records and the weights.
#pragma once
#include "warp.cuh"

namespace lmn {
namespace {
namespace chained {

/// The block's copy of the kernel's parameters, at the beginning of its shared memory. The weights follow the copy.
__device__ inline Chained& shared_parameters() { return *reinterpret_cast<Chained*>(dynamic_shared()); }
constexpr std::size_t kParameterBytes = (sizeof(Chained) + 15) / 16 * 16;

/// Changes the block's copy to the pointers of the block's network. One thread calls this.
__device__ inline void move_to_network(const Chained& p, int depth) {
  Chained& own = shared_parameters();
  for (int l = 0; l <= depth; ++l) {
    HalfLayer& layer = own.layers[l];
    layer.records = in_network_if(layer.records, p.apart), layer.units = in_network_if(layer.units, p.apart);
    layer.weights = in_network_if(layer.weights, p.apart);
  }
  own.ends = in_network(p.ends, p.apart), own.scale = in_network(p.scale, p.apart);
  own.z = in_network(p.z, p.apart), own.range = in_network(p.range, p.apart);
  own.connectivity = in_network(p.connectivity, std::int64_t(p.samples) * p.samples * std::int64_t(sizeof(float)));
  own.counts = in_network(p.counts, 2 * std::int64_t(sizeof(std::int64_t)));
}

/// Measures a unit of work. False: nothing was stored, and the unit has to be measured in another way.
template <class Curve, int kBlocks, int kStencil, bool kSplit, Way kWay>
__device__ inline bool chained_unit(int i, int block) {
  using S = Shape<Curve, kBlocks, kStencil, kSplit>;
  using W = ChainedWarp<Curve, kBlocks, kStencil, kSplit, kWay>;
  const Chained& p = shared_parameters();
  const uint4* memory = reinterpret_cast<const uint4*>(dynamic_shared() + kParameterBytes);
  W warp(p);
  warp.lane = int(threadIdx.x) % kWarp;
  warp.q = warp.lane % 4;
  warp.row = 4 * int(i % kGroup) + warp.q;
  const int last_group = (p.samples - 1) / kGroup;
  const unsigned floats = unsigned(p.layers[0].group_floats());
  warp.first = unsigned(i / kGroup) * floats;
#pragma unroll
  for (int path = 0; path < S::kPaths; ++path) {
    warp.second[path] = unsigned(smaller(block * S::kPaths + path, last_group)) * floats;
  }
  warp.more_outputs = p.outputs > kStepUnits;
  warp.spacing = p.spacing;
  warp.weights = memory + warp.lane;
  // one uint4 is two fragments of a step
  for (int l = 0; l < S::kDepth; ++l) memory += S::kParts * p.layers[l + 1].part_fragments(p.layers[l].steps) / 2;
  warp.moments = const_cast<float4*>(reinterpret_cast<const float4*>(memory)) + warp.lane;
  warp.moments += threadIdx.x / kWarp * (S::kMoments * kWarp);
  PairSums<false> sums[S::kPaths];
  const int j = block * S::kPaths * kGroup + warp.lane / 4;
  if (!warp.run(i, j, sums)) return false;
#pragma unroll
  for (int path = 0; path < S::kPaths; ++path) {
    const PairSums<false> total = sums[path].over_lanes(4);
    const int second = j + kGroup * path;
    if (warp.q == 0 && i < second && second < p.samples) {
      store_entry(p.connectivity, p.counts, total, p.z, p.stride, p.width, p.samples, p.outputs, i, second);
    }
  }
  return true;
}

/// Not inline: with more than one way in the kernel the compiler keeps addresses of one way alive through the other, and runs
/// out of registers. Parameters of a function that is not inline would be in local memory, so the function reads the block's
/// copy of the kernel's parameters.
template <class Curve, int kBlocks, int kStencil, bool kSplit, Way kWay>
__device__ __noinline__ bool one_unit(int i, int block) {
  return chained_unit<Curve, kBlocks, kStencil, kSplit, kWay>(i, block);
}

template <class Curve, int kBlocks, int kStencil, bool kSplit>
__global__ void __launch_bounds__(Shape<Curve, kBlocks, kStencil, kSplit>::kMostWarps* kWarp, 1)
    chained_kernel(const __grid_constant__ Chained p) {
  using S = Shape<Curve, kBlocks, kStencil, kSplit>;
  for (unsigned n = threadIdx.x; n < sizeof(Chained) / sizeof(unsigned); n += blockDim.x) {
    reinterpret_cast<unsigned*>(&shared_parameters())[n] = reinterpret_cast<const unsigned*>(&p)[n];
  }
  {
    uint4* to = reinterpret_cast<uint4*>(dynamic_shared() + kParameterBytes);
    for (int l = 0; l < S::kDepth; ++l) {
      const uint4* const from = in_network(reinterpret_cast<const uint4*>(p.layers[l + 1].weights), p.apart);
      const std::int64_t count = S::kParts * p.layers[l + 1].part_fragments(p.layers[l].steps) / 2;
      for (std::int64_t n = threadIdx.x; n < count; n += blockDim.x) to[n] = from[n];
      to += count;
    }
  }
  __syncthreads();
  // A block takes neighbouring units of work. Nearly all of them have the same second samples, which then stay in the cache.
  if (threadIdx.x == 0) {
    shared_parameters().units = int(std::int64_t(blockIdx.x + 1) * p.units / gridDim.x);
    move_to_network(p, S::kDepth);
  }
  if (threadIdx.x < kChainedOutputs) {
    const int n = int(threadIdx.x) / 4, k = kStepUnits * (n / 4) + 4 * (int(threadIdx.x) % 4) + n % 4;
    const float* const units = in_network(p.layers[S::kDepth].units, p.apart) + n / 4 * 2 * kStepUnits + kStepUnits;
    shared_parameters().factor[threadIdx.x] = k < p.outputs ? in_network(p.scale, p.apart)[k] * units[k % kStepUnits] : 0.0f;
  }
  __syncthreads();
  [[maybe_unused]] bool careful = true;
  if constexpr (Curve::kSilu && kStencil == 0) {
    const RangeFlags& range = *in_network(p.range, p.apart);
    careful = !(__uint_as_float(unsigned(range.largest_z)) < kPairedLimit) || range.careful != 0;
  }
  const int warps = int(blockDim.x) / kWarp;
  const int begin = int(std::int64_t(blockIdx.x) * p.units / gridDim.x);
  for (int n = begin + int(threadIdx.x) / kWarp; n < shared_parameters().units; n += warps) {
    __syncwarp();  // waits for the lanes that have stored an entry
    int i, block;
    find_unit(n, S::kPaths * kGroup, i, block);
    if constexpr (Curve::kSilu && kStencil == 0) {
      bool done = false;
      if (!careful) {
        done = p.uniform ? one_unit<Curve, kBlocks, kStencil, kSplit, Way::uniform>(i, block)
                         : one_unit<Curve, kBlocks, kStencil, kSplit, Way::fast>(i, block);
      }
      if (done) continue;
    }
    one_unit<Curve, kBlocks, kStencil, kSplit, Way::careful>(i, block);
  }
}

}  // namespace chained
}  // namespace
}  // namespace lmn
