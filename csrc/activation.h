// Each activation and its derivative, written once for host and device. The definitions are PyTorch's, at kinks too.
//
// V is a float, a double, or a vector of lanes of either. The including file must first define, for V:
// exp, expm1, log1p_unit (on [0, 1]), erf, sin, cos, tanh, reciprocal, absolute, fma, splat<V>(scalar).
#pragma once
#include "common.h"

namespace lmn {
namespace {

template <class V>
LMN_FN V sigmoid(V z) {
  return reciprocal(1 + exp(-z));
}

template <ActivationKind kKind, class V, class T>
LMN_FN V activate(V z, T alpha, T beta) {
  if constexpr (kKind == ActivationKind::kIdentity) return z;
  if constexpr (kKind == ActivationKind::kRelu) return z < V{} ? V{} : z;
  if constexpr (kKind == ActivationKind::kLeakyRelu) return z < V{} ? z * alpha : z;
  if constexpr (kKind == ActivationKind::kElu) return z < V{} ? alpha * expm1(z) : z;
  if constexpr (kKind == ActivationKind::kSilu) return z * sigmoid(z);
  if constexpr (kKind == ActivationKind::kGelu) {
    return z * static_cast<T>(0.5) * (1 + erf(z * static_cast<T>(0.70710678118654752440)));
  }
  if constexpr (kKind == ActivationKind::kGeluTanh) {
    const V inner = static_cast<T>(0.79788456080286535588) * (z + static_cast<T>(0.044715) * z * z * z);
    return z * static_cast<T>(0.5) * (1 + tanh(inner));
  }
  if constexpr (kKind == ActivationKind::kTanh) return tanh(z);
  if constexpr (kKind == ActivationKind::kSigmoid) return sigmoid(z);
  if constexpr (kKind == ActivationKind::kSoftplus) {
    const V scaled = z * alpha;
    const V smooth = (scaled < V{} ? V{} : scaled) + log1p_unit(exp(-absolute(scaled)));
    return scaled > splat<V>(beta) ? z : smooth / alpha;
  }
  if constexpr (kKind == ActivationKind::kSin) return sin(z);
}

template <ActivationKind kKind, class V, class T>
LMN_FN V derivative(V z, T alpha, T beta) {
  const V one = splat<V>(static_cast<T>(1));
  if constexpr (kKind == ActivationKind::kIdentity) return one;
  if constexpr (kKind == ActivationKind::kRelu) return z > V{} ? one : V{};
  if constexpr (kKind == ActivationKind::kLeakyRelu) return z > V{} ? one : splat<V>(alpha);
  if constexpr (kKind == ActivationKind::kElu) return z > V{} ? one : alpha * exp(z);
  if constexpr (kKind == ActivationKind::kSilu) {
    // Where exp(-z) overflows, the slope is 0, as PyTorch's is. The host's exp has a largest result in place of infinity, and
    // z of -1e36 times what that leaves of the sigmoid would not be small.
    constexpr T kLeast = static_cast<T>(sizeof(T) == 4 ? -88.7 : -709.7);
    const V s = sigmoid(z);
    return z < splat<V>(kLeast) ? V{} : s * (1 + z * (1 - s));
  }
  if constexpr (kKind == ActivationKind::kGelu) {
    const V normal = exp(z * z * static_cast<T>(-0.5)) * static_cast<T>(0.39894228040143267794);
    return static_cast<T>(0.5) * (1 + erf(z * static_cast<T>(0.70710678118654752440))) + z * normal;
  }
  if constexpr (kKind == ActivationKind::kGeluTanh) {
    constexpr T kScale = static_cast<T>(0.79788456080286535588), kCubic = static_cast<T>(0.044715);
    const V t = tanh(kScale * (z + kCubic * z * z * z)), steep = 1 - t * t;
    const V inner = kScale * (1 + 3 * kCubic * z * z);
    const V slope = static_cast<T>(0.5) * z * steep * inner;
    return static_cast<T>(0.5) * (1 + t) + (steep > V{} ? slope : V{});  // for larger |z|, z * z may be infinite
  }
  if constexpr (kKind == ActivationKind::kTanh) {
    const V t = tanh(z);
    return 1 - t * t;
  }
  if constexpr (kKind == ActivationKind::kSigmoid) {
    const V s = sigmoid(z);
    return s * (1 - s);
  }
  if constexpr (kKind == ActivationKind::kSoftplus) {
    const V scaled = z * alpha;
    return scaled > splat<V>(beta) ? one : sigmoid(scaled);
  }
  if constexpr (kKind == ActivationKind::kSin) return cos(z);
}

/// Calls function(constant), where `constant.value` is the activation's kind, known to the compiler. All code inside a kernel
/// that takes every kind chooses by this function. Elsewhere kinds stand by name: where only some have code of their own, as
/// code for all would be compiled in vain (find_chained in cuda/path_connectivity.cu; shallow_range and enqueue64 in
/// cuda/chain64.cuh; residuals_of in cuda/panels/residuals.cuh), and in cuda/jacobian.cuh, where `forward` chooses a kernel to
/// launch, which is for the host alone, and this function is for both.
template <int kKind>
struct KindConstant {
  static constexpr ActivationKind value = ActivationKind(kKind);
};
template <int kKind = 0, class Function>
LMN_FN void with_kind(ActivationKind kind, const Function& function) {
  if constexpr (kKind + 1 < int(ActivationKind::kCount)) {
    if (int(kind) != kKind) return with_kind<kKind + 1>(kind, function);
  }
  function(KindConstant<kKind>{});
}

/// The chord of z, or of a, between two samples. Both use this one function and so round alike: a linear piece then has a
/// residual of exactly 0.
template <class V, class T>
LMN_FN V on_chord(V first, V second, T t) {
  return fma(splat<V>(t), second - first, first);
}

/// Whether the activation is 0 only where it underflows.
LMN_FN bool never_zero(ActivationKind kind) {
  return kind == ActivationKind::kSigmoid || kind == ActivationKind::kSilu || kind == ActivationKind::kSoftplus;
}

}  // namespace
}  // namespace lmn
