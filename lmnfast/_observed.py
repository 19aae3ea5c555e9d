"""What an observable is computed from, and the package's own: numbers of a matrix, of samples, of a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _native, ops
from ._chain import IDENTITY, Chain
from ._differentiated import Rows, differentiated_features
from ._features import Scaled, chain_features, merged, tiled
from ._prepare import Prepared, prepared
from ._route import REGIONS
from ._threads import alone, lapack_on_one_core, one_core_after_fork

# Bytes of Jacobians, or of features in their place, that exist at a time. What does not fit is differentiated repeatedly.
ALL_JACOBIANS = 256 * 2**20


class DoesNotApply(ValueError):
    """An observable is not defined for this network; the message says why."""


@dataclass(frozen=True)
class Spectrum:
    """What the eigenvalues of a connectivity matrix give, as the fields of a `Measurement` with these names."""

    lmn: float
    complexity_bits: float
    negative_share: float


@dataclass(frozen=True, eq=False)
class Observation:
    """What the function of an observable receives. None of it may be changed.

    Example:
        >>> def bend_of_the_worst_pair(o: lmnfast.Observation) -> torch.Tensor:
        ...     return 1 - o.connectivity.min()
    """

    connectivity: Tensor
    """(N, N), as :func:`lmnfast.connectivity` returns it."""
    pooled: Tensor | None
    """(N, N), the R2 of each pair, pooled over the outputs. None if no observable of the measurement reads it."""
    spectrum: Spectrum | None
    """Has ``lmn``, ``complexity_bits``, ``negative_share``. None if no observable of the measurement reads it."""
    samples: Tensor
    """(N, *in), the samples at the cut."""
    network: Callable[[Tensor], Tensor]
    """The measured function: the tail behind the cut."""
    model: nn.Module | None
    """The whole model. None if a function is measured that is no ``nn.Module``."""


def participation(L: Tensor) -> Tensor:
    """``N^2 / |L|_F^2`` of matrices (..., N, N), in float64."""
    return (L.shape[-1] / torch.linalg.matrix_norm(L, dtype=torch.float64)).square()


def mean_bend(L: Tensor) -> Tensor:
    """1 - mean over pairs i < j of L (N, N), in float64. 0 without pairs."""
    pairs = len(L) * (len(L) - 1)
    above = L.sum(dtype=torch.float64) - L.diagonal().sum(dtype=torch.float64)
    return 1 - above / pairs if pairs else above.new_zeros(())


def lmn(o: Observation) -> float:
    assert o.spectrum is not None
    return o.spectrum.lmn


def complexity_bits(o: Observation) -> float:
    assert o.spectrum is not None
    return o.spectrum.complexity_bits


def negative_share(o: Observation) -> float:
    assert o.spectrum is not None
    return o.spectrum.negative_share


def curvature(o: Observation) -> Tensor:
    return mean_bend(o.connectivity)


def pooled_curvature(o: Observation) -> Tensor:
    if o.pooled is None:
        raise DoesNotApply("the method gives no pooled matrix")
    return mean_bend(o.pooled)


def participation_ratio(o: Observation) -> Tensor:
    return participation(o.connectivity)


def l2_norm(o: Observation) -> Tensor:
    if o.model is None:
        raise DoesNotApply("it is no nn.Module, and has no parameters")
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(p, dtype=torch.float64) for p in o.model.parameters()]
        if not norms:
            return torch.zeros((), dtype=torch.float64, device="cpu")
        return torch.stack([norm.to(norms[0].device) for norm in norms]).norm()


def local_complexity(o: Observation) -> Tensor:
    """Mean over pairs of the units whose pre-activations have opposite signs: of n+ and n- samples these are n+ n- pairs."""
    with torch.no_grad(), one_core_after_fork():
        z = _first_before_activation(o.network, o.samples)
        crossings = ((z > 0).sum(0) * (z < 0).sum(0)).sum()
        return crossings.double() / max(1, len(z) * (len(z) - 1) // 2)


def _first_before_activation(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The pre-activations of f's first hidden layer, (N, units)."""
    with alone(), prepared(f, x, REGIONS, deferred=False) as function:
        function.check_outputs()
        if function.chain is not None:
            return _first_of_chain(function.chain, function.x)
        reason = function.route.reason
    with alone(), prepared(f, x, "path", deferred=False) as function:
        if function.route.block is not None:
            function.settle()
        block = function.route.block
        if block is None:
            raise DoesNotApply(f"its first hidden layer is not known, as {reason}")
        _check_switches(block.activation.name)
        n = function.x if block.norm is None else block.norm(function.x)
        return F.linear(n, block.first, block.first_bias).flatten(1)


