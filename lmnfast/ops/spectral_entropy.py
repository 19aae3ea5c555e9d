"""``lmnfast::spectral_entropy``: batched reduction from eigenvalues to the nonlinear complexity."""

import torch
from torch import Tensor

from .. import _native, reference


def spectral_entropy(eigenvalues: Tensor) -> Tensor:
    """:func:`lmnfast.reference.spectral_entropy`: ``-sum p log2 p`` with ``p = |w| / sum |w|``, in bits.

    Args:
        eigenvalues: (..., N) float32 or float64, N > 0, any order and sign; accumulated in float64.

    Returns:
        (...) float64.

    Raises:
        TypeError: neither float32 nor float64.
        ValueError: no eigenvalues.
    """
    return torch.ops.lmnfast.spectral_entropy(eigenvalues)


torch.library.define("lmnfast::spectral_entropy", "(Tensor eigenvalues) -> Tensor")


@torch.library.impl("lmnfast::spectral_entropy", "default")
def _spectral_entropy(eigenvalues: Tensor) -> Tensor:
    if eigenvalues.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"eigenvalues: expected float32 or float64, got {eigenvalues.dtype}")
    if eigenvalues.dim() == 0 or eigenvalues.shape[-1] == 0:
        raise ValueError(f"eigenvalues: expected (..., N) with N > 0, got shape {tuple(eigenvalues.shape)}")
    eigenvalues = eigenvalues.contiguous()
    result = eigenvalues.new_empty(eigenvalues.shape[:-1], dtype=torch.float64)
    sizes = (
        eigenvalues.dtype == torch.float64,
        _native.address(eigenvalues),
        _native.address(result),
        result.numel(),
        eigenvalues.shape[-1],
    )
    if _native.is_native(eigenvalues):
        _native._C.spectral_entropy(*sizes, torch.get_num_threads())
    elif eigenvalues.is_cuda and _native.cuda_built():
        with torch.cuda.device(eigenvalues.device):
            _native._C.spectral_entropy_cuda(*sizes, torch.cuda.current_stream().cuda_stream)
    else:
        return reference.spectral_entropy(eigenvalues)
    return result


@torch.library.register_fake("lmnfast::spectral_entropy")
def _(eigenvalues):
    return eigenvalues.new_empty(eigenvalues.shape[:-1], dtype=torch.float64)
