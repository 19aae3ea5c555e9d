// The only pybind11 file: integers to pointers, GIL released, errors to Python. It checks the lengths of the lists that it is
// given, so that no kernel reads past their ends. It sees tensors as addresses alone; lmnfast/_native.py says who checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "levels.h"
#include "ops.h"

namespace py = pybind11;

namespace {

/// An address that comes from Python as an integer. It converts to a pointer of any type.
struct Address {
  std::uintptr_t number = 0;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(number);
  }
};

}  // namespace

template <>
struct py::detail::type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("int"));
  bool load(handle source, bool convert) {
    make_caster<std::uintptr_t> number;
    if (!number.load(source, convert)) return false;
    value.number = cast_op<std::uintptr_t>(number);
    return true;
  }
};

namespace {

void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string(what) + ": a length or a value that does not fit");
}

// While a kernel runs, this object runs Python's signal handlers, so that Ctrl-C stops the kernel, and passes the finished
// share to a callable. If a handler or the callable raises, the kernel stops, and `raise` raises the error again.
class Attention {
 public:
  // signals: whether this is Python's main thread. Python runs signal handlers only there.
  Attention(bool signals, py::object progress) : signals_(signals), progress_(std::move(progress)) {}
  const lmn::Watch* watch() const { return signals_ || !progress_.is_none() ? &watch_ : nullptr; }
  void raise() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static bool stop(void* state, double done) {
    Attention& self = *static_cast<Attention*>(state);
    py::gil_scoped_acquire held;
    try {
      if (self.signals_ && PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!self.progress_.is_none()) self.progress_(done);
    } catch (...) {
      self.error_ = std::current_exception();
    }
    return self.error_ != nullptr;
  }
  const bool signals_;
  const py::object progress_;
  std::exception_ptr error_;
  const lmn::Watch watch_{&stop, this};
};

// ---- the arguments of each op ----

// <Op>Arguments makes an op from the arguments of the Python class, and holds the arrays that the op's host pointers point at.
// The parameters of `op` are those of the Python class after is_double. `results` lists the op's members that are results, in
// the order in which Python passes their addresses to `run`.

struct Arguments {
  /// Throws for arguments that the kernels of csrc/cpu do not take.
  template <class Op>
  static void expect_for_cpu(const Op&) {}
};

struct CheckOutputsArguments : Arguments {
  template <class T>
  lmn::CheckOutputs<T> op(Address x, Address y, Address again, Address expected, Address matrix, Address counts,
                          std::int64_t samples, std::int64_t inputs, std::int64_t outputs, std::int64_t columns,
                          double epsilon) {
    return {x, y, again, expected, matrix, counts, samples, inputs, outputs, columns, epsilon};
  }
  template <class Op>
  static auto results(Op& op) {
    return std::tie(op.found);
  }
};

/// A quadrature rule: the interior nodes t and their weights, with the mean and variance of t over all nodes.
struct Nodes {
  std::vector<double> t, weights;
  lmn::PathNodes keep(std::vector<double>&& t_, std::vector<double>&& weights_, double mean_t, double variance_t) {
    expect(t_.size() == weights_.size() && !t_.empty(), "nodes");
    t = std::move(t_), weights = std::move(weights_);
    return {t.data(), weights.data(), std::int32_t(t.size()), mean_t, variance_t};
  }
};

/// Linear layers with activations between them.
struct Layers {
  std::vector<std::uintptr_t> weights, biases;
  std::vector<std::int64_t> widths;
  std::vector<lmn::Activation> activations;

