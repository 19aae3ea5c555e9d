// A test instrument: it runs a GPU's threads on the CPU. A build with LMNFAST_CUDA=emulated compiles the sources of csrc/cuda
// with the host's compiler against the functions here. The tests then hold the CUDA kernels to the same reference as the CPU
// kernels. No build for users contains the emulator.
//
// The emulator reproduces this part of the programming model. A block's threads interleave only at barriers and warp
// collectives. They are resumed there in a shuffled order, so a missing barrier gives another result. Dynamic shared memory
// holds NaNs when a block begins, and has exactly the size that the launch asks for. If threads wait for one another for ever,
// the process ends with a message.
//
// The emulator does not reproduce timing, the weak order of memory outside shared memory (here all threads see a store at once,
// and all stores in order), or instructions that csrc/cuda does not use.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

/// Sets how many operating-system threads share the blocks of a grid that the calling thread launches.
void set_threads(int threads);

void run_blocks(int columns, int rows, int threads, std::size_t shared, void (*body)(const void*), const void* kernel);

/// Calls kernel() in every thread of every block. The grid has `columns` blocks in x (blockIdx.x) and `rows` in y (blockIdx.y).
/// If the launch is impossible, cudaGetLastError returns the error.
template <class F>
void run_grid(int columns, int rows, int threads, std::size_t shared, const F& kernel) {
  run_blocks(columns, rows, threads, shared, [](const void* f) { (*static_cast<const F*>(f))(); }, &kernel);
}

unsigned char* dynamic_shared();

// ---- cooperative grids: all blocks are resident together, and blocks may wait for one another ----

void run_cooperative_blocks(int blocks, int threads, std::size_t shared, void (*body)(const void*), const void* kernel);

/// Calls kernel() in every thread of every block, all on the calling operating-system thread. Blocks take turns in a shuffled
/// order. One block gets a turn only rarely, so that it lags behind the others. If blocks wait for one another for ever, the
/// process ends with a message. The kernel may use dynamic shared memory only, because a `__shared__` variable would be common
/// to all blocks.
template <class F>
void run_cooperative_grid(int blocks, int threads, std::size_t shared, const F& kernel) {
  run_cooperative_blocks(blocks, threads, shared, [](const void* f) { (*static_cast<const F*>(f))(); }, &kernel);
}

/// Gives the other blocks their turns. A loop that waits for another block's store calls this between two loads.
void give_way();

/// bar.sync (`wait` is set) or bar.arrive (it is not) on one of the block's 16 numbered barriers. The barrier expects `threads`
/// threads.
void named_barrier(int number, int threads, bool wait);

// ---- barriers and warp collectives ----

enum class Barrier { kPlain, kOr };
int block_barrier(Barrier kind, int predicate);
void warp_barrier(unsigned mask);
unsigned ballot(unsigned mask, bool predicate);
/// Returns the value of the lane whose number differs from the caller's in the bits of `lanes`. Groups of `width` neighbouring
/// lanes exchange values.
std::uint64_t shuffle_xor(unsigned mask, std::uint64_t value, int lanes, int width);

// ---- copies that bypass the registers ----

/// Copies 16 bytes either at once or only when the thread waits for its copies. Chance decides, because a GPU may do either.
void copy_async16(void* to, const void* from);
void copy_async_wait();

// ---- instructions whose results are not those of C++ ----

/// 1 / v. For every second v the result is the float on the other side of the exact quotient, less than an ulp from it, because
/// rcp.approx may return this float. Powers of two give exact results. Arguments and results below the normal numbers become
/// zero.
float reciprocal(float v);

/// 2^v. For every second v the result is two ulp off, because ex2.approx may be so far off. The result is exact at 0. Arguments
/// and results below the normal numbers become zero.
float exp2_fast(float v);

/// c += a b on halves. The depth is 16 if `a` has four registers, and 8 if it has two. Matrix units align the addends to the
/// largest one and drop the bits below. The number of bits that they keep is not documented. Here it is one more than a float
/// has, and products are added in steps of four.
void mma_m16n8_f16(float (&c)[4], const std::uint32_t* a, int registers, std::uint32_t b0, std::uint32_t b1);

std::uint32_t to_halves(float low, float high);  // rounds to nearest, ties to even

/// c += a b in float64. The products are added one after the other, with one rounding for each.
void mma_m16n8k8_f64(double (&c)[4], double a0, double a1, double a2, double a3, double b0, double b1);

/// 1 / v to 20 bits, like rcp.approx.ftz.f64. Arguments and results below the normal numbers become zero.
double reciprocal_f64(double v);

}  // namespace emulator
