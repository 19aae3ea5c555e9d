"""Jacobians of a network at its samples: the linear maps themselves, their distances, and their number."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from ._chain import IDENTITY, Chain
from ._checks import Checks, Findings, NotTheChain, is_like
from ._differentiated import Differentiated, check_jacobian
from ._features import Kind, compare_chain, compare_differentiated
from ._outputs import Calls, first_outputs, gives_outputs
from ._recognise import recognise, why_no_chain
from ._route import find_route
from ._samples import checked_samples
from ._settings import check_budget
from ._threads import alone
from ._tiles import DEFAULT_BUDGET, AllocationCount
from ._undisturbed import evaluating
from .ops.jacobian import at_once

PIECEWISE_LINEAR = ("identity", "relu", "leaky_relu")


@alone()
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
    x = checked_samples(f, x)
    with evaluating(f) as kept:
        calls = Calls(f, kept.put_back)
        chain, y, again, allocated = _prepared(calls, x, kept.in_order)
        if chain is not None and not _native.on_cuda(x):
            J, _ = at_once(chain, x)
            check_jacobian(J)
            return J
        if chain is not None:
            J, own = at_once(chain, x, with_outputs=y is None)
            y = own if y is None else y
            assert y is not None
            found = Findings(x, y, again, None, J.flatten(1))
            try:
                found.check()
            except NotTheChain:
                pass
            else:
                if not found.finite:
                    check_jacobian(J)
                return J
        assert y is not None
        # Samples and outputs are checked already.
        J = Differentiated(calls, x, y, allocated, budget, Checks(False))(0, len(x))
        check_jacobian(J)
    return J


@alone()
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
    x = checked_samples(f, x)
    kind: Kind = "squared" if squared else "distance"
    with evaluating(f) as kept:
        calls = Calls(f, kept.put_back)
        chain, y, again, allocated = _prepared(calls, x, kept.in_order)
        if chain is not None:
            try:
                return compare_chain(chain, x, y, kind, affine, again)
            except NotTheChain:
                pass
        assert y is not None
        return compare_differentiated(calls, x, y, allocated, kind, affine, Checks(False))


@alone()
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
    x = checked_samples(f, x)
    with evaluating(f) as kept:
        chain, *_ = _prepared(Calls(f, kept.put_back), x, kept.in_order, with_kernels=False)
        if chain is None:
            raise ValueError(
                f"f: expected a chain of Linear layers and piecewise-linear activations; {why_no_chain(f)}"
            )
        for activation in chain.activations:
            if activation.name not in PIECEWISE_LINEAR:
                raise ValueError(
                    f"f: expected activations among {', '.join(PIECEWISE_LINEAR)}, got {activation.name}"
                )
        before = chain.values(x)[::2]
        patterns = [z > 0 for z, activation in zip(before, chain.activations) if activation != IDENTITY]
        return len(torch.cat(patterns, 1).unique(dim=0)) if patterns else 1


class Prepared(NamedTuple):
    chain: Chain | None
    """The chain that f is; None if f is no chain."""
    y: Tensor | None
    """f(x), (N, K). None, on CUDA, if the chain's kernels compute f(x)."""
    again: Tensor | None
    """The chain's outputs, if they must still be compared with y: on CUDA, unless f is a sequence of torch's own modules."""
    allocated: int
    """Bytes of f's results. 0 for a chain that is a sequence of torch's own modules."""


def _prepared(calls: Calls, x: Tensor, in_order: bool, with_kernels: bool = True) -> Prepared:
    """Calls f on all samples, and checks samples and outputs.

    For a chain on CUDA `Findings` makes these checks behind the kernels, so that the device is waited for once.
    in_order: whether f is a sequence of torch's own modules. with_kernels: whether kernels will measure the chain.
    """
    checks, on_cuda = Checks(False), with_kernels and _native.on_cuda(x)

    def recognised() -> Chain | None:
        if with_kernels:
            return find_route(calls.f, x, "jacobians", put_back=calls.begin_anew).chain
        chain = recognise(calls.f)
        return chain if chain is not None and (x.dim() == 2 or chain.flattens) else None

    chain, allocated = recognised() if in_order else None, 0
    if on_cuda and chain is not None and gives_outputs(chain, x):
        return Prepared(chain, None, None, 0)
    if not on_cuda:
        checks.finite("x", x)
    try:
        if chain is not None:
            y = first_outputs(calls, x, chain)
        else:
            with AllocationCount() as count:
                y = first_outputs(calls, x, None)
            allocated = count.bytes
    except Exception:
        checks.finite("x", x)  # f may raise anything on samples that are not finite
        raise
    if on_cuda and chain is not None:
        return Prepared(chain, y, None, 0)
    if not in_order:
        chain = recognised()
        if on_cuda and chain is not None and is_like(again := chain(x), y):
            return Prepared(chain, y, again, allocated)
    if on_cuda:
        Findings(x, y, None, None).check()
    else:
        checks.finite("f(x)", y)
    if chain is not None and not (in_order or checks.reproduces(chain, x, y)):
        chain = None
    return Prepared(chain, y, None, allocated)
