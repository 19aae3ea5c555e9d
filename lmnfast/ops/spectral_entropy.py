"""``lmnfast::spectral_entropy``: the nonlinear complexity of a batch of eigenvalues."""

import torch
from torch import Tensor

from .. import _native, reference
from .._native import plain
from ._checks import KERNEL_DTYPES, check_dense


def spectral_entropy(eigenvalues: Tensor) -> Tensor:
    """:func:`lmnfast.reference.spectral_entropy`: ``-sum p log2 p`` with ``p = |w| / sum |w|``, in bits.

    Args:
        eigenvalues: (..., N) float32 or float64, N > 0, any order and sign; accumulated in float64.

    Returns:
        (...) float64.

    Raises:
        TypeError: neither float32 nor float64.
        ValueError: no eigenvalues; on the CPU also a row with nothing but zeros. On CUDA such a row gives NaN.

    Source:
        arXiv 2310.05918, Eq. 3.

    Example:
        >>> lmnfast.ops.spectral_entropy(torch.ones(8))
        tensor(3., dtype=torch.float64)
    """
    return torch.ops.lmnfast.spectral_entropy(eigenvalues)


torch.library.define("lmnfast::spectral_entropy", "(Tensor eigenvalues) -> Tensor")


@torch.library.impl("lmnfast::spectral_entropy", "default")
def _spectral_entropy(eigenvalues: Tensor) -> Tensor:
    _check(eigenvalues)
    if _native.by_reference(eigenvalues):
        with torch.no_grad():
            result = reference.spectral_entropy(eigenvalues)
    else:
        eigenvalues = plain(eigenvalues)
        result = eigenvalues.new_empty(eigenvalues.shape[:-1], dtype=torch.float64)
        is_double, sizes = eigenvalues.dtype == torch.float64, (result.numel(), eigenvalues.shape[-1])
        _native.run(_native._C.SpectralEntropy(is_double, eigenvalues.data_ptr(), *sizes), result)
    if eigenvalues.device.type != "cpu":  # a look at the values would wait for the device
        return result
    undefined = result.isnan()
    if undefined.any() and bool((eigenvalues[undefined] == 0).all(-1).any()):
        raise ValueError("eigenvalues: expected one or more in a row that are not 0; all 0 have no shares")
    return result


@torch.library.register_fake("lmnfast::spectral_entropy")
def _(eigenvalues: Tensor) -> Tensor:
    _check(eigenvalues)
    return eigenvalues.new_empty(eigenvalues.shape[:-1], dtype=torch.float64)


def _check(eigenvalues: Tensor) -> None:
    check_dense("eigenvalues", eigenvalues)
    if eigenvalues.dtype not in KERNEL_DTYPES:
        raise TypeError(f"eigenvalues: expected float32 or float64, got {eigenvalues.dtype}")
    if eigenvalues.dim() == 0 or eigenvalues.shape[-1] == 0:
        raise ValueError(f"eigenvalues: expected (..., N) with N > 0, got shape {tuple(eigenvalues.shape)}")