  void keep(std::vector<std::uintptr_t>&& weights_, std::vector<std::uintptr_t>&& biases_, std::vector<std::int64_t>&& widths_,
            const std::vector<int>& kinds, const std::vector<double>& parameters) {
    expect(biases_.size() == weights_.size() && widths_.size() == weights_.size() + 1 && kinds.size() == widths_.size(),
           "weights, biases, widths, activations");
    expect(parameters.size() == 2 * kinds.size(), "parameters");
    for (std::size_t n = 0; n < kinds.size(); ++n) {
      activations.push_back(activation(kinds[n], parameters[2 * n], parameters[2 * n + 1]));
    }
    weights = std::move(weights_), biases = std::move(biases_), widths = std::move(widths_);
  }
  static lmn::Activation activation(int kind, double alpha, double beta) {
    expect(0 <= kind && kind < int(lmn::ActivationKind::kCount), "activations");
    return {lmn::ActivationKind(kind), alpha, beta};
  }
};

/// Addresses as an array of pointers: an integer and a pointer have the same bits.
template <class T>
const T* const* pointers(const std::vector<std::uintptr_t>& addresses) {
  static_assert(sizeof(std::uintptr_t) == sizeof(T*));
  return reinterpret_cast<const T* const*>(addresses.data());
}

/// More: the types of the members that an op has in addition to those of PathConnectivity.
template <template <class> class Op, class... More>
struct ConnectivityArguments : Arguments {
  Layers layers;
  Nodes nodes;
  std::vector<std::int32_t> skips;  // empty: no sums
  std::vector<std::uintptr_t> shifts;

  template <class T>
  Op<T> op(Address z, std::vector<std::uintptr_t> weights, std::vector<std::uintptr_t> biases, std::vector<std::int64_t> widths,
           const std::vector<int>& kinds, const std::vector<double>& parameters, std::vector<std::int32_t> skips_,
           std::vector<std::uintptr_t> shifts_, std::vector<double> t, std::vector<double> node_weights, double mean_t,
           double variance_t, std::int64_t samples, bool halves_alone, Address exact, Address inputs, std::int64_t exact_width,
           std::int64_t input_width, std::int64_t networks, double stabiliser, Address first, Address second,
           std::int64_t pairs, bool pools, More... more) {
    layers.keep(std::move(weights), std::move(biases), std::move(widths), kinds, parameters);
    skips = std::move(skips_), shifts = std::move(shifts_);
    expect(skips.size() == shifts.size() && (skips.empty() || skips.size() == 2 * kinds.size()), "skips, shifts");
    for (std::size_t n = 0; n < skips.size(); ++n) expect(-1 <= skips[n] && skips[n] < int(n), "skips");
    std::int64_t moving = layers.widths[0];  // columns of z and of the shifts
    for (std::size_t n = 0; n < shifts.size(); ++n) moving += shifts[n] ? layers.widths[n / 2] : 0;
    expect(exact.number ? inputs.number && sizeof(T) == 4 && exact_width == moving && input_width >= 0 : !inputs.number,
           "exact, inputs");
    expect(networks >= 1, "networks");
    expect(stabiliser >= 0 && (first.number == 0) == (second.number == 0) && (first.number ? pairs >= 0 : pairs == 0),
           "stabiliser, first, second, pairs");
    const bool sums = !skips.empty();
    return {lmn::PathConnectivity<T>{z,
                                     pointers<T>(layers.weights),
                                     pointers<T>(layers.biases),
                                     layers.widths.data(),
                                     layers.activations.data(),
                                     sums ? skips.data() : nullptr,
                                     sums ? pointers<T>(shifts) : nullptr,
                                     nodes.keep(std::move(t), std::move(node_weights), mean_t, variance_t),
                                     samples,
                                     std::int32_t(layers.weights.size()),
                                     halves_alone,
                                     exact,
                                     inputs,
                                     exact_width,
                                     input_width,
                                     networks,
                                     stabiliser,
                                     first,
                                     second,
                                     pairs,
                                     pools},
            more...};
  }
  template <class Any>
  static auto results(Any& op) {
    return std::tie(op.connectivity, op.pooled, op.counts);
  }
  template <class Any>
  static void expect_for_cpu(const Any& op) {
    expect(op.networks == 1, "networks");
  }
};
using PathConnectivityArguments = ConnectivityArguments<lmn::PathConnectivity>;
using HermiteConnectivityArguments = ConnectivityArguments<lmn::HermiteConnectivity, bool>;  // midpoint

