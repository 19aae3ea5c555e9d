"""``lmnfast::path_r2``: r2 along paths from a network's outputs at their nodes."""

import torch
from torch import Tensor

from .. import _native, reference


def path_r2(
    interior: Tensor, ends: Tensor, first: Tensor, second: Tensor, nodes: Tensor, weights: Tensor
) -> Tensor:
    """:func:`lmnfast.reference.path_r2` in one pass over memory, without temporaries; float32 or float64.

    Through the chord residual ``y(t) - (y_i + t (y_j - y_i))``, so an offset of y costs no digits.

    Args:
        interior: (pairs, nodes - 2, outputs), float32 or float64.
        ends: (samples, outputs), the same dtype.
        first, second: (pairs,) int64, samples at t = 0 and t = 1.
        nodes, weights: (nodes,) float64, on the CPU.

    On CUDA on the current stream, and never waiting for it. So nobody can look at the indices there: a pair of
    samples that do not exist gets NaN.

    Returns:
        (pairs,) of interior's dtype.

    Raises:
        TypeError: dtypes or devices differ, or are none of these.
        ValueError: shapes do not fit; on the CPU, an index of no sample.
        RuntimeError: the CUDA kernels do not run on that device.
    """
    return torch.ops.lmnfast.path_r2(interior, ends, first, second, nodes, weights)


torch.library.define(
    "lmnfast::path_r2",
    "(Tensor interior, Tensor ends, Tensor first, Tensor second, Tensor nodes, Tensor weights) -> Tensor",
)


@torch.library.impl("lmnfast::path_r2", "default")
def _path_r2(
    interior: Tensor, ends: Tensor, first: Tensor, second: Tensor, nodes: Tensor, weights: Tensor
) -> Tensor:
    _check(interior, ends, first, second, nodes, weights)
    on_cuda = interior.is_cuda and _native.cuda_built()
    if not on_cuda and not _native.is_native(interior):
        return reference.path_r2(
            interior, ends, first, second, nodes.to(ends.device), weights.to(ends.device)
        )
    interior, ends, first, second = (v.contiguous() for v in (interior, ends, first, second))
    result = interior.new_empty(len(interior))
    workspace = interior.new_empty(ends.shape[1] + 3 * (len(nodes) - 2))
    arguments = (
        interior.dtype == torch.float64,
        *map(_native.address, (interior, ends, first, second)),
        *_native.path_nodes(nodes, weights),
        len(interior),
        *ends.shape,
        _native.address(result),
        _native.address(workspace),
    )
    if on_cuda:
        with _native.cuda_stream(interior.device) as stream:
            _native._C.path_r2_cuda(*arguments, stream)
    else:
        _native._C.path_r2(*arguments, torch.get_num_threads())
    return result


@torch.library.register_fake("lmnfast::path_r2")
def _(interior, ends, first, second, nodes, weights):
    return interior.new_empty(interior.shape[0])


def _check(
    interior: Tensor, ends: Tensor, first: Tensor, second: Tensor, nodes: Tensor, weights: Tensor
) -> None:
    on, cpu = interior.device, torch.device("cpu")
    for name, tensor, dtypes, device in (
        ("interior", interior, (torch.float32, torch.float64), on),
        ("ends", ends, (interior.dtype,), on),
        ("first", first, (torch.int64,), on),
        ("second", second, (torch.int64,), on),
        ("nodes", nodes, (torch.float64,), cpu),
        ("weights", weights, (torch.float64,), cpu),
    ):
        if tensor.dtype not in dtypes or tensor.device != device:
            raise TypeError(
                f"{name}: expected {' or '.join(map(str, dtypes))} on {device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if nodes.dim() != 1 or len(nodes) < 2:
        raise ValueError(f"nodes: expected (nodes,), two or more, got shape {tuple(nodes.shape)}")
    if weights.shape != nodes.shape:
        raise ValueError(f"weights: expected ({len(nodes)},), got shape {tuple(weights.shape)}")
    if interior.dim() != 3 or interior.shape[1] != len(nodes) - 2 or interior.shape[2] == 0:
        raise ValueError(
            f"interior: expected (pairs, {len(nodes) - 2}, outputs), got shape {tuple(interior.shape)}"
        )
    if ends.dim() != 2 or ends.shape[1] != interior.shape[2]:
        raise ValueError(f"ends: expected (samples, {interior.shape[2]}), got shape {tuple(ends.shape)}")
    for name, tensor in (("first", first), ("second", second)):
        if tensor.shape != interior.shape[:1]:
            raise ValueError(f"{name}: expected ({len(interior)},), got shape {tuple(tensor.shape)}")
        if on == cpu and tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < len(ends):
            raise ValueError(
                f"{name}: expected samples 0 to {len(ends) - 1}, got {tensor.min()} to {tensor.max()}"
            )
