// Single instructions for symmetric_eigenvalues: the bits of a double, barriers between some threads of a block, tagged words
// that blocks exchange through global memory, and a sum over a warp. The emulator has its own form of each. Nothing here knows
// about matrices.
#pragma once
#include <cstring>

#include "../device.h"

namespace lmn {
namespace {

__device__ inline std::uint64_t bits_of(double v) {
  std::uint64_t bits;
  memcpy(&bits, &v, sizeof(v));
  return bits;
}
__device__ inline double of_bits(std::uint64_t bits) {
  double v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

// Hides from the compiler that v keeps its value. Without this the compiler computes everything that follows from v (the
// offsets of all entries) ahead of a loop, and spills the results.
__device__ inline void forget([[maybe_unused]] int& v) {
#if !defined(LMN_EMULATED)
  asm volatile("" : "+r"(v));
#endif
}

// The barriers at which only some threads of a block meet. Barrier 0 is the one of __syncthreads.
enum Meeting : int { kColumnReady = 1, kSumsReady, kVectorWarpsMeet, kMatrixRead };
__device__ inline void meet(Meeting number, int threads) {
#if defined(LMN_EMULATED)
  emulator::named_barrier(number, threads, true);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(int(number)), "r"(threads) : "memory");
#endif
}
__device__ inline void arrive(Meeting number, int threads) {
#if defined(LMN_EMULATED)
  emulator::named_barrier(number, threads, false);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(int(number)), "r"(threads) : "memory");
#endif
}

// A value that travels to the other blocks carries the tag of its step in the two lowest bits of its mantissa.
__device__ inline int tag_of(double v) { return int(bits_of(v) & 3); }
__device__ inline void post(double* to, double v, int tag) {
  const std::uint64_t bits = (bits_of(v) & ~std::uint64_t(3)) | std::uint64_t(tag);
#if defined(LMN_EMULATED)
  __atomic_store_n(reinterpret_cast<std::uint64_t*>(to), bits, __ATOMIC_RELAXED);
#else
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits) : "memory");
#endif
}
__device__ inline double2 look(const double* from) {
  double2 v;
#if defined(LMN_EMULATED)
  const auto* bits = reinterpret_cast<const std::uint64_t*>(from);
  v = make_double2(of_bits(__atomic_load_n(bits, __ATOMIC_RELAXED)), of_bits(__atomic_load_n(bits + 1, __ATOMIC_RELAXED)));
#else
  asm volatile("ld.relaxed.gpu.global.v2.f64 {%0, %1}, [%2];" : "=d"(v.x), "=d"(v.y) : "l"(from) : "memory");
#endif
  return v;
}

// Sum over the warp; every lane gets the same bits. Two products with ones on the FP64 matrix unit take 60 clocks; five
// shuffles of two words and five additions would take 160.
__device__ inline double whole_warp_sum(double v) {
#if defined(LMN_EMULATED)
  return warp_sum(v);
#else
  double even, odd, sum;
  [[maybe_unused]] double same;
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%4, %4};"
               : "=d"(even), "=d"(odd)
               : "d"(1.0), "d"(v), "d"(0.0));
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%4, %4};"
               : "=d"(sum), "=d"(same)
               : "d"(even + odd), "d"(1.0), "d"(0.0));
  return sum;
#endif
}

__device__ inline unsigned append_sign(unsigned signs, double v) {
#if defined(LMN_EMULATED)
  return signs << 1 | unsigned(bits_of(v) >> 63);
#else
  return __funnelshift_l(unsigned(__double2hiint(v)), signs, 1);
#endif
}

}  // namespace
}  // namespace lmn
