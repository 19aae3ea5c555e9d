"""``lmnfast::jacobian_distance``: Euclidean distances of features, accurate also for close rows."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import _native, reference
from .._chain import Activation
from .._native import plain
from ._checks import KERNEL_DTYPES, check_array, check_tensor
from ._hoisted import activation_arguments

# Features are scaled if their largest magnitude is outside this range: squares of larger features overflow, and sums of squares
# of smaller features lose digits.
SMALLEST, LARGEST = 2.0**-400, 2.0**400

# Rows are equal if their squared distance is at most this share of the larger squared norm; kSameFeatures in csrc/ops.h.
SAME_FEATURES = (32 * torch.finfo(torch.float64).eps) ** 2


def jacobian_distance(
    first: Tensor, second: Tensor, squared: bool = False, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``reference.jacobian_distance(first, second, squared)``: ``d[m, n] = |first[m] - second[n]|``.

    The Gram form has no correct digits for close rows. Therefore a float64 result, and every result on CUDA, is a sum of
    squared differences in float64. A float32 result on the CPU has a relative error of at most 1e-5 (2e-6 on the tests'
    features). It is computed in two steps. First a centre is subtracted from the rows, and the rounded float32 rows are
    multiplied. Then every distance below half of the larger row's norm (from the centre) is computed again from differences in
    float64.

    A distance of at most 32 epsilons (float64) of the larger row's norm is exactly 0, because that is the features' own
    rounding. If `first` and `second` are the same tensor, the result is exactly symmetric, for half the work. All distances of
    a row with a NaN or Inf are NaN. The CPU scales features above 2^400 or below 2^-400. On CUDA a row whose sum of squares
    overflows has NaN too, and the distance of rows whose squares underflow is 0. On CUDA the op is enqueued on the current
    stream. It never synchronises, and takes all memory from torch.

    Args:
        first: (M, F) float64.
        second: (N, F) float64 on the same device.
        squared: whether to leave out the square root.
        dtype: of the result, float32 or float64.

    Returns:
        (M, N) of that dtype.

    Raises:
        TypeError: another dtype, or devices that differ.
        ValueError: shapes that do not fit.
        RuntimeError: the CUDA kernels do not run on that device.

    Example:
        >>> features = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
        >>> lmnfast.ops.jacobian_distance(features, features)
        tensor([[0., 5.],
                [5., 0.]], dtype=torch.float64)
    """
    return torch.ops.lmnfast.jacobian_distance(first, second, squared, dtype)


torch.library.define(
    "lmnfast::jacobian_distance", "(Tensor first, Tensor second, bool squared, ScalarType dtype) -> Tensor"
)


@torch.library.impl("lmnfast::jacobian_distance", "default")
def _jacobian_distance(first: Tensor, second: Tensor, squared: bool, dtype: torch.dtype) -> Tensor:
    _check(first, second, dtype)
    same = first.data_ptr() == second.data_ptr() and first.stride() == second.stride()
    same = same and first.shape == second.shape and first.is_neg() == second.is_neg()
    first = plain(first)
    second = first if same else plain(second)
    if first.shape[0] == 0 or second.shape[0] == 0:
        return first.new_empty(len(first), len(second), dtype=dtype)
    exponent = None
    if first.device.type == "cpu":
        largest = largest_magnitude(first) if same else largest_magnitude(first, second)
        if not (SMALLEST <= largest <= LARGEST or largest == 0):
            first, second, exponent = _scaled(first, second)
    wide = dtype if exponent is None else torch.float64
    if _native.by_reference(first):
        with torch.no_grad():
            result = _plain(first, second, squared).to(wide)
    else:
        result = _native.run(*_native_call(first, second, squared, wide))
    if exponent is None:
        return result
    for _ in range(1 + squared):
        result.mul_(2.0**exponent)
    return result.to(dtype)


def _scaled(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, int]:
    """The features divided by 2^exponent, so that their largest magnitude is about 1, and the exponent.

    The scale is a power of two, so that no digit changes. Inf becomes NaN: with Inf the distance to every row would be 0,
    because the squared distance would not be above the rounding of the squared norm.
    """
    same = second is first
    first, second = (v.masked_fill(v.isinf(), math.nan) for v in (first, second))
    largest = largest_magnitude(first.nan_to_num(0.0), second.nan_to_num(0.0))
    exponent = max(-1000, min(1000, math.frexp(largest)[1]))
    first = first * 2.0**-exponent
    return first, first if same else second * 2.0**-exponent, exponent


