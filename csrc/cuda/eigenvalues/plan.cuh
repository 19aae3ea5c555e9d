// The host's choice for symmetric_eigenvalues: which layouts fit the card, in which phases a matrix of this size is reduced,
// and where everything lies in the workspace. No plan means that the matrices do not fit, and that cuSOLVER takes them.
#pragma once
#include <vector>

#include "tridiagonal.cuh"

namespace lmn {
namespace {

// Larger matrices are left to cuSOLVER. The entries beyond shared memory have to stay in L2, of which an H200 has 50 MB and an
// A100 40 MB. A matrix of 2304 samples puts 34 MB there on an H200, and 36 MB on an A100.
constexpr int kMostSamples = 2304;
constexpr std::int64_t kMostDistant = 36 << 20;
// Limit in bytes for the matrices that go through the phases together. Each phase's rest of these matrices has to be stored.
constexpr std::int64_t kMostLeft = std::int64_t(1) << 29;

using Run = const char* (*)(const Matrices&, const Shape&, const Work&, CUstream_st*);
using Fits = bool (*)(const Shape&);

struct Phase {
  Shape shape{};
  Run run = nullptr;
  Fits fits = nullptr;
  double step = 0;  // microseconds of a column, without the part that grows with the entries that a block holds
};

struct Plan {
  std::vector<Phase> phases;  // empty: the matrices do not fit
  std::int64_t portion = 0;   // matrices that go through the phases together
};

struct Card {
  int multiprocessors, shared;  // `shared`: bytes of a block
  bool operator==(const Card& o) const { return multiprocessors == o.multiprocessors && shared == o.shared; }
};

#if !defined(LMN_EMULATED)
// How many blocks of a kernel a multiprocessor can run; 0 if it cannot run the kernel.
inline int occupancy(const void* kernel, int threads, int bytes) {
  int blocks = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, std::size_t(bytes)) != cudaSuccess) {
    cudaGetLastError();  // otherwise the next launch would report this error again
    return 0;
  }
  return blocks;
}
#endif

template <class L>
const char* run_layout(const Matrices& matrices, const Shape& shape, const Work& work, CUstream_st* stream) {
  const int blocks = shape.blocks * shape.groups;
#if defined(LMN_EMULATED)
  (void)stream;
  emulator::run_cooperative_grid(blocks, L::kThreads, std::size_t(shape.bytes),
                                 [&] { tridiagonal_kernel<L>(matrices, shape, work); });
  return message(cudaGetLastError());
#else
  const void* const kernel = reinterpret_cast<const void*>(&tridiagonal_kernel<L>);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.bytes);
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Matrices*>(&matrices), const_cast<Shape*>(&shape), const_cast<Work*>(&work)};
    error = cudaLaunchCooperativeKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(L::kThreads)), arguments,
                                        std::size_t(shape.bytes), stream);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return message(error);
#endif
}

template <class L>
bool fits_card([[maybe_unused]] const Shape& shape) {
#if defined(LMN_EMULATED)
  return true;
#else
  return occupancy(reinterpret_cast<const void*>(&tridiagonal_kernel<L>), L::kThreads, shape.bytes) >= 1;
#endif
}