struct BlockCoefficientsArguments : Arguments {
  template <class T>
  lmn::BlockCoefficients<T> op(Address z, Address shift, Address own, Address cross, Address first, Address second, Address t,
                               Address polynomials, double epsilon, double scale, std::int64_t samples, std::int64_t rows,
                               std::int64_t units, int interior, int degrees, int begin, int end, bool gated, int kind,
                               double alpha, double beta) {
    expect(0 < interior && interior <= lmn::kMostCoefficients, "interior");
    expect(0 <= begin && begin <= end && end <= degrees && degrees <= lmn::kMostCoefficients, "begin, end, degrees");
    expect(rows == 0 || (own.number == 0) == (cross.number == 0), "own, cross");  // an array of no rows has no address
    const T factor = T(scale);
    const lmn::Activation activation = Layers::activation(kind, alpha, beta);
    return {z,       shift, own,   cross,    first,   second, t,   polynomials, epsilon,   factor,
            samples, rows,  units, interior, degrees, begin,  end, gated,       activation};
  }
  template <class Op>
  static auto results(Op& op) {
    return std::tie(op.coefficients, op.energy);
  }
};

struct JacobianArguments : Arguments {
  Layers layers;

  template <class T>
  lmn::Jacobian<T> op(Address x, std::vector<std::uintptr_t> weights, std::vector<std::uintptr_t> biases,
                      std::vector<std::int64_t> widths, const std::vector<int>& kinds, const std::vector<double>& parameters,
                      std::int64_t samples) {
    expect(!weights.empty(), "weights");
    layers.keep(std::move(weights), std::move(biases), std::move(widths), kinds, parameters);
    return {x,
            pointers<T>(layers.weights),
            pointers<T>(layers.biases),
            layers.widths.data(),
            layers.activations.data(),
            samples,
            std::int32_t(layers.weights.size())};
  }
  template <class Op>
  static auto results(Op& op) {
    return std::tie(op.jacobian, op.outputs);
  }
};

struct JacobianDistanceArguments : Arguments {
  template <class T>
  lmn::JacobianDistance<T> op(Address first, Address second, std::int64_t first_samples, std::int64_t second_samples,
                              std::int64_t features, bool squared, bool connectivity) {
    return {first, second, first_samples, second_samples, features, squared, connectivity};
  }
  template <class Op>
  static auto results(Op& op) {
    return std::tie(op.distance);
  }
  template <class Op>
  static void expect_for_cpu(const Op& op) {
    expect(!op.connectivity, "connectivity");
  }
};

struct JacobianIsometryArguments : Arguments {
  template <class T>
  lmn::JacobianIsometry<T> op(Address first, Address last, std::int64_t units, std::int64_t inputs, std::int64_t outputs) {
    return {first, last, units, inputs, outputs};
  }
  template <class Op>
  static auto results(Op& op) {
    return std::tie(op.isometry, op.lost);
  }
};

struct JacobianFeaturesArguments : Arguments {
  template <class T>
  lmn::JacobianFeatures<T> op(Address x, Address first, Address bias, Address isometry, std::int64_t samples,
                              std::int64_t inputs, std::int64_t units, int kind, double alpha, double beta) {
    return {x, first, bias, isometry, samples, inputs, units, Layers::activation(kind, alpha, beta)};
  }
  template <class Op>
  static auto results(Op& op) {
    return std::tie(op.features);
  }
};

struct IsometryDistanceArguments : Arguments {
  template <class T>
  lmn::IsometryDistance<T> op(Address x, Address first, Address bias, Address last, Address last_bias, std::int64_t samples,
                              std::int64_t inputs, std::int64_t units, std::int64_t outputs, int kind, double alpha,
                              double beta, bool squared, bool connectivity) {
    return {x,       first,       bias, last, last_bias, samples, inputs, units, outputs, Layers::activation(kind, alpha, beta),
            squared, connectivity};
  }
  template <class Op>
  static auto results(Op& op) {
    return std::tie(op.distance, op.lost, op.y);
  }
};