def largest_magnitude(*features: Tensor) -> float:
    """The largest magnitude, or NaN if a value is NaN. Waits for the device."""
    extremes = torch.stack([extreme for v in features for extreme in torch.aminmax(v)])
    return float(extremes.abs().max())


def _native_call(
    first: Tensor, second: Tensor, squared: bool, dtype: torch.dtype, connectivity: bool = False
) -> tuple[Any, Tensor]:
    """The object of the compiled core, and its empty result.

    connectivity: as in csrc/ops.h; only the CUDA kernels, real or emulated, have it.
    """
    call = _native._C.JacobianDistance(
        dtype == torch.float64,
        first.data_ptr(),
        second.data_ptr(),
        first.shape[0],
        *second.shape,
        squared,
        connectivity,
    )
    return call, _native.empty(first, first.shape[0], second.shape[0], dtype=dtype)


def _plain(first: Tensor, second: Tensor, squared: bool) -> Tensor:
    """The distances by the reference, with 0 for those that are the features' own rounding."""
    square = reference.jacobian_distance(first, second, squared=True)
    norms = [v.square().sum(1) for v in (first, second)]
    same = square <= SAME_FEATURES * torch.maximum(norms[0][:, None], norms[1])
    square = torch.where(same, 0.0, square)
    return square if squared else square.sqrt()


@torch.library.register_fake("lmnfast::jacobian_distance")
def _(first: Tensor, second: Tensor, squared: bool, dtype: torch.dtype) -> Tensor:
    _check(first, second, dtype)
    return first.new_empty(first.shape[0], second.shape[0], dtype=dtype)


