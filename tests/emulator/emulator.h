// A test instrument: it runs a GPU's threads on the CPU. A build with LMNFAST_CUDA=emulated compiles the sources of csrc/cuda
// with the host's compiler against the functions here, and the tests then hold the CUDA kernels to the same reference as the
// CPU's. No build for users contains it.
//
// The emulator keeps this of the programming model: a block's threads interleave only at barriers and warp collectives. They
// are resumed there in a shuffled order, so that a missing barrier gives another result. Dynamic shared memory holds NaNs
// when a block begins, and ends at the byte it was asked for. Threads that wait for one another for ever end the process with
// a message. It does not keep: timing; memory outside shared memory (all see a store at once, and in order); instructions that
// csrc/cuda does not use.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

/// Operating-system threads that share a grid's blocks, for launches from the calling thread.
void set_threads(int threads);

void run_blocks(int columns, int rows, int threads, std::size_t shared, void (*body)(const void*), const void* kernel);

/// kernel() by every thread of every block of `rows` (blockIdx.y) of `columns` (blockIdx.x); an impossible launch is left for
/// cudaGetLastError.
template <class F>
void run_grid(int columns, int rows, int threads, std::size_t shared, const F& kernel) {
  run_blocks(columns, rows, threads, shared, [](const void* f) { (*static_cast<const F*>(f))(); }, &kernel);
}

unsigned char* dynamic_shared();

// ---- cooperative grids: every block is there at once, and they may wait for one another ----

void run_cooperative_blocks(int blocks, int threads, std::size_t shared, void (*body)(const void*), const void* kernel);

/// kernel() by every thread of every block, all on the calling operating-system thread. Blocks take turns in a shuffled
/// order, one of them rarely, so that it lags behind the others; blocks that wait for one another for ever end the process
/// with a message. A `__shared__` variable would be the same for all blocks: such a kernel has dynamic shared memory alone.
template <class F>
void run_cooperative_grid(int blocks, int threads, std::size_t shared, const F& kernel) {
  run_cooperative_blocks(blocks, threads, shared, [](const void* f) { (*static_cast<const F*>(f))(); }, &kernel);
}

/// For a loop that waits for another block's store, between two loads: the other blocks get their turns.
void give_way();

/// bar.sync (wait) and bar.arrive on one of the block's 16 numbered barriers, for `threads` of its threads.
void named_barrier(int number, int threads, bool wait);

// ---- barriers and warp collectives ----

enum class Barrier { kPlain, kOr };
int block_barrier(Barrier kind, int predicate);
void warp_barrier(unsigned mask);
unsigned ballot(unsigned mask, bool predicate);
/// The value of the lane whose number differs in the bits of `lanes`, among `width` neighbouring lanes.
std::uint64_t shuffle_xor(unsigned mask, std::uint64_t value, int lanes, int width);

// ---- copies past the registers ----

/// Lands at once or only when it is waited for, by chance: both are possible.
void copy_async16(void* to, const void* from);
void copy_async_wait();

// ---- instructions whose results are not those of C++ ----

/// 1 / v, for every second v the float on the other side of the quotient: less than an ulp off, as rcp.approx may be.
/// Powers of two are exact, and what is no normal number is zero.
float reciprocal(float v);

/// 2^v, for every second v two ulp off, as ex2.approx may be; exact at 0, and what is no normal number is zero.
float exp2_fast(float v);

/// Matrix units align the addends to the largest and drop what lies below. How many bits they keep is not documented: here one
/// more than a float's, and products are added in steps of four. Of depth 16 with four registers of a, of depth 8 with two.
void mma_m16n8_f16(float (&c)[4], const std::uint32_t* a, int registers, std::uint32_t b0, std::uint32_t b1);

std::uint32_t to_halves(float low, float high);  // nearest, ties to even

/// In float64 the products are added one after the other, each with one rounding.
void mma_m16n8k8_f64(double (&c)[4], double a0, double a1, double a2, double a3, double b0, double b1);

/// 1 / v to 20 bits, as rcp.approx.ftz.f64 has it; what is no normal number is zero.
double reciprocal_f64(double v);

}  // namespace emulator
