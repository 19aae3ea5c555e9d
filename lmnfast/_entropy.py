"""The entropy of eigenvalues, and its gradient in the matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from ._autograd import without_second
from ._threads import lapack_on_one_core, one_core_after_fork

# In the gradient an eigenvalue counts as at least this share of the mean magnitude: the logarithm has no limit at 0.
LEAST = 1e-6


def entropy(values: Tensor, negative: str) -> Tensor:
    """Entropy of eigenvalues (..., N), in bits."""
    if negative == "clip":
        values = values.clamp(min=0)
    total = values.abs().sum(-1)
    if not (good := (total > 0) & (total < float("inf"))).all():
        raise ValueError(
            f"L: expected eigenvalues whose magnitudes have a finite sum above 0, got a sum of {float(total[~good][0])} "
            f"(negative={negative!r})"
        )
    return ops.spectral_entropy(values)


def complexity_with_graph(L: Tensor, negative: str) -> Tensor:
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
        bits = entropy(values, negative)
        ctx.save_for_backward(L, values, vectors, bits)
        ctx.negative = negative
        return bits

    @staticmethod
    @one_core_after_fork()
    def backward(ctx: Any, gradient: Tensor) -> Any:
        L, values, vectors, bits = ctx.saved_tensors
        with torch.no_grad():
            g = slopes(values, bits, ctx.negative) * gradient[..., None]
            of_L = ((vectors * g[..., None, :]) @ vectors.mT).to(L.dtype)
        return *without_second([of_L], [L]), None


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
