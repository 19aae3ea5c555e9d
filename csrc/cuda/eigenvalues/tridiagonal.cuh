// Householder's reduction of symmetric matrices to tridiagonal form, in float64. plan.cuh launches the kernel once for each
// phase; sturm.cuh takes the diagonals that the kernel writes.
//
// Column n, n = 0 ... samples - 2, is x = A[n + 1:, n]. With beta = -sign(x_0) |x|, v = x - beta e_0 and gamma = 2 / |v|^2,
// A[n + 1:, n + 1:] becomes A - v w^T - w v^T, where p = gamma A v, w = p - gamma / 2 (p . v) v (Golub and Van Loan, 8.3.1).
//
// A block holds every `blocks`-th row of a matrix, so the work stays evenly divided as the matrix shrinks. The block's matrix
// warps hold the entries without the last update. In each step they multiply these entries with the current column, post the
// products and the next column (both without the update), and make the update while both travel. The vector warps of every
// block read both from L2, correct them for the missing update, and compute v and w. All blocks compute the same v and w. So a
// column takes one exchange between blocks.
//
// A prototype took 1.7 us a column on an H200, at 768 and 961 with one matrix. This time went into the exchange and into
// issuing instructions, not into arithmetic. The prototype moved registers from vector warps to matrix warps by instructions
// that sm_90a alone has, and so held more entries in registers.
//
// Relaxed stores and loads are sufficient for the exchange. A value and its tag are one 8-byte word, so a thread that sees the
// tag has the value. Blocks exchange nothing else, so no order between words is needed. There are two buffers, one for even and
// one for odd steps, and the tags repeat after four uses of a buffer.
// - No block overwrites a word that another block still has to read. A block posts at step n + 2 after its vector warps have
//   received all of step n + 1 (kColumnReady). Every block that reads at step n also posts at step n + 1, after its vector
//   warps have finished step n, because its last row is still left then. A block without a row at step n + 1 does not read at
//   step n (`last` below). The exception is the block of the last row, which posts in every step. So the store at n + 2 depends
//   on all loads of step n, by values and by branches through barriers of the two blocks, and hardware does not perform a store
//   before the loads that decide whether the store happens.
// - No thread takes an old word for a new one. The same thread looks at a word in every step that reads the word, so the thread
//   has seen the words of the steps n - 6, n - 4 and n - 2 before it looks for the word of step n. Loads of one address by one
//   thread do not go back in time (coherence of each location). The first tag is 1, and the buffers are 0 before the launch.
//   Each matrix has its own buffers.
//
// The protocol needs no fence. All blocks of a matrix must be resident together, so the launch is cooperative.
//
// A matrix that has shrunk enough fits a layout with less work for each block, or leaves room for more matrices at once. So the
// reduction runs in phases, with one launch each. Every phase but the last stops after some columns and writes the rest of the
// matrix. The next phase reduces this rest, with an exchange of its own. A block that has a row left in the rest stays to the
// end of the phase.
#pragma once
#include "matrix_warps.cuh"
#include "vector_warps.cuh"

namespace lmn {
namespace {

// Each of shape.groups matrices at a time has shape.blocks blocks. In a block kMatrixWarps warps hold rows; the others make the
// vectors.
template <class L>
__global__ void __launch_bounds__(L::kThreads, 1) tridiagonal_kernel(Matrices matrices, Shape shape, Work work) {
  double* const memory = reinterpret_cast<double*>(dynamic_shared());
  const int group = int(blockIdx.x) / shape.blocks, block = int(blockIdx.x) % shape.blocks;
  // A row of this block is left in as many steps as the number of its last row says, or in all steps.
  const int last_row = (shape.samples - 1 - block) / shape.blocks * shape.blocks + block;
  const bool has_last_row = last_row == shape.samples - 1, stays = last_row >= shape.steps;
  const int last = stays ? shape.steps : last_row;
  for (int matrix = group; matrix < shape.batch; matrix += shape.groups) {
    const double largest = of_bits(work.largest[matrix]);
    if (!isfinite(largest)) continue;
    const Scale scale(shape.samples == shape.whole ? largest : 0.0, 1);  // the rest that a phase leaves is already scaled
    if (threadIdx.x < kMatrixThreads) {
      hold_matrix<L>(matrices.one(matrix), matrix, scale, shape, work, last, stays, memory);
    } else {
      make_vectors<L>(matrices.one(matrix), matrix, scale, shape, work, last, stays, has_last_row, memory);
    }
  }
}

}  // namespace
}  // namespace lmn
