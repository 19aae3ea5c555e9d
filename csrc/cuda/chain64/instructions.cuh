// Single instructions of the float64 kernels: the FP64 matrix instruction and a fast reciprocal. The emulator has its own form
// of each.
#pragma once
#include "../chain.cuh"

namespace lmn {
namespace {
namespace float64 {

/// c += a b for a warp's 16 x 8 tile of c, a 16 x 8, b 8 x 8. With g = lane / 4 and q = lane % 4: a0..a3 = (g, q), (g + 8, q),
/// (g, q + 4), (g + 8, q + 4); b0, b1 = (q, g), (q + 4, g); c = (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1). Source:
/// PTX ISA, mma.m16n8k8 and mma.m8n8k4 with .f64. On an H200 the larger instruction is 1.5 times as fast.
__device__ inline void multiply_add64(double (&c)[4], double a0, double a1, double a2, double a3, double b0, double b1) {
#if defined(LMN_EMULATED)
  emulator::mma_m16n8k8_f64(c, a0, a1, a2, a3, b0, b1);
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a0), "d"(a1), "d"(a2), "d"(a3), "d"(b0), "d"(b1));
#else
  const auto small = [](double& c0, double& c1, double a, double b) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(c0), "+d"(c1)
                 : "d"(a), "d"(b));
  };
  small(c[0], c[1], a0, b0);
  small(c[2], c[3], a1, b0);
  small(c[0], c[1], a2, b1);
  small(c[2], c[3], a3, b1);
#endif
}

/// 1 / v to about an ulp, for a normal v whose reciprocal is normal: an approximation of 20 bits and a cubic step.
__device__ inline double reciprocal_fast(double v) {
#if defined(LMN_EMULATED)
  const double x = emulator::reciprocal_f64(v);
#else
  double x;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(x) : "d"(v));
#endif
  const double e = fma(-v, x, 1.0);
  return fma(x, fma(e, e, e), x);
}

LMN_FN int ceiling(int count, int size) { return (count + size - 1) / size; }

}  // namespace float64
}  // namespace
}  // namespace lmn
