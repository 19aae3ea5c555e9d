// The only pybind11 file: integers to pointers, GIL released, errors to Python. csrc/arguments.h checks the lengths of the
// lists that come from Python, so that no kernel reads past their ends. Tensors are addresses alone; lmnfast/_native.py says
// who checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <exception>
#include <memory>
#include <variant>

#include "arguments.h"
#include "levels.h"

namespace py = pybind11;

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