// Appends a phase of all columns in layout L, if the layout fits.
template <class L>
void consider(const Card& card, int samples, int batch, double step, std::vector<Phase>& phases) {
  const int least = (samples + L::kSlots - 1) / L::kSlots;
  if (least > card.multiprocessors) return;
  Shape s{};
  s.samples = s.whole = samples;
  s.steps = samples - 1;
  s.batch = batch;
  int chunks = (samples + L::kChunk - 1) / L::kChunk;
  if (chunks < L::kHeld) chunks = L::kHeld;
  s.padded = chunks * L::kChunk;
  s.padding = s.padded - samples;
  s.spilled = chunks - L::kHeld;
  s.skipped = s.padding / 2 * 2;
  if (s.padded > L::kEntries * L::kVectorThreads) return;
  s.groups = card.multiprocessors / least;
  if (s.groups > batch) s.groups = batch;
  // With more blocks each block has less to do. Below about four rows a block (an estimate) more blocks only receive more
  // values.
  s.blocks = card.multiprocessors / s.groups;
  const int enough = (samples + 3) / 4;
  if (s.blocks > enough) s.blocks = enough > least ? enough : least;
  const int rows = (samples + s.blocks - 1) / s.blocks;  // rows of a block
  s.absent = (L::kRows - (rows + L::kRowStep - 1) / L::kRowStep) / 2 * 2;

  int doubles = 0;
  const auto take = [&](int count) {
    const int at = doubles;
    doubles += (count + 1) / 2 * 2;  // the kernel reads pairs of doubles at once
    return at;
  };
  s.sums = take(4 * L::kVectorWarps + 1);
  s.partial = take(L::kColumnWarps * L::kSlots);
  s.w = take(s.padded);
  s.x = take(2 * s.padded);
  const int chunk = L::kChunk * (L::kSlots - s.absent * L::kRowStep);
  if (L::kDistant) {
    const int room = (card.shared / int(sizeof(double)) - doubles) / chunk;
    if (s.spilled > room) s.distant = room > 0 ? s.spilled - room : s.spilled;
  }
  s.chunks = take((s.spilled - s.distant) * chunk);
  s.bytes = doubles * int(sizeof(double));
  s.distant_bytes = std::int64_t(s.blocks) * s.groups * s.distant * chunk * std::int64_t(sizeof(double));
  s.distant_columns = s.distant * L::kChunk;
  if (s.bytes > card.shared || s.distant_bytes > kMostDistant) return;
  phases.push_back({s, run_layout<L>, fits_card<L>, step});
}

// Estimate of the microseconds that this phase takes for the columns down to `left` rows. The constants are fitted to times on
// an H200, of one matrix of 768, 961, 1280 and 1664, eight of 768 and 961, and 32 of 256. They are: a step of each layout, and
// 1e-4 for each entry that a block holds when the column's turn comes. Entries in L2 are read twice and written once, at 5.5
// TB/s.
inline double cost_of(const Phase& phase, int left) {
  const Shape& s = phase.shape;
  const double n = s.samples, m = left, steps = n - m;
  const double held = (n * n + n * m + m * m) / (3 * s.blocks);
  const double distant = s.distant_columns, away = steps < distant ? steps : distant;
  const double bytes = distant > 0 ? 3 * double(s.distant_bytes) * away * (1 - away / (2 * distant)) : 0;
  constexpr double kStart = 5, kHandOver = 30;  // start of a wave, and hand-over to the next launch; both are estimates
  const double waves = (s.batch + s.groups - 1) / s.groups;
  const double wave = kStart + steps * (phase.step + 1e-4 * held) + bytes / 5.5e6;
  // The rest of the matrix is written once, and its lower triangle is also read by columns, at 3 TB/s (an estimate).
  return waves * wave + (left > 1 ? kHandOver + 32 * m * m * s.batch / 3e6 : 0.0);
}

inline void consider_all(const Card& card, int n, int batch, std::vector<Phase>& phases) {
  //              rows, row lanes, row warps, held, vector warps, entries, distant. "?": the step is a guess.
  consider<Layout<8, 1, 1, 3, 8, 4>>(card, n, batch, 1.75, phases);        // on an H200 up to 1024
  consider<Layout<6, 2, 1, 4, 8, 6>>(card, n, batch, 2.3, phases);         // up to 1536 ?
  consider<Layout<8, 2, 1, 2, 8, 8, true>>(card, n, batch, 2.85, phases);  // up to 2048
  consider<Layout<6, 4, 1, 1, 8, 10, true>>(card, n, batch, 3.1, phases);  // up to 2304 ?
  consider<Layout<8, 4, 1, 4, 4, 8>>(card, n, batch, 2.15, phases);        // batches: up to 1024 with 32 blocks each
  consider<Layout<6, 4, 2, 7, 4, 6>>(card, n, batch, 1.93, phases);        // up to 768 with 16
  consider<Layout<4, 4, 4, 10, 4, 6>>(card, n, batch, 1.95, phases);       // up to 576 with 9 ?
  consider<Layout<6, 4, 4, 7, 4, 4>>(card, n, batch, 1.9, phases);         // up to 384 with 4 ?
  consider<Layout<6, 4, 8, 7, 4, 2>>(card, n, batch, 1.9, phases);         // up to 192 with one ?
}

