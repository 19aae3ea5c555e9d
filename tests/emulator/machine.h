// One emulated block: its threads as fibers of one operating-system thread, the scheduler that resumes them, barriers, warp
// collectives, and the block's dynamic shared memory. emulator.cpp alone includes this file, and runs a Machine for each block.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "cuda_runtime.h"

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr std::size_t kStack = 256 * 1024;  // pages that are not touched cost nothing
constexpr std::size_t kGuard = 1024;        // bytes of NaN before and after the dynamic shared memory

enum class Wait { kNothing, kBlock, kBarrier, kBallot, kShuffle, kMultiplyHalves, kMultiply64, kNamed, kStore };
const char* const kWaitNames[] = {"nothing",        "__syncthreads", "__syncwarp",
                                  "vote",           "shuffle",       "mma of halves",
                                  "mma in float64", "bar.sync",      "store of another block"};

struct Fragments {
  float* c;
  const std::uint32_t* a;
  std::uint32_t b0, b1;
  int registers;  // registers of a
};

struct Fragments64 {
  double* c;
  double a[4], b[2];
};

struct Fiber {
  jmp_buf context;
  ucontext_t start;
  bool started = false;
  // what the fiber waits for; afterwards the result
  Wait wait;
  unsigned mask;
  Barrier barrier;
  int source;  // lane to read from; at a numbered barrier, the barrier's number
  std::uint64_t value;
  Fragments fragments;
  Fragments64 fragments64;
  std::vector<std::pair<void*, const void*>> copies;  // copies under way, 16 bytes each
};

struct Warp {
  unsigned ready, at_collective, at_barrier, exited, at_named, at_store;  // sets of lanes
};

struct NamedBarrier {
  int arrived, expected;  // numbers of threads
};
constexpr int kNamedBarriers = 16;

// xorshift64. It gives the order in which fibers are resumed.
struct Order {
  std::uint64_t state;
  unsigned next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return unsigned(state >> 32);
  }
};

__attribute__((noinline)) void switch_context(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

void multiply_add_halves(const Fragments* const* lanes);
void multiply_add64(const Fragments64* const* lanes);

class Machine {
 public:
  explicit Machine(int most_threads = kMaxThreads, bool guarded = true) : most_threads_(most_threads), guarded_(guarded) {}
  ~Machine() {
    if (!stacks_) return;
#if defined(__SANITIZE_ADDRESS__)
    // The checker still marks these stacks' frames. Without this call the marks would apply to the next owner of the memory.
    __asan_unpoison_memory_region(stacks_, stack_bytes_);
#endif
    munmap(stacks_, stack_bytes_);
  }

  void begin(int block, int columns, int rows, int threads, std::size_t shared, void (*body)(const void*), const void* kernel);
  // True: all threads have returned. False (only in a cooperative grid): it is another block's turn.
  bool run(bool cooperative);
  void end();
  // Whether in the last run() some thread went further than to its next look for a store.
  bool progressed() const { return progressed_; }

  // Called by a fiber: gives way until the event that it waits for has happened.
  std::uint64_t wait(Wait wait, unsigned mask) {
    Fiber& fiber = fibers_[current_];
    fiber.wait = wait;
    fiber.mask = mask;
    switch_context(fiber.context, scheduler_);
    return fiber.value;
  }
  Fiber& current() { return fibers_[current_]; }
  int lane() const { return current_ % kWarp; }
  unsigned char* shared() { return shared_; }
  void copy(void* to, const void* from);
  void named_barrier(int number, int threads, bool wait);
  [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));
  void print_waits();

 private:
  static void fiber_main();
  void resume(int thread);
  void step(int warp);
  void resolve_collectives(int warp);
  void collective(int warp, unsigned mask);
  bool resolve_block_barrier();
  void make_stacks();

  jmp_buf scheduler_;
  std::unique_ptr<Fiber[]> fibers_;
  void* stacks_ = nullptr;
  std::size_t stack_bytes_ = 0;
  std::vector<unsigned char> memory_;
  unsigned char* shared_ = nullptr;
  Warp warps_[kMaxThreads / kWarp];
  NamedBarrier named_[kNamedBarriers];
  const int most_threads_;
  const bool guarded_;
  bool progressed_ = false;
  std::size_t shared_bytes_ = 0;
  int block_ = 0, columns_ = 0, rows_ = 0, threads_ = 0, current_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* kernel_ = nullptr;
  Order order_;
};

