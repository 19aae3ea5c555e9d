// What the CUDA kernels share: launches, the mathematics that activation.h needs, single instructions, the nodes, sums. Every
// file of this folder includes it.
#pragma once
#include <cuda_runtime.h>  // from the CUDA toolkit, or in an emulated build from tests/emulator

#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <type_traits>

#include "../common.h"

namespace lmn {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- launching; functions return null, or what went wrong ----

inline const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

/// Allows a kernel its dynamic shared memory. More than 48 KB, static and dynamic together, have to be allowed. This is done
/// once for each kernel and device, because the call takes a microsecond.
inline cudaError_t ask_for_shared(const void* kernel, int bytes) {
  constexpr int kSlots = 256;  // kernels of one source times devices; if all slots are taken, every launch makes the call
  struct Granted {
    const void* kernel;
    int device, bytes;
  };
  static Granted granted[kSlots];
  static std::mutex alone;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(alone);
  int slot = 0;
  while (slot < kSlots && granted[slot].kernel && (granted[slot].kernel != kernel || granted[slot].device != device)) ++slot;
  if (slot < kSlots && granted[slot].kernel && granted[slot].bytes >= bytes) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && slot < kSlots) granted[slot] = {kernel, device, bytes};
  return error;
}

/// The blocks of one network, and the networks. A block finds its own as blockIdx.x and blockIdx.y.
struct Grid {
  std::int64_t blocks, networks;
  Grid(std::int64_t blocks_, std::int64_t networks_ = 1) : blocks(blocks_), networks(networks_) {}
};
constexpr std::int64_t kMostNetworks = 65535;  // most networks in a grid

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), Grid grid, int threads, std::size_t shared,
                   [[maybe_unused]] CUstream_st* stream, const Arguments&... arguments) {
  if (grid.blocks == 0) return nullptr;
  if (grid.blocks > 0x7fffffff || grid.networks > kMostNetworks) return "more blocks than a grid can have";
  if (shared > 0) {
    const cudaError_t error = ask_for_shared(reinterpret_cast<const void*>(kernel), int(shared));
    if (error != cudaSuccess) {
      cudaGetLastError();  // otherwise the next launch would report this error again
      return message(error);
    }
  }
#if defined(LMN_EMULATED)
  emulator::run_grid(int(grid.blocks), int(grid.networks), threads, shared, [&] { kernel(arguments...); });
#else
  kernel<<<dim3(unsigned(grid.blocks), unsigned(grid.networks)), unsigned(threads), shared, stream>>>(arguments...);
#endif
  return message(cudaGetLastError());
}

/// The block's dynamic shared memory, aligned to 16 bytes.
__device__ inline unsigned char* dynamic_shared() {
#if defined(LMN_EMULATED)
  return emulator::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#endif
}

/// An attribute of the current device. The driver is asked once for each device and attribute.
inline int device_attribute(cudaDeviceAttr attribute) {
  constexpr int kDevices = 16, kAttributes = 160;
  static std::atomic<int> known[kDevices][kAttributes];  // the value plus 1; 0: not known yet
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
#if defined(LMN_EMULATED)
  const bool kept = false;  // tests change the device
#else
  const bool kept = device < kDevices && int(attribute) < kAttributes;
#endif
  if (kept && (value = known[device][int(attribute)].load(std::memory_order_relaxed)) > 0) return value - 1;
  if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  if (kept) known[device][int(attribute)].store(value + 1, std::memory_order_relaxed);
  return value;
}

// ---- single instructions ----

/// *to = the larger of both, none of them negative: the bits of such numbers have the numbers' order.
template <class T>
__device__ inline void atomic_larger(T* to, T value) {
  using Bits = std::conditional_t<sizeof(T) == 4, int, long long>;
  Bits bits;
  memcpy(&bits, &value, sizeof(bits));
  atomicMax(reinterpret_cast<Bits*>(to), bits);
}

/// 1 / v to about an ulp; 0 if the reciprocal is not a normal number.
__device__ inline float reciprocal(float v) {
#if defined(LMN_EMULATED)
  return emulator::reciprocal(v);
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#endif
}
__device__ inline double reciprocal(double v) { return 1.0 / v; }

/// 2^v to 2 ulp, if the result is normal.
__device__ inline float exp2_fast(float v) {
#if defined(LMN_EMULATED)
  return emulator::exp2_fast(v);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#endif
}

/// Two floats as halves, rounded to nearest; `low` is in the lower 16 bits. A number beyond 65504 becomes infinite.
__device__ inline std::uint32_t to_halves(float low, float high) {
#if defined(LMN_EMULATED)
  return emulator::to_halves(low, high);
#else
  std::uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#endif
}

