// The only pybind11 file: integers to pointers, GIL released, errors to Python. It checks the lengths of what it is given,
// so that no kernel reads past an end; lmnfast/ops checks all else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "ops.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

#if defined(LMN_CUDA) || defined(LMN_EMULATED)
void raise(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": " + error);
}
#endif

void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string(what) + ": a length or a value that does not fit");
}

// While a kernel is at work: runs Python's handlers of signals, so that Ctrl-C reaches it, and tells a callable how much
// is done. What either raises is raised again once the kernel has returned.
class Attention {
 public:
  // signals: whether this is Python's main thread, where alone handlers run.
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

// function(watch) without Python's lock.
template <class Function>
void attended(bool signals, py::object progress, const Function& function) {
  const Attention attention(signals, std::move(progress));
  {
    py::gil_scoped_release release;
    function(attention.watch());
  }
  attention.raise();
}

struct Nodes {  // interior t and weights with mean and variance of t over all nodes
  std::vector<double> t, weights;
  double mean_t, variance_t;
  lmn::PathNodes view() const { return {t.data(), weights.data(), std::int32_t(t.size()), mean_t, variance_t}; }
};

// One path_connectivity or hermite_connectivity call, kept while Python asks for its workspace and allocates it.
struct ConnectivityCall {
  bool is_double;
  Address z;
  std::vector<Address> weights, biases;
  std::vector<std::int64_t> widths;
  std::vector<lmn::Activation> activations;
  std::vector<std::int32_t> skips;  // empty: no sums
  std::vector<Address> shifts;
  Nodes nodes;
  std::int64_t samples;
  bool halves_alone;
  std::optional<bool> midpoint;  // none: path_connectivity
  Address exact, inputs;
  std::int64_t exact_width, input_width;
  std::int64_t networks;

  template <class T>
  lmn::PathConnectivity<T> path(Address connectivity, Address counts, Address workspace,
                                const lmn::Watch* watch) const {
    // Vectors of addresses are arrays of pointers.
    static_assert(sizeof(Address) == sizeof(T*));
    return {pointer<const T>(z),
            reinterpret_cast<const T* const*>(weights.data()),
            reinterpret_cast<const T* const*>(biases.data()),
            widths.data(),
            activations.data(),
            skips.empty() ? nullptr : skips.data(),
            skips.empty() ? nullptr : reinterpret_cast<const T* const*>(shifts.data()),
            nodes.view(),
            samples,
            std::int32_t(weights.size()),
            halves_alone,
            pointer<T>(connectivity),
            pointer<std::int64_t>(counts),
            pointer<void>(workspace),
            watch,
            pointer<const double>(exact),
            pointer<const float>(inputs),
            exact_width,
            input_width,
            networks};
  }
  /// function(op) of the kind and dtype that this is.
  template <class Function>
  auto with_op(Address connectivity, Address counts, Address workspace, const lmn::Watch* watch,
               const Function& function) const {
    const auto call = [&](auto zero) {
      using T = decltype(zero);
      const lmn::PathConnectivity<T> op = path<T>(connectivity, counts, workspace, watch);
      return midpoint ? function(lmn::HermiteConnectivity<T>{op, *midpoint}) : function(op);
    };
    return is_double ? call(0.0) : call(0.0f);
  }
  std::size_t workspace(int threads) const {
    return with_op(0, 0, 0, nullptr, [&](const auto& op) { return workspace_of(op, threads); });
  }
  void run(Address connectivity, Address counts, Address workspace, int threads, bool signals,
           py::object progress) const {
    expect(networks == 1 || !lmn::level_in_use().is_default, "networks");  // the emulated kernels take several
    attended(signals, std::move(progress), [&](const lmn::Watch* watch) {
      with_op(connectivity, counts, workspace, watch, [&](const auto& op) { run_on_cpu(op, threads); });
    });
  }
#if defined(LMN_CUDA)
  std::size_t workspace_cuda() const {
    return with_op(0, 0, 0, nullptr, [&](const auto& op) { return workspace_on_cuda(op); });
  }
  void run_cuda(Address connectivity, Address counts, Address workspace, Address stream) const {
    raise(midpoint ? "hermite_connectivity" : "path_connectivity",
          with_op(connectivity, counts, workspace, nullptr,
                  [&](const auto& op) { return run_on_cuda(op, pointer<CUstream_st>(stream)); }));
  }
#endif

