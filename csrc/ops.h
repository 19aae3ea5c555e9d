// The whole native surface. Each op has one plain struct here, and one line in the lists at the end. The declarations of the
// kernels, the table of levels and the bindings are made from these lists. This file uses no torch, no CUDA header and no
// container.
//
// Kernels own nothing: results and workspace come from the caller. The one rule for workspaces: an op that needs memory has a
// member `workspace`, 64-byte aligned, and its kernel on each device has a function that returns the number of bytes it needs
// there. The members that a call fills in last (results, workspace, watch) come last and are null until then.
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

/// A function that a long CPU kernel calls about ten times a second, on the thread that called the kernel. The kernel stops
/// when the function returns true, and its result is then undefined. done: the finished share of the work, from 0 to 1.
struct Watch {
  bool (*stop)(void* state, double done);
  void* state;
};

/// A quadrature rule on [0, 1], in the form that the kernels use. Both ends of [0, 1] are nodes of the rule, but they are not
/// in the arrays: the chord residual is zero there, so the ends only contribute to mean_t and variance_t.
struct PathNodes {
  const double* t;        // [interior], host
  const double* weights;  // [interior], host; together with the weights of the ends they sum to 1
  std::int32_t interior;
  double mean_t, variance_t;
};

/// Linear connectivity of y = act_L(W_L ... act_1(W_1 act_0(z) + b_1) ... + b_L).
///
/// Residual networks: the values of the chain are numbered 0 to 2 L + 1. Value 2 l is the value of layer l before its
/// activation, value 2 l + 1 is the value after it. `skips` adds an earlier value of the same width to a value. `shifts` adds
/// a tensor [samples, width] to a value: it is for skips from values that are affine in the samples, which have no chord
/// residual. Nothing can be added to value 0, nor to a value 2 l + 1 whose activation is the identity (it would be the same as
/// value 2 l).
///
/// Several networks: they have the same shape, and the arrays of one network follow those of the network before, so z is
/// [networks, samples, width].
template <class T>
struct PathConnectivity {
  const T* z;                     // [samples, widths[0]]
  const T* const* weights;        // [layers], host, of [widths[l + 1], widths[l]]
  const T* const* biases;         // [layers], host, of null or [widths[l + 1]]
  const std::int64_t* widths;     // [layers + 1], host
  const Activation* activations;  // [layers + 1], host
  const std::int32_t* skips;      // [2 * (layers + 1)], host, per value the number of the added value or -1; null: no sums
  const T* const* shifts;         // [2 * (layers + 1)], host, per value null or [samples, width]; null if skips is null
  PathNodes nodes;
  std::int64_t samples;
  std::int32_t layers;
  bool halves_alone;  // CUDA, float: products may round residuals and weights to halves, of 11 bits
  // CUDA, float; null or both: with these the kernels measure unresolved pairs in float64, except those that
  // csrc/cuda/unresolved.cuh leaves to Python.
  const double* exact;  // [samples, exact_width], z and the shifts side by side, before they were rounded to float
  const float* inputs;  // [samples, input_width], the network's inputs; equal rows are the same sample
  std::int64_t exact_width, input_width;
  std::int64_t networks;  // 1 or more; on the CPU 1
  double stabiliser;      // 0, or what is added to var(t) var(y), in the square of the outputs' unit
  // CPU; null: all pairs. [pairs], samples at t = 0 and t = 1. Both results are then [pairs].
  const std::int64_t *first, *second;
  std::int64_t pairs;
  bool pools;                      // whether `pooled` will not be null; CUDA's kernels and their workspace depend on it
  T* connectivity = nullptr;       // [samples, samples]; kUnresolved for a pair that T cannot resolve
  T* pooled = nullptr;             // null, or as connectivity: r2 pooled over the outputs
  std::int64_t* counts = nullptr;  // [2], outputs counted as constant over the resolved pairs; unresolved pairs
  void* workspace = nullptr;
  const Watch* watch = nullptr;  // CPU; null: the kernel runs to its end
};

/// Linear connectivity of polynomials in place of the outputs, over the same nodes. Each polynomial matches an output's values
/// and slopes at both ends of the path; with `midpoint` it also matches the output's value in the middle.
template <class T>
struct HermiteConnectivity : PathConnectivity<T> {
  bool midpoint;
};

