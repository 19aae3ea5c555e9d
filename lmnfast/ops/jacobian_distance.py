"""``lmnfast::jacobian_distance``: Euclidean distances of features, right for close rows, too."""

import torch
from torch import Tensor

from .. import _native, reference


def jacobian_distance(
    first: Tensor, second: Tensor, squared: bool = False, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``reference.jacobian_distance(first, second, squared)``: ``d[m, n] = |first[m] - second[n]|``.

    The Gram form has no digits left for close rows. A float64 result, and every result on CUDA, is summed of squared
    differences in float64. A float32 result is within a relative 1e-5 (2e-6 on the tests' features): rows are taken from
    a centre, rounded to float32 and multiplied, and distances below half of the larger row's norm there are taken
    again as differences in float64. A distance of at most 32 epsilons (float64) of the larger row's norm is exactly 0:
    that is the features' own rounding. One tensor as first and second: exactly symmetric, for half the work.
    On CUDA enqueued on the current stream: no synchronisation, memory from torch alone.

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
    """
    return torch.ops.lmnfast.jacobian_distance(first, second, squared, dtype)


torch.library.define(
    "lmnfast::jacobian_distance", "(Tensor first, Tensor second, bool squared, ScalarType dtype) -> Tensor"
)


@torch.library.impl("lmnfast::jacobian_distance", "default")
def _jacobian_distance(first: Tensor, second: Tensor, squared: bool, dtype: torch.dtype) -> Tensor:
    _check(first, second, dtype)
    on_cuda = first.is_cuda and _native.cuda_built()
    if not on_cuda and not _native.is_native(first):
        return reference.jacobian_distance(first, second, squared).to(dtype)
    same = first.data_ptr() == second.data_ptr() and first.stride() == second.stride()
    same = same and first.shape == second.shape
    first = first.contiguous()
    second = first if same else second.contiguous()
    result = _native.empty(first, len(first), len(second), dtype=dtype)
    if result.numel() == 0:
        return result
    group = _native._C.distance_group
    rows = -(-len(second) // group) * group + (len(first) if dtype == torch.float32 else 0)
    norms = 8 * (4 * (len(first) + len(second)) + first.shape[1])
    workspace = torch.empty(
        norms + rows * first.shape[1] * dtype.itemsize, dtype=torch.uint8, device=first.device
    )
    arguments = (
        dtype == torch.float64,
        _native.address(first),
        _native.address(second),
        len(first),
        *second.shape,
        squared,
        _native.address(result),
        _native.address(workspace),
    )
    if on_cuda:
        with _native.cuda_stream(first.device) as stream:
            _native._C.jacobian_distance_cuda(*arguments, stream)
    else:
        _native._C.jacobian_distance(*arguments, torch.get_num_threads())
    return result


@torch.library.register_fake("lmnfast::jacobian_distance")
def _(first, second, squared, dtype):
    return first.new_empty(first.shape[0], second.shape[0], dtype=dtype)


def _check(first: Tensor, second: Tensor, dtype: torch.dtype) -> None:
    for name, tensor in (("first", first), ("second", second)):
        if tensor.dtype != torch.float64 or tensor.device != first.device:
            raise TypeError(
                f"{name}: expected torch.float64 on {first.device}, got {tensor.dtype} on {tensor.device}"
            )
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    if first.dim() != 2 or first.shape[1] == 0:
        raise ValueError(f"first: expected (M, F) with F > 0, got shape {tuple(first.shape)}")
    if second.dim() != 2 or second.shape[1] != first.shape[1]:
        raise ValueError(f"second: expected (N, {first.shape[1]}), got shape {tuple(second.shape)}")
