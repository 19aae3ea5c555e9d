// The network at the samples: the values of every layer, and from the same sums the size of the terms behind each value.
// Pairs read both at the ends of their paths.
#pragma once
#include "plan.h"
#include "product.h"

namespace lmn {
namespace {

/// a = act(z), and the slope act'(z) if `slope` is not null. All [count].
template <class T, ActivationKind kKind>
__attribute__((noinline)) void values(T* a, T* slope, const T* z, std::int64_t count, Activation activation) {
  using V = Vector<T>;
  const T alpha = T(activation.alpha), beta = T(activation.beta);
  for (std::int64_t n = 0; n < count; n += kLanes<T>) {
    store<V>(a + n, activate<kKind>(load<V>(z + n), alpha, beta));
    if (slope) store<V>(slope + n, derivative<kKind>(load<V>(z + n), alpha, beta));
  }
}

/// Adds the network's skip inputs of a value to one unit of that value, at the samples of a block. squares: the sum of the
/// squares of all terms behind the value.
template <class T>
void add_earlier(const Plan<T>& plan, int value, std::int64_t block, std::int64_t unit, double (&sums)[kLanes<T>],
                 double (&squares)[kLanes<T>]) {
  const PathConnectivity<T>& op = plan.op;
  if (!op.skips) return;
  const std::int64_t width = op.widths[value / 2];
  if (op.skips[value] >= 0) {
    const Layer<T>& source = plan.layers[op.skips[value] / 2];
    const T* earlier = (op.skips[value] % 2 ? source.v : source.z) + (block * width + unit) * kLanes<T>;
    const T* rounding = source.rounding + (block * width + unit) * kLanes<T>;
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      sums[lane] += double(earlier[lane]);
      squares[lane] += double(rounding[lane]) * double(rounding[lane]);
    }
  }
  if (const T* shift = op.shifts[value]) {
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const double term = double(shift[at_most(block * kLanes<T> + lane, op.samples - 1) * width + unit]);
      sums[lane] += term;
      squares[lane] += term * term;
    }
  }
}

/// Fills z, a, v and rounding of every layer for one block of lanes. Lanes beyond the last sample repeat the last sample.
/// Products are summed in double: the rounding of a node averages out along a path, but the rounding of an end would tilt
/// the whole path.
template <class T>
void forward_block(const Plan<T>& plan, std::int64_t block) {
  const PathConnectivity<T>& op = plan.op;
  for (int l = 0; l <= op.layers; ++l) {
    const Layer<T>& layer = plan.layers[l];
    const std::int64_t start = block * layer.width * kLanes<T>;
    T *z = layer.z + start, *rounding = layer.rounding + start;
    if (l == 0) {
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        const T* sample = op.z + at_most(block * kLanes<T> + lane, op.samples - 1) * layer.width;
        for (std::int64_t unit = 0; unit < layer.width; ++unit) z[unit * kLanes<T> + lane] = sample[unit];
      }
      for (std::int64_t n = 0; n < layer.width * kLanes<T>; ++n) rounding[n] = z[n] < 0 ? -z[n] : z[n];
    } else {
      const Layer<T>& before = plan.layers[l - 1];
      const T* a = before.v + block * before.width * kLanes<T>;
      const T* a_rounding = before.rounding + block * before.width * kLanes<T>;
      for (std::int64_t unit = 0; unit < layer.width; ++unit) {
        const double bias = op.biases[l - 1] ? double(op.biases[l - 1][unit]) : 0.0;
        double sums[kLanes<T>], squares[kLanes<T>];
        for (double& sum : sums) sum = bias;
        for (double& square : squares) square = bias * bias;
        const T* weights = op.weights[l - 1] + unit * before.width;
        for (std::int64_t d = 0; d < before.width; ++d) {
          const double weight = double(weights[d]);
          for (int lane = 0; lane < kLanes<T>; ++lane) {
            const double term = weight * double(a_rounding[d * kLanes<T> + lane]);
            sums[lane] += weight * double(a[d * kLanes<T> + lane]);
            squares[lane] += term * term;
          }
        }
        add_earlier(plan, 2 * l, block, unit, sums, squares);
        for (int lane = 0; lane < kLanes<T>; ++lane) {
          z[unit * kLanes<T> + lane] = T(sums[lane]);
          rounding[unit * kLanes<T> + lane] = T(sqrt(squares[lane] + sums[lane] * sums[lane]));
          if (l == op.layers) {
            plan.y_low[start + unit * kLanes<T> + lane] = T(sums[lane] - double(T(sums[lane])));
          }
        }
      }
    }
    if (layer.a != layer.z || layer.slope) {
      T* const slope = layer.slope ? layer.slope + start : nullptr;
      with_kind(layer.activation.kind, [&](auto kind) {
        values<T, kind.value>(layer.a + start, slope, z, layer.width * kLanes<T>, layer.activation);
      });
    }
    for (std::int64_t unit = 0; layer.v != layer.z && unit < layer.width; ++unit) {
      const std::int64_t at = unit * kLanes<T>;
      double sums[kLanes<T>], squares[kLanes<T>];
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        sums[lane] = double(layer.a[start + at + lane]);
        squares[lane] = double(rounding[at + lane]) * double(rounding[at + lane]);
      }
      if (layer.v != layer.a) {
        add_earlier(plan, 2 * l + 1, block, unit, sums, squares);
        for (int lane = 0; lane < kLanes<T>; ++lane) layer.v[start + at + lane] = T(sums[lane]);
      }
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        rounding[at + lane] = T(sqrt(squares[lane] + sums[lane] * sums[lane]));
      }
    }
  }
}