 private:
  template <class T>
  static std::size_t workspace_of(const lmn::PathConnectivity<T>& op, int threads) {
    return lmn::path_connectivity_workspace(op, threads);
  }
  template <class T>
  static std::size_t workspace_of(const lmn::HermiteConnectivity<T>& op, int threads) {
    return lmn::hermite_connectivity_workspace(op, threads);
  }
  template <class T>
  static void run_on_cpu(const lmn::PathConnectivity<T>& op, int threads) {
    lmn::path_connectivity_cpu(op, threads);
  }
  template <class T>
  static void run_on_cpu(const lmn::HermiteConnectivity<T>& op, int threads) {
    lmn::hermite_connectivity_cpu(op, threads);
  }
#if defined(LMN_CUDA)
  template <class T>
  static std::size_t workspace_on_cuda(const lmn::PathConnectivity<T>& op) {
    return lmn::path_connectivity_cuda_workspace(op);
  }
  template <class T>
  static std::size_t workspace_on_cuda(const lmn::HermiteConnectivity<T>& op) {
    return lmn::hermite_connectivity_cuda_workspace(op);
  }
  template <class T>
  static const char* run_on_cuda(const lmn::PathConnectivity<T>& op, CUstream_st* stream) {
    return lmn::path_connectivity_cuda(op, stream);
  }
  template <class T>
  static const char* run_on_cuda(const lmn::HermiteConnectivity<T>& op, CUstream_st* stream) {
    return lmn::hermite_connectivity_cuda(op, stream);
  }
#endif
};

// One jacobian call, kept while Python asks for its workspace and allocates it.
struct JacobianCall {
  bool is_double;
  Address x;
  std::vector<Address> weights, biases;
  std::vector<std::int64_t> widths;
  std::vector<lmn::Activation> activations;
  std::int64_t samples;

