"""Jacobians of a network at its samples: the linear maps themselves, how far apart they are, how many there are."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _native, ops
from ._chain import IDENTITY, Activation, Chain
from ._checks import Checks, Findings, NotTheChain, all_finite, is_like
from ._outputs import Calls, first_outputs, gives_outputs, out_of_memory, outputs_of, widened
from ._recognise import recognise, why_no_chain
from ._route import find_route
from ._samples import checked_samples
from ._settings import check_budget
from ._threads import alone, lapack_on_one_core
from ._tiles import CPU_TILE, DEFAULT_BUDGET, AllocationCount
from ._undisturbed import evaluating
from .ops._checks import KERNEL_DTYPES
from .ops.jacobian import at_once
from .ops.jacobian_distance import (
    has_isometry,
    isometric_features,
    isometry,
    isometry_distance,
    jacobian_connectivity,
)

PIECEWISE_LINEAR = ("identity", "relu", "leaky_relu")
# Bytes of features held at a time; the kernel packs the second samples' once more. All at once, or two tiles of them.
ALL_FEATURES = 24 * 2**20
TILE_FEATURES = 8 * 2**20
TILE_ROWS = 1024  # more would only make the tile of the result larger than those of the features
# What the features of `_isometry` may lose of a squared distance, for the 1e-4 of a distance that is promised.
ISOMETRY_ERROR = 1e-6

# What is made of every two Jacobians: |J_i - J_j|, its square, or 1 less the share of that in |J_i|^2 + |J_j|^2.
Kind = Literal["distance", "squared", "connectivity"]


@alone()
def jacobians(f: Callable[[Tensor], Tensor], x: Tensor, *, budget: int | None = None) -> Tensor:
    """Jacobian of f at every sample; ``torch.func.vmap(torch.func.jacrev(f))(x)`` to rounding, flattened.

    Chains of Linear and pointwise activations without residual blocks run in one fused kernel. Any other f is
    differentiated by torch.func, forwards where it has more outputs than inputs and backwards elsewhere, on as many
    samples at a time as the budget allows; where that cannot run one of f's layers, by torch.autograd, output after
    output. An ``nn.Module`` is measured in eval mode and left as it was. The result carries no graph.
    On CUDA a chain of torch's own modules in order, in float32 or float64 and without autocast, is not called: the kernels give
    its outputs, which are only looked at.

    Args:
        f: maps a batch (B, *in) to (B, *out), one row independent of the others, differentiable.
        x: (N, *in), floating point, the samples.
        budget: bytes that f's intermediate results and their derivatives may take together, None: 256 MiB; not for chains.

    Returns:
        (N, K, D) with K outputs and D inputs; float64 for float64 samples, else float32.

    Raises:
        TypeError, ValueError: as :func:`lmnfast.connectivity`; a NaN or Inf in a Jacobian, or an f that cannot be
            differentiated, is a ValueError.
    """
    check_budget(budget)
    budget = DEFAULT_BUDGET if budget is None else budget
    x = checked_samples(f, x)
    with evaluating(f) as kept:
        calls = Calls(f, kept.put_back)
        chain, y, again, allocated = _prepared(calls, x, kept.in_order)
        if chain is not None and not _native.on_cuda(x):
            J, _ = at_once(chain, x)
            _check_finite(J)
            return J
        if chain is not None:
            J, own = at_once(chain, x, with_outputs=y is None)
            found = Findings(x, own if y is None else y, again, None, J.flatten(1))
            try:
                found.check()
            except NotTheChain:
                pass
            else:
                if not found.finite:
                    _check_finite(J)
                return J
        assert y is not None
        # Samples and outputs have been looked at.
        J = Differentiated(calls, x, y, allocated, budget, Checks(False))(0, len(x))
        _check_finite(J)
    return J


@alone()
def jacobian_distances(
    f: Callable[[Tensor], Tensor], x: Tensor, *, affine: bool = False, squared: bool = False
) -> Tensor:
    """Frobenius distances of f's Jacobians: ``d[i, j] = |J_i - J_j|``, right for close pairs, too.

    Close pairs are sums of squared differences in float64, and so is every pair of float64 samples; see
    ``lmnfast.ops.jacobian_distance``. For chains what is subtracted is float64 throughout, whatever f's dtype, so
    samples in one linear region of a piecewise-linear chain are exactly 0 apart: distances of at most 32
    epsilons of the larger Jacobian's norm are 0. With one nonlinearity,
    ``f = W3 a(W2 x + b2) + b3`` and ``s = a'(W2 x + b2)``, no Jacobian is formed: ``<J_i, J_j> = s_i^T M s_j`` with
    ``M = (W3^T W3) o (W2 W2^T) = B^T B``, and ``d[i, j] = |B s_i - B s_j|``. Otherwise Jacobians are taken for two tiles of
    samples at a time, again and again, and never all held. Networks that are no chain are differentiated in their own
    dtype, as :func:`jacobians` does; below its rounding a distance is noise.
    Memory beyond the result: under 64 MB, but for what f itself needs. CUDA is waited for once, at the end, where f is a chain.

    Args:
        f, x: as there.
        affine: compare the affine maps ``x -> J_i x + o_i``: the offset ``o_i = f(x_i) - J_i x_i`` is one more column.
        squared: d^2 in place of d.

    Returns:
        (N, N), symmetric, zeros on the diagonal; float64 for float64 samples, else float32.

    Raises:
        As jacobians.
    """
    x = checked_samples(f, x)
    kind: Kind = "squared" if squared else "distance"
    with evaluating(f) as kept:
        calls = Calls(f, kept.put_back)
        chain, y, again, allocated = _prepared(calls, x, kept.in_order)
        if chain is not None:
            try:
                return of_chain(chain, x, y, kind, affine, again)
            except NotTheChain:
                pass
        assert y is not None
        return of_other(calls, x, y, allocated, kind, affine, Checks(False))


@alone()
def linear_regions(f: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Number of linear regions of a piecewise-linear chain that the samples lie in.

    Counts the distinct patterns ``z > 0`` over all units before an activation, z in f's own dtype. This is what the linear
    mapping number generalises: regions count here, however alike their linear maps are.

    Args:
        f: Linear layers with ReLU, leaky ReLU or nothing between them, also in residual blocks.
        x: (N, *in), floating point, the samples.

    Returns:
        From 1 to N.

    Raises:
        TypeError, ValueError: as :func:`lmnfast.connectivity`; another f is a ValueError.
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
    """What f is, if so."""
    y: Tensor | None
    """f(x), (N, K); None, on CUDA, where the chain's kernels give it."""
    again: Tensor | None
    """What the chain gives, where nobody has compared that with y yet: on CUDA, where f is not in order."""
    allocated: int
    """Bytes that f's results took, of a chain in order 0."""