/// The gradient of sum over pairs of gradient * r2 in the weights of the chain and in its samples. The path from sample i to
/// sample j has nodes m with weights omega_m, also at its ends. delta_m is the gradient in the outputs at node m:
///   delta_m = omega_m (P (t_m - mean t) - Q (e_m - mean e)),   P = 2 g u ((1 - r2) + u te),   Q = 2 g u^2 var(t),
/// per output, with u = cov / (var(t) var(y) + stabiliser), te = sum omega (t - mean t) e, and g = gradient / outputs. If
/// `pools`, the gradient is of the pooled r2; docs/mathematics.md has P and Q of it. Every number is one of a difference that
/// the kernels know without cancellation.
///
/// Each delta goes back through the activations and the weights. A value of the chain at an interior node has the adjoint
/// a_m. The results are sums of adjoints. On the CPU they contain all; on CUDA Python adds what depends on a sample alone
/// (lmnfast/ops/path_connectivity_backward.py): the way back of `ends`, and in `products` the sums times the inputs' values at
/// the samples. Pairs that T cannot resolve have kUnresolved in `connectivity`, and no part in the sums. `connectivity`,
/// `pooled` and `counts` are as of PathConnectivity. On CUDA `exact` and `inputs` are null.
template <class T>
struct PathConnectivityBackward : PathConnectivity<T> {
  const T* gradient;  // [samples, samples], where the entries (i, j) and (j, i) are added; or [pairs]
  // [layers], of [widths[l + 1], widths[l]]: the sum over pairs and interior nodes of the adjoint of value 2 (l + 1) times the
  // chord residual of value 2 l + 1
  double* products = nullptr;
  // For value 0, for each value 2 l, and for each value 2 l + 1 that has a shift, in the order of their numbers, [samples,
  // width]: the sum over the pairs of a sample and the interior nodes of the value's adjoint, times 1 - t_m for the sample at
  // t = 0 and t_m for the sample at t = 1
  double* sums = nullptr;
  double* ends = nullptr;  // [samples, widths[layers]]: the sum over the pairs of a sample of delta at the sample's own end
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
  const T* rounding;               // [2, outputs] or null. Row 0: f's own rounding of each output, in epsilons. Row 1:
                                   // `least` of share_of_output (csrc/statistics.h)
  double stabiliser;               // as of PathConnectivity
  T* r2 = nullptr;                 // [pairs]; kUnresolved for a pair that T cannot resolve
  T* pooled = nullptr;             // null, or [pairs]: r2 pooled over the outputs
  std::int64_t* counts = nullptr;  // [2], outputs counted as constant over the resolved pairs; unresolved pairs
  T* workspace = nullptr;
};

/// The hidden layer of a transformer's block along paths, as coefficients of polynomials. The layer is h = act(a), or act(a) g
/// with a gate. Its pre-activations are a(t) = s(t) z(t) + shift, g alike, where z(t) is the chord between two samples' rows
/// and s(t) = 1, or, behind a normalisation, 1 / sqrt((1 - t)^2 own_i + 2 t (1 - t) cross + t^2 own_j + epsilon).
///
/// e(t) = h(t) - (h_i + t (h_j - h_i)) is the residual from the chord. Coefficient d of a unit is the sum over the interior
/// nodes m of polynomials[d][m] e(t_m). `orthonormal_polynomials` in lmnfast/quadrature.py makes them.
template <class T>
struct BlockCoefficients {
  const T* z;                  // [samples, units]; with a gate [samples, 2 * units], the gate's units last
  const T* shift;              // null, or as long as a row of z
  const double* own;           // [samples] or null: no normalisation
  const double* cross;         // [rows], null if own is null
  const std::int64_t* first;   // [rows], sample at t = 0
  const std::int64_t* second;  // [rows], sample at t = 1
  const double* t;             // [interior]
  const double* polynomials;   // [degrees, interior]
  double epsilon;
  T scale;  // a power of two that brings hidden values to the order of 1: the squares in `energy` are of scaled values
  std::int64_t samples, rows, units;
  std::int32_t interior, degrees;  // at most kMostCoefficients each
  std::int32_t begin, end;         // the degrees whose coefficients are written
  bool gated;
  Activation activation;
  T* coefficients = nullptr;  // [end - begin, rows, units]
  double* energy = nullptr;   // [rows, degrees], sum over units of the squared coefficient times scale
};
constexpr int kMostCoefficients = 64;

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
  T* outputs = nullptr;   // CUDA: [samples, widths[layers]], the chain's outputs, or null
  void* workspace = nullptr;
  const Watch* watch = nullptr;  // CPU; null: the kernel runs to its end
};

/// Two rows count as the same if their squared distance is at most this share of the larger row's squared norm. The share is
/// (32 epsilon)^2, the features' own rounding.
constexpr double kSameFeatures = 0x1p-94;

/// Euclidean distances of rows of features. If `first` and `second` are the same array, the result is exactly symmetric, for
/// half the work. On the CPU float32 distances come from the Gram form, except for close rows.
template <class T>
struct JacobianDistance {
  const double* first;   // [first_samples, features]
  const double* second;  // [second_samples, features]
  std::int64_t first_samples, second_samples, features;
  bool squared;
  bool connectivity;      // CUDA: 1 - |f - s|^2 / (|f|^2 + |s|^2) in place of the distance of rows f and s; 1 if both are 0
  T* distance = nullptr;  // [first_samples, second_samples]
  double* workspace = nullptr;
  const Watch* watch = nullptr;  // CPU; null: the kernel runs to its end
};

constexpr std::int64_t kIsometryUnits = 256;  // the largest number of units, because one block computes B