struct LinearArguments : Arguments {
  template <class T>
  lmn::Linear<T> op(Address x, Address weight, Address bias, std::int64_t networks, std::int64_t samples, std::int64_t inputs,
                    std::int64_t outputs) {
    return {x, weight, bias, networks, samples, inputs, outputs};
  }
  template <class Op>
  static auto results(Op& op) {
    return std::tie(op.z);
  }
  template <class Op>
  static void expect_for_cpu(const Op& op) {
    expect(op.networks == 1, "networks");
  }
};

struct PathR2Arguments : Arguments {
  Nodes nodes;

  template <class T>
  lmn::PathR2<T> op(Address interior, Address ends, Address first, Address second, std::vector<double> t,
                    std::vector<double> weights, double mean_t, double variance_t, std::int64_t pairs, std::int64_t samples,
                    std::int64_t outputs, Address rounding, double stabiliser) {
    expect(stabiliser >= 0, "stabiliser");
    return {interior, ends,    first,   second,   nodes.keep(std::move(t), std::move(weights), mean_t, variance_t),
            pairs,    samples, outputs, rounding, stabiliser};
  }
  template <class Op>
  static auto results(Op& op) {
    return std::tie(op.r2, op.pooled, op.counts);
  }
};

struct SpectralEntropyArguments : Arguments {
  template <class T>
  lmn::SpectralEntropy<T> op(Address eigenvalues, std::int64_t batch, std::int64_t samples) {
    return {eigenvalues, batch, samples};
  }
  template <class Op>
  static auto results(Op& op) {
    return std::tie(op.bits);
  }
};

struct SymmetricEigenvaluesArguments : Arguments {
  template <class T>
  lmn::SymmetricEigenvalues<T> op(Address matrices, std::int64_t batch, std::int64_t samples) {
    return {matrices, batch, samples};
  }
  template <class Op>
  static auto results(Op& op) {
    return std::tie(op.eigenvalues);
  }
};

// ---- a call ----

template <class OpArguments, class Op, class... Values>
Op made_by(Op (OpArguments::*)(Values...));

/// An op in one of the two dtypes. It exists from its creation in Python, over the allocation of its workspace, to its run.
template <class OpArguments>
class Call {
  using Op =
      std::variant<decltype(made_by(&OpArguments::template op<float>)), decltype(made_by(&OpArguments::template op<double>))>;
  using Members = decltype(OpArguments::results(std::declval<std::variant_alternative_t<0, Op>&>()));

 public:
  static constexpr std::size_t kResults = std::tuple_size_v<Members>;
  using Results = std::array<Address, kResults>;

  template <class... Values>
  explicit Call(bool is_double, Values&&... values)
      : op_(is_double ? Op(std::in_place_index<1>, arguments_.template op<double>(std::forward<Values>(values)...))
                      : Op(std::in_place_index<0>, arguments_.template op<float>(std::forward<Values>(values)...))) {}
  Call(const Call&) = delete;  // op_ points into arguments_

  std::size_t workspace(int threads) const {
    return std::visit([&](const auto& op) { return lmn::level_in_use().workspace(op, threads); }, op_);
  }
  /// Returns null or an error message.
  const char* run(const Results& results, Address workspace, int threads, bool signals, py::object progress) const {
    const lmn::Level& level = lmn::level_in_use();
    const Attention attention(signals, std::move(progress));
    const auto run_one = [&](auto op) {
      if (!level.emulates_cuda) OpArguments::expect_for_cpu(op);
      complete(op, results, workspace, attention.watch());
      return level.run(op, threads);
    };
    const char* error = nullptr;
    {
      const py::gil_scoped_release release;
      error = std::visit(run_one, op_);
    }
    attention.raise();
    return error;
  }
#if defined(LMN_CUDA)
  std::size_t workspace_cuda() const {
    const auto of_one = [](const auto& op) {
      if constexpr (lmn::kHasWorkspace<std::decay_t<decltype(op)>>) return lmn::cuda_workspace(op);
      return std::size_t(0);
    };
    return std::visit(of_one, op_);
  }
  const char* run_cuda(const Results& results, Address workspace, Address stream) const {
    const auto run_one = [&](auto op) {
      complete(op, results, workspace, nullptr);
      return lmn::cuda_run(op, stream);
    };
    return std::visit(run_one, op_);
  }
#endif