def jacobian_connectivity(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """``reference.jacobian_connectivity(first, second)``, by the distance kernels on CUDA. Does not wait for the device.

    Squared distances and norms are float64, and their ratio is rounded once. Rows that are equal to rounding have connectivity
    1 exactly, because their distance is 0. All entries of a row with a NaN or Inf, or whose sum of squares overflows, are NaN,
    also the entry of the row with itself.

    Args:
        first: (M, F) float64.
        second: (N, F) float64. If it is the tensor `first` itself, the result is symmetric, for half the work.
        dtype: of the result, float32 or float64.

    Returns:
        (M, N) of that dtype.

    Raises:
        TypeError, ValueError: as `jacobian_distance`.
    """
    _check(first, second, dtype)
    rows = plain(first)
    second = rows if second is first else plain(second)
    return _native.run(*_native_call(rows, second, False, dtype, connectivity=True))


# Features on CUDA ------------------------------------------------------------------------------------------


def has_isometry(first: Tensor, last: Tensor) -> bool:
    """Whether `jacobian_isometry` takes these weights, and its features are fewer than the Jacobians' numbers."""
    units = len(first)
    fits = first.dtype in KERNEL_DTYPES and units < len(last) * first.shape[1]
    return fits and _native.on_cuda(first) and units <= _native._C.isometry_units


def jacobian_isometry(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """B with ``|J_i - J_j| = |B s_i - B s_j|`` for ``J_i = last diag(s_i) first``, by CUDA kernels, without waiting.

    ``B^T B = M = (last^T last) o (first first^T)``. Cholesky's method is applied to M scaled to a diagonal of ones. All values
    are float64.

    Args:
        first: (H, D) float32 or float64.
        last: (K, H) of the same dtype.

    Returns:
        B^T (H, H) float64, and (2,) float64: a bound for the share of a squared distance that rounding of M and B takes, a NaN
        or Inf where M is singular to rounding, and a 0. B is of use only where the bound is small.

    Raises:
        TypeError, ValueError: a dtype, a device or a shape that does not fit.
        RuntimeError: more units than the kernel takes, or no CUDA kernels for that device.
    """
    _check_layers(first, last)
    first, last = plain(first), plain(last)
    units, inputs = first.shape
    result = first.new_empty(units, units, dtype=torch.float64)
    lost = result.new_empty(2)
    call = _native._C.JacobianIsometry(
        first.dtype == torch.float64, first.data_ptr(), last.data_ptr(), units, inputs, len(last)
    )
    return _native.run(call, result, lost), lost


def jacobian_features(
    x: Tensor, first: Tensor, bias: Tensor | None, activation: Activation, isometry: Tensor
) -> Tensor:
    """Rows ``B s_i`` with ``s_i = a'(first x_i + bias)``, by CUDA kernels, in float64. Does not wait for the device.

    Args:
        x: (N, D) float32 or float64.
        first: (H, D) of the same dtype.
        bias: (H,) of the same dtype, or None.
        activation: a.
        isometry: B^T (H, H) float64.

    Returns:
        (N, H) float64.

    Raises:
        TypeError, ValueError: a dtype, a device or a shape that does not fit.
        RuntimeError: no CUDA kernels for that device.
    """
    _check_layers(first)
    units = len(first)
    check_array("x", x, (len(x), first.shape[1]), first.dtype, first.device)
    check_array("bias", bias, (units,), first.dtype, first.device)
    check_array("isometry", isometry, (units, units), torch.float64, first.device)
    x, first, bias, isometry = plain(x), plain(first), None if bias is None else plain(bias), plain(isometry)
    (codes, parameters), (samples, inputs) = activation_arguments([activation]), x.shape
    call = _native._C.JacobianFeatures(
        x.dtype == torch.float64,
        *map(_native.address, (x, first, bias, isometry)),
        samples,
        inputs,
        units,
        codes[0],
        *parameters,
    )
    return _native.run(call, x.new_empty(samples, units, dtype=torch.float64))


def isometry_distance(
    x: Tensor,
    first: Tensor,
    bias: Tensor | None,
    last: Tensor,
    last_bias: Tensor | None,
    activation: Activation,
    *,
    squared: bool = False,
    connectivity: bool = False,
    with_outputs: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`jacobian_isometry`, `jacobian_features` and :func:`jacobian_distance` of those with themselves, or
    `jacobian_connectivity`, by one call.

    Returns:
        (N, N) of x's dtype; (2,) int64, the bits of what `jacobian_isometry` says about B; and with_outputs (N, K) of x's
        dtype, what the chain gives, each sum in float64.

    Raises:
        TypeError, ValueError, RuntimeError: as `jacobian_isometry`.
    """
    _check_layers(first, last)
    check_array("x", x, (len(x), first.shape[1]), first.dtype, first.device)
    check_array("bias", bias, (len(first),), first.dtype, first.device)
    check_array("last_bias", last_bias, (len(last),), first.dtype, first.device)
    x, first, last = plain(x), plain(first), plain(last)
    bias, last_bias = (None if b is None else plain(b) for b in (bias, last_bias))
    (codes, parameters), (samples, inputs), units = (
        activation_arguments([activation]),
        x.shape,
        first.shape[0],
    )
    result, lost = x.new_empty(samples, samples), x.new_empty(2, dtype=torch.int64)
    y = x.new_empty(samples, last.shape[0]) if with_outputs else None
    call = _native._C.IsometryDistance(
        x.dtype == torch.float64,
        *map(_native.address, (x, first, bias, last, last_bias)),
        samples,
        inputs,
        units,
        last.shape[0],
        codes[0],
        *parameters,
        squared,
        connectivity,
    )
    return _native.run(call, result, lost, y), lost, y


def _check_layers(first: Tensor, last: Tensor | None = None) -> None:
    """Raises what does not fit in the weights of Linear layers (H, D) and (K, H), on the CPU or on CUDA."""
    on = first.device if first.device.type in ("cpu", "cuda") else torch.device("cuda")
    check_tensor("first", first, KERNEL_DTYPES, on)
    if first.dim() != 2 or first.numel() == 0:
        raise ValueError(f"first: expected (H, D), both above 0, got shape {tuple(first.shape)}")
    if last is not None:
        outputs = len(last) if last.dim() and last.numel() else 1
        check_array("last", last, (outputs, len(first)), first.dtype, on)


def _check(first: Tensor, second: Tensor, dtype: torch.dtype) -> None:
    for name, tensor in (("first", first), ("second", second)):
        check_tensor(name, tensor, (torch.float64,), first.device)
    if dtype not in KERNEL_DTYPES:
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    if first.dim() != 2 or first.shape[1] == 0:
        raise ValueError(f"first: expected (M, F) with F > 0, got shape {tuple(first.shape)}")
    if second.dim() != 2 or second.shape[1] != first.shape[1]:
        raise ValueError(f"second: expected (N, {first.shape[1]}), got shape {tuple(second.shape)}")