  template <class Function>
  auto with_op(Address jacobian, Address outputs, Address workspace, const lmn::Watch* watch, const Function& function) const {
    const auto call = [&](auto zero) {
      using T = decltype(zero);
      return function(lmn::Jacobian<T>{pointer<const T>(x), reinterpret_cast<const T* const*>(weights.data()),
                                       reinterpret_cast<const T* const*>(biases.data()), widths.data(),
                                       activations.data(), samples, std::int32_t(weights.size()),
                                       pointer<T>(jacobian), pointer<T>(outputs), pointer<void>(workspace), watch});
    };
    return is_double ? call(0.0) : call(0.0f);
  }
  std::size_t workspace(int threads) const {
    return with_op(0, 0, 0, nullptr, [&](const auto& op) { return lmn::jacobian_workspace(op, threads); });
  }
  void run(Address jacobian, Address outputs, Address workspace, int threads, bool signals, py::object progress) const {
    attended(signals, std::move(progress), [&](const lmn::Watch* watch) {
      with_op(jacobian, outputs, workspace, watch, [&](const auto& op) { lmn::jacobian_cpu(op, threads); });
    });
  }
#if defined(LMN_CUDA)
  std::size_t workspace_cuda() const {
    return with_op(0, 0, 0, nullptr, [&](const auto& op) { return lmn::jacobian_cuda_workspace(op); });
  }
  void run_cuda(Address jacobian, Address outputs, Address workspace, Address stream) const {
    raise("jacobian", with_op(jacobian, outputs, workspace, nullptr, [&](const auto& op) {
            return lmn::jacobian_cuda(op, pointer<CUstream_st>(stream));
          }));
  }
#endif
};

std::vector<lmn::Activation> activations_of(const std::vector<int>& kinds, const std::vector<double>& parameters) {
  expect(parameters.size() == 2 * kinds.size(), "parameters");
  std::vector<lmn::Activation> activations;
  for (std::size_t n = 0; n < kinds.size(); ++n) {
    expect(0 <= kinds[n] && kinds[n] < int(lmn::ActivationKind::kCount), "activations");
    activations.push_back({lmn::ActivationKind(kinds[n]), parameters[2 * n], parameters[2 * n + 1]});
  }
  return activations;
}

void expect_chain(std::size_t weights, std::size_t biases, std::size_t widths, std::size_t activations) {
  expect(biases == weights && widths == weights + 1 && activations == widths, "weights, biases, widths, activations");
}

JacobianCall jacobian_call(bool is_double, Address x, std::vector<Address> weights, std::vector<Address> biases,
                           std::vector<std::int64_t> widths, const std::vector<int>& kinds,
                           const std::vector<double>& parameters, std::int64_t samples) {
  expect_chain(weights.size(), biases.size(), widths.size(), kinds.size());
  expect(!weights.empty(), "weights");
  return {is_double, x, std::move(weights), std::move(biases), std::move(widths), activations_of(kinds, parameters),
          samples};
}

template <class T>
lmn::JacobianDistance<T> jacobian_distance(Address first, Address second, std::int64_t first_samples,
                                           std::int64_t second_samples, std::int64_t features, bool squared,
                                           bool connectivity, Address distance, Address workspace,
                                           const lmn::Watch* watch) {
  return {pointer<const double>(first), pointer<const double>(second), first_samples, second_samples, features, squared,
          connectivity, pointer<T>(distance), pointer<double>(workspace), watch};
}

ConnectivityCall connectivity_call(bool is_double, Address z, std::vector<Address> weights,
                                       std::vector<Address> biases, std::vector<std::int64_t> widths,
                                       const std::vector<int>& kinds, const std::vector<double>& parameters,
                                       std::vector<std::int32_t> skips, std::vector<Address> shifts,
                                       std::vector<double> t, std::vector<double> node_weights, double mean_t,
                                       double variance_t, std::int64_t samples, bool halves_alone,
                                       std::optional<bool> midpoint, Address exact, Address inputs,
                                       std::int64_t exact_width, std::int64_t input_width, std::int64_t networks) {
  expect_chain(weights.size(), biases.size(), widths.size(), kinds.size());
  expect(skips.size() == shifts.size() && (skips.empty() || skips.size() == 2 * kinds.size()), "skips, shifts");
  for (std::size_t n = 0; n < skips.size(); ++n) expect(-1 <= skips[n] && skips[n] < int(n), "skips");
  expect(t.size() == node_weights.size() && !t.empty(), "nodes");
  std::int64_t moving = widths[0];  // columns of z and of the shifts
  for (std::size_t n = 0; n < shifts.size(); ++n) moving += shifts[n] ? widths[n / 2] : 0;
  expect(exact ? inputs && !is_double && exact_width == moving && input_width >= 0 : !inputs, "exact, inputs");
  expect(networks >= 1, "networks");
  return {is_double,   z, std::move(weights), std::move(biases), std::move(widths), activations_of(kinds, parameters),
          std::move(skips), std::move(shifts), {std::move(t), std::move(node_weights), mean_t, variance_t}, samples,
          halves_alone, midpoint, exact, inputs, exact_width, input_width, networks};
}

template <class T>
lmn::PathR2<T> path_r2(Address interior, Address ends, Address first, Address second, const Nodes& nodes,
                       std::int64_t pairs, std::int64_t samples, std::int64_t outputs, Address r2, Address counts,
                       Address rounding, Address workspace) {
  return {pointer<const T>(interior), pointer<const T>(ends), pointer<const std::int64_t>(first),
          pointer<const std::int64_t>(second), nodes.view(), pairs, samples, outputs, pointer<T>(r2),
          pointer<std::int64_t>(counts), pointer<const T>(rounding), pointer<T>(workspace)};
}

template <class T>
lmn::CheckOutputs<T> check_outputs(Address x, Address y, Address again, Address expected, Address matrix, Address counts,
                                   std::int64_t samples, std::int64_t inputs, std::int64_t outputs, std::int64_t columns,
                                   double epsilon, Address found) {
  return {pointer<const T>(x),        pointer<const T>(y),
          pointer<const T>(again),    pointer<const T>(expected),
          pointer<const T>(matrix),   pointer<const std::int64_t>(counts),
          samples,                    inputs,
          outputs,                    columns,
          epsilon,                    pointer<std::int64_t>(found)};
}

template <class T>
lmn::SpectralEntropy<T> spectral_entropy(Address eigenvalues, Address bits, std::int64_t batch, std::int64_t samples) {
  return {pointer<const T>(eigenvalues), pointer<double>(bits), batch, samples};
}

template <class T>
lmn::SymmetricEigenvalues<T> symmetric_eigenvalues(Address matrices, Address eigenvalues, std::int64_t batch,
                                                   std::int64_t samples, Address workspace) {
  return {pointer<const T>(matrices), pointer<double>(eigenvalues), batch, samples, pointer<void>(workspace)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "lmnfast kernels; use lmnfast.ops, which checks and allocates.";

  m.def("isas", [] {
    std::vector<std::string> names;
    for (int n = 0; n < lmn::level_count(); ++n) {
      if (lmn::levels()[n].supported) names.push_back(lmn::levels()[n].name);
    }
    return names;
  });
  m.def("isa", [] { return std::string(lmn::level_in_use().name); });
  m.def("use_isa", &lmn::use_level);
  // A large result comes on fresh pages, and faulting them in one by one costs more than writing them: 16 ms of 19 for
  // 64 MB. Where the system does not have huge pages this does nothing.
  m.def("advise_huge_pages", [](Address address, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr Address kPage = 4096;
    const Address begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
    if (begin < end) madvise(pointer<void>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
  });
  m.attr("cuda_archs") = LMN_CUDA_ARCHS;  // "" in a build without CUDA
  m.attr("activation_count") = int(lmn::ActivationKind::kCount);

  py::class_<ConnectivityCall>(m, "Connectivity")
      .def(py::init(&connectivity_call))
      .def("workspace", &ConnectivityCall::workspace)
      .def("run", &ConnectivityCall::run)
#if defined(LMN_CUDA)
      .def("workspace_cuda", &ConnectivityCall::workspace_cuda)
      .def("run_cuda", &ConnectivityCall::run_cuda)
#endif
      ;

  py::class_<JacobianCall>(m, "Jacobian")
      .def(py::init(&jacobian_call))
      .def("workspace", &JacobianCall::workspace)
      .def("run", &JacobianCall::run)
#if defined(LMN_CUDA)
      .def("workspace_cuda", &JacobianCall::workspace_cuda)
      .def("run_cuda", &JacobianCall::run_cuda)
#endif
      ;
  const auto linear = [](Address x, Address weight, Address bias, std::int64_t samples, std::int64_t inputs,
                         std::int64_t outputs, Address z, Address workspace, const lmn::Watch* watch) {
    return lmn::Linear{pointer<const double>(x), pointer<const double>(weight), pointer<const double>(bias), samples,
                       inputs, outputs, pointer<double>(z), pointer<void>(workspace), watch};
  };
  m.def("linear_workspace", [=](std::int64_t samples, std::int64_t inputs, std::int64_t outputs, int threads) {
    return lmn::linear_workspace(linear(0, 0, 0, samples, inputs, outputs, 0, 0, nullptr), threads);
  });
  m.def("linear", [=](Address x, Address weight, Address bias, std::int64_t samples, std::int64_t inputs,
                      std::int64_t outputs, Address z, Address workspace, int threads, bool signals,
                      py::object progress) {
    attended(signals, std::move(progress), [&](const lmn::Watch* watch) {
      lmn::linear_cpu(linear(x, weight, bias, samples, inputs, outputs, z, workspace, watch), threads);
    });
  });
#if defined(LMN_CUDA) || defined(LMN_EMULATED)
  // Without a counterpart on the CPU, where LAPACK makes B and `linear` is given float64; in an emulated build the stream is 0.
  m.def("wide_linear_cuda", [](bool is_double, Address x, Address weight, Address bias, std::int64_t networks,
                               std::int64_t samples, std::int64_t inputs, std::int64_t outputs, Address z, Address stream) {
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      const lmn::WideLinear<T> op{pointer<const T>(x), pointer<const T>(weight), pointer<const T>(bias),
                                  networks, samples, inputs, outputs, pointer<double>(z)};
      raise("wide_linear", lmn::wide_linear_cuda(op, pointer<CUstream_st>(stream)));
    };
    is_double ? run(0.0) : run(0.0f);
  });
  m.attr("isometry_units") = lmn::kIsometryUnits;
  m.def("isometry_workspace", &lmn::isometry_workspace);
  m.def("jacobian_isometry_cuda", [](bool is_double, Address first, Address last, std::int64_t units,
                                     std::int64_t inputs, std::int64_t outputs, Address isometry, Address lost,
                                     Address workspace, Address stream) {
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      const lmn::JacobianIsometry<T> op{pointer<const T>(first), pointer<const T>(last), units, inputs, outputs,
                                        pointer<double>(isometry), pointer<double>(lost), pointer<double>(workspace)};
      raise("jacobian_isometry", lmn::jacobian_isometry_cuda(op, pointer<CUstream_st>(stream)));
    };
    is_double ? run(0.0) : run(0.0f);
  });
  m.def("jacobian_features_cuda", [](bool is_double, Address x, Address first, Address bias, Address isometry,
                                     std::int64_t samples, std::int64_t inputs, std::int64_t units, int kind, double alpha,
                                     double beta, Address features, Address slopes, Address stream) {
    const lmn::Activation activation = activations_of({kind}, {alpha, beta})[0];
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      const lmn::JacobianFeatures<T> op{pointer<const T>(x), pointer<const T>(first), pointer<const T>(bias),
                                        pointer<const double>(isometry), samples, inputs, units, activation,
                                        pointer<double>(features), pointer<double>(slopes)};
      raise("jacobian_features", lmn::jacobian_features_cuda(op, pointer<CUstream_st>(stream)));
    };
    is_double ? run(0.0) : run(0.0f);
  });
  // Also of an emulated build, whose CPU entry knows no connectivity.
  m.def("jacobian_distance_cuda", [](bool is_double, Address first, Address second, std::int64_t first_samples,
                                     std::int64_t second_samples, std::int64_t features, bool squared, bool connectivity,
                                     Address distance, Address workspace, Address stream) {
    const auto run = [&](auto zero) {
      raise("jacobian_distance",
            lmn::jacobian_distance_cuda(jacobian_distance<decltype(zero)>(first, second, first_samples, second_samples,
                                                                          features, squared, connectivity, distance,
                                                                          workspace, nullptr),
                                        pointer<CUstream_st>(stream)));
    };
    is_double ? run(0.0) : run(0.0f);
  });
  m.def("isometry_distance_workspace", &lmn::isometry_distance_workspace);
  m.def("isometry_distance_cuda", [](bool is_double, Address x, Address first, Address bias, Address last,
                                     Address last_bias, std::int64_t samples, std::int64_t inputs, std::int64_t units,
                                     std::int64_t outputs, int kind, double alpha, double beta, bool squared,
                                     bool connectivity, Address distance, Address y, Address lost, Address workspace,
                                     Address stream) {
    const lmn::Activation activation = activations_of({kind}, {alpha, beta})[0];
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      const lmn::IsometryDistance<T> op{pointer<const T>(x), pointer<const T>(first), pointer<const T>(bias),
                                        pointer<const T>(last), pointer<const T>(last_bias), samples, inputs, units,
                                        outputs, activation, squared, connectivity, pointer<T>(distance), pointer<T>(y),
                                        pointer<double>(lost), pointer<double>(workspace)};
      raise("isometry_distance", lmn::isometry_distance_cuda(op, pointer<CUstream_st>(stream)));
    };
    is_double ? run(0.0) : run(0.0f);
  });