def _prepared(calls: Calls, x: Tensor, in_order: bool, with_kernels: bool = True) -> Prepared:
    """f on all samples. These and its outputs are checked, but of a chain on CUDA, where `Findings` behind its kernels do it, and
    the device is waited for once.

    in_order: whether f is made of torch's own modules, one after the other.
    """
    checks, on_cuda = Checks(False), with_kernels and _native.on_cuda(x)

    def recognised() -> Chain | None:
        if with_kernels:
            return find_route(calls.f, x, "jacobians").chain
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
        checks.finite("x", x)  # of not finite samples f may say anything
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


def _check_finite(J: Tensor, begin: int = 0) -> None:
    if all_finite(J):
        return
    good = J.isfinite().flatten(1).all(1)
    first = begin + int((~good).nonzero()[0])
    raise ValueError(f"f: NaN or Inf in the Jacobian of sample {first}, the first of {int((~good).sum())}")


# Chains ----------------------------------------------------------------------------------------------------


def merged(chain: Chain) -> Chain:
    """The chain in float64, Linear layers with nothing between them multiplied."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    activations = [chain.activations[0]]
    for weight, bias, activation in zip(chain.weights, chain.biases, chain.activations[1:]):
        weight, bias = weight.double(), None if bias is None else bias.double()
        if weights and activations[-1].name == "identity":
            before = biases.pop()
            if before is not None:
                bias = _native.linear(before[None], weight, bias)[0]
            weight = _native.linear(weight, weights.pop().mT, None)
            activations.pop()
        weights.append(weight)
        biases.append(bias)
        activations.append(activation)
    return replace(chain, weights=tuple(weights), biases=tuple(biases), activations=tuple(activations))


def of_chain(
    chain: Chain,
    x: Tensor,
    y: Tensor | None,
    kind: Kind,
    affine: bool = False,
    again: Tensor | None = None,
    expected: Tensor | None = None,
) -> Tensor:
    """What is made of every two Jacobians of a chain, (N, N). CUDA is waited for once, for the checks of samples x and outputs y,
    too, and of the chain's outputs and the model's, see `Findings`; elsewhere these have been made. y: as of `Prepared`.

    Raises NotTheChain, on CUDA, where y are others than the chain's.
    """
    on_cuda = _native.on_cuda(x)
    if all(a == IDENTITY for a in chain.activations):
        if on_cuda:
            Findings(x, chain(x) if y is None else y, again, expected).check()
        value = 1.0 if kind == "connectivity" else 0.0
        return torch.full((len(x), len(x)), value, dtype=_result_dtype(x), device=x.device)
    if not on_cuda:
        rows, width = chain_features(chain, x, affine)
        return of_rows(_checked(rows), x, width, kind)
    hidden = _one_hidden(chain, x)
    if hidden is not None:
        made, lost, own = _of_one_hidden(hidden, x, affine, kind, with_outputs=y is None)
        y = y if own is None else own
        y = chain(x) if y is None else y
        found = Findings(x, y, again, expected, made, lost)
        found.check()
        if abs(found.count) <= ISOMETRY_ERROR:
            if not found.finite:
                _name_what_is_not_finite(*_features_on_device(hidden, x, affine)[:2], x, made, kind)
            return made
    y = chain(x) if y is None else y
    rows, width = chain_features(chain, x, affine, with_isometry=hidden is None)
    made = of_rows(rows, x, width, kind)
    found = Findings(x, y, again, expected, made)
    found.check()
    if not found.finite:
        _name_what_is_not_finite(rows, width, x, made, kind)
    return made


def of_other(
    f: Calls, x: Tensor, y: Tensor, allocated: int, kind: Kind, affine: bool, checks: Checks
) -> Tensor:
    """The same of any f, which took so many bytes for all samples."""
    rows = other_features(f, x, y, allocated, affine, checks)
    return of_rows(rows, x, y.shape[1] * (x[0].numel() + affine), kind)


def of_rows(rows: Callable[[int, int], Tensor], x: Tensor, width: int, kind: Kind) -> Tensor:
    """The same of rows of features, in place of Jacobians."""
    dtype = _result_dtype(x)
    if kind == "connectivity" and not _native.on_cuda(x):
        return _connectivity(rows, x, width, dtype)
    if kind == "connectivity":
        return tiled(rows, len(x), width, dtype, partial(jacobian_connectivity, dtype=dtype))
    return tiled(rows, len(x), width, dtype, partial(_distance, squared=kind == "squared", dtype=dtype))


def _distance(first: Tensor, second: Tensor, *, squared: bool, dtype: torch.dtype) -> Tensor:
    return ops.jacobian_distance(first, second, squared, dtype)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _checked(rows: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    def checked(begin: int, end: int) -> Tensor:
        features = rows(begin, end)
        _check_finite(features, begin)
        return features

    return checked


def _name_what_is_not_finite(
    rows: Callable[[int, int], Tensor], width: int, x: Tensor, made: Tensor, kind: Kind
) -> None:
    """Raises what is wrong with a matrix that is not finite: a row of which it is made, or in a connectivity an entry. A distance
    may be beyond what there is."""
    tile = _tile_rows(len(x), width)
    for begin in range(0, len(x), tile):
        _check_finite(rows(begin, min(begin + tile, len(x))), begin)
    if kind == "connectivity":
        made.fill_diagonal_(1)
        Checks(False).entries(made)


def _one_hidden(chain: Chain, x: Tensor) -> Chain | None:
    """The chain as two Linear layers, where there are kernels for features of its slopes, and Jacobians are no smaller."""
    if len(chain.weights) != 2 or not x.dtype == chain.weights[0].dtype in KERNEL_DTYPES:
        chain = merged(chain)
    bent = [a != IDENTITY for a in chain.activations]
    return chain if bent == [False, True, False] and has_isometry(*chain.weights) else None


def _of_one_hidden(
    chain: Chain, x: Tensor, affine: bool, kind: Kind, with_outputs: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`of_chain` by CUDA's kernels for one hidden layer, without waiting, what `isometry` says about B, and where they give them
    the chain's outputs."""
    first, last = chain.weights
    if affine or first.dtype != _result_dtype(x) or _tile_rows(len(x), len(first)) < len(x):
        rows, width, lost = _features_on_device(chain, x, affine)
        return of_rows(rows, x, width, kind), lost, None
    return isometry_distance(
        x.flatten(1),
        first,
        chain.biases[0],
        last,
        chain.biases[1],
        chain.activations[1],
        squared=kind == "squared",
        connectivity=kind == "connectivity",
        with_outputs=with_outputs,
    )