def _first_of_chain(chain: Chain, x: Tensor) -> Tensor:
    for n, activation in enumerate(chain.activations):
        if activation != IDENTITY:
            _check_switches(activation.name)
            return chain.values(x)[2 * n]
    return x.new_zeros(len(x), 1)  # a linear map: no unit changes its piece


def _check_switches(activation: str) -> None:
    """Whether an activation has one place where it bends, and has it at 0."""
    if activation in ("identity", "sin"):
        raise DoesNotApply(f"{activation} of its first hidden layer has no bend at 0")


def jacobian_rank(o: Observation) -> Callable[[], Tensor]:
    """The Gram matrix of the Jacobians at once, its eigenvalues later."""
    with torch.no_grad():
        G = jacobian_gram(o.network, o.samples).cpu()
    return lambda: effective_rank(ops.symmetric_eigenvalues(G).clamp(min=0), "all its Jacobians are 0")


def jacobian_gram(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A float64 matrix with the nonzero eigenvalues of ``G[i, j] = <J_i, J_j>``: G, or that of features if it is smaller.

    Raises DoesNotApply if f cannot be differentiated.
    """
    with alone(), prepared(f, x, "jacobians", deferred=False) as function:
        if function.own_ends is None:  # modules in order on CUDA, whose outputs are the chain's
            function.checks.finite("x", function.x)
        else:
            function.check_outputs()
        rows, width = _features(function)
        return Scaled(rows).of(lambda divided: _gram(divided, len(function.x), width))


def _features(function: Prepared) -> tuple[Rows, int]:
    """Rows whose inner products are those of the Jacobians, from sample to sample, and the length of a row."""
    x, chain = function.x, function.chain
    if chain is not None and any(a != IDENTITY for a in chain.activations):
        return chain_features(chain, x, affine=False)
    if chain is not None:  # one linear map for all samples
        size = (merged(chain).weights[0] != 0).any().double()
        return lambda begin, end: size.expand(end - begin, 1), 1
    try:
        differentiated = differentiated_features(
            function.calls, x, function.ends, function.allocated, False, function.checks
        )
        differentiated(0, 1)
    except ValueError as error:
        raise DoesNotApply(str(error)) from error
    return differentiated, function.ends.shape[1] * x[0].numel()


def _gram(rows: Rows, samples: int, width: int) -> Tensor:
    """``A.T @ A`` or ``A @ A.T`` of the rows A (samples, width), whichever is smaller."""
    most = max(1, ALL_JACOBIANS // (16 * width))
    if width <= samples:
        total = None
        for begin in range(0, samples, most):
            columns = rows(begin, min(begin + most, samples)).mT.contiguous()
            product = _native.linear(columns, columns, None)
            total = product if total is None else total + product
        assert total is not None
        return total

    def product_of(a: Tensor, b: Tensor) -> Tensor:
        return _native.linear(a.contiguous(), b.contiguous(), None)

    tile = samples if samples <= 2 * most else most
    return tiled(rows, samples, width, torch.float64, product_of, tile)


@one_core_after_fork()
def representation_rank(o: Observation) -> Tensor:
    samples = o.samples.detach().flatten(1).double().cpu()
    with lapack_on_one_core():
        values = torch.linalg.svdvals(samples)
    return effective_rank(values, "all its samples are 0")


def effective_rank(values: Tensor, why_none: str) -> Tensor:
    """exp(entropy) of values (N,) >= 0 as shares of their sum. Raises DoesNotApply if all are 0."""
    if not bool(values.sum() > 0):
        raise DoesNotApply(why_none)
    return torch.exp2(ops.spectral_entropy(values))


def number_of(value: Any) -> float | None:
    """What the function of an observable has returned, as a number; None if it does not apply."""
    if callable(value) and not isinstance(value, (Tensor, type)):
        value = value()
    if value is None:
        return None
    if isinstance(value, (str, bytes, type)):
        raise TypeError(f"it returned {value!r}")
    return float(value.detach() if isinstance(value, Tensor) else value)
