"""``lmnfast::check_outputs``: all checks of the numbers of a public call, in one pass."""

from typing import Any

import torch
from torch import Tensor

from .. import _native, reference
from .._native import plain
from ._checks import KERNEL_DTYPES, check_tensor


def check_outputs(
    x: Tensor,
    y: Tensor,
    again: Tensor | None,
    expected: Tensor | None,
    matrix: Tensor | None,
    counts: Tensor | None,
    epsilon: float,
) -> Tensor:
    """:func:`lmnfast.reference.check_outputs`, equal to the last bit.

    It counts the samples, outputs and matrix entries that are not finite, and the outputs that differ from those of another
    function. It passes on the counts of a connectivity. On CUDA it is one kernel and never waits for the device. All results
    are in one tensor, so that one copy to the host is enough.

    Args:
        x: (N, D) float32 or float64, the samples.
        y: (N, K) of x's dtype, f's outputs.
        again: (N, K) of x's dtype, outputs of the chain that f was recognised as, or None.
        expected: (N, K) of x's dtype, outputs of the model that f was cut from, or None.
        matrix: (N, M) of x's dtype, M > 0, the connectivity or Jacobians, or None.
        counts: (2,) int64, the counts of the connectivity, or None.
        epsilon: of the dtype in which f returns its outputs.

    Returns:
        (12,) int64, as described in :func:`lmnfast.reference.check_outputs`.

    Raises:
        TypeError: a dtype or a device that does not fit.
        ValueError: a shape or an epsilon that does not fit.

    Example:
        >>> x, y = torch.zeros(4, 2), torch.tensor([[1.0], [2.0], [float("nan")], [3.0]])
        >>> found = lmnfast.ops.check_outputs(x, y, None, None, None, None, 1e-7)
        >>> found[:4].tolist()  # x: no such row; y: one row is not finite, and 2 rows are left from that row on
        [0, 0, 1, 2]
    """
    return torch.ops.lmnfast.check_outputs(x, y, again, expected, matrix, counts, epsilon)


torch.library.define(
    "lmnfast::check_outputs",
    "(Tensor x, Tensor y, Tensor? again, Tensor? expected, Tensor? matrix, Tensor? counts, float epsilon) -> Tensor",
)


@torch.library.impl("lmnfast::check_outputs", "default")
def _check_outputs(*arguments: Any) -> Tensor:
    _check(*arguments)
    return find(*arguments)


def find(
    x: Tensor,
    y: Tensor,
    again: Tensor | None,
    expected: Tensor | None,
    matrix: Tensor | None,
    counts: Tensor | None,
    epsilon: float,
) -> Tensor:
    """:func:`check_outputs` for arguments that are known to fit: torch's dispatcher, and a look at them, take longer than the
    kernel. It trusts its one caller, `Findings` in lmnfast/_checks.py, which brings all to one dtype. There x is f's input on
    its one device and y f's outputs there, again and expected have been compared with y's shape, and matrix and counts are a
    kernel's results for x."""
    if not _native.HAS_CORE:
        with torch.no_grad():
            return reference.check_outputs(x, y, again, expected, matrix, counts, epsilon)
    # Kept until the call: an address does not keep its tensor.
    tensors = [None if t is None else plain(t) for t in (x, y, again, expected, matrix, counts)]
    call = _native._C.CheckOutputs(
        x.dtype == torch.float64,
        *map(_native.address, tensors),
        *x.shape,
        y.shape[1],
        0 if matrix is None else matrix.shape[1],
        epsilon,
    )
    return _native.run(call, x.new_empty(_native._C.findings, dtype=torch.int64))


@torch.library.register_fake("lmnfast::check_outputs")
def _(x: Tensor, *others: Any) -> Tensor:
    _check(x, *others)
    return x.new_empty(_native._C.findings, dtype=torch.int64)


def _check(
    x: Tensor,
    y: Tensor,
    again: Tensor | None,
    expected: Tensor | None,
    matrix: Tensor | None,
    counts: Tensor | None,
    epsilon: float,
) -> None:
    check_tensor("x", x, KERNEL_DTYPES, x.device)
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"x: expected samples (N, D) with N > 0, got shape {tuple(x.shape)}")
    samples = len(x)
    if y.dim() != 2 or len(y) != samples or y.numel() == 0:
        raise ValueError(f"y: expected ({samples}, outputs) with outputs > 0, got shape {tuple(y.shape)}")
    for name, tensor in (("y", y), ("again", again), ("expected", expected)):
        if tensor is None:
            continue
        check_tensor(name, tensor, (x.dtype,), x.device)
        if tensor.shape != y.shape:
            raise ValueError(f"{name}: expected {tuple(y.shape)}, got shape {tuple(tensor.shape)}")
    if matrix is not None:
        check_tensor("matrix", matrix, (x.dtype,), x.device)
        if matrix.dim() != 2 or len(matrix) != samples or matrix.numel() == 0:
            raise ValueError(f"matrix: expected ({samples}, M) with M > 0, got shape {tuple(matrix.shape)}")
    if counts is not None:
        check_tensor("counts", counts, (torch.int64,), x.device)
        if counts.shape != (2,):
            raise ValueError(f"counts: expected (2,), got shape {tuple(counts.shape)}")
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon: expected a number between 0 and 1, got {epsilon}")