def _features_on_device(
    chain: Chain, x: Tensor, affine: bool
) -> tuple[Callable[[int, int], Tensor], int, Tensor]:
    """`chain_features` of these kernels, and what `isometry` says about B."""
    first, last = chain.weights
    B, lost = isometry(first, last)

    def rows(begin: int, end: int) -> Tensor:
        some = x[begin:end].flatten(1).to(first.dtype)
        features = isometric_features(some, first, chain.biases[0], chain.activations[1], B)
        return torch.cat((features, _offsets(chain, some.double())), 1) if affine else features

    return rows, len(first) + affine * len(last), lost


def chain_features(
    chain: Chain, x: Tensor, affine: bool, with_isometry: bool = True
) -> tuple[Callable[[int, int], Tensor], int]:
    """Rows of features, as far apart as the Jacobians of a chain, for samples from begin to end; and their number."""
    chain = merged(chain)
    if chain.activations[-1] == IDENTITY and len(chain.weights[-1]) > chain.weights[-1].shape[1]:
        # W = Q R: a last Linear with more outputs than inputs keeps every distance as R.
        with lapack_on_one_core():
            R = torch.linalg.qr(chain.weights[-1], mode="r").R
        chain = replace(chain, weights=(*chain.weights[:-1], R), biases=(*chain.biases[:-1], None))
    inputs, outputs = chain.weights[0].shape[1], len(chain.weights[-1])
    B = None
    if with_isometry:
        with lapack_on_one_core():
            B = _isometry(chain)
    width = (inputs * outputs if B is None else len(B)) + affine * outputs

    def rows(begin: int, end: int) -> Tensor:
        some = x[begin:end].flatten(1).double()
        if B is None:
            features = ops.jacobian(chain, some).flatten(1)
        else:
            # The nonlinearity is on the input, or after the first Linear.
            on_input = chain.activations[0].name != "identity"
            z = some if on_input else _native.linear(some, chain.weights[0], chain.biases[0])
            features = _native.linear(_slope(chain.activations[0 if on_input else 1], z)[1], B, None)
        return torch.cat((features, _offsets(chain, some)), 1) if affine else features

    return rows, width