/// c += a b for a warp's 16 x 8 tile of c, a 16 x 16, b 16 x 8, in halves; sums are in float. With g = lane / 4 and
/// q = lane % 4, each register holds two halves side by side: a = (g, 2 q), (g + 8, 2 q), (g, 2 q + 8), (g + 8, 2 q + 8);
/// b = (2 q, g), (2 q + 8, g); c = (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1). Source: PTX ISA, mma.m16n8k16.
__device__ inline void multiply_add_halves(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
#if defined(LMN_EMULATED)
  emulator::mma_m16n8_f16(c, a, 4, b0, b1);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
/// The same for a 16 x 8, b 8 x 8: a = (g, 2 q), (g + 8, 2 q); b = (2 q, g).
__device__ inline void multiply_add_halves(float (&c)[4], const std::uint32_t (&a)[2], std::uint32_t b0) {
#if defined(LMN_EMULATED)
  emulator::mma_m16n8_f16(c, a, 2, b0, 0);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b0));
#endif
}

/// Starts a copy of 16 bytes from global memory to the block's shared memory, past the registers. Both addresses are multiples
/// of 16 bytes.
__device__ inline void copy_async16(void* to, const void* from) {
#if defined(LMN_EMULATED)
  emulator::copy_async16(to, from);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from) : "memory");
#endif
}

/// Waits for this thread's copies. Other threads see the copied bytes after the block's next barrier.
__device__ inline void copy_async_wait() {
#if defined(LMN_EMULATED)
  emulator::copy_async_wait();
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- functions that activation.h uses ----

template <class V>
__device__ inline V splat(V value) {
  return value;
}
__device__ inline float absolute(float v) { return ::fabsf(v); }
__device__ inline double absolute(double v) { return ::fabs(v); }
__device__ inline float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
__device__ inline double fma(double a, double b, double c) { return ::fma(a, b, c); }
__device__ inline float exp(float v) { return ::expf(v); }
__device__ inline double exp(double v) { return ::exp(v); }
__device__ inline float expm1(float v) { return ::expm1f(v); }
__device__ inline double expm1(double v) { return ::expm1(v); }
__device__ inline float log1p_unit(float u) { return ::log1pf(u); }
__device__ inline double log1p_unit(double u) { return ::log1p(u); }
__device__ inline float erf(float v) { return ::erff(v); }
__device__ inline double erf(double v) { return ::erf(v); }
__device__ inline float sin(float v) { return ::sinf(v); }
__device__ inline double sin(double v) { return ::sin(v); }
__device__ inline float cos(float v) { return ::cosf(v); }
__device__ inline double cos(double v) { return ::cos(v); }
__device__ inline float tanh(float v) { return ::tanhf(v); }
__device__ inline double tanh(double v) { return ::tanh(v); }

// ---- the nodes ----

/// Interior nodes in global memory.
template <class T>
struct DeviceNodes {
  T *t, *w, *w_t;  // [interior] nodes, weights, weights times t - mean t
  std::int32_t interior;
  T variance_t;
};

/// The nodes of one launch. As parameters they are copied with the launch, also into a CUDA graph.
struct NodeBatch {
  static constexpr int kSize = 64;
  double t[kSize], weights[kSize];
};

template <class T>
__global__ void store_nodes_kernel(NodeBatch batch, DeviceNodes<T> to, double mean_t, int begin) {
  const int m = begin + int(threadIdx.x);
  if (m >= to.interior) return;
  to.t[m] = T(batch.t[threadIdx.x]);
  to.w[m] = T(batch.weights[threadIdx.x]);
  to.w_t[m] = T(batch.weights[threadIdx.x] * (batch.t[threadIdx.x] - mean_t));
}

/// Writes the nodes to `memory`, which has room for 3 * interior values of T.
template <class T>
const char* store_nodes(const PathNodes& nodes, T* memory, DeviceNodes<T>& to, CUstream_st* stream) {
  to = {memory, memory + nodes.interior, memory + 2 * std::int64_t(nodes.interior), nodes.interior, T(nodes.variance_t)};
  for (int begin = 0; begin < nodes.interior; begin += NodeBatch::kSize) {
    NodeBatch batch{};
    for (int m = 0; m < NodeBatch::kSize && begin + m < nodes.interior; ++m) {
      batch.t[m] = nodes.t[begin + m];
      batch.weights[m] = nodes.weights[begin + m];
    }
    const char* error = launch(store_nodes_kernel<T>, 1, NodeBatch::kSize, 0, stream, batch, to, nodes.mean_t, begin);
    if (error) return error;
  }
  return nullptr;
}

// ---- sums ----

/// Adds to one of an op's counts.
__device__ inline void count(std::int64_t* to, double number) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(number));
}

/// Sum over groups of `width` neighbouring lanes; `width` is a power of two. Every lane of a group gets the sum.
template <class T>
__device__ inline T warp_sum(T value, int width = kWarp) {
  for (int offset = width / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

}  // namespace
}  // namespace lmn
