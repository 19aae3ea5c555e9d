"""Jacobians of a network at its samples: the linear maps themselves, their distances, and their number."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from ._chain import IDENTITY
from ._checks import Findings, NotTheChain
from ._differentiated import Differentiated, check_jacobian
from ._features import Kind, compare_chain, compare_differentiated
from ._prepare import prepared
from ._route import REGIONS
from ._settings import check_budget
from ._threads import alone
from ._tiles import DEFAULT_BUDGET
from .ops.jacobian import at_once

PIECEWISE_LINEAR = ("identity", "relu", "leaky_relu")


def jacobians(f: Callable[[Tensor], Tensor], x: Tensor, *, budget: int | None = None) -> Tensor:
    """Jacobian of f at every sample; ``torch.func.vmap(torch.func.jacrev(f))(x)`` to rounding, flattened.

    Chains of Linear and pointwise activations without residual blocks run in one fused kernel. Any other f is differentiated
    by torch.func: forwards if f has more outputs than inputs, otherwise backwards, on as many samples at a time as the budget
    allows. If torch.func cannot run one of f's layers, torch.autograd differentiates one output after the other. An
    ``nn.Module`` is measured in eval mode and left as it was. The result carries no autograd graph. On CUDA a sequence of
    torch's own modules that forms a chain, in float32 or float64 and without autocast, is not called: the kernels compute its
    outputs, which are needed for checks only.

    Args:
        f: maps a batch (B, *in) to (B, *out), each row independent of the others, differentiable.
        x: (N, *in), floating point, the samples.
        budget: bytes for f's intermediate results and their derivatives together. None: 256 MiB. No effect on chains.

    Returns:
        (N, K, D) with K outputs and D inputs; float64 for float64 samples, otherwise float32.

    Raises:
        TypeError, ValueError: as :func:`lmnfast.connectivity`. A NaN or Inf in a Jacobian, or an f that cannot be
            differentiated, is a ValueError.

    Example:
        >>> f = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> lmnfast.jacobians(f, torch.randn(50, 8)).shape
        torch.Size([50, 3, 8])
    """
    check_budget(budget)
    budget = DEFAULT_BUDGET if budget is None else budget
    with alone(), prepared(f, x, "jacobians", deferred=False) as function:
        x = function.x
        if (chain := function.chain_before_checks()) is not None:
            with suppress(NotTheChain):
                J, own = at_once(chain, x, with_outputs=function.own_ends is None)
                found = Findings(x, function.ends if own is None else own, function.again, None, J.flatten(1))
                found.check()
                if not found.finite:
                    check_jacobian(J)
                return J
            function.refute()
        function.check_outputs()
        if function.chain is not None:
            J = at_once(function.chain, x)[0]
        else:
            how = function.ends, function.allocated, budget, function.checks
            J = Differentiated(function.calls, x, *how)(0, len(x))
        check_jacobian(J)
        return J


def jacobian_distances(
    f: Callable[[Tensor], Tensor], x: Tensor, *, affine: bool = False, squared: bool = False
) -> Tensor:
    """Frobenius distances of f's Jacobians: ``d[i, j] = |J_i - J_j|``, also accurate for close pairs.

    Distances of close pairs, and of every pair of float64 samples, are sums of squared differences in float64; see
    ``lmnfast.ops.jacobian_distance``. For chains the subtracted numbers are float64, whatever f's dtype. A distance of at most
    32 epsilons of the larger Jacobian's norm counts as 0, so samples in one linear region of a piecewise-linear chain are
    exactly 0 apart.

    With one nonlinearity, ``f = W3 a(W2 x + b2) + b3`` and ``s = a'(W2 x + b2)``, no Jacobian is formed:
    ``<J_i, J_j> = s_i^T M s_j`` with ``M = (W3^T W3) o (W2 W2^T) = B^T B``, and ``d[i, j] = |B s_i - B s_j|``. For other
    networks Jacobians are computed for two tiles of samples at a time, some of them repeatedly, and never all stored. Networks
    that are no chain are differentiated in their own dtype, as in :func:`jacobians`; a distance below the rounding of that
    dtype is noise. Memory beyond the result: under 64 MB, plus the memory that f itself needs. For a chain, CUDA is waited for
    once, at the end.

    Args:
        f: as in :func:`jacobians`.
        x: (N, *in), floating point, the samples.
        affine: compare the affine maps ``x -> J_i x + o_i``: the offset ``o_i = f(x_i) - J_i x_i`` is one more column.
        squared: return d^2 in place of d.

    Returns:
        (N, N), symmetric, zeros on the diagonal; float64 for float64 samples, otherwise float32.

    Raises:
        TypeError, ValueError: as :func:`jacobians`.

    Source:
        docs/mathematics.md, the isometry of Jacobians.

    Example:
        >>> f = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> x = torch.randn(50, 8)
        >>> d, J = lmnfast.jacobian_distances(f, x), lmnfast.jacobians(f, x)
        >>> torch.allclose(d[0, 1], (J[0] - J[1]).norm(), atol=1e-5)
        True
    """
    kind: Kind = "squared" if squared else "distance"
    with alone(), prepared(f, x, "jacobians", deferred=False) as function:
        x = function.x
        if (chain := function.chain_before_checks()) is not None:
            with suppress(NotTheChain):
                return compare_chain(chain, x, function.own_ends, kind, affine, function.again)
            function.refute()
        function.check_outputs()
        if function.chain is not None:
            return compare_chain(function.chain, x, function.ends, kind, affine)
        how = function.ends, function.allocated, kind, affine, function.checks
        return compare_differentiated(function.calls, x, *how)


def linear_regions(f: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Number of linear regions of a piecewise-linear chain in which the samples lie.

    Counts the distinct patterns ``z > 0`` over all inputs z of activations, with z in f's own dtype. The linear mapping number
    generalises this count. Here every region counts as one, no matter how similar its linear map is to the others.

    Args:
        f: Linear layers with ReLU, leaky ReLU or no activation between them, also in residual blocks.
        x: (N, *in), floating point, the samples.

    Returns:
        From 1 to N.

    Raises:
        TypeError, ValueError: as :func:`lmnfast.connectivity`. Any other f is a ValueError.

    Example:
        >>> f = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())  # bent at 0
        >>> lmnfast.linear_regions(f, torch.tensor([[-2.0], [-1.0], [1.0]]))
        2
    """
    with alone(), prepared(f, x, REGIONS, deferred=False) as function:
        function.check_outputs()
        chain = function.chain
        if chain is None:
            raise ValueError(
                "f: expected a chain of Linear layers and piecewise-linear activations; "
                f"{function.route.reason}"
            )
        for activation in chain.activations:
            if activation.name not in PIECEWISE_LINEAR:
                raise ValueError(
                    f"f: expected activations among {', '.join(PIECEWISE_LINEAR)}, got {activation.name}"
                )
        before = chain.values(function.x)[::2]
        patterns = [z > 0 for z, activation in zip(before, chain.activations) if activation != IDENTITY]
        return len(torch.cat(patterns, 1).unique(dim=0)) if patterns else 1