thread_local Machine t_machine;
__thread Machine* t_current;  // &t_machine, without the check whether t_machine is constructed

void Machine::fail(const char* format, ...) {
  std::fprintf(stderr, "CUDA emulator, block %u: ", blockIdx.x);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::abort();
}

void Machine::fiber_main() {
  for (;;) {
    Machine& machine = *t_current;
    machine.body_(machine.kernel_);
    if (!machine.current().copies.empty()) machine.fail("thread %d returns with copies under way", machine.current_);
    machine.wait(Wait::kNothing, 0);
  }
}

void Machine::copy(void* to, const void* from) {
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % 16) {
    fail("thread %d copies 16 bytes from %p to %p, not aligned to them", current_, from, to);
  }
  if (order_.next() & 1) {
    std::memcpy(to, from, 16);
  } else {
    current().copies.emplace_back(to, from);
  }
}

void Machine::resume(int thread) {
  current_ = thread;
  threadIdx.x = unsigned(thread);
  Fiber& fiber = fibers_[thread];
  if (fiber.started) {
    switch_context(scheduler_, fiber.context);
  } else {
    fiber.started = true;
    if (_setjmp(scheduler_) == 0) setcontext(&fiber.start);
  }
}

// Every ready lane runs until it waits or returns.
void Machine::step(int warp) {
  Warp& w = warps_[warp];
  const unsigned ready = w.ready, random = order_.next();
  const unsigned stride = random | 1, offset = random >> 8;  // an odd stride visits all lanes
  w.ready = 0;
  for (unsigned n = 0; n < unsigned(kWarp); ++n) {
    const unsigned lane = (n * stride + offset) % kWarp;
    if (!(ready >> lane & 1)) continue;
    resume(warp * kWarp + int(lane));
    const Wait wait = fibers_[warp * kWarp + int(lane)].wait;
    progressed_ |= wait != Wait::kStore;
    (wait == Wait::kNothing ? w.exited
     : wait == Wait::kBlock ? w.at_barrier
     : wait == Wait::kNamed ? w.at_named
     : wait == Wait::kStore ? w.at_store
                            : w.at_collective) |= 1u << lane;
  }
  resolve_collectives(warp);
}

void Machine::resolve_collectives(int warp) {
  Warp& w = warps_[warp];
  const Fiber* const fibers = &fibers_[warp * kWarp];
  for (unsigned left = w.at_collective; left;) {
    const int lane = __builtin_ctz(left);
    const unsigned mask = fibers[lane].mask;
    left &= ~mask & ~(1u << lane);
    if (!(mask >> lane & 1)) fail("lane %d of warp %d is not in its own mask %08x", lane, warp, mask);
    if (mask & w.exited) {
      fail("%s with mask %08x in warp %d, whose lanes %08x have returned", kWaitNames[int(fibers[lane].wait)], mask, warp,
           w.exited);
    }
    if (mask & ~w.at_collective) continue;
    for (int other = 0; other < kWarp; ++other) {
      if ((mask >> other & 1) && (fibers[other].wait != fibers[lane].wait || fibers[other].mask != mask)) {
        fail("lane %d of warp %d is at a %s with mask %08x, lane %d at a %s with mask %08x", lane, warp,
             kWaitNames[int(fibers[lane].wait)], mask, other, kWaitNames[int(fibers[other].wait)], fibers[other].mask);
      }
    }
    collective(warp, mask);
    w.at_collective &= ~mask;
    w.ready |= mask;
  }
}

