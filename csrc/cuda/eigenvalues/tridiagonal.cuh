// Householder's reduction of symmetric matrices to tridiagonal form, in float64. plan.cuh launches the kernel once for each
// phase; sturm.cuh takes the diagonals that the kernel writes.
//
// Column n, n = 0 ... samples - 2, is x = A[n + 1:, n]. With beta = -sign(x_0) |x|, v = x - beta e_0 and gamma = 2 / |v|^2,
// A[n + 1:, n + 1:] becomes A - v w^T - w v^T, where p = gamma A v, w = p - gamma / 2 (p . v) v (Golub and Van Loan, 8.3.1).
//
// Of each matrix a block holds every `blocks`-th row, so that the work stays even as the matrix shrinks. Its matrix warps
// hold the entries, one update behind. They multiply what they hold with the next column, post these products and the
// column after it as they stand, and then make the update while both travel. The vector warps of every block get both from
// L2, put in what the missing update changes, and make v and w, all of them alike: one exchange a column.
//
// A prototype took 1.7 us a column on an H200, at 768 and 961 with one matrix, of the exchange and of issuing instructions, not
// of arithmetic. It moved registers from vector to matrix warps, by instructions of sm_90a alone, and held more in them.
//
// Why relaxed stores and loads do. A value and its tag are one 8-byte word, so whoever sees the tag has the value, and
// nothing else is handed over through memory that blocks share: no order between words is asked for. There are two buffers,
// one for even and one for odd steps, and tags repeat after four uses of a buffer.
// - Nobody overwrites what is still to be read. A block posts at step n + 2 once its vector warps have all of step n + 1
//   (kColumnReady). Every block that reads at step n also posts at step n + 1, again after its vector warps are done with
//   step n, as its last row is still left then: a block that has none left at step n + 1 does not read at step n (`last`
//   below), but the block of the last row, which posts in every step. So the store at n + 2 depends, by values and branches
//   through barriers of the two blocks, on all loads of step n, and hardware does not let a store out before the loads that
//   decide whether there is one.
// - Nobody takes an old word for a new one. The same thread looks at a word in every step in which it is read, so it has
//   seen the words of the steps n - 6, n - 4 and n - 2 before it looks for n's, and loads of one address by one thread do
//   not go back (coherence of each location). The first tag is 1, and the buffers are 0 before the launch. Each matrix has
//   its own buffers.
// No fence is needed. It is needed that all blocks of a matrix are resident together, hence the cooperative launch.
//
// A matrix that shrinks soon fits a layout with less to do for each block, or leaves room for more matrices at once. So the
// reduction runs in phases, a launch each: all but the last stop after some columns and write what is left of the matrix,
// whose own reduction is the next phase, with an exchange of its own. A block that has a row left then stays to the end.
#pragma once
#include "matrix_warps.cuh"
#include "vector_warps.cuh"

namespace lmn {
namespace {

// shape.blocks blocks for each of shape.groups matrices at a time: kMatrixWarps warps hold rows, the others make vectors.
template <class L>
__global__ void __launch_bounds__(L::kThreads, 1) tridiagonal_kernel(Matrices matrices, Shape shape, Work work) {
  double* const memory = reinterpret_cast<double*>(dynamic_shared());
  const int group = int(blockIdx.x) / shape.blocks, block = int(blockIdx.x) % shape.blocks;
  // Of all steps those in which a row of this block is left: as many as its last row's number.
  const int last_row = (shape.samples - 1 - block) / shape.blocks * shape.blocks + block;
  const bool has_last_row = last_row == shape.samples - 1, stays = last_row >= shape.steps;
  const int last = stays ? shape.steps : last_row;
  for (int matrix = group; matrix < shape.batch; matrix += shape.groups) {
    const double largest = of_bits(work.largest[matrix]);
    if (!isfinite(largest)) continue;
    const Scale scale(shape.samples == shape.whole ? largest : 0.0, 1);  // what a phase leaves is scaled already
    if (threadIdx.x < kMatrixThreads) {
      hold_matrix<L>(matrices.one(matrix), matrix, scale, shape, work, last, stays, memory);
    } else {
      make_vectors<L>(matrices.one(matrix), matrix, scale, shape, work, last, stays, has_last_row, memory);
    }
  }
}

}  // namespace
}  // namespace lmn
