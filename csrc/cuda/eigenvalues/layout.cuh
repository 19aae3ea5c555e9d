// How a matrix lies in the blocks of tridiagonal_kernel: which lane holds which entries, in registers, in shared memory or in
// L2. A Layout is fixed at compile time; a Shape holds the sizes of one launch. plan.cuh chooses both.
#pragma once
#include "matrices.cuh"

namespace lmn {
namespace {

constexpr int kMatrixWarps = 8, kMatrixThreads = kMatrixWarps * kWarp;

// Which lane holds which entries. Lanes and matrix warps are divided among rows first; the rest of the division is among
// columns. A chunk is as many columns as a block has column lanes. A lane holds kRows rows, `stride` indices apart, and of each
// row one column of every chunk. The last kHeld chunks are in registers. The earlier chunks, which are finished first, are in
// shared memory. If kDistant is set, the chunks that do not fit there (the very first ones) are in global memory, which in
// practice is L2. kHeld is what the registers hold without spills: 128 registers a thread for 512 threads, 168 for 384. If a
// matrix needs fewer rows of a block, each lane leaves its first rows empty, an even number of them, and treats these rows as
// finished.
template <int kRows_, int kRowLanes_, int kRowWarps_, int kHeld_, int kVectorWarps_, int kEntries_, bool kDistant_ = false>
struct Layout {
  static constexpr int kRows = kRows_, kRowLanes = kRowLanes_, kRowWarps = kRowWarps_, kHeld = kHeld_;
  // kEntries: entries of a vector for each vector thread
  static constexpr int kVectorWarps = kVectorWarps_, kEntries = kEntries_;
  static constexpr int kColumnLanes = kWarp / kRowLanes, kColumnWarps = kMatrixWarps / kRowWarps;
  static constexpr int kRowStep = kRowLanes * kRowWarps;  // distance between two rows of a lane, in rows of the block
  static constexpr int kSlots = kRows * kRowStep;         // rows of a block
  static constexpr int kChunk = kColumnLanes * kColumnWarps;
  static constexpr int kVectorThreads = kVectorWarps * kWarp, kThreads = kMatrixThreads + kVectorThreads;
  static constexpr bool kDistant = kDistant_;
  // whether a vector thread keeps its entries of the column in registers from one step to the next
  static constexpr bool kKeepsColumn = kEntries <= 6;
  static_assert(kRows % 2 == 0 && kRows <= 8 && kEntries % 2 == 0 && kColumnLanes >= 8);
};

// The sizes of one launch. Rows and columns go by index = padding + row, so that the last chunk is full.
struct Shape {
  int samples, batch;
  int whole;   // samples before the first phase
  int steps;   // columns of this phase
  int blocks;  // blocks of one matrix
  int groups;  // groups of blocks, which is the number of matrices at a time
  int padded;  // number of indices, a multiple of a chunk
  int padding;
  int absent;   // rows of a lane that hold nothing; these are the lane's first rows
  int spilled;  // chunks that are not in registers
  int distant;  // the part of `spilled` that is in global memory
  int skipped;  // indices without a row that the exchange leaves out, an even number
  __host__ __device__ int words() const { return padded - skipped; }  // words of one vector in the exchange
  __host__ __device__ int left() const { return samples - steps; }    // rows after this phase; 1: the matrix is finished
  int sums, partial, w, x, chunks, bytes;  // places in shared memory, in doubles; `bytes`: its whole size
  int distant_columns;                     // columns of the matrix in global memory
  std::int64_t distant_bytes;              // bytes in global memory, of all blocks
};

}  // namespace
}  // namespace lmn
