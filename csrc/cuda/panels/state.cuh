// The kernel's parameters for panels_kernel, and each warp's position in its work. The position lies in shared memory, because
// registers are short. All other files of this folder use both.
#pragma once
#include "../halves.cuh"

namespace lmn {
namespace {
namespace panels {

constexpr int kPanelWarps = 12;                         // of a multiprocessor: 168 registers each thread
constexpr int kPanelThreads = kPanelWarps * kWarp;
constexpr int kChunkSteps = 2;                          // of 16 units, that a warp takes at a time
constexpr int kChunkUnits = kChunkSteps * kStepUnits;
constexpr int kLaneOutputs = 4 * kChunkSteps;           // of a chunk
constexpr int kStraightOutputs = 32;                    // at most, for kStraight
constexpr int kMoments = 3;
constexpr int kPathTiles = 5, kFewTiles = 2;            // of a warp: 19 nodes are twice five tiles; slopes, and the midpoint

constexpr std::size_t kStaticShared = 4096;             // of the kernel's own at most, beside what it is launched with

struct Panels {
  Problem<float> problem;
  Stencil<float> stencil;
  std::int64_t units;          // of work
  int tiles, pass_tiles;       // of a path, and of them in one pass
  int hidden;                  // layers whose residuals the products after them take
  int output_steps, chunks;    // of outputs
  int second_panel;            // where it begins, in fragments
  int partial_sums;            // kStraight: where the warps' sums of outputs begin
  std::int64_t block_fragments;
  uint4* panels;               // [blocks][block_fragments]; null: in shared memory
  float* moments;              // [blocks][chunks][kLaneOutputs][kMoments][lanes], where they do not stay in registers
  float* kept;                 // [blocks][slots][pass_tiles][kept_steps][8][lanes], residuals that are added to later ones
  std::int64_t block_kept;
  int kept_steps;
};

/// The same number or pointer, of which the compiler does not know that. What is read there is read again, in place of
/// being kept in registers through the products, where there are none to spare.
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

/// What a warp is at, in shared memory: in registers it would live through the products. All lanes write the same.
struct Work {
  std::int64_t unit;      // its number
  int i, group;           // first sample; eight second ones
  int first_tile, here;   // of the pass; tiles in it
  int layer, task;        // what it makes; a part of that
  int in_products;        // 1 where the products are the outputs' residuals
};
__device__ inline Work& work_of_warp() {
  __shared__ Work works[kPanelWarps];
  return works[afresh(int(threadIdx.x)) / kWarp];
}
/// Moves one of the numbers on.
template <class T>
__device__ inline void advance(T Work::*number, std::int64_t by) {
  const T next = T(work_of_warp().*number + by);
  __syncwarp();  // all lanes have read it
  work_of_warp().*number = next;
}
__device__ inline int lane_here() { return afresh(int(threadIdx.x)) % kWarp; }

/// What an array of the nodes has of a path's tile; the nodes are an even number.
__device__ inline float2 at_tile(const float* array, int tile) { return reinterpret_cast<const float2*>(array)[tile]; }

__device__ inline void take4(float (&to)[4], const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

}  // namespace panels
}  // namespace
}  // namespace lmn