/// Scales each output to order 1. If the chain ends in a product, the weights of that product take the factor.
template <class T>
void scale_outputs(Plan<T>& plan) {
  const Layer<T>& last = plan.last();
  T common = 0;  // the scale of the output that varies most
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    T largest = 0;
    for (std::int64_t block = 0; block < plan.lane_blocks; ++block) {
      const T *y = last.v + (block * plan.outputs + k) * kLanes<T>, origin = last.v[k * kLanes<T>];
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        const T difference = y[lane] < origin ? origin - y[lane] : y[lane] - origin;
        largest = largest < difference ? difference : largest;
      }
    }
    plan.scale[k] = output_scale(largest);
    if (largest > 0 && (common == 0 || plan.scale[k] < common)) common = plan.scale[k];
    for (std::int64_t block = 0; block < plan.lane_blocks; ++block) {
      const std::int64_t start = (block * plan.outputs + k) * kLanes<T>;
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        plan.y[start + lane] = last.v[start + lane] * plan.scale[k];
        plan.y_low[start + lane] = plan.ends_linear() ? plan.y_low[start + lane] * plan.scale[k] : 0;
        plan.rounding[start + lane] = last.rounding[start + lane] * plan.scale[k];
      }
    }
  }
  common = common > 0 ? common : T(1);
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    plan.stabiliser[k] = scaled_stabiliser(plan.op.stabiliser, plan.scale[k]);
    plan.pooling[k] = pooling_factor(common, plan.scale[k]);
  }
  plan.pooled_stabiliser = scaled_stabiliser(plan.op.stabiliser, common);
  if (!plan.ends_in_product()) return;
  scale_packed(last.packed, plan.outputs, plan.layers[plan.op.layers - 1].width, plan.scale);
}

/// Copies a sample's values side by side, the layout in which they are read if the sample is the first of a pair.
template <class T>
void fill_rows(const Plan<T>& plan, std::int64_t i) {
  const std::int64_t lane_block = i / kLanes<T>, lane = i % kLanes<T>;
  T *z = plan.row_z + i * plan.total_width, *a = plan.row_a + i * plan.total_width;
  T* slope = plan.row_slope + (plan.stencil.size == 0 ? 0 : i * plan.total_width);
  for (int l = 0; l <= plan.op.layers; ++l) {
    const Layer<T>& layer = plan.layers[l];
    const std::int64_t start = lane_block * layer.width * kLanes<T> + lane;
    for (std::int64_t unit = 0; unit < layer.width; ++unit) {
      *z++ = layer.z[start + unit * kLanes<T>];
      *a++ = layer.a[start + unit * kLanes<T>];
      if (layer.slope) *slope++ = layer.slope[start + unit * kLanes<T>];
    }
  }
  for (std::int64_t k = 0; k < plan.outputs; ++k) {
    const std::int64_t from = (lane_block * plan.outputs + k) * kLanes<T> + lane;
    plan.row_y[i * plan.outputs + k] = plan.y[from];
    plan.row_y_low[i * plan.outputs + k] = plan.y_low[from];
    plan.row_rounding[i * plan.outputs + k] = plan.rounding[from];
  }
}

}  // namespace
}  // namespace lmn