void Machine::collective(int warp, unsigned mask) {
  Fiber* const fibers = &fibers_[warp * kWarp];
  const Wait kind = fibers[__builtin_ctz(mask)].wait;
  if (kind == Wait::kBallot) {
    std::uint64_t votes = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) && fibers[lane].value) votes |= 1u << lane;
    }
    for (int lane = 0; lane < kWarp; ++lane) fibers[lane].value = votes;
  } else if (kind == Wait::kShuffle) {
    std::uint64_t values[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) values[lane] = fibers[lane].value;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const int source = fibers[lane].source;
      if (!(mask >> source & 1)) fail("lane %d of warp %d shuffles from lane %d, not in %08x", lane, warp, source, mask);
      fibers[lane].value = values[source];
    }
  } else if (kind == Wait::kMultiplyHalves) {
    const Fragments* lanes[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = &fibers[lane].fragments;
    multiply_add_halves(lanes);
  } else if (kind == Wait::kMultiply64) {
    const Fragments64* lanes[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = &fibers[lane].fragments64;
    multiply_add64(lanes);
  }
}

// False: some threads that have not returned are not at the barrier.
bool Machine::resolve_block_barrier() {
  int first = -1;
  bool any = false;
  for (int thread = 0; thread < threads_; ++thread) {
    const Warp& w = warps_[thread / kWarp];
    const unsigned lane = 1u << thread % kWarp;
    if (w.exited & lane) continue;
    if (!(w.at_barrier & lane)) return false;
    if (first < 0) first = thread;
    if (fibers_[thread].barrier != fibers_[first].barrier) {
      fail("threads %d and %d are at two kinds of __syncthreads", first, thread);
    }
    any |= fibers_[thread].value != 0;
  }
  if (first < 0) return false;
  const bool result = fibers_[first].barrier == Barrier::kOr && any;
  for (int thread = 0; thread < threads_; ++thread) fibers_[thread].value = result;
  for (int warp = 0; warp * kWarp < threads_; ++warp) {
    warps_[warp].ready = warps_[warp].at_barrier;
    warps_[warp].at_barrier = 0;
  }
  return true;
}

void Machine::named_barrier(int number, int threads, bool wait) {
  if (number < 0 || number >= kNamedBarriers || threads < kWarp || threads % kWarp || threads > threads_) {
    fail("thread %d at barrier %d of %d threads", current_, number, threads);
  }
  NamedBarrier& barrier = named_[number];
  if (barrier.arrived > 0 && barrier.expected != threads) {
    fail("thread %d at barrier %d of %d threads, others of %d", current_, number, threads, barrier.expected);
  }
  barrier.expected = threads;
  if (++barrier.arrived < threads) {
    if (!wait) return;
    current().source = number;
    this->wait(Wait::kNamed, 0);
    return;
  }
  barrier.arrived = 0;
  for (int thread = 0; thread < threads_; ++thread) {
    Warp& w = warps_[thread / kWarp];
    const unsigned lane = 1u << thread % kWarp;
    if (!(w.at_named & lane) || fibers_[thread].source != number) continue;
    w.at_named &= ~lane;
    w.ready |= lane;
  }
}

void Machine::make_stacks() {
  stack_bytes_ = most_threads_ * kStack;
  stacks_ = mmap(nullptr, stack_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks_ == MAP_FAILED) fail("no memory for the stacks of %d threads", most_threads_);
  fibers_.reset(new Fiber[most_threads_]);
  const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
  for (int thread = 0; thread < most_threads_; ++thread) {
    char* const stack = static_cast<char*>(stacks_) + thread * kStack;
    if (guarded_) mprotect(stack, page, PROT_NONE);  // a stack that overflows crashes
    ucontext_t& start = fibers_[thread].start;
    getcontext(&start);
    start.uc_stack.ss_sp = stack;
    start.uc_stack.ss_size = kStack;
    makecontext(&start, &Machine::fiber_main, 0);
  }
}

void Machine::begin(int block, int columns, int rows, int threads, std::size_t shared, void (*body)(const void*),
                    const void* kernel) {
  if (!stacks_) make_stacks();
  block_ = block;
  columns_ = columns;
  rows_ = rows;
  threads_ = threads;
  body_ = body;
  kernel_ = kernel;
  order_.state = 0x9e3779b97f4a7c15u * (unsigned(block) + 1u);

  // Aligned to 16 bytes and to no more, because a kernel may rely on no more.
  shared_bytes_ = shared;
  memory_.assign(shared + 2 * kGuard + 32, 0xff);
  shared_ = memory_.data() + kGuard;
  while (reinterpret_cast<std::uintptr_t>(shared_) % 32 != 16) ++shared_;

  for (int warp = 0; warp * kWarp < threads; ++warp) {
    const int lanes = std::min(threads - warp * kWarp, kWarp);
    const unsigned all = lanes == kWarp ? ~0u : (1u << lanes) - 1;
    warps_[warp] = {all, 0, 0, ~all, 0, 0};
  }
  for (NamedBarrier& barrier : named_) barrier = {0, 0};
}

bool Machine::run(bool cooperative) {
  t_current = this;
  blockIdx = {unsigned(block_ % columns_), unsigned(block_ / columns_), 0};
  threadIdx = {0, 0, 0};
  blockDim = {unsigned(threads_), 1, 1};
  gridDim = {unsigned(columns_), unsigned(rows_), 1};
  progressed_ = false;
  const int warps = (threads_ + kWarp - 1) / kWarp;
  for (int warp = 0; warp < warps; ++warp) {
    warps_[warp].ready |= warps_[warp].at_store;
    warps_[warp].at_store = 0;
  }
  // A warp usually runs on to its next __syncthreads. This is as far ahead of the others as it can get. A block of a
  // cooperative grid usually runs until all its threads wait.
  constexpr unsigned kStay = 8, kTurn = 256;
  for (int warp = 0;;) {
    if (!warps_[warp].ready || order_.next() % kStay == 0) {
      const int first = int(order_.next() % unsigned(warps));
      warp = -1;
      for (int n = 0; n < warps && warp < 0; ++n) {
        if (warps_[(first + n) % warps].ready) warp = (first + n) % warps;
      }
    }
    if (warp >= 0) {
      step(warp);
      if (cooperative && order_.next() % kTurn == 0) return false;
      continue;
    }
    warp = 0;
    if (resolve_block_barrier()) continue;
    bool done = true, looking = false;
    for (int n = 0; n < warps; ++n) {
      done &= warps_[n].exited == ~0u;
      looking |= warps_[n].at_store != 0;
    }
    if (done) return true;
    if (looking && cooperative) return false;
    print_waits();
    fail(looking ? "it waits for another block, in a grid that is not cooperative"
                 : "its threads wait for one another for ever (a divergent barrier)");
  }
}

void Machine::print_waits() {
  for (int n = 0; n * kWarp < threads_; ++n) {
    std::fprintf(stderr, "block %d, warp %d: lanes at __syncthreads %08x, at a warp collective %08x, returned %08x", block_, n,
                 warps_[n].at_barrier, warps_[n].at_collective, warps_[n].exited);
    std::fprintf(stderr, ", at bar.sync %08x, at a load of another block's store %08x\n", warps_[n].at_named,
                 warps_[n].at_store | warps_[n].ready);
  }
}

void Machine::end() {
  for (int number = 0; number < kNamedBarriers; ++number) {
    if (named_[number].arrived > 0)
      fail("%d threads have arrived at barrier %d, and nobody has met them there", named_[number].arrived, number);
  }
  const unsigned char *const begin = memory_.data(), *const end = begin + memory_.size();
  const auto untouched = [](unsigned char byte) { return byte == 0xff; };
  if (!std::all_of(begin, static_cast<const unsigned char*>(shared_), untouched)) {
    fail("a write before the beginning of its dynamic shared memory");
  }
  const unsigned char* const past = shared_ + shared_bytes_;
  const unsigned char* const written = std::find_if_not(past, end, untouched);
  if (written != end) {
    fail("a write %td bytes past its %zu bytes of dynamic shared memory", written - past, shared_bytes_);
  }
}

}  // namespace
}  // namespace emulator
