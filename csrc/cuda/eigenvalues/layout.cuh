// How a matrix lies in the blocks of tridiagonal_kernel: which lane holds which entries, in registers, in shared memory or in
// L2. A Layout is fixed at compile time; a Shape holds the sizes of one launch. plan.cuh chooses both.
#pragma once
#include "matrices.cuh"

namespace lmn {
namespace {

constexpr int kMatrixWarps = 8, kMatrixThreads = kMatrixWarps * kWarp;

// Who holds what. Lanes and matrix warps are spread over rows and, what is left of them, over columns; a chunk is as many
// columns as there are column lanes in a block. A lane holds kRows rows, each `stride` indices after the one before, and of
// these one column of each chunk: the last kHeld chunks in registers, those before, which are done with first, in shared
// memory, and where kDistant what does not fit there, the first of all, in global memory, which is to say L2. kHeld is what
// the registers hold without spills, 128 a thread for 512 threads and 168 for 384. A matrix that needs fewer rows of a block
// leaves its first ones out, an even number a lane, as if they were done with.
template <int kRows_, int kRowLanes_, int kRowWarps_, int kHeld_, int kVectorWarps_, int kEntries_, bool kDistant_ = false>
struct Layout {
  static constexpr int kRows = kRows_, kRowLanes = kRowLanes_, kRowWarps = kRowWarps_, kHeld = kHeld_;
  static constexpr int kVectorWarps = kVectorWarps_, kEntries = kEntries_;  // entries of a vector for each vector thread
  static constexpr int kColumnLanes = kWarp / kRowLanes, kColumnWarps = kMatrixWarps / kRowWarps;
  static constexpr int kRowStep = kRowLanes * kRowWarps;        // rows of a block between two of a lane
  static constexpr int kSlots = kRows * kRowStep;               // rows of a block
  static constexpr int kChunk = kColumnLanes * kColumnWarps;
  static constexpr int kVectorThreads = kVectorWarps * kWarp, kThreads = kMatrixThreads + kVectorThreads;
  static constexpr bool kDistant = kDistant_;
  static constexpr bool kKeepsColumn = kEntries <= 6;  // in registers, from one step to the next
  static_assert(kRows % 2 == 0 && kRows <= 8 && kEntries % 2 == 0 && kColumnLanes >= 8);
};

// Rows and columns go by index, index = padding + row, so that the last chunk is full.
struct Shape {
  int samples, batch;
  int whole;    // samples before the first phase
  int steps;    // columns of this phase
  int blocks;   // of a matrix
  int groups;   // of blocks: matrices at once
  int padded;   // indices: a multiple of a chunk
  int padding;
  int absent;   // rows of a lane that hold nothing, its first ones
  int spilled;  // chunks not in registers
  int distant;  // of these those in global memory
  int skipped;  // indices of no row, an even number of them, that the exchange leaves out
  __host__ __device__ int words() const { return padded - skipped; }  // of a vector in the exchange
  __host__ __device__ int left() const { return samples - steps; }      // rows after this phase; 1: all is done
  int sums, partial, w, x, chunks, bytes;  // where they lie in shared memory, in doubles; bytes in all
  int distant_columns;         // of the matrix, in global memory
  std::int64_t distant_bytes;  // there, of all blocks
};

}  // namespace
}  // namespace lmn
