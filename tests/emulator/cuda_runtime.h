// An emulated build finds this file in place of the CUDA toolkit's header of the same name. This file declares only the part of
// that header that csrc/cuda uses. If a source begins to use something else, an emulated build fails to compile until the
// declaration is added here.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include <cmath>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __noinline__ __attribute__((noinline))
#define __shared__ static thread_local  // all threads of a block are on one operating-system thread
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__

// ---- types ----

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};

#define EMULATOR_VECTOR2(name, T, bytes) \
  struct __align__(bytes) name {         \
    T x, y;                              \
  };                                     \
  inline name make_##name(T x, T y) { return {x, y}; }
#define EMULATOR_VECTOR4(name, T) \
  struct __align__(16) name {     \
    T x, y, z, w;                 \
  };                              \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTOR2(float2, float, 8)
EMULATOR_VECTOR2(double2, double, 16)
EMULATOR_VECTOR2(int2, int, 8)
EMULATOR_VECTOR2(uint2, unsigned, 8)
EMULATOR_VECTOR4(float4, float)
EMULATOR_VECTOR4(uint4, unsigned)
#undef EMULATOR_VECTOR2
#undef EMULATOR_VECTOR4

#define EMULATOR_INDEX extern __thread
EMULATOR_INDEX uint3 threadIdx, blockIdx;
EMULATOR_INDEX dim3 blockDim, gridDim;
#undef EMULATOR_INDEX

// ---- host ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrCooperativeLaunch,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
typedef struct CUstream_st* cudaStream_t;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaMemset2DAsync(void* memory, std::size_t pitch, int value, std::size_t width, std::size_t height,
                              cudaStream_t stream);

// ---- device ----

inline void __syncthreads() { emulator::block_barrier(emulator::Barrier::kPlain, 0); }
inline int __syncthreads_or(int v) { return emulator::block_barrier(emulator::Barrier::kOr, v); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_barrier(mask); }
inline unsigned __ballot_sync(unsigned mask, int v) { return emulator::ballot(mask, v != 0); }
inline int __any_sync(unsigned mask, int v) { return emulator::ballot(mask, v != 0) != 0; }
inline int __all_sync(unsigned mask, int v) { return emulator::ballot(mask, v != 0) == mask; }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulator::shuffle_xor(mask, bits, lanes, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// These operations are atomic, because the blocks of a grid run on several operating-system threads.
template <class T>
T atomicAdd(T* to, T value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* to, T value) {
  return __atomic_fetch_or(to, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* to, T value) {
  T before = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (before < value && !__atomic_compare_exchange_n(to, &before, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline long long __double_as_longlong(double v) {
  long long bits;
  std::memcpy(&bits, &v, sizeof(v));
  return bits;
}
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof(v));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
