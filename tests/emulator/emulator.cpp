// The emulator's entries: grids of blocks, what a kernel calls, and the CUDA runtime's host functions. Threads of a block are
// fibers of one operating-system thread (machine.h). Blocks of a grid are divided among OpenMP's threads; blocks of a
// cooperative grid take turns on one thread. It is compiled into emulated builds and by tests/test_emulator.py.
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks, but fibers are switched in this way
#include "emulator.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda_runtime.h"
#include "instructions.h"
#include "machine.h"

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace emulator {
namespace {

thread_local int t_threads = 1;
thread_local cudaError_t t_error = cudaSuccess;

}  // namespace

void set_threads(int threads) { t_threads = threads; }

void run_blocks(int columns, int rows, int threads, std::size_t shared, void (*body)(const void*), const void* kernel) {
  int limit = 0;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  const int blocks = columns * rows;
  if (threads < 1 || threads > kMaxThreads || shared > std::size_t(limit)) {
    t_error = cudaErrorInvalidConfiguration;
    return;
  }
  // If this variable is set, only so many blocks at the end of each grid run. Tests of more than 2^31 values use it: the other
  // blocks' memory is then hardly touched.
  const char* const last = std::getenv("LMNFAST_EMULATED_LAST_BLOCKS");
  const int begin = last ? std::max(0, blocks - std::atoi(last)) : 0;
  const auto run_block = [&](int block) {
    t_machine.begin(block, columns, rows, threads, shared, body, kernel);
    t_machine.run(false);
    t_machine.end();
  };
  if (blocks == 1 || t_threads == 1) {
    for (int n = blocks; n-- > begin;) run_block(n);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(std::min(t_threads, blocks))
  for (int n = begin; n < blocks; ++n) run_block(n);
}

void run_cooperative_blocks(int blocks, int threads, std::size_t shared, void (*body)(const void*), const void* kernel) {
  int limit = 0, multiprocessors = 0;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  if (threads < 1 || threads > kMaxThreads || shared > std::size_t(limit)) {
    t_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (blocks > multiprocessors) {  // each multiprocessor runs one block, see cudaOccupancyMaxActiveBlocksPerMultiprocessor
    t_error = cudaErrorCooperativeLaunchTooLarge;
    return;
  }
  constexpr int kMostGuarded = 16384;  // a thread's stack takes two of the 65 530 mappings that Linux allows a process
  std::vector<std::unique_ptr<Machine>> machines;
  for (int n = 0; n < blocks; ++n) {
    machines.push_back(std::make_unique<Machine>(threads, blocks * threads <= kMostGuarded));
    machines.back()->begin(n, blocks, 1, threads, shared, body, kernel);
  }
  // One block lags: it gets a turn only now and then. After a while another block lags. A block that only waits gets no turn
  // until another block has progressed, and then looks again now and then. If all blocks have waited for kRounds rounds,
  // nothing is left to happen.
  constexpr unsigned kLag = 16, kWhile = 512, kLook = 8;
  constexpr int kRounds = 64;
  Order order{0x9e3779b97f4a7c15u ^ unsigned(blocks)};
  std::vector<std::int64_t> waits_since(machines.size(), -1);  // the moment since which a block waits; -1: it does not wait
  std::int64_t moment = 0;
  std::size_t lagging = 0, waiting = 0;  // the block that lags; the number of blocks that wait at this moment
  int rounds = 0;
  while (!machines.empty()) {
    if (order.next() % kWhile == 0) lagging = order.next() % machines.size();
    const std::size_t turn = order.next() % machines.size();
    if (waits_since[turn] == moment) continue;
    const bool all_wait = waiting + 1 == machines.size();
    if (!all_wait && ((turn == lagging && order.next() % kLag) || (waits_since[turn] >= 0 && order.next() % kLook))) continue;
    Machine& machine = *machines[turn];
    const bool done = machine.run(true);
    if (done || machine.progressed()) {
      waits_since[turn] = -1;
      ++moment;
      waiting = 0;
      rounds = 0;
    } else {
      waits_since[turn] = moment;
      if (++waiting == machines.size()) {
        ++moment;
        waiting = 0;
        if (++rounds == kRounds) {
          for (auto& each : machines) each->print_waits();
          machine.fail("the blocks that are left wait for one another for ever");
        }
      }
    }
    if (done) {
      machine.end();
      machines.erase(machines.begin() + std::ptrdiff_t(turn));
      waits_since.erase(waits_since.begin() + std::ptrdiff_t(turn));
    }
  }
}

void give_way() { t_current->wait(Wait::kStore, 0); }

void named_barrier(int number, int threads, bool wait) { t_current->named_barrier(number, threads, wait); }

unsigned char* dynamic_shared() { return t_current->shared(); }

int block_barrier(Barrier kind, int predicate) {
  Fiber& fiber = t_current->current();
  fiber.barrier = kind;
  fiber.value = predicate != 0;
  return int(t_current->wait(Wait::kBlock, 0));
}

void copy_async16(void* to, const void* from) { t_current->copy(to, from); }

void copy_async_wait() {
  auto& copies = t_current->current().copies;
  for (const auto& copy : copies) std::memcpy(copy.first, copy.second, 16);
  copies.clear();
}

void warp_barrier(unsigned mask) { t_current->wait(Wait::kBarrier, mask); }

unsigned ballot(unsigned mask, bool predicate) {
  t_current->current().value = predicate;
  return unsigned(t_current->wait(Wait::kBallot, mask));
}

std::uint64_t shuffle_xor(unsigned mask, std::uint64_t value, int lanes, int width) {
  const int lane = t_current->lane(), end = lane / width * width + width;
  int source = lane ^ lanes;
  if (source < 0 || source >= end) source = lane;  // an earlier group may be read, a later group may not
  t_current->current().source = source;
  t_current->current().value = value;
  return t_current->wait(Wait::kShuffle, mask);
}

void mma_m16n8_f16(float (&c)[4], const std::uint32_t* a, int registers, std::uint32_t b0, std::uint32_t b1) {
  t_current->current().fragments = {c, a, b0, b1, registers};
  t_current->wait(Wait::kMultiplyHalves, 0xffffffffu);
}

std::uint32_t to_halves(float low, float high) { return to_half(low) | to_half(high) << 16; }
void mma_m16n8k8_f64(double (&c)[4], double a0, double a1, double a2, double a3, double b0, double b1) {
  t_current->current().fragments64 = {c, {a0, a1, a2, a3}, {b0, b1}};
  t_current->wait(Wait::kMultiply64, 0xffffffffu);
}

double reciprocal_f64(double v) {
  const auto flushed = [](double x) { return std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x; };
  const double exact = flushed(1 / flushed(v));
  std::uint64_t bits;
  std::memcpy(&bits, &exact, sizeof(bits));
  bits &= ~std::uint64_t(0xffffffff);
  double cut;
  std::memcpy(&cut, &bits, sizeof(cut));
  return cut;
}

float reciprocal(float v) {
  v = flush(v);
  const double exact = 1.0 / v;
  float nearest = float(exact);
  if (odd(v) && double(nearest) != exact && std::isfinite(nearest)) {
    nearest = std::nextafter(nearest, exact > nearest ? HUGE_VALF : -HUGE_VALF);
  }
  return flush(nearest);
}

float exp2_fast(float v) {
  v = flush(v);
  float nearest = std::exp2(v);
  if (odd(v) && v != 0 && std::isfinite(nearest)) {
    const float side = as_bits(v) & 1 ? HUGE_VALF : 0.0f;
    nearest = std::nextafter(std::nextafter(nearest, side), side);
  }
  return flush(nearest);
}

}  // namespace emulator

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::t_error;
  emulator::t_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unknown error";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int kReserved = 1024;  // bytes of each block that the driver reserves
  // The values of an H100, or of a smaller card if a test asks for it.
  const char* const shared = std::getenv("LMNFAST_EMULATED_SHARED");
  const int optin = shared ? std::atoi(shared) : 227 * 1024;
  // few, because the tests' grids are small
  const char* const multiprocessors = std::getenv("LMNFAST_EMULATED_MULTIPROCESSORS");
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = optin;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = optin + kReserved;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = kReserved;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors ? std::atoi(multiprocessors) : 3;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  int limit = 0;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  return value <= limit ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(void* memory, std::size_t pitch, int value, std::size_t width, std::size_t height, cudaStream_t) {
  if (width > pitch) return cudaErrorInvalidValue;
  for (std::size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(memory) + row * pitch, value, width);
  return cudaSuccess;
}
