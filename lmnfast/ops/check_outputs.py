"""``lmnfast::check_outputs``: what a call has to know of its numbers before they count, in one pass."""

import torch
from torch import Tensor

from .. import _native
from ._checks import KERNEL_DTYPES, check_tensor, plain


def check_outputs(
    x: Tensor,
    y: Tensor,
    again: Tensor | None,
    expected: Tensor | None,
    L: Tensor,
    counts: Tensor,
    epsilon: float,
) -> Tensor:
    """:func:`lmnfast.reference.check_outputs`, to the last bit: samples, outputs and entries that are not finite, outputs that
    another function does not give, and the counts of a connectivity.

    On CUDA one kernel, and nothing that waits: the result is for one copy to the host.

    Args:
        x: (N, D) float32 or float64, the samples.
        y: (N, K) of their dtype, f's outputs.
        again: (N, K), those of the chain that f is taken for, or None.
        expected: (N, K), those of the model that f was cut from, or None.
        L: (N, N) of their dtype, the connectivity.
        counts: (2,) int64.
        epsilon: of the dtype that f's outputs come in.

    Returns:
        (12,) int64, see there. Raises TypeError for a dtype or a device, ValueError for a shape or an epsilon.
    """
    return torch.ops.lmnfast.check_outputs(x, y, again, expected, L, counts, epsilon)


torch.library.define(
    "lmnfast::check_outputs",
    "(Tensor x, Tensor y, Tensor? again, Tensor? expected, Tensor L, Tensor counts, float epsilon) -> Tensor",
)


@torch.library.impl("lmnfast::check_outputs", "default")
def _check_outputs(
    x: Tensor,
    y: Tensor,
    again: Tensor | None,
    expected: Tensor | None,
    L: Tensor,
    counts: Tensor,
    epsilon: float,
) -> Tensor:
    _check(x, y, again, expected, L, counts, epsilon)
    # Kept until the call: an address does not keep its tensor.
    tensors = [None if t is None else plain(t) for t in (x, y, again, expected, L, counts)]
    found = counts.new_empty(_native._C.findings)
    arguments = (
        x.dtype == torch.float64,
        *map(_native.address, tensors),
        len(x),
        x.shape[1],
        y.shape[1],
        epsilon,
        _native.address(found),
    )
    if x.is_cuda:
        with _native.cuda_stream(x.device) as stream:
            _native._C.check_outputs_cuda(*arguments, stream)
    else:
        _native._C.check_outputs(*arguments, _native.cores_to_use())
    return found


@torch.library.register_fake("lmnfast::check_outputs")
def _(x, y, again, expected, L, counts, epsilon):
    _check(x, y, again, expected, L, counts, epsilon)
    return counts.new_empty(_native._C.findings)


def _check(
    x: Tensor,
    y: Tensor,
    again: Tensor | None,
    expected: Tensor | None,
    L: Tensor,
    counts: Tensor,
    epsilon: float,
) -> None:
    check_tensor("x", x, KERNEL_DTYPES, x.device)
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"x: expected samples (N, D) with N > 0, got shape {tuple(x.shape)}")
    samples = len(x)
    if y.dim() != 2 or len(y) != samples or y.numel() == 0:
        raise ValueError(f"y: expected ({samples}, outputs) with outputs > 0, got shape {tuple(y.shape)}")
    shapes = {"y": y.shape, "again": y.shape, "expected": y.shape, "L": (samples, samples)}
    for (name, shape), tensor in zip(shapes.items(), (y, again, expected, L)):
        if tensor is None:
            continue
        check_tensor(name, tensor, (x.dtype,), x.device)
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {tuple(shape)}, got shape {tuple(tensor.shape)}")
    check_tensor("counts", counts, (torch.int64,), x.device)
    if counts.shape != (2,):
        raise ValueError(f"counts: expected (2,), got shape {tuple(counts.shape)}")
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon: expected a number between 0 and 1, got {epsilon}")
