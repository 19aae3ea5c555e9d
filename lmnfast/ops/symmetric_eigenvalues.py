"""``lmnfast::symmetric_eigenvalues``: eigenvalues of symmetric matrices in float64, on the device they are on."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._native import plain
from .._threads import lapack_on_one_core
from ._checks import KERNEL_DTYPES, check_dense

# Up to this N, LAPACK solves on one core, so that the values have the same bits for any thread count. On two cores of
# an AMD EPYC that takes 24 ms in place of 19 at N = 500, 135 in place of 73 at 961, 794 in place of 475 at 2048.
SAME_BITS_TO = 1024


def symmetric_eigenvalues(matrices: Tensor) -> Tensor:
    """:func:`lmnfast.reference.symmetric_eigenvalues`: ``torch.linalg.eigvalsh`` in float64.

    On the CPU it is LAPACK's. On CUDA it is the package's kernel, which does not wait for the device, or for a matrix that
    :func:`fits` says is too large for it, cuSOLVER, which does. The kernel's values are within a few times 1e-13 of the
    largest magnitude; their bits are the same in every call of the same shape on the same card.

    Args:
        matrices: (..., N, N) float32 or float64, N > 0; the lower triangle is read.

    Returns:
        (..., N) float64, rising. On CUDA, from the kernel, NaN for a matrix that is not finite, or that was given up as
        its blocks did not all run at once.

    Raises:
        TypeError: neither float32 nor float64.
        ValueError: not square, or empty.
        torch.linalg.LinAlgError: LAPACK or cuSOLVER does not converge; cuSOLVER does not for some matrices near rank one.

    Example:
        >>> lmnfast.ops.symmetric_eigenvalues(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        tensor([0.5000, 1.5000], dtype=torch.float64)
    """
    return torch.ops.lmnfast.symmetric_eigenvalues(matrices)


def fits(matrices: Tensor) -> bool:
    """Whether matrices (..., N, N) are solved by the CUDA kernel of the device they are on, in several waves if need be.

    Its blocks hold a matrix between them, and have to be there all at once: an H200 takes N up to 2304; by arithmetic an A100
    does, too.
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
    """For their number and size, and for numbers of their dtype at that address."""
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
def _(matrices):
    _check(matrices)
    return matrices.new_empty(matrices.shape[:-1], dtype=torch.float64)


def _check(matrices: Tensor) -> None:
    check_dense("matrices", matrices)
    if matrices.dtype not in KERNEL_DTYPES:
        raise TypeError(f"matrices: expected float32 or float64, got {matrices.dtype}")
    if matrices.dim() < 2 or matrices.shape[-1] != matrices.shape[-2] or matrices.shape[-1] == 0:
        raise ValueError(f"matrices: expected (..., N, N) with N > 0, got shape {tuple(matrices.shape)}")
