// The whole native surface: per op one plain struct, and one line in the lists at the end, from which the declarations of its
// kernels, the table of levels and the bindings are made. No torch, no CUDA header, no container.
//
// Kernels own nothing: results and workspace come from the caller. The one rule for workspaces: an op that needs memory has a
// member `workspace`, 64-byte aligned, and its kernel on each device has a function that says how many bytes it needs there.
// The members that a call fills in last (results, workspace, watch) come last and are null before.
#pragma once
#include <cstddef>
#include <cstdint>

struct CUstream_st;  // opaque: no CUDA header needed

namespace lmn {

/// Matches ACTIVATIONS in lmnfast/_chain.py.
enum class ActivationKind : std::int32_t {
  kIdentity,
  kRelu,
  kLeakyRelu,
  kElu,
  kSilu,
  kGelu,
  kGeluTanh,
  kTanh,
  kSigmoid,
  kSoftplus,
  kSin,
  kCount
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
  const T* z;                     // [samples, widths[0]]
  const T* const* weights;        // [layers], host, of [widths[l + 1], widths[l]]
  const T* const* biases;         // [layers], host, of null or [widths[l + 1]]
  const std::int64_t* widths;     // [layers + 1], host
  const Activation* activations;  // [layers + 1], host
  const std::int32_t* skips;      // [2 * (layers + 1)], host, the value added to each, none: -1; null: no sums
  const T* const* shifts;         // [2 * (layers + 1)], host, of null or [samples, width], added to each; null with skips
  PathNodes nodes;
  std::int64_t samples;
  std::int32_t layers;
  bool halves_alone;  // CUDA, float: products may round residuals and weights to halves, of 11 bits
  // CUDA, float: z and the shifts side by side before they were rounded, and what they were made from, where equal rows are one
  // sample. Unresolved pairs are measured in float64 with these, as far as that is plain; null: none.
  const double* exact;  // [samples, exact_width]
  const float* inputs;  // [samples, input_width]
  std::int64_t exact_width, input_width;
  std::int64_t networks;           // 1 or more; on the CPU 1
  T* connectivity = nullptr;       // [samples, samples]; kUnresolved for a pair that T cannot resolve
  std::int64_t* counts = nullptr;  // [2], outputs counted as constant over the resolved pairs; unresolved pairs
  void* workspace = nullptr;
  const Watch* watch = nullptr;  // CPU; null: nobody
};

/// Linear connectivity of the polynomials that match each output's ends and end slopes along a path, and with the
/// midpoint its value there; over the same nodes.
template <class T>
struct HermiteConnectivity : PathConnectivity<T> {
  bool midpoint;
};

/// Mean over outputs of r2 along each path, from f's outputs at the interior nodes and at the samples.
template <class T>
struct PathR2 {
  const T* interior;           // [pairs, nodes.interior, outputs]
  const T* ends;               // [samples, outputs]
  const std::int64_t* first;   // [pairs], sample at t = 0
  const std::int64_t* second;  // [pairs], sample at t = 1
  PathNodes nodes;
  std::int64_t pairs, samples, outputs;
  const T* rounding;               // [2, outputs] or null: f's own rounding of each output, in epsilons, and `least` of
                                   // share_of_output
  T* r2 = nullptr;                 // [pairs]; kUnresolved for a pair that T cannot resolve
  std::int64_t* counts = nullptr;  // [2], outputs counted as constant over the resolved pairs; unresolved pairs
  T* workspace = nullptr;
};

/// Jacobians of act_L(W_L ... act_1(W_1 act_0(x) + b_1) ... + b_L) at the samples.
template <class T>
struct Jacobian {
  const T* x;                     // [samples, widths[0]]
  const T* const* weights;        // [layers], host, of [widths[l + 1], widths[l]]
  const T* const* biases;         // [layers], host, of null or [widths[l + 1]]
  const std::int64_t* widths;     // [layers + 1], host
  const Activation* activations;  // [layers + 1], host
  std::int64_t samples;
  std::int32_t layers;    // 1 or more
  T* jacobian = nullptr;  // [samples, widths[layers], widths[0]]
  T* outputs = nullptr;   // CUDA: [samples, widths[layers]] or null: the chain's
  void* workspace = nullptr;
  const Watch* watch = nullptr;  // CPU; null: nobody
};

/// Rows whose squared distance is at most this share of the larger one's squared norm are the same: (32 epsilon)^2,
/// the features' own rounding.
constexpr double kSameFeatures = 0x1p-94;

/// Euclidean distances of rows of features. The same rows as first and second: symmetric, half the work.
/// On the CPU float32 distances are of the Gram form, but those of close rows.
template <class T>
struct JacobianDistance {
  const double* first;   // [first_samples, features]
  const double* second;  // [second_samples, features]
  std::int64_t first_samples, second_samples, features;
  bool squared;
  bool connectivity;      // CUDA: 1 - |f - s|^2 / (|f|^2 + |s|^2) of two rows in place of their distance; of zeros 1
  T* distance = nullptr;  // [first_samples, second_samples]
  double* workspace = nullptr;
  const Watch* watch = nullptr;  // CPU; null: nobody
};

constexpr std::int64_t kIsometryUnits = 256;  // at most: one block makes B

/// Of a chain whose one nonlinearity is between two Linear layers, J_i = last diag(s_i) first: B with
/// |J_i - J_j| = |B s_i - B s_j|, so B^T B = M = (last^T last) o (first first^T).
template <class T>
struct JacobianIsometry {
  const T* first;  // [units, inputs]
  const T* last;   // [outputs, units]
  std::int64_t units, inputs, outputs;
  double* isometry = nullptr;  // [units, units], B's transpose
  double* lost = nullptr;      // [2], a bound for the share of a squared distance that B's rounding takes, a NaN or Inf
                               // where M has no factor; and a 0
  double* workspace = nullptr;
};

/// Rows B s_i, where s_i are the slopes of activation(first x_i + bias).
template <class T>
struct JacobianFeatures {
  const T* x;              // [samples, inputs]
  const T* first;          // [units, inputs]
  const T* bias;           // [units] or null
  const double* isometry;  // [units, units], B's transpose
  std::int64_t samples, inputs, units;
  Activation activation;
  double* features = nullptr;   // [samples, units]
  double* workspace = nullptr;  // [samples, units], the slopes
};

/// What jacobian_distance gives of those rows, made and measured in one go: a call from Python for each part, and memory, cost
/// more than the kernels.
template <class T>
struct IsometryDistance {
  const T* x;          // [samples, inputs]
  const T* first;      // [units, inputs]
  const T* bias;       // [units] or null
  const T* last;       // [outputs, units]
  const T* last_bias;  // [outputs] or null
  std::int64_t samples, inputs, units, outputs;
  Activation activation;
  bool squared, connectivity;  // as of JacobianDistance
  T* distance = nullptr;       // [samples, samples]
  double* lost = nullptr;      // [2], as of JacobianIsometry
  T* y = nullptr;              // [samples, outputs] or null: the chain's outputs
  double* workspace = nullptr;
};

/// Nonlinear complexity in bits of each row of eigenvalues.
template <class T>
struct SpectralEntropy {
  const T* eigenvalues;  // [batch, samples]
  std::int64_t batch, samples;
  double* bits = nullptr;  // [batch]
};

/// Eigenvalues of symmetric matrices, rising; of their lower triangles, as LAPACK takes them. NaN for a matrix that is not
/// finite. On the CPU it is LAPACK, which lmnfast/ops calls. A workspace of 0 bytes: the matrices do not fit on the device.
template <class T>
struct SymmetricEigenvalues {
  const T* matrices;  // [batch, samples, samples]
  std::int64_t batch, samples;
  double* eigenvalues = nullptr;  // [batch, samples]
  void* workspace = nullptr;
};

/// Numbers that check_outputs finds.
constexpr int kFindings = 12;

/// What a public call has to know of its numbers before they count: one pass over all, for one copy to the host.
template <class T>
struct CheckOutputs {
  const T* x;                  // [samples, inputs]
  const T* y;                  // [samples, outputs], f's at x
  const T* again;              // [samples, outputs] or null: the chain's that f is taken for
  const T* expected;           // [samples, outputs] or null: the model's that f was cut from
  const T* matrix;             // [samples, columns] or null: a connectivity, Jacobians
  const std::int64_t* counts;  // [2] or null: as path_connectivity leaves them
  std::int64_t samples, inputs, outputs, columns;
  double epsilon;                 // of the dtype that f's outputs come in
  std::int64_t* found = nullptr;  // [kFindings], as lmnfast/ops/check_outputs.py says
};

/// x W^T + b, each sum in float64 from the first input to the last: the same bits for any thread count and any batch, which a
/// BLAS does not promise. It is what a chain's samples go through once before path_connectivity.
template <class T>
struct Linear {
  const T* x;             // [networks, samples, inputs]
  const T* weight;        // [networks, outputs, inputs]
  const T* bias;          // [networks, outputs] or null
  std::int64_t networks;  // 1 or more; on the CPU 1
  std::int64_t samples, inputs, outputs;
  double* z = nullptr;  // [networks, samples, outputs]
  void* workspace = nullptr;
  const Watch* watch = nullptr;  // CPU; null: nobody
};

// ---- the lists ----

// Each op of this file once. X is expanded for both dtypes of every op by LMN_BOTH, or as N says.
#define LMN_BOTH(X, Op) X(Op<float>) X(Op<double>)

// With a kernel in csrc/cpu and one in csrc/cuda:
#define LMN_ON_BOTH(N, X)   \
  N(X, CheckOutputs)        \
  N(X, HermiteConnectivity) \
  N(X, Jacobian)            \
  N(X, JacobianDistance)    \
  N(X, Linear)              \
  N(X, PathConnectivity)    \
  N(X, PathR2)              \
  N(X, SpectralEntropy)
// In csrc/cuda alone:
#define LMN_ON_CUDA_ALONE(N, X) \
  N(X, IsometryDistance)        \
  N(X, JacobianFeatures)        \
  N(X, JacobianIsometry)        \
  N(X, SymmetricEigenvalues)

#define LMN_CPU_OPS(X) LMN_ON_BOTH(LMN_BOTH, X)
#define LMN_OPS(X) LMN_ON_BOTH(LMN_BOTH, X) LMN_ON_CUDA_ALONE(LMN_BOTH, X)

/// Whether an op needs memory. One that does not has no workspace functions.
template <class Op, class = void>
constexpr bool kHasWorkspace = false;
template <class Op>
constexpr bool kHasWorkspace<Op, decltype(void(Op::workspace))> = true;

// The entries in csrc/cuda. They take device pointers (what is marked host stays there) on the current device, on which the
// workspace depends, enqueue on the stream, and return null, or what went wrong. Those in csrc/cpu: csrc/levels.h.
#define LMN_DECLARE(Op)                  \
  std::size_t cuda_workspace(const Op&); \
  const char* cuda_run(const Op&, CUstream_st*);
LMN_OPS(LMN_DECLARE)
#undef LMN_DECLARE

}  // namespace lmn