/// The matrix B of a chain with one nonlinearity between two Linear layers. Its Jacobians are J_i = last diag(s_i) first.
/// B has |J_i - J_j| = |B s_i - B s_j|, because B^T B = M = (last^T last) o (first first^T).
template <class T>
struct JacobianIsometry {
  const T* first;  // [units, inputs]
  const T* last;   // [outputs, units]
  std::int64_t units, inputs, outputs;
  double* isometry = nullptr;  // [units, units], B's transpose
  double* lost = nullptr;      // [2]: a bound for the share of a squared distance that is lost to B's rounding (NaN or Inf if
                               // M has no Cholesky factor); and 0
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

/// JacobianIsometry, JacobianFeatures and JacobianDistance in one call. Three calls from Python and their allocations take
/// longer than the kernels.
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
  T* y = nullptr;              // [samples, outputs], the chain's outputs, or null
  double* workspace = nullptr;
};

/// Nonlinear complexity in bits of each row of eigenvalues.
template <class T>
struct SpectralEntropy {
  const T* eigenvalues;  // [batch, samples]
  std::int64_t batch, samples;
  double* bits = nullptr;  // [batch]
};

/// Eigenvalues of symmetric matrices in rising order, from the lower triangles, as in LAPACK. A matrix that is not finite gives
/// NaN. On the CPU lmnfast/ops calls LAPACK instead. A workspace of 0 bytes means that the matrices do not fit on the device.
template <class T>
struct SymmetricEigenvalues {
  const T* matrices;  // [batch, samples, samples]
  std::int64_t batch, samples;
  double* eigenvalues = nullptr;  // [batch, samples]
  void* workspace = nullptr;
};

/// The number of results of check_outputs.
constexpr int kFindings = 12;

/// All checks of the numbers of a public call, in one pass, so that one copy to the host is enough.
template <class T>
struct CheckOutputs {
  const T* x;                  // [samples, inputs]
  const T* y;                  // [samples, outputs], f's outputs at x
  const T* again;              // [samples, outputs] or null: outputs of the chain that f was recognised as
  const T* expected;           // [samples, outputs] or null: outputs of the model that f was cut from
  const T* matrix;             // [samples, columns] or null: a connectivity, or Jacobians
  const std::int64_t* counts;  // [2] or null: counts of path_connectivity
  std::int64_t samples, inputs, outputs, columns;
  double epsilon;                 // of the dtype in which f returns its outputs
  std::int64_t* found = nullptr;  // [kFindings], as described in lmnfast/reference.py
};

/// x W^T + b, each sum in float64 from the first input to the last. The bits are the same for any thread count and any batch,
/// which a BLAS does not promise. A chain's first Linear is applied to its samples by this op, before path_connectivity.
template <class T>
struct Linear {
  const T* x;             // [networks, samples, inputs]
  const T* weight;        // [networks, outputs, inputs]
  const T* bias;          // [networks, outputs] or null
  std::int64_t networks;  // 1 or more; on the CPU 1
  std::int64_t samples, inputs, outputs;
  double* z = nullptr;  // [networks, samples, outputs]
  void* workspace = nullptr;
  const Watch* watch = nullptr;  // CPU; null: the kernel runs to its end
};

// ---- the lists ----

// Each op of this file is listed once. The lists apply N(X, Op) to every op. With N = LMN_BOTH, X is expanded for both dtypes.
#define LMN_BOTH(X, Op) X(Op<float>) X(Op<double>)

// Ops with a kernel in csrc/cpu and one in csrc/cuda.
#define LMN_ON_BOTH(N, X)        \
  N(X, BlockCoefficients)        \
  N(X, CheckOutputs)             \
  N(X, HermiteConnectivity)      \
  N(X, Jacobian)                 \
  N(X, JacobianDistance)         \
  N(X, Linear)                   \
  N(X, PathConnectivity)         \
  N(X, PathConnectivityBackward) \
  N(X, PathR2)                   \
  N(X, SpectralEntropy)
// Ops with a kernel in csrc/cuda only.
#define LMN_ON_CUDA_ALONE(N, X) \
  N(X, IsometryDistance)        \
  N(X, JacobianFeatures)        \
  N(X, JacobianIsometry)        \
  N(X, SymmetricEigenvalues)

#define LMN_CPU_OPS(X) LMN_ON_BOTH(LMN_BOTH, X)
#define LMN_OPS(X) LMN_ON_BOTH(LMN_BOTH, X) LMN_ON_CUDA_ALONE(LMN_BOTH, X)

/// Whether an op needs memory. An op that needs none has no workspace functions.
template <class Op, class = void>
constexpr bool kHasWorkspace = false;
template <class Op>
constexpr bool kHasWorkspace<Op, decltype(void(Op::workspace))> = true;

/// Whether a kernel of an op looks at a watch.
template <class Op, class = void>
constexpr bool kHasWatch = false;
template <class Op>
constexpr bool kHasWatch<Op, decltype(void(Op::watch))> = true;

// The entries in csrc/cuda. All pointers are device pointers of the current device, except those marked "host". The size of the
// workspace depends on the current device. cuda_run enqueues on the stream and returns null or an error message. The entries in
// csrc/cpu are in csrc/levels.h.
#define LMN_DECLARE(Op)                  \
  std::size_t cuda_workspace(const Op&); \
  const char* cuda_run(const Op&, CUstream_st*);
LMN_OPS(LMN_DECLARE)
#undef LMN_DECLARE

}  // namespace lmn
