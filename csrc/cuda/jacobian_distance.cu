// Two related ops. Distances are sums of squared differences of rows in float64, computed tile against tile. The Gram form
// |u|^2 + |v|^2 - 2 u v would have no digits left for close rows. Features are H numbers for each sample, for a chain with one
// nonlinearity. The distances of the features are the distances of the Jacobians, and the features replace the K x D numbers
// of a Jacobian.
#include "jacobian.cuh"

namespace lmn {
namespace {

// ---- distances ----

// kSide: side of the threads' square; each thread takes kSums x kSums distances of a tile
constexpr int kThreads = 256, kSide = 16;
constexpr int kDepth = 16;  // features in shared memory at a time
constexpr int kNormWarps = kThreads / kWarp;

// One warp per row, lanes over the row's features: neighbouring lanes read neighbouring values.
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const double* features, std::int64_t samples, std::int64_t width, double* norms) {
  const std::int64_t row = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (row >= samples) return;  // whole warps leave together, so the warp sum stays legal
  double sum = 0;
  for (std::int64_t f = threadIdx.x % kWarp; f < width; f += kWarp) {
    const double value = features[row * width + f];
    sum = fma(value, value, sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) norms[row] = sum;
}

// A block takes a tile of distances. A thread takes neighbouring first samples, and second samples that are 16 apart, so
// neighbouring lanes write neighbouring values. There are two double operations for each feature and pair: 4096 x 4096 x 100
// take 0.11 ms at sm_90's rate, and some 6 ms where the rate is 1/64 of float's (most cards that are not made for computing).
// The divisions of the connectivity take a third more registers, so it has kernels of its own.
template <class T, int kSums, bool kConnectivity>
__global__ void __launch_bounds__(kThreads)
    distance_kernel(JacobianDistance<T> op, const double* first_norms, const double* second_norms, bool symmetric) {
  constexpr int kTile = kSide * kSums;
  __shared__ double first[kDepth][kTile + 2], second[kDepth][kTile + 2];
  const int lane = int(threadIdx.x) % kSide, line = int(threadIdx.x) / kSide;
  const std::int64_t tiles = blocks_of(op.second_samples, kTile);
  const std::int64_t i = blockIdx.x / tiles * kTile, j = blockIdx.x % tiles * kTile;
  if (symmetric && j < i) return;  // the block of the mirrored tile writes this tile, too
  double sums[kSums][kSums] = {};
  for (std::int64_t depth = 0; depth < op.features; depth += kDepth) {
    __syncthreads();  // the tiles before may still be in use
    static_assert(kDepth == kSide, "a lane loads one feature of its rows");
#pragma unroll
    for (int n = 0; n < kSums; ++n) {
      const int row = line + n * kSide;
      const bool inside = depth + lane < op.features;
      first[lane][row] = inside && i + row < op.first_samples ? op.first[(i + row) * op.features + depth + lane] : 0.0;
      second[lane][row] = inside && j + row < op.second_samples ? op.second[(j + row) * op.features + depth + lane] : 0.0;
    }
    __syncthreads();
#pragma unroll 4
    for (int f = 0; f < kDepth; ++f) {  // beyond the features there are zeros
      double rows[kSums], columns[kSums];
#pragma unroll
      for (int n = 0; n < kSums; ++n) rows[n] = first[f][line * kSums + n];
#pragma unroll
      for (int n = 0; n < kSums; ++n) columns[n] = second[f][lane + n * kSide];
#pragma unroll
      for (int r = 0; r < kSums; ++r) {
#pragma unroll
        for (int c = 0; c < kSums; ++c) {
          const double difference = columns[c] - rows[r];
          sums[r][c] = fma(difference, difference, sums[r][c]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kSums; ++r) {
    const std::int64_t row = i + line * kSums + r;
    if (row >= op.first_samples) continue;
#pragma unroll
    for (int c = 0; c < kSums; ++c) {
      const std::int64_t column = j + lane + c * kSide;
      if (column >= op.second_samples) continue;
      const double norm = first_norms[row], other_norm = second_norms[column], larger_norm = larger(norm, other_norm);
      const bool counts = larger_norm <= 0x1.fffffffffffffp1023;  // false for a NaN, for an Inf, and for a sum that overflowed
      const double square = !counts ? larger_norm - larger_norm : sums[r][c] <= kSameFeatures * larger_norm ? 0.0 : sums[r][c];
      T distance;
      if constexpr (kConnectivity) {
        // A sum of two norms may overflow where each norm does not, so the smaller norm is divided first. If both norms are 0,
        // the quotient is a NaN, and `square` decides.
        const double both = 1 + (norm < other_norm ? norm : other_norm) / larger_norm;
        distance = T(square == 0 ? 1.0 : 1 - square / larger_norm / both);
      } else {
        distance = T(op.squared ? square : ::sqrt(square));
      }
      op.distance[row * op.second_samples + column] = distance;
      if (symmetric && i != j) op.distance[column * op.second_samples + row] = distance;
    }
  }
}

template <class T, int kSums>
const char* measure(const JacobianDistance<T>& op, const double* first_norms, const double* second_norms, bool symmetric,
                    CUstream_st* stream) {
  const std::int64_t blocks = blocks_of(op.first_samples, kSide * kSums) * blocks_of(op.second_samples, kSide * kSums);
  const auto kernel = op.connectivity ? distance_kernel<T, kSums, true> : distance_kernel<T, kSums, false>;
  return launch(kernel, blocks, kThreads, 0, stream, op, first_norms, second_norms, symmetric);
}

/// Bytes for the norms of both sides. A symmetric matrix uses the norms of one side only.
template <class T>
std::size_t distance_workspace(const JacobianDistance<T>& op) {
  return std::size_t(op.first_samples + op.second_samples) * sizeof(double);
}

template <class T>
const char* jacobian_distance_on(const JacobianDistance<T>& op, CUstream_st* stream) {
  const bool symmetric = op.first == op.second && op.first_samples == op.second_samples;
  double* const second_norms = op.workspace;
  double* const first_norms = symmetric ? second_norms : second_norms + op.second_samples;
  const char* error = launch(norm_kernel, blocks_of(op.second_samples, kNormWarps), kThreads, 0, stream, op.second,
                             op.second_samples, op.features, second_norms);
  if (!error && !symmetric) {
    error = launch(norm_kernel, blocks_of(op.first_samples, kNormWarps), kThreads, 0, stream, op.first, op.first_samples,
                   op.features, first_norms);
  }
  if (error) return error;
  // Large tiles read less from shared memory; small tiles keep all multiprocessors busy if there are few tiles. From four large
  // tiles for each multiprocessor on, the last round costs little.
  const std::int64_t large = blocks_of(op.first_samples, 4 * kSide) * blocks_of(op.second_samples, 4 * kSide);
  const std::int64_t busy = 4 * std::int64_t(device_attribute(cudaDevAttrMultiProcessorCount));
  if ((symmetric ? large / 2 : large) < busy) return measure<T, 2>(op, first_norms, second_norms, symmetric, stream);
  return measure<T, 4>(op, first_norms, second_norms, symmetric, stream);
}

// ---- features ----

constexpr int kGramSide = 16;

// A block computes a tile of M = (last^T last) o (first first^T), and each thread computes one entry of the tile. Neighbouring
// lanes read and write neighbouring units.
template <class T>
__global__ void __launch_bounds__(kGramSide* kGramSide) gram_kernel(JacobianIsometry<T> op, double* gram) {
  __shared__ double rows[kGramSide][kGramSide + 1], columns[kGramSide][kGramSide + 1];
  const int lane = int(threadIdx.x) % kGramSide, line = int(threadIdx.x) / kGramSide;
  const std::int64_t tiles = blocks_of(op.units, kGramSide);
  const std::int64_t first_row = blockIdx.x / tiles * kGramSide, first_column = blockIdx.x % tiles * kGramSide;
  const std::int64_t row = first_row + line, column = first_column + lane;
  double first = 0, last = 0;
  for (std::int64_t depth = 0; depth < op.inputs; depth += kGramSide) {
    __syncthreads();  // the tiles before may still be in use
    const bool inside = depth + lane < op.inputs;
    const std::int64_t other = first_column + line;
    rows[line][lane] = inside && row < op.units ? double(op.first[row * op.inputs + depth + lane]) : 0.0;
    columns[line][lane] = inside && other < op.units ? double(op.first[other * op.inputs + depth + lane]) : 0.0;
    __syncthreads();
    for (int d = 0; d < kGramSide; ++d) first = fma(rows[line][d], columns[lane][d], first);
  }
  if (row >= op.units || column >= op.units) return;
#pragma unroll 4
  for (std::int64_t k = 0; k < op.outputs; ++k) {
    last = fma(double(op.last[k * op.units + row]), double(op.last[k * op.units + column]), last);
  }
  gram[row * op.units + column] = first * last;
}

constexpr int kFactorThreads = 1024, kRows = 4;  // kRows: rows of the factor at a time

inline std::int64_t isometry_stride(std::int64_t units) {  // length of a row of the factor
  return blocks_of(units, kRows) * kRows;
}
/// Size of M and its factor, in doubles.
inline std::int64_t isometry_doubles(std::int64_t units) { return units * (isometry_stride(units) + units); }

/// How the one block's threads are divided among the units: `parts` threads share the sum for one unit.
struct FactorShape {
  int padded, parts, stride;  // stride: length of a row of the factor
  std::size_t vectors() const { return std::size_t(padded) * std::size_t(1 + kRows * (parts + 1)) * sizeof(double); }
};
inline FactorShape factor_shape(std::int64_t units) {
  const int padded = int(blocks_of(units, kWarp) * kWarp);
  return {padded, kFactorThreads / padded, int(isometry_stride(units))};
}

/// Two neighbouring numbers of a row of the factor, loaded as 16 bytes.
struct alignas(16) RowPair {
  double first, second;
};

// One block factors A = R^T R, where A is M scaled to ones on the diagonal. It computes kRows rows at a time. With each row of
// R it computes the same row of (R^T)^-1, which is the same kind of sum. `factor` holds A and then R above its diagonal, and
// the inverse on and below its diagonal. The sum of the inverse's squares is the trace of A^-1, which is at least one over A's
// least eigenvalue. Rounding changes M by about H epsilon, and a squared distance by at most this times the trace. Neighbouring
// lanes read neighbouring units.
//
// First, all threads sum what the earlier rows take from the kRows rows; `parts` threads share each sum. Then each thread has
// one column. Every thread computes the square on the diagonal for itself, because that costs less than a barrier. So kRows
// rows take three barriers.
__global__ void __launch_bounds__(kFactorThreads)
    factor_kernel(const double* gram, std::int64_t width, double* memory, FactorShape shape, bool in_shared, double* isometry,
                  double* lost) {
  const int padded = shape.padded, parts = shape.parts, stride = shape.stride;
  double* const norms = reinterpret_cast<double*>(dynamic_shared());  // [padded], zeros beyond the units
  double* const left = norms + padded;            // [kRows][padded]: rows of A minus what the earlier rows take
  double* const partial = left + kRows * padded;  // [parts][kRows][padded]
  double* const factor = in_shared ? partial + parts * kRows * padded : memory;  // [units][stride]
  const int units = int(width), h = int(threadIdx.x) % padded, part = int(threadIdx.x) / padded;
  const bool works = h < units && part < parts;
  for (int n = int(threadIdx.x); n < padded; n += kFactorThreads) norms[n] = n < units ? ::sqrt(gram[n * units + n]) : 0.0;
  __syncthreads();
  for (int at = int(threadIdx.x); at < units * stride; at += kFactorThreads) {
    // A unit with a norm of 0 changes no Jacobian. Its row and column are zeros.
    const int row = at / stride, column = at % stride;
    const double scale = column > row && column < units ? norms[row] * norms[column] : 0.0;
    factor[at] = scale != 0 ? gram[row * units + column] / scale : 0.0;
  }
  __syncthreads();
  for (int r = 0; r < units; r += kRows) {
    if (works) {
      double sums[kRows] = {};
      const int begin = h < r ? h : 0;  // the inverse is 0 above this row
#pragma unroll 4
      for (int t = begin + (part + parts - begin % parts) % parts; t < r; t += parts) {
        const double own = factor[t * stride + h];
        const RowPair* const others = reinterpret_cast<const RowPair*>(factor + t * stride + r);
#pragma unroll
        for (int i = 0; i < kRows; i += 2) {
          const RowPair pair = others[i / 2];
          sums[i] = fma(pair.first, own, sums[i]);
          sums[i + 1] = fma(pair.second, own, sums[i + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) partial[(part * kRows + i) * padded + h] = sums[i];
    }
    __syncthreads();
    for (int i = part; works && i < kRows; i += parts) {
      const int row = r + i;
      double sum = 0;
      for (int p = 0; p < parts; ++p) sum += partial[(p * kRows + i) * padded + h];
      const double entry = row >= units || h < row ? 0.0 : h == row ? 1.0 : factor[row * stride + h];
      left[i * padded + h] = entry - sum;
    }
    __syncthreads();
    if (works && part == 0) {
      double square[kRows][kRows], roots[kRows], column[kRows];  // square: the part of R above the diagonal in this square
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool dead = norms[r + i] == 0;
        double own = r + i < units ? left[i * padded + r + i] : 1.0;
#pragma unroll
        for (int j = 0; j < i; ++j) own = fma(-square[j][i], square[j][i], own);
        roots[i] = dead ? 0.0 : 1.0 / ::sqrt(own);  // a NaN if A has no factor; then everything after it is a NaN, too
#pragma unroll
        for (int k = i + 1; k < kRows; ++k) {
          double entry = r + k < units ? left[i * padded + r + k] : 0.0;
#pragma unroll
          for (int j = 0; j < i; ++j) entry = fma(-square[j][i], square[j][k], entry);
          square[i][k] = dead ? 0.0 : entry * roots[i];
        }
      }
      const int place = h - r;  // place of the thread's column in the square, if it is there
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool inside = place >= 0 && place < kRows;
        double entry = !inside ? left[i * padded + h] : place == i ? 1.0 : 0.0;
#pragma unroll
        for (int j = 0; j < i; ++j) entry = fma(-square[j][i], column[j], entry);
        column[i] = entry * roots[i];
        double value = column[i];
#pragma unroll
        for (int k = i + 1; k < kRows; ++k) value = place == k ? square[i][k] : value;
        if (r + i < units) factor[(r + i) * stride + h] = norms[r + i] == 0 ? 0.0 : value;
      }
    }
    __syncthreads();
  }
  double trace = 0;
  for (int r = part; works && r < units; r += parts) {
    const double value = factor[r * stride + h];
    if (h <= r) trace = fma(value, value, trace);
    // B = R diag(norms) is written transposed, so that the features are one product of rows.
    const double mirrored = factor[h * stride + r];  // above the diagonal if r > h
    isometry[r * units + h] = h > r ? 0.0 : h < r ? mirrored * norms[r] : norms[r] == 0 ? 0.0 : norms[r] / value;
  }
  trace = warp_sum(trace);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = trace;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const double total = warp_sum(partial[threadIdx.x]);
  if (threadIdx.x < 2) lost[threadIdx.x] = threadIdx.x == 0 ? double(units) * 0x1p-52 * total : 0.0;
}

template <class T>
const char* jacobian_isometry_on(const JacobianIsometry<T>& op, CUstream_st* stream) {
  if (op.units < 1 || op.units > kIsometryUnits) return "a number of units that has no factor here";
  double* const factor = op.workspace;
  double* const gram = factor + op.units * isometry_stride(op.units);
  const std::int64_t tiles = blocks_of(op.units, kGramSide);
  const char* error = launch(gram_kernel<T>, tiles * tiles, kGramSide * kGramSide, 0, stream, op, gram);
  if (error) return error;
  const FactorShape shape = factor_shape(op.units);
  const std::size_t bytes = shape.vectors() + std::size_t(op.units) * std::size_t(shape.stride) * sizeof(double);
  const bool in_shared = bytes <= std::size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  return launch(factor_kernel, 1, kFactorThreads, in_shared ? bytes : shape.vectors(), stream, gram, op.units, factor, shape,
                in_shared, op.isometry, op.lost);
}

/// values: [samples, units], the activation's values, or null.
template <class T>
const char* slopes_on(const JacobianFeatures<T>& op, T* values, CUstream_st* stream) {
  return forward<T, double, T>(
      {op.x, op.first, op.bias, values, op.workspace, op.samples, op.inputs, op.units, op.units, op.activation}, stream);
}

template <class T>
const char* rows_on(const JacobianFeatures<T>& op, CUstream_st* stream) {
  const Product<double> product{
      {op.workspace, op.units}, {op.isometry, 0}, nullptr, nullptr, nullptr, op.features, op.samples, 1, op.units, op.units, 0};
  return multiply(product, true, stream);
}

template <class T>
const char* jacobian_features_on(const JacobianFeatures<T>& op, CUstream_st* stream) {
  const char* error = slopes_on<T>(op, nullptr, stream);
  return error ? error : rows_on(op, stream);
}

constexpr Activation kNoActivation{ActivationKind::kIdentity, 0, 0};

/// The workspace holds, in this order: the workspace of JacobianIsometry, its result, features, slopes and norms.
template <class T>
std::size_t isometry_distance_workspace(const IsometryDistance<T>& op) {
  const std::int64_t doubles = isometry_doubles(op.units) + op.units * op.units + 2 * op.samples * op.units + op.samples;
  return std::size_t(doubles) * sizeof(double);
}

template <class T>
const char* isometry_distance_on(const IsometryDistance<T>& op, CUstream_st* stream) {
  double* const isometry = op.workspace + isometry_doubles(op.units);
  double* const features = isometry + op.units * op.units;
  double* const slopes = features + op.samples * op.units;
  double* const norms = slopes + op.samples * op.units;
  // The values lie where the features will be. They are read before the features are written.
  T* const values = op.y ? reinterpret_cast<T*>(features) : nullptr;
  const JacobianFeatures<T> rows{op.x,      op.first, op.bias,       isometry, op.samples,
                                 op.inputs, op.units, op.activation, features, slopes};
  const char* error = slopes_on(rows, values, stream);
  if (!error && op.y) {
    error = forward_as<T, T, T, ActivationKind::kIdentity>(
        {values, op.last, op.last_bias, op.y, nullptr, op.samples, op.units, op.outputs, 0, kNoActivation}, stream);
  }
  if (!error) {
    error =
        jacobian_isometry_on<T>({op.first, op.last, op.units, op.inputs, op.outputs, isometry, op.lost, op.workspace}, stream);
  }
  if (!error) error = rows_on(rows, stream);
  if (error) return error;
  return jacobian_distance_on<T>(
      {features, features, op.samples, op.samples, op.units, op.squared, op.connectivity, op.distance, norms, nullptr}, stream);
}

}  // namespace

std::size_t cuda_workspace(const JacobianDistance<float>& op) { return distance_workspace(op); }
std::size_t cuda_workspace(const JacobianDistance<double>& op) { return distance_workspace(op); }
const char* cuda_run(const JacobianDistance<float>& op, CUstream_st* stream) { return jacobian_distance_on(op, stream); }
const char* cuda_run(const JacobianDistance<double>& op, CUstream_st* stream) { return jacobian_distance_on(op, stream); }
std::size_t cuda_workspace(const JacobianIsometry<float>& op) { return isometry_doubles(op.units) * sizeof(double); }
std::size_t cuda_workspace(const JacobianIsometry<double>& op) { return isometry_doubles(op.units) * sizeof(double); }
const char* cuda_run(const JacobianIsometry<float>& op, CUstream_st* stream) { return jacobian_isometry_on(op, stream); }
const char* cuda_run(const JacobianIsometry<double>& op, CUstream_st* stream) { return jacobian_isometry_on(op, stream); }
std::size_t cuda_workspace(const JacobianFeatures<float>& op) { return std::size_t(op.samples * op.units) * sizeof(double); }
std::size_t cuda_workspace(const JacobianFeatures<double>& op) { return std::size_t(op.samples * op.units) * sizeof(double); }
const char* cuda_run(const JacobianFeatures<float>& op, CUstream_st* stream) { return jacobian_features_on(op, stream); }
const char* cuda_run(const JacobianFeatures<double>& op, CUstream_st* stream) { return jacobian_features_on(op, stream); }
std::size_t cuda_workspace(const IsometryDistance<float>& op) { return isometry_distance_workspace(op); }
std::size_t cuda_workspace(const IsometryDistance<double>& op) { return isometry_distance_workspace(op); }
const char* cuda_run(const IsometryDistance<float>& op, CUstream_st* stream) { return isometry_distance_on(op, stream); }
const char* cuda_run(const IsometryDistance<double>& op, CUstream_st* stream) { return isometry_distance_on(op, stream); }

}  // namespace lmn