// The cheapest sequence of phases for all samples. It is found from the smallest size up: for each size the cheapest first
// phase and the size at which this phase stops.
inline Plan cheapest(const Card& card, std::int64_t samples, std::int64_t batch) {
  Plan plan;
  const std::int64_t portions = blocks_of(batch * samples * samples * std::int64_t(sizeof(double)), kMostLeft);
  plan.portion = blocks_of(batch, portions);
  const int n = int(samples), count = int(plan.portion);
  const int spacing = n <= 256 ? 16 : 64;
  struct Way {
    double cost;
    Phase first;
    int left;  // 1: nothing is left
    std::size_t next;
  };
  std::vector<Way> ways;  // in the order of rising size
  std::vector<Phase> phases;
  for (int size = spacing < n ? spacing : n;; size = size + spacing < n ? size + spacing : n) {
    phases.clear();
    consider_all(card, size, count, phases);
    Way best{-1, {}, 1, 0};
    for (const Phase& phase : phases) {
      const auto better = [&](double cost, int left, std::size_t next) {
        if (best.cost < 0 || cost < best.cost) best = {cost, phase, left, next};
      };
      better(cost_of(phase, 1), 1, 0);
      for (std::size_t next = 0; next < ways.size(); ++next) {
        const int left = ways[next].first.shape.samples;
        if (ways[next].cost >= 0) better(cost_of(phase, left) + ways[next].cost, left, next);
      }
    }
    best.first.shape.samples = size;
    ways.push_back(best);
    if (size == n) break;
  }
  if (ways.back().cost < 0) return plan;
  for (const Way* way = &ways.back();; way = &ways[way->next]) {
    Phase phase = way->first;
    phase.shape.whole = n;
    phase.shape.steps = phase.shape.samples - way->left;
    if (!phase.fits(phase.shape)) return {};
    plan.phases.push_back(phase);
    if (way->left == 1) return plan;
  }
}

inline Plan plan_of(std::int64_t samples, std::int64_t batch) {
  const Card card{device_attribute(cudaDevAttrMultiProcessorCount), device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  if (!device_attribute(cudaDevAttrCooperativeLaunch) || samples > kMostSamples || batch < 1 || batch > 0x7fffffff / 2048) {
    return {};
  }
  // The last plan of this thread is kept, because each call asks twice, and a plan for 2048 samples takes tens of microseconds.
  struct Known {
    Card card;
    std::int64_t samples, batch;
    Plan plan;
  };
  thread_local Known last{};
  if (!(last.card == card && last.samples == samples && last.batch == batch)) {
    last = {card, samples, batch, cheapest(card, samples, batch)};
  }
  return last.plan;
}

// Where everything lies in the workspace, in bytes.
struct Places {
  std::size_t exchange, largest, failed, zeros, diagonal, off_diagonal, left[2], distant, bytes;
};
inline Places places_of(const Plan& plan, std::int64_t batch, std::int64_t samples) {
  Places at{};
  const auto take = [&](std::size_t bytes) {
    const std::size_t place = at.bytes;
    at.bytes += (bytes + 63) / 64 * 64;
    return place;
  };
  std::size_t exchange = 0, distant = 0, left[2] = {};
  for (std::size_t k = 0; k < plan.phases.size(); ++k) {
    const Shape& s = plan.phases[k].shape;
    exchange += std::size_t(batch) * 4 * std::size_t(s.words()) * sizeof(double);
    const std::size_t rest = s.left() > 1 ? std::size_t(plan.portion) * s.left() * s.left() * sizeof(double) : 0;
    if (rest > left[k % 2]) left[k % 2] = rest;
    if (std::size_t(s.distant_bytes) > distant) distant = std::size_t(s.distant_bytes);
  }
  const std::size_t numbers = std::size_t(batch) * sizeof(double);
  at.exchange = take(exchange);
  at.largest = take(numbers);
  at.failed = take(numbers);
  at.zeros = at.bytes;
  at.diagonal = take(numbers * std::size_t(samples));
  at.off_diagonal = take(numbers * std::size_t(samples));
  at.left[0] = take(left[0]);
  at.left[1] = take(left[1]);
  at.distant = take(distant);
  return at;
}

}  // namespace
}  // namespace lmn
