"""The entropy of a connectivity matrix with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._eigenvalues import _complexity
from ._threads import lapack_on_one_core, one_core_after_fork

# In the gradient an eigenvalue counts as at least this share of the mean magnitude: the logarithm has no limit at 0.
LEAST = 1e-6


def complexity(L: Tensor, negative: str) -> Tensor:
    """S_NL in bits of checked matrices (..., N, N), with the graph of L: (...) float64."""
    bits: Tensor = _Complexity.apply(L, negative)
    return bits


class _Complexity(torch.autograd.Function):
    """``S = -sum p log2 p`` of the eigenvalues w with ``p = |w| / A``.

    ``dS/dL = g(L)`` with ``g(w) = -sgn(w) (log2 p + S) / A``.
    g(L) is one function of the matrix, so equal eigenvalues need no care.
    """

    @staticmethod
    @one_core_after_fork()
    def forward(ctx: Any, L: Tensor, negative: str) -> Tensor:
        values, vectors = _eigh(L.double())
        bits = _complexity(values, negative)
        ctx.save_for_backward(values, vectors, bits)
        ctx.negative, ctx.dtype = negative, L.dtype
        return bits

    @staticmethod
    @once_differentiable
    @one_core_after_fork()
    def backward(ctx: Any, gradient: Tensor) -> Any:
        values, vectors, bits = ctx.saved_tensors
        g = slopes(values, bits, ctx.negative) * gradient[..., None]
        return ((vectors * g[..., None, :]) @ vectors.mT).to(ctx.dtype), None


def slopes(values: Tensor, bits: Tensor, negative: str) -> Tensor:
    """g of eigenvalues (..., N), the derivative of their entropy (...); 0 for an eigenvalue that is 0 to rounding."""
    size, sign = values.abs(), values.sign()
    rounding = values.shape[-1] * torch.finfo(torch.float64).eps * size.amax(-1, keepdim=True)
    sign = torch.where(
        size > rounding, sign, 0.0
    )  # entropy has a kink there, and rounding would choose the side
    if negative == "clip":
        size, sign = values.clamp(min=0), sign.clamp(min=0)
    total = size.sum(-1, keepdim=True)
    share = size.clamp(min=LEAST * total / values.shape[-1]) / total
    return -sign * (torch.log2(share) + bits[..., None]) / total


def _eigh(L: Tensor) -> tuple[Tensor, Tensor]:
    if L.is_cuda:
        try:
            return tuple(torch.linalg.eigh(L))
        except torch.linalg.LinAlgError:  # cuSOLVER fails on some nearly rank-one matrices
            pass
    with lapack_on_one_core():
        values, vectors = torch.linalg.eigh(L.cpu())
    return values.to(L.device), vectors.to(L.device)