def _isometry(chain: Chain) -> Tensor | None:
    """B (F, H) with ``|J_i - J_j| = |B s_i - B s_j|`` for slopes s of the only nonlinearity.

    None where there are more, where Jacobians are no larger than the features, and where M is so close to singular
    that B would lose digits of them.
    """
    if sum(a.name != "identity" for a in chain.activations) > 1:
        return None
    first, last = chain.weights[0], chain.weights[-1]
    if chain.activations[0] != IDENTITY:
        M = last.square().sum(0).diag()
    elif chain.activations[-1] != IDENTITY:
        M = first.square().sum(1).diag()
    else:
        M = _native.linear(last.mT, last.mT, None) * _native.linear(first, first, None)
    norms = M.diagonal().sqrt()
    used = norms > 0  # the others change no Jacobian
    units = int(used.sum())
    if units == 0:
        return M.new_zeros(1, len(M))
    if len(last) * first.shape[1] <= units:
        return None
    if units < len(M):
        M, norms = M[used][:, used], norms[used]
    root, failed = torch.linalg.cholesky_ex(M / (norms[:, None] * norms))
    if failed:
        return None
    inverse = torch.linalg.solve_triangular(
        root, torch.eye(units, dtype=root.dtype, device=root.device), upper=False
    )
    # Rounding changes M by about H epsilon, a squared distance by as much over the least eigenvalue.
    if not units * torch.finfo(torch.float64).eps * inverse.square().sum() <= ISOMETRY_ERROR:
        return None
    B = root.mT * norms
    return B if units == len(used) else B.new_zeros(units, len(used)).masked_scatter_(used, B)