#endif
  m.attr("distance_group") = lmn::kDistanceGroup;
  m.def("jacobian_distance", [](bool is_double, Address first, Address second, std::int64_t first_samples,
                                std::int64_t second_samples, std::int64_t features, bool squared, Address distance,
                                Address workspace, int threads, bool signals, py::object progress) {
    attended(signals, std::move(progress), [&](const lmn::Watch* watch) {
      const auto run = [&](auto zero) {
        lmn::jacobian_distance_cpu(
            jacobian_distance<decltype(zero)>(first, second, first_samples, second_samples, features, squared, false,
                                              distance, workspace, watch), threads);
      };
      is_double ? run(0.0) : run(0.0f);
    });
  });

  m.def("path_r2", [](bool is_double, Address interior, Address ends, Address first, Address second,
                      std::vector<double> t, std::vector<double> weights, double mean_t, double variance_t,
                      std::int64_t pairs, std::int64_t samples, std::int64_t outputs, Address r2, Address counts,
                      Address rounding, Address workspace, int threads) {
    expect(t.size() == weights.size(), "nodes");
    py::gil_scoped_release release;
    const Nodes nodes{std::move(t), std::move(weights), mean_t, variance_t};
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      lmn::path_r2_cpu(path_r2<T>(interior, ends, first, second, nodes, pairs, samples, outputs, r2, counts,
                                    rounding, workspace), threads);
    };
    is_double ? run(0.0) : run(0.0f);
  });

  m.def("check_outputs", [](bool is_double, Address x, Address y, Address again, Address expected, Address matrix,
                            Address counts, std::int64_t samples, std::int64_t inputs, std::int64_t outputs,
                            std::int64_t columns, double epsilon, Address found, int threads) {
    py::gil_scoped_release release;
    const auto run = [&](auto zero) {
      lmn::check_outputs_cpu(check_outputs<decltype(zero)>(x, y, again, expected, matrix, counts, samples, inputs,
                                                           outputs, columns, epsilon, found), threads);
    };
    is_double ? run(0.0) : run(0.0f);
  });
  m.attr("findings") = lmn::kFindings;

  m.def("spectral_entropy", [](bool is_double, Address eigenvalues, Address bits, std::int64_t batch,
                               std::int64_t samples, int threads) {
    py::gil_scoped_release release;
    if (is_double) {
      lmn::spectral_entropy_cpu(spectral_entropy<double>(eigenvalues, bits, batch, samples), threads);
    } else {
      lmn::spectral_entropy_cpu(spectral_entropy<float>(eigenvalues, bits, batch, samples), threads);
    }
  });
