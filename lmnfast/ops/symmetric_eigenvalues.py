"""``lmnfast::symmetric_eigenvalues``: eigenvalues of symmetric matrices in float64, computed on the matrices' device."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._native import plain
from .._threads import lapack_on_one_core
from ._checks import KERNEL_DTYPES, check_dense

# Up to this N, LAPACK runs on one core, so that the values have the same bits for any thread count. The price on an AMD EPYC,
# one core in place of two: 24 ms in place of 19 at N = 500, 135 in place of 73 at 961, 794 in place of 475 at 2048.
SAME_BITS_TO = 1024


def symmetric_eigenvalues(matrices: Tensor) -> Tensor:
    """:func:`lmnfast.reference.symmetric_eigenvalues`: ``torch.linalg.eigvalsh`` in float64.

    On the CPU LAPACK computes them. On CUDA the package's kernel computes them, without waiting for the device. If :func:`fits`
    returns False for the matrices, cuSOLVER computes them and waits for the device. The kernel's error is at most a few times
    1e-13 of the largest magnitude. Its bits are the same in every call with the same shape on the same card.

    Args:
        matrices: (..., N, N) float32 or float64, N > 0; the lower triangle is read.

    Returns:
        (..., N) float64, in rising order. The CUDA kernel gives NaN for a matrix that is not finite, and for a matrix that it
        gave up because the matrix's blocks did not all run at the same time.

    Raises:
        TypeError: neither float32 nor float64.
        ValueError: not square, or empty.
        torch.linalg.LinAlgError: LAPACK or cuSOLVER does not converge. This happens with cuSOLVER for some matrices near rank
            one.

    Example:
        >>> lmnfast.ops.symmetric_eigenvalues(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        tensor([0.5000, 1.5000], dtype=torch.float64)
    """
    return torch.ops.lmnfast.symmetric_eigenvalues(matrices)


def fits(matrices: Tensor) -> bool:
    """Whether the CUDA kernel can solve matrices (..., N, N) on their device, in several waves if there are many.

    All blocks of a matrix must run at the same time, because together they hold the matrix. An H200 takes N up to 2304. By
    calculation an A100 takes the same N.
    """
    return _workspace_bytes(matrices) > 0


def _workspace_bytes(matrices: Tensor) -> int:
    if _native.emulates_cuda(matrices):
        return _call(matrices, 0).workspace(1)
    if not matrices.is_cuda or _native.cuda_problem(matrices.device) is not None:
        return 0
    with _native.on_device(matrices.device):
        return _call(matrices, 0).workspace_cuda()


def _call(matrices: Tensor, address: int) -> Any:
    """The call of the compiled core for matrices of this shape and dtype whose values are at this address."""
    is_double, batch = matrices.dtype == torch.float64, matrices.shape[:-2].numel()
    return _native._C.SymmetricEigenvalues(is_double, address, batch, matrices.shape[-1])


torch.library.define("lmnfast::symmetric_eigenvalues", "(Tensor matrices) -> Tensor")


@torch.library.impl("lmnfast::symmetric_eigenvalues", "default")
def _symmetric_eigenvalues(matrices: Tensor) -> Tensor:
    _check(matrices)
    n = matrices.shape[-1]
    if matrices.numel() == 0 or not _workspace_bytes(matrices):
        on_cpu = matrices.device.type == "cpu"
        same_bits = on_cpu and (n <= SAME_BITS_TO or torch.are_deterministic_algorithms_enabled())
        with lapack_on_one_core() if same_bits else nullcontext():
            return torch.linalg.eigvalsh(matrices.double())
    matrices = plain(matrices)
    result = matrices.new_empty(matrices.shape[:-1], dtype=torch.float64)
    return _native.run(_call(matrices, matrices.data_ptr()), result)


@torch.library.register_fake("lmnfast::symmetric_eigenvalues")
def _(matrices: Tensor) -> Tensor:
    _check(matrices)
    return matrices.new_empty(matrices.shape[:-1], dtype=torch.float64)


def _check(matrices: Tensor) -> None:
    check_dense("matrices", matrices)
    if matrices.dtype not in KERNEL_DTYPES:
        raise TypeError(f"matrices: expected float32 or float64, got {matrices.dtype}")
    if matrices.dim() < 2 or matrices.shape[-1] != matrices.shape[-2] or matrices.shape[-1] == 0:
        raise ValueError(f"matrices: expected (..., N, N) with N > 0, got shape {tuple(matrices.shape)}")
