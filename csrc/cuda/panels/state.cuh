// The parameters of panels_kernel, and each warp's position in its work. The position is in shared memory, because registers
// are scarce. All other files of this folder use both.
#pragma once
#include "../halves.cuh"

namespace lmn {
namespace {
namespace panels {

constexpr int kPanelWarps = 12;  // warps of a multiprocessor; each thread has 168 registers
constexpr int kPanelThreads = kPanelWarps * kWarp;
constexpr int kChunkSteps = 2;  // steps of 16 units that a warp takes at a time
constexpr int kChunkUnits = kChunkSteps * kStepUnits;
constexpr int kLaneOutputs = 4 * kChunkSteps;  // outputs of a lane in a chunk
constexpr int kStraightOutputs = 32;           // most outputs for kStraight
constexpr int kMoments = 3;
// Tiles of a warp. 19 nodes are two sets of five tiles. The slopes and the midpoint are two tiles.
constexpr int kPathTiles = 5, kFewTiles = 2;

constexpr std::size_t kStaticShared = 4096;  // upper limit of the kernel's static shared memory, beside the dynamic

struct Panels {
  Problem<float> problem;
  Stencil<float> stencil;
  std::int64_t units;        // units of work
  int tiles, pass_tiles;     // tiles of a path; tiles in one pass
  int hidden;                // layers whose residuals are factors of later products
  int output_steps, chunks;  // outputs in steps and in chunks
  int second_panel;          // where the second panel begins, in fragments
  int partial_sums;          // kStraight: where the warps' sums of outputs begin
  std::int64_t block_fragments;
  uint4* panels;   // [blocks][block_fragments]; null: in shared memory
  float* moments;  // [blocks][chunks][kLaneOutputs][kMoments][lanes], for moments that do not stay in registers
  float* kept;     // [blocks][slots][pass_tiles][kept_steps][8][lanes], residuals that are added to later ones
  std::int64_t block_kept;
  int kept_steps;
};

/// Returns the same number or pointer, but hides from the compiler that it is the same. The compiler then reads values again,
/// and does not keep them in registers through the products, where no register is free.
__device__ inline int afresh(int value) {
#if !defined(LMN_EMULATED)
  asm volatile("" : "+r"(value));
#endif
  return value;
}
template <class T>
__device__ inline const T* afresh(const T* from) {
#if !defined(LMN_EMULATED)
  asm volatile("" : "+l"(from));
#endif
  return from;
}

/// A warp's position in its work. It is in shared memory; in registers it would stay alive through the products. All lanes
/// write the same values.
struct Work {
  std::int64_t unit;     // number of the unit of work
  int i, group;          // first sample; group of eight second samples
  int first_tile, here;  // first tile of the pass; tiles in the pass
  int layer, task;       // current layer; current task of this layer
  int in_products;       // 1 if the products are the outputs' residuals
};
__device__ inline Work& work_of_warp() {
  __shared__ Work works[kPanelWarps];
  return works[afresh(int(threadIdx.x)) / kWarp];
}
/// Adds `by` to one of the numbers.
template <class T>
__device__ inline void advance(T Work::* number, std::int64_t by) {
  const T next = T(work_of_warp().*number + by);
  __syncwarp();  // all lanes have read the number
  work_of_warp().*number = next;
}
__device__ inline int lane_here() { return afresh(int(threadIdx.x)) % kWarp; }

/// The values at a tile's two nodes in an array over the nodes. The number of nodes is even.
__device__ inline float2 at_tile(const float* array, int tile) { return reinterpret_cast<const float2*>(array)[tile]; }

__device__ inline void take4(float (&to)[4], const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

}  // namespace panels
}  // namespace
}  // namespace lmn