#if defined(LMN_CUDA) || defined(LMN_EMULATED)
  m.def("symmetric_eigenvalues_workspace", [](std::int64_t batch, std::int64_t samples) {
    return lmn::symmetric_eigenvalues_cuda_workspace(symmetric_eigenvalues<double>(0, 0, batch, samples, 0));
  });
  m.def("symmetric_eigenvalues_cuda", [](bool is_double, Address matrices, Address eigenvalues, std::int64_t batch,
                                         std::int64_t samples, Address workspace, Address stream) {
    const auto run = [&](auto zero) {
      raise("symmetric_eigenvalues",
            lmn::symmetric_eigenvalues_cuda(
                symmetric_eigenvalues<decltype(zero)>(matrices, eigenvalues, batch, samples, workspace),
                pointer<CUstream_st>(stream)));
    };
    is_double ? run(0.0) : run(0.0f);
  });
#endif
#if defined(LMN_CUDA)
  m.def("path_r2_cuda", [](bool is_double, Address interior, Address ends, Address first, Address second,
                           std::vector<double> t, std::vector<double> weights, double mean_t, double variance_t,
                           std::int64_t pairs, std::int64_t samples, std::int64_t outputs, Address r2,
                           Address counts, Address rounding, Address workspace, Address stream) {
    expect(t.size() == weights.size(), "nodes");
    const Nodes nodes{std::move(t), std::move(weights), mean_t, variance_t};
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      raise("path_r2", lmn::path_r2_cuda(path_r2<T>(interior, ends, first, second, nodes, pairs, samples, outputs, r2,
                                                    counts, rounding, workspace), pointer<CUstream_st>(stream)));
    };
    is_double ? run(0.0) : run(0.0f);
  });
  m.def("check_outputs_cuda", [](bool is_double, Address x, Address y, Address again, Address expected,
                                 Address matrix, Address counts, std::int64_t samples, std::int64_t inputs,
                                 std::int64_t outputs, std::int64_t columns, double epsilon, Address found,
                                 Address stream) {
    const auto run = [&](auto zero) {
      raise("check_outputs",
            lmn::check_outputs_cuda(check_outputs<decltype(zero)>(x, y, again, expected, matrix, counts, samples, inputs,
                                                                  outputs, columns, epsilon, found),
                                    pointer<CUstream_st>(stream)));
    };
    is_double ? run(0.0) : run(0.0f);
  });
  m.def("spectral_entropy_cuda", [](bool is_double, Address eigenvalues, Address bits, std::int64_t batch,
                                    std::int64_t samples, Address stream) {
    CUstream_st* const on = pointer<CUstream_st>(stream);
    const char* error =
        is_double ? lmn::spectral_entropy_cuda(spectral_entropy<double>(eigenvalues, bits, batch, samples), on)
                  : lmn::spectral_entropy_cuda(spectral_entropy<float>(eigenvalues, bits, batch, samples), on);
    raise("spectral_entropy", error);
  });
#endif
}