def _slope(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
    """a(z) and a'(z), PyTorch's also at a kink."""
    if activation == IDENTITY:
        return z, torch.ones_like(z)
    with torch.inference_mode(False), torch.enable_grad():
        z = (z.clone() if z.is_inference() else z.detach()).requires_grad_()
        a = _native.pointwise(activation, z)
        (slope,) = torch.autograd.grad(a, z, torch.ones_like(a))
    return a.detach(), slope


def _offsets(chain: Chain, x: Tensor) -> Tensor:
    """f(x) - J x up to f's last bias, from layer to layer: where a unit is linear, ``a(z) - a'(z) z`` is exactly 0, so
    the offset depends on the linear piece alone."""
    a, slope = _slope(chain.activations[0], x)
    offsets = a - slope * x
    for n, (weight, bias, activation) in enumerate(zip(chain.weights, chain.biases, chain.activations[1:])):
        z = _native.linear(a, weight, bias)
        if n + 1 == len(chain.weights) and activation.name == "identity":
            return _native.linear(offsets, weight, None)  # the last bias is the same for all
        a, slope = _slope(activation, z)
        offsets = _native.linear(offsets, weight, bias) * slope + (a - slope * z)
    return offsets


def _tile_rows(samples: int, width: int) -> int:
    """How many rows of features exist at a time, of as many numbers."""
    if 8 * samples * width <= ALL_FEATURES:
        return samples
    return max(1, min(TILE_FEATURES // (8 * width), TILE_ROWS))


def tiled(
    rows: Callable[[int, int], Tensor],
    samples: int,
    width: int,
    dtype: torch.dtype,
    measure: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """What is measured of every two rows of features, of which two tiles exist at a time."""
    tile = _tile_rows(samples, width)
    if tile == samples:
        features = rows(0, samples)
        return measure(features, features)
    result: Tensor | None = None
    for i in range(0, samples, tile):
        first = rows(i, min(i + tile, samples))
        if result is None:
            result = _native.empty(first, samples, samples, dtype=dtype)
        result[i : i + tile, i : i + tile] = measure(first, first)
        for j in range(i + tile, samples, tile):
            values = measure(first, rows(j, min(j + tile, samples)))
            result[i : i + tile, j : j + tile] = values
            result[j : j + tile, i : i + tile] = values.mT
    assert result is not None
    return result


def _connectivity(rows: Callable[[int, int], Tensor], x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """`jacobian_connectivity` in torch's arithmetic, for devices without that kernel."""
    norms = torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def with_norms(begin: int, end: int) -> Tensor:
        features = rows(begin, end)
        norms[begin:end] = torch.linalg.vector_norm(features, dim=1)
        return features

    L = tiled(with_norms, len(x), width, dtype, partial(_distance, squared=False, dtype=dtype))
    # Distances over norms, and squared only then: squares of tiny or huge Jacobians would not be finite.
    for begin in range(0, len(x), 256):
        end = min(begin + 256, len(x))
        least, largest = (of(norms[begin:end, None], norms[begin:]) for of in (torch.minimum, torch.maximum))
        # Not torch's hypot, which has other last bits where it is not vectorised.
        both = largest * (1 + (least / torch.where(largest > 0, largest, 1.0)).square()).sqrt()
        share = L[begin:end, begin:] / torch.where(both > 0, both, 1.0)
        some = 1 - share.square()
        own = some[:, : end - begin]
        own.copy_(own.triu(1) + own.triu(1).mT).fill_diagonal_(1)
        L[begin:end, begin:] = some
        L[end:, begin:end] = some[:, end - begin :].mT
    return L


# Other networks --------------------------------------------------------------------------------------------


def other_features(
    f: Calls, x: Tensor, y: Tensor, allocated: int, affine: bool, checks: Checks
) -> Callable[[int, int], Tensor]:
    differentiated = Differentiated(f, x, y, allocated, CPU_TILE // 4, checks)

    def rows(begin: int, end: int) -> Tensor:
        J = differentiated(begin, end).double()
        _check_finite(J, begin)
        if not affine:
            return J.flatten(1)
        some = x[begin:end].flatten(1).double()
        offsets = y[begin:end].double() - (J @ some[:, :, None]).squeeze(2)
        return torch.cat((J.flatten(1), offsets), 1)

    return rows


class Differentiated:
    """Jacobians of any f at samples from begin to end, (end - begin, K, D), by whichever way works."""

    def __init__(self, f: Calls, x: Tensor, y: Tensor, allocated: int, budget: int, checks: Checks) -> None:
        self.f, self.x, self.y, self.checks = f, x.clone() if x.is_inference() else x, y, checks
        self.inputs, self.outputs = x[0].numel(), y.shape[1]
        sample = -(-allocated // len(x))  # bytes that one sample takes
        directions = min(self.inputs, self.outputs)
        self.chunk = max(1, budget // (sample * (directions + 1)))
        self.chunk_outputs = max(1, budget // sample)
        self.ways = [self._forwards] if self.inputs < self.outputs else []
        self.ways += [self._backwards, self._output_by_output]
        self.constant = self._is_constant()

    def __call__(self, begin: int, end: int) -> Tensor:
        J = widened(self.y.new_empty(end - begin, self.outputs, self.inputs))
        if self.constant:
            return J.zero_()
        for start in range(begin, end, self.chunk):
            some = self.x[start : min(start + self.chunk, end)]
            J[start - begin : start - begin + len(some)], y = self._differentiate(some)
            self.checks.repeats(
                self.f, self.x, self.y, y, list(range(start, start + len(some))), "it alone, or on a few"
            )
        return J

    def _differentiate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Jacobians, and f's outputs, by the same calls."""
        while True:
            try:
                with torch.inference_mode(False):
                    J, y = self.ways[0](x)
                return J.detach().reshape(len(x), self.outputs, self.inputs), y.detach()
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                if len(self.ways) == 1:
                    raise ValueError(f"f: cannot be differentiated: {error}") from error
                self.ways.pop(0)  # for good: the next chunk would fail as well

    def _is_constant(self) -> bool:
        """Whether nothing leads back from the outputs to the samples; an error where they do depend on them."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = self.x[:1].clone().requires_grad_()
            y = self._with_graph(leaf)
            if y.requires_grad:
                try:
                    if torch.autograd.grad(y.sum(), leaf, allow_unused=True)[0] is not None:
                        return False
                except RuntimeError as error:
                    raise ValueError(f"f: cannot be differentiated: {error}") from error
        if (self.y != self.y[0]).any():
            raise ValueError(
                "f: cannot be differentiated: its outputs differ from sample to sample, but no graph leads back from "
                "them to the samples (a detach, no_grad, or a layer without a derivative)"
            )
        return True

    def _with_graph(self, leaf: Tensor) -> Tensor:
        try:
            return outputs_of(self.f, leaf.clone())
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise ValueError(f"f: cannot be differentiated: {error}") from error

    def _of_one(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        y = self.f(sample[None].clone()).flatten()
        return y, y

    def _forwards(self, x: Tensor) -> tuple[Tensor, Tensor]:
        jacobian = torch.func.jacfwd(self._of_one, has_aux=True, randomness="different")
        with warnings.catch_warnings():  # torch's own, where it first differentiates forwards
            warnings.filterwarnings("ignore", "`torch.jit.*` is deprecated", DeprecationWarning)
            return torch.func.vmap(jacobian, randomness="different")(x)

    def _backwards(self, x: Tensor) -> tuple[Tensor, Tensor]:
        jacobian = torch.func.jacrev(self._of_one, has_aux=True, chunk_size=self.chunk_outputs)
        return torch.func.vmap(jacobian, randomness="different")(x)

    def _output_by_output(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            y = outputs_of(self.f, leaf.clone())
            rows = [
                torch.autograd.grad(
                    total, leaf, retain_graph=True, allow_unused=True, materialize_grads=True
                )[0]
                for total in y.sum(0)
            ]
        return torch.stack(rows, 1), y