 private:
  template <class Any>
  static void complete(Any& op, const Results& results, Address workspace, [[maybe_unused]] const lmn::Watch* watch) {
    std::size_t n = 0;
    std::apply([&](auto&... member) { ((member = results[n++]), ...); }, OpArguments::results(op));
    if constexpr (lmn::kHasWorkspace<Any>) op.workspace = workspace;
    if constexpr (lmn::kHasWatch<Any>) op.watch = watch;
  }

  OpArguments arguments_;
  const Op op_;
};

// Throws an error with the op's name in snake case: raise("PathR2", "no memory") throws "path_r2: no memory".
void raise(const char* name, const char* error) {
  if (!error) return;
  std::string message;
  for (const char* letter = name; *letter; ++letter) {
    const bool capital = 'A' <= *letter && *letter <= 'Z';
    if (capital && letter != name) message += '_';
    message += char(capital ? *letter - 'A' + 'a' : *letter);
  }
  throw std::runtime_error(message + ": " + error);
}

template <std::size_t>
using Each = Address;

/// Defines the Python class of one op. Its constructor takes is_double and the op's arguments. Its methods are `workspace` and
/// `run` for the CPU, and in a build with CUDA `workspace_cuda` and `run_cuda`.
template <class OpArguments, class Op, class... Values, std::size_t... n>
void bind(py::module_& m, const char* name, Op (OpArguments::*)(Values...), std::index_sequence<n...>) {
  using OfOp = Call<OpArguments>;
  py::class_<OfOp>(m, name)
      .def(py::init(
          [](bool is_double, Values... values) { return std::make_unique<OfOp>(is_double, std::forward<Values>(values)...); }))
      .def("workspace", &OfOp::workspace)
      .def("run",
           [name](const OfOp& call, Each<n>... results, Address workspace, int threads, bool signals, py::object progress) {
             raise(name, call.run({results...}, workspace, threads, signals, std::move(progress)));
           })
#if defined(LMN_CUDA)
      .def("workspace_cuda", &OfOp::workspace_cuda)
      .def("run_cuda", [name](const OfOp& call, Each<n>... results, Address workspace,
                              Address stream) { raise(name, call.run_cuda({results...}, workspace, stream)); })
#endif
      ;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "lmnfast kernels; use lmnfast.ops, which checks and allocates.";
  m.def("isas", [] {
    std::vector<std::string> names;
    for (int n = 0; n < lmn::level_count(); ++n) {
      if (lmn::levels()[n]->supported) names.push_back(lmn::levels()[n]->name);
    }
    return names;
  });
  m.def("isa", [] { return std::string(lmn::level_in_use().name); });
  m.def("use_isa", &lmn::use_level);
  // A large result lies on fresh pages. The page faults take longer than the writes: 16 ms of 19 for 64 MB. This function does
  // nothing on a system without huge pages.
  m.def("advise_huge_pages", [](std::uintptr_t address, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kPage = 4096;
    const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
  });
  m.attr("cuda_archs") = LMN_CUDA_ARCHS;  // "" in a build without CUDA
  m.attr("activation_count") = int(lmn::ActivationKind::kCount);
  m.attr("findings") = lmn::kFindings;
  m.attr("isometry_units") = lmn::kIsometryUnits;
#define LMN_BIND(m, Op) \
  bind(m, #Op, &Op##Arguments::template op<float>, std::make_index_sequence<Call<Op##Arguments>::kResults>());
  LMN_ON_BOTH(LMN_BIND, m)
  LMN_ON_CUDA_ALONE(LMN_BIND, m)
}
