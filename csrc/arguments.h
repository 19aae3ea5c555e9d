// What the Python class of each op takes, and the op made of it. csrc/bind.cpp alone includes this file.
#pragma once
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"

namespace {

/// An address that comes from Python as an integer. It converts to a pointer of any type.
struct Address {
  std::uintptr_t number = 0;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(number);
  }
};

inline void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string(what) + ": a length or a value that does not fit");
}

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
  template <class T>
  static auto results(lmn::PathConnectivityBackward<T>& op) {
    return std::tie(op.connectivity, op.pooled, op.counts, op.products, op.sums, op.ends);
  }
  template <class Any>
  static void expect_for_cpu(const Any& op) {
    expect(op.networks == 1, "networks");
  }
};
using PathConnectivityArguments = ConnectivityArguments<lmn::PathConnectivity>;
using HermiteConnectivityArguments = ConnectivityArguments<lmn::HermiteConnectivity, bool>;  // midpoint

using PathConnectivityBackwardArguments = ConnectivityArguments<lmn::PathConnectivityBackward, Address>;  // gradient

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

}  // namespace
