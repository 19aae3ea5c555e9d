// The whole native surface: per op one plain struct and one entry per device.
//
// Kernels own nothing: outputs and workspaces come from the caller. No torch, no CUDA header, no container.
#pragma once
#include <cstddef>
#include <cstdint>

struct CUstream_st;  // opaque: no CUDA header needed

namespace lmn {

/// Matches ACTIVATIONS in lmnfast/_chain.py.
enum class ActivationKind : std::int32_t {
  kIdentity, kRelu, kLeakyRelu, kElu, kSilu, kGelu, kGeluTanh, kTanh, kSigmoid, kSoftplus, kSin, kCount
};

struct Activation {
  ActivationKind kind;
  double alpha;  // leaky_relu: slope; elu: alpha; softplus: beta
  double beta;   // softplus: threshold
};

/// Whom a CPU kernel that may run for long asks about ten times a second, on the thread that called it, whether to stop
/// (the result is then undefined); done: the share of its work, from 0 to 1.
struct Watch {
  bool (*stop)(void* state, double done);
  void* state;
};

/// A quadrature rule on [0, 1] whose ends are nodes, as the kernels use it: at the ends the chord residual is zero,
/// so of them only their share in mean_t and variance_t is left.
struct PathNodes {
  const double* t;        // [interior], host
  const double* weights;  // [interior], host; with the ends' they sum to 1
  std::int32_t interior;
  double mean_t, variance_t;
};

/// Linear connectivity of y = act_L(W_L ... act_1(W_1 act_0(z) + b_1) ... + b_L).
/// Value 2 l is layer l's before its activation, value 2 l + 1 after it; an earlier one of the same width may be added to
/// either, but to none after the identity. What is affine in the samples has no residual: it comes as a shift.
/// Of several networks of one shape the arrays of one lie behind those of the network before: z is [networks, samples, width].
template <class T>
struct PathConnectivity {
  const T* z;                       // [samples, widths[0]]
  const T* const* weights;          // [layers], host, of [widths[l + 1], widths[l]]
  const T* const* biases;           // [layers], host, of null or [widths[l + 1]]
  const std::int64_t* widths;       // [layers + 1], host
  const Activation* activations;    // [layers + 1], host
  const std::int32_t* skips;        // [2 * (layers + 1)], host, the value added to each, none: -1; null: no sums
  const T* const* shifts;           // [2 * (layers + 1)], host, of null or [samples, width], added to each; null with skips
  PathNodes nodes;
  std::int64_t samples;
  std::int32_t layers;
  bool halves_alone;                // CUDA, float: products may round residuals and weights to halves, of 11 bits
  T* connectivity;                  // [samples, samples]; kUnresolved for a pair that T cannot resolve
  std::int64_t* counts;             // [2], outputs counted as constant over the resolved pairs; unresolved pairs
  void* workspace;                  // 64-byte aligned, as many bytes as the device's workspace function says
  const Watch* watch;               // CPU; null: nobody
  // CUDA, float: z and the shifts side by side before they were rounded, and what they were made from, where equal rows are one
  // sample. Unresolved pairs are measured in float64 with these, as far as that is plain; null: none.
  const double* exact;              // [samples, exact_width]
  const float* inputs;              // [samples, input_width]
  std::int64_t exact_width, input_width;
  std::int64_t networks;            // 1 or more; on the CPU 1
};

/// Linear connectivity of the polynomials that match each output's ends and end slopes along a path, and with the
/// midpoint its value there; over the same nodes.
template <class T>
struct HermiteConnectivity {
  PathConnectivity<T> path;
  bool midpoint;
};

/// Mean over outputs of r2 along each path, from f's outputs at the interior nodes and at the samples.
template <class T>
struct PathR2 {
  const T* interior;                // [pairs, nodes.interior, outputs]
  const T* ends;                    // [samples, outputs]
  const std::int64_t* first;        // [pairs], sample at t = 0
  const std::int64_t* second;       // [pairs], sample at t = 1
  PathNodes nodes;
  std::int64_t pairs, samples, outputs;
  T* r2;                            // [pairs]; kUnresolved for a pair that T cannot resolve
  std::int64_t* counts;             // [2], outputs counted as constant over the resolved pairs; unresolved pairs
  const T* rounding;                // [2, outputs] or null: f's own rounding of each output, in epsilons, and `least` of
                                    // share_of_output
  T* workspace;                     // [3 * outputs + 3 * nodes.interior]
};

/// Jacobians of act_L(W_L ... act_1(W_1 act_0(x) + b_1) ... + b_L) at the samples.
template <class T>
struct Jacobian {
  const T* x;                       // [samples, widths[0]]
  const T* const* weights;          // [layers], host, of [widths[l + 1], widths[l]]
  const T* const* biases;           // [layers], host, of null or [widths[l + 1]]
  const std::int64_t* widths;       // [layers + 1], host
  const Activation* activations;    // [layers + 1], host
  std::int64_t samples;
  std::int32_t layers;              // 1 or more
  T* jacobian;                      // [samples, widths[layers], widths[0]]
  T* outputs;                       // CUDA: [samples, widths[layers]] or null: the chain's
  void* workspace;                  // 64-byte aligned, as many bytes as the device's workspace function says
  const Watch* watch;               // CPU; null: nobody
};

/// Rows whose squared distance is at most this share of the larger one's squared norm are the same: (32 epsilon)^2,
/// the features' own rounding.
constexpr double kSameFeatures = 0x1p-94;
/// Second samples are padded to a multiple of this in the workspace: whole panels at every vector width.
constexpr std::int64_t kDistanceGroup = 48;

/// Euclidean distances of rows of features. The same rows as first and second: symmetric, half the work.
/// On the CPU float32 distances are of the Gram form, but those of close rows.
template <class T>
struct JacobianDistance {
  const double* first;              // [first_samples, features]
  const double* second;             // [second_samples, features]
  std::int64_t first_samples, second_samples, features;
  bool squared;
  bool connectivity;                // CUDA: 1 - |f - s|^2 / (|f|^2 + |s|^2) of two rows in place of their distance; of zeros 1
  T* distance;                      // [first_samples, second_samples]
  double* workspace;                // [4 * (first_samples + second_samples) + features], then T: second_samples rounded
                                    // up, and in float32 first_samples, rows of features
  const Watch* watch;               // CPU; null: nobody
};

/// Of a chain whose one nonlinearity is between two Linear layers, J_i = last diag(s_i) first: B with
/// |J_i - J_j| = |B s_i - B s_j|, so B^T B = M = (last^T last) o (first first^T). CUDA alone.
constexpr std::int64_t kIsometryUnits = 256;  // at most: one block makes B, kIsometryRows rows at a time
constexpr std::int64_t kIsometryRows = 4;
inline std::int64_t isometry_stride(std::int64_t units) {  // of the rows of B's factor
  return (units + kIsometryRows - 1) / kIsometryRows * kIsometryRows;
}
inline std::int64_t isometry_workspace(std::int64_t units) { return units * (isometry_stride(units) + units); }
template <class T>
struct JacobianIsometry {
  const T* first;                   // [units, inputs]
  const T* last;                    // [outputs, units]
  std::int64_t units, inputs, outputs;
  double* isometry;                 // [units, units], B's transpose
  double* lost;                     // [2], a bound for the share of a squared distance that B's rounding takes, a NaN or Inf
                                    // where M has no factor; and a 0
  double* workspace;                // [isometry_workspace(units)], 16-byte aligned
};

/// Rows B s_i, where s_i are the slopes of activation(first x_i + bias). CUDA alone.
template <class T>
struct JacobianFeatures {
  const T* x;                       // [samples, inputs]
  const T* first;                   // [units, inputs]
  const T* bias;                    // [units] or null
  const double* isometry;           // [units, units], B's transpose
  std::int64_t samples, inputs, units;
  Activation activation;
  double* features;                 // [samples, units]
  double* slopes;                   // [samples, units], the workspace
};

/// What jacobian_distance gives of those rows, made and measured in one go: a call from Python for each part, and memory, cost
/// more than the kernels. CUDA alone.
template <class T>
struct IsometryDistance {
  const T* x;                       // [samples, inputs]
  const T* first;                   // [units, inputs]
  const T* bias;                    // [units] or null
  const T* last;                    // [outputs, units]
  const T* last_bias;               // [outputs] or null
  std::int64_t samples, inputs, units, outputs;
  Activation activation;
  bool squared, connectivity;       // as of JacobianDistance
  T* distance;                      // [samples, samples]
  T* y;                             // [samples, outputs] or null: the chain's outputs
  double* lost;                     // [2], as of JacobianIsometry
  double* workspace;                // [isometry_distance_workspace(samples, units)], 16-byte aligned
};
inline std::int64_t isometry_distance_workspace(std::int64_t samples, std::int64_t units) {
  return isometry_workspace(units) + units * units + 2 * samples * units + samples;
}

/// Nonlinear complexity in bits of each row of eigenvalues.
template <class T>
struct SpectralEntropy {
  const T* eigenvalues;             // [batch, samples]
  double* bits;                     // [batch]
  std::int64_t batch, samples;
};

/// Eigenvalues of symmetric matrices, rising; of their lower triangles, as LAPACK takes them. NaN for a matrix that is not
/// finite. CUDA alone: on the CPU it is LAPACK, which lmnfast/ops calls.
template <class T>
struct SymmetricEigenvalues {
  const T* matrices;                // [batch, samples, samples]
  double* eigenvalues;              // [batch, samples]
  std::int64_t batch, samples;
  void* workspace;                  // 64-byte aligned, as many bytes as the device's workspace function says
};

/// Numbers that check_outputs finds.
constexpr int kFindings = 12;

/// What a public call has to know of its numbers before they count: one pass over all, for one copy to the host.
template <class T>
struct CheckOutputs {
  const T* x;                       // [samples, inputs]
  const T* y;                       // [samples, outputs], f's at x
  const T* again;                   // [samples, outputs] or null: the chain's that f is taken for
  const T* expected;                // [samples, outputs] or null: the model's that f was cut from
  const T* matrix;                  // [samples, columns] or null: a connectivity, Jacobians
  const std::int64_t* counts;       // [2] or null: as path_connectivity leaves them
  std::int64_t samples, inputs, outputs, columns;
  double epsilon;                   // of the dtype that f's outputs come in
  std::int64_t* found;              // [kFindings], as lmnfast/ops/check_outputs.py says
};

/// x W^T + b, each sum in float64, of float32 or float64. What the samples of chains go through once on CUDA.
template <class T>
struct WideLinear {
  const T* x;                       // [networks, samples, inputs]
  const T* weight;                  // [networks, outputs, inputs]
  const T* bias;                    // [networks, outputs] or null
  std::int64_t networks, samples, inputs, outputs;
  double* z;                        // [networks, samples, outputs]
};

/// x W^T + b, each sum from the first input to the last: the same bits for any thread count and any batch, which a BLAS
/// does not promise. It is what a chain's samples go through once before path_connectivity. CPU alone.
struct Linear {
  const double* x;                  // [samples, inputs]
  const double* weight;             // [outputs, inputs]
  const double* bias;               // [outputs] or null
  std::int64_t samples, inputs, outputs;
  double* z;                        // [samples, outputs]
  void* workspace;                  // 64-byte aligned, as many bytes as linear_workspace says
  const Watch* watch;               // null: nobody
};

std::size_t linear_workspace(const Linear&, int threads);
void linear_cpu(const Linear&, int threads);
std::size_t path_connectivity_workspace(const PathConnectivity<float>&, int threads);
std::size_t path_connectivity_workspace(const PathConnectivity<double>&, int threads);
void path_connectivity_cpu(const PathConnectivity<float>&, int threads);
void path_connectivity_cpu(const PathConnectivity<double>&, int threads);
std::size_t hermite_connectivity_workspace(const HermiteConnectivity<float>&, int threads);
std::size_t hermite_connectivity_workspace(const HermiteConnectivity<double>&, int threads);
void hermite_connectivity_cpu(const HermiteConnectivity<float>&, int threads);
void hermite_connectivity_cpu(const HermiteConnectivity<double>&, int threads);
std::size_t jacobian_workspace(const Jacobian<float>&, int threads);
std::size_t jacobian_workspace(const Jacobian<double>&, int threads);
void jacobian_cpu(const Jacobian<float>&, int threads);
void jacobian_cpu(const Jacobian<double>&, int threads);
void jacobian_distance_cpu(const JacobianDistance<float>&, int threads);
void jacobian_distance_cpu(const JacobianDistance<double>&, int threads);
void path_r2_cpu(const PathR2<float>&, int threads);
void path_r2_cpu(const PathR2<double>&, int threads);
void check_outputs_cpu(const CheckOutputs<float>&, int threads);
void check_outputs_cpu(const CheckOutputs<double>&, int threads);
void spectral_entropy_cpu(const SpectralEntropy<float>&, int threads);
void spectral_entropy_cpu(const SpectralEntropy<double>&, int threads);

/// The CUDA entries take device pointers (what is marked host stays there), enqueue on the stream, and return null, or
/// what went wrong. On the current device; the workspace depends on it.
std::size_t path_connectivity_cuda_workspace(const PathConnectivity<float>&);
std::size_t path_connectivity_cuda_workspace(const PathConnectivity<double>&);
const char* path_connectivity_cuda(const PathConnectivity<float>&, CUstream_st*);
const char* path_connectivity_cuda(const PathConnectivity<double>&, CUstream_st*);
std::size_t hermite_connectivity_cuda_workspace(const HermiteConnectivity<float>&);
std::size_t hermite_connectivity_cuda_workspace(const HermiteConnectivity<double>&);
const char* hermite_connectivity_cuda(const HermiteConnectivity<float>&, CUstream_st*);
const char* hermite_connectivity_cuda(const HermiteConnectivity<double>&, CUstream_st*);
std::size_t jacobian_cuda_workspace(const Jacobian<float>&);
std::size_t jacobian_cuda_workspace(const Jacobian<double>&);
const char* jacobian_cuda(const Jacobian<float>&, CUstream_st*);
const char* jacobian_cuda(const Jacobian<double>&, CUstream_st*);
const char* jacobian_distance_cuda(const JacobianDistance<float>&, CUstream_st*);
const char* jacobian_distance_cuda(const JacobianDistance<double>&, CUstream_st*);
const char* wide_linear_cuda(const WideLinear<float>&, CUstream_st*);
const char* wide_linear_cuda(const WideLinear<double>&, CUstream_st*);
const char* jacobian_isometry_cuda(const JacobianIsometry<float>&, CUstream_st*);
const char* jacobian_isometry_cuda(const JacobianIsometry<double>&, CUstream_st*);
const char* jacobian_features_cuda(const JacobianFeatures<float>&, CUstream_st*);
const char* jacobian_features_cuda(const JacobianFeatures<double>&, CUstream_st*);
const char* isometry_distance_cuda(const IsometryDistance<float>&, CUstream_st*);
const char* isometry_distance_cuda(const IsometryDistance<double>&, CUstream_st*);
const char* path_r2_cuda(const PathR2<float>&, CUstream_st*);
const char* path_r2_cuda(const PathR2<double>&, CUstream_st*);
const char* check_outputs_cuda(const CheckOutputs<float>&, CUstream_st*);
const char* check_outputs_cuda(const CheckOutputs<double>&, CUstream_st*);
const char* spectral_entropy_cuda(const SpectralEntropy<float>&, CUstream_st*);
const char* spectral_entropy_cuda(const SpectralEntropy<double>&, CUstream_st*);
/// 0: the matrices do not fit on the current device.
std::size_t symmetric_eigenvalues_cuda_workspace(const SymmetricEigenvalues<float>&);
std::size_t symmetric_eigenvalues_cuda_workspace(const SymmetricEigenvalues<double>&);
const char* symmetric_eigenvalues_cuda(const SymmetricEigenvalues<float>&, CUstream_st*);
const char* symmetric_eigenvalues_cuda(const SymmetricEigenvalues<double>&, CUstream_st*);

}  // namespace lmn
