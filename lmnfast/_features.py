"""Compares the Jacobians of a network by rows of features that are exactly as far apart as the Jacobians are."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from . import _native, ops
from ._chain import IDENTITY, Activation, Chain
from ._checks import Checks, Findings
from ._differentiated import Rows, check_jacobian, differentiated_features
from ._outputs import Calls
from ._threads import lapack_on_one_core
from .ops._checks import KERNEL_DTYPES
from .ops.jacobian import at_once
from .ops.jacobian_distance import (
    LARGEST,
    SMALLEST,
    has_isometry,
    isometry_distance,
    jacobian_connectivity,
    jacobian_features,
    jacobian_isometry,
    largest_magnitude,
)

# Bytes of features held at a time: all features at once, or two tiles. The kernel packs the second samples' features once more.
ALL_FEATURES = 24 * 2**20
TILE_FEATURES = 8 * 2**20
TILE_ROWS = 1024  # more rows would only make the tile of the result larger than the tiles of the features

# Largest relative error of a squared distance by the features of `_isometry`; a distance is promised to 1e-4.
ISOMETRY_ERROR = 1e-6

# The number computed for every two Jacobians: |J_i - J_j|, its square, or 1 - |J_i - J_j|^2 / (|J_i|^2 + |J_j|^2).
Kind = Literal["distance", "squared", "connectivity"]


def merged(chain: Chain) -> Chain:
    """The chain in float64. Linear layers without an activation between them are multiplied into one."""
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


def compare_chain(
    chain: Chain,
    x: Tensor,
    y: Tensor | None,
    kind: Kind,
    affine: bool = False,
    again: Tensor | None = None,
    expected: Tensor | None = None,
) -> Tensor:
    """The number of `Kind` for every two Jacobians of a chain, (N, N).

    On CUDA it waits once, and makes the checks of `Findings`: of samples x, outputs y, the chain's outputs `again` and the
    model's outputs `expected`. On other devices the caller has made these checks. y: as in `Prepared`.

    Raises NotTheChain, on CUDA, if y are not the chain's outputs.
    """
    on_cuda = _native.on_cuda(x)
    if all(a == IDENTITY for a in chain.activations):
        if on_cuda:
            Findings(x, chain(x) if y is None else y, again, expected).check()
        value = 1.0 if kind == "connectivity" else 0.0
        return torch.full((len(x), len(x)), value, dtype=_result_dtype(x), device=x.device)
    if not on_cuda:
        return compare_rows(*chain_features(chain, x, affine), x, kind)
    hidden = _one_hidden(chain, x)
    if hidden is not None:
        matrix, lost, own = _of_one_hidden(hidden, x, affine, kind, with_outputs=y is None)
        y = y if own is None else own
        y = chain(x) if y is None else y
        found = Findings(x, y, again, expected, matrix, lost)
        found.check()
        if abs(found.count) <= ISOMETRY_ERROR:
            if not found.finite:
                _name_what_is_not_finite(*_features_on_device(hidden, x, affine)[:2], x, matrix, kind)
            return matrix
    y = chain(x) if y is None else y
    rows, width = chain_features(chain, x, affine, with_isometry=hidden is None, checked=False)
    matrix = compare_rows(rows, width, x, kind)
    found = Findings(x, y, again, expected, matrix)
    found.check()
    if not found.finite:
        _name_what_is_not_finite(rows, width, x, matrix, kind)
    return matrix


def compare_differentiated(
    f: Calls, x: Tensor, y: Tensor, allocated: int, kind: Kind, affine: bool, checks: Checks
) -> Tensor:
    """The same for any f. allocated: bytes that f takes for all samples."""
    rows = differentiated_features(f, x, y, allocated, affine, checks)
    return compare_rows(rows, y.shape[1] * (x[0].numel() + affine), x, kind)


def compare_rows(rows: Rows, width: int, x: Tensor, kind: Kind) -> Tensor:
    """The same for rows of features, in place of Jacobians."""
    dtype = _result_dtype(x)
    if kind == "connectivity" and not _native.on_cuda(x):
        return _connectivity(rows, x, width, dtype)
    if kind == "connectivity":
        return tiled(rows, len(x), width, dtype, partial(jacobian_connectivity, dtype=dtype))
    distance = partial(ops.jacobian_distance, squared=kind == "squared", dtype=dtype)
    return tiled(rows, len(x), width, dtype, distance)


class Scaled:
    """Rows of features divided by one power of two, about the largest magnitude in them. On the CPU alone.

    What a ratio of squares needs: squares of the outputs' own size may overflow or vanish. The first rows that are asked for
    give the scale. Where later ones are much larger, `of` begins again with theirs.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._exponent: int | None = None

    def of(self, use: Callable[[Rows], Tensor]) -> Tensor:
        """`use` of these rows."""
        while True:
            try:
                return use(self._divided)
            except Larger:
                continue

    def _divided(self, begin: int, end: int) -> Tensor:
        return self.divided(self._rows(begin, end))

    def divided(self, features: Tensor) -> Tensor:
        """Some of the rows, divided. Raises `Larger` if all must be divided again, by the scale that these rows have given."""
        largest = largest_magnitude(features)
        # 2^-1000 to 2^1000: a factor beyond them is no float64.
        exponent = max(-1000, min(1000, math.frexp(largest)[1])) if largest > 0 else -1000
        if self._exponent is None:
            self._exponent = exponent
        elif exponent > self._exponent + 400:
            self._exponent = exponent
            raise Larger
        return features * 2.0**-self._exponent


class Larger(Exception):
    """Rows are so much larger than the first that their squares overflow."""


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _name_what_is_not_finite(rows: Rows, width: int, x: Tensor, matrix: Tensor, kind: Kind) -> None:
    """Raises the error behind a matrix that is not finite: a row of features, or in a connectivity an entry.

    Does not raise for a distance that overflows though its rows are finite.
    """
    tile = _tile_rows(len(x), width)
    for begin in range(0, len(x), tile):
        check_jacobian(rows(begin, min(begin + tile, len(x))), begin)
    if kind == "connectivity":
        matrix.fill_diagonal_(1)
        Checks(False).entries(matrix)


def _one_hidden(chain: Chain, x: Tensor) -> Chain | None:
    """The chain as two Linear layers with one activation between; None if the kernels for that case do not take the chain.

    They take it if its Jacobians are not smaller than the features of its slopes.
    """
    if len(chain.weights) != 2 or not x.dtype == chain.weights[0].dtype in KERNEL_DTYPES:
        chain = merged(chain)
    bent = [a != IDENTITY for a in chain.activations]
    return chain if bent == [False, True, False] and has_isometry(*chain.weights) else None


def _of_one_hidden(
    chain: Chain, x: Tensor, affine: bool, kind: Kind, with_outputs: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`compare_chain` by CUDA's kernels for one hidden layer, without a wait.

    Returns the matrix, the error of B as `jacobian_isometry` gives it, and the chain's outputs if the kernels compute them.
    """
    first, last = chain.weights
    if affine or first.dtype != _result_dtype(x) or _tile_rows(len(x), len(first)) < len(x):
        rows, width, lost = _features_on_device(chain, x, affine)
        return compare_rows(rows, width, x, kind), lost, None
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


def _features_on_device(chain: Chain, x: Tensor, affine: bool) -> tuple[Rows, int, Tensor]:
    """`chain_features` by these kernels, and the error of B as `jacobian_isometry` gives it."""
    first, last = chain.weights
    B, lost = jacobian_isometry(first, last)

    def rows(begin: int, end: int) -> Tensor:
        samples = x[begin:end].flatten(1).to(first.dtype)
        features = jacobian_features(samples, first, chain.biases[0], chain.activations[1], B)
        return torch.cat((features, _offsets(chain, samples.double())), 1) if affine else features

    return rows, len(first) + affine * len(last), lost


def chain_features(
    chain: Chain, x: Tensor, affine: bool, with_isometry: bool = True, checked: bool = True
) -> tuple[Rows, int]:
    """A function that gives the features of a chain for samples from begin to end; and the number of features.

    Two rows of features are as far apart as the samples' Jacobians. checked: whether the function raises ValueError for a row
    that is not finite.
    """
    chain = merged(chain)
    if chain.activations[-1] == IDENTITY and len(chain.weights[-1]) > chain.weights[-1].shape[1]:
        # W = Q R: if the last Linear has more outputs than inputs, R in place of W keeps every distance.
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
        samples = x[begin:end].flatten(1).double()
        if B is None:
            features = at_once(chain, samples)[0].flatten(1)
        else:
            # The only nonlinearity is on the input or after the first Linear.
            on_input = chain.activations[0].name != "identity"
            z = samples if on_input else _native.linear(samples, chain.weights[0], chain.biases[0])
            features = _native.linear(_slope(chain.activations[0 if on_input else 1], z)[1], B, None)
        features = torch.cat((features, _offsets(chain, samples)), 1) if affine else features
        if checked:
            check_jacobian(features, begin)
        return features

    return rows, width


def _isometry(chain: Chain) -> Tensor | None:
    """B (F, H) with ``|J_i - J_j| = |B s_i - B s_j|``, where s are the slopes of the only nonlinearity.

    None if there are more nonlinearities, if Jacobians are no larger than the features, or if M is so close to singular that
    distances would lose digits. docs/mathematics.md derives B and M.
    """
    if sum(a.name != "identity" for a in chain.activations) > 1:
        return None
    first, last = chain.weights[0], chain.weights[-1]
    if not all(SMALLEST**0.5 <= largest_magnitude(weight) <= LARGEST**0.5 for weight in (first, last)):
        return None
    if chain.activations[0] != IDENTITY:
        M = last.square().sum(0).diag()
    elif chain.activations[-1] != IDENTITY:
        M = first.square().sum(1).diag()
    else:
        M = _native.linear(last.mT, last.mT, None) * _native.linear(first, first, None)
    norms = M.diagonal().sqrt()
    used = norms > 0  # units with norm 0 change no Jacobian
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
    # Rounding changes M by about H epsilon, and a squared distance by that number over the least eigenvalue of M.
    if not units * torch.finfo(torch.float64).eps * inverse.square().sum() <= ISOMETRY_ERROR:
        return None
    B = root.mT * norms
    return B if units == len(used) else B.new_zeros(units, len(used)).masked_scatter_(used, B)


def _slope(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
    """a(z) and a'(z), at a kink PyTorch's derivative."""
    if activation == IDENTITY:
        return z, torch.ones_like(z)
    with torch.inference_mode(False), torch.enable_grad():
        z = (z.clone() if z.is_inference() else z.detach()).requires_grad_()
        a = _native.pointwise(activation, z)
        (slope,) = torch.autograd.grad(a, z, torch.ones_like(a))
    return a.detach(), slope


def _offsets(chain: Chain, x: Tensor) -> Tensor:
    """f(x) - J x without f's last bias, computed from layer to layer.

    If a unit is linear, ``a(z) - a'(z) z`` is exactly 0, so the offset depends on the linear piece alone.
    """
    a, slope = _slope(chain.activations[0], x)
    offsets = a - slope * x
    for n, (weight, bias, activation) in enumerate(zip(chain.weights, chain.biases, chain.activations[1:])):
        z = _native.linear(a, weight, bias)
        if n + 1 == len(chain.weights) and activation.name == "identity":
            return _native.linear(offsets, weight, None)  # the last bias is the same for all samples
        a, slope = _slope(activation, z)
        offsets = _native.linear(offsets, weight, bias) * slope + (a - slope * z)
    return offsets


def _tile_rows(samples: int, width: int) -> int:
    """How many rows of features exist at a time. width: numbers in a row."""
    if 8 * samples * width <= ALL_FEATURES:
        return samples
    return max(1, min(TILE_FEATURES // (8 * width), TILE_ROWS))


def tiled(
    rows: Rows,
    samples: int,
    width: int,
    dtype: torch.dtype,
    measure: Callable[[Tensor, Tensor], Tensor],
    tile: int | None = None,
) -> Tensor:
    """Applies `measure` to every two rows of features, (samples, samples). Two tiles of features exist at a time.

    tile: rows of features in a tile. None: by `_tile_rows`.
    """
    tile = _tile_rows(samples, width) if tile is None else tile
    result: Tensor | None = None
    for i, j in _tile_places(samples, tile):
        second = rows(j.start, j.stop)
        if i == j:
            first = second
        result = _with_tile(result, measure(first, second), i, j, samples, dtype)
        del second  # or three tiles would exist while the next rows are computed
    assert result is not None
    return result


def _tile_places(samples: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """The rows of every two tiles. Of each first tile, the pair of it with itself comes first."""
    places = [slice(begin, min(begin + tile, samples)) for begin in range(0, samples, tile)]
    for n, i in enumerate(places):
        for j in places[n:]:
            yield i, j


def _with_tile(
    result: Tensor | None, values: Tensor, i: slice, j: slice, samples: int, dtype: torch.dtype
) -> Tensor:
    """A symmetric result with the values of two tiles; the values themselves if one tile has all samples."""
    if j.stop - i.start == samples and i == j:
        return values
    if result is None:
        result = _native.empty(values, samples, samples, dtype=dtype)
    result[i, j] = values
    if i != j:
        result[j, i] = values.mT
    return result


def _connectivity(rows: Rows, x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """`jacobian_connectivity` in plain torch, for devices without that kernel."""
    norms, largest_of = (torch.zeros(len(x), dtype=torch.float64, device=x.device) for _ in range(2))
    L: Tensor | None = None
    scaled, tile = Scaled(rows), _tile_rows(len(x), width)
    while True:
        try:
            for i, j in _tile_places(len(x), tile):
                second = scaled.divided(rows(j.start, j.stop))
                if i == j:
                    first = second
                    norms[i] = torch.linalg.vector_norm(first, dim=1)
                    largest_of[i] = torch.linalg.vector_norm(first, math.inf, dim=1)
                L = _with_tile(L, ops.jacobian_distance(first, second, dtype=dtype), i, j, len(x), dtype)
                del second
        except Larger:
            continue
        break
    assert L is not None
    _to_connectivity(L, norms)
    # Jacobians so small that their squares vanish beside the others' are compared on their own scale. Samples whose units are
    # all dead have such.
    (small,) = ((largest_of > 0) & (largest_of < SMALLEST)).nonzero(as_tuple=True)
    if len(small) > 1:

        def alone(begin: int, end: int) -> Tensor:
            return torch.cat([rows(i, i + 1) for i in small[begin:end].tolist()])

        L[small[:, None], small] = _connectivity(alone, x[small], width, dtype)
    return L


def _to_connectivity(L: Tensor, norms: Tensor) -> None:
    """Makes connectivities of distances (N, N), in place. norms: (N,), of the features."""
    # Distances are divided by norms before they are squared: squares of tiny or huge Jacobians would not be finite.
    for begin in range(0, len(L), 256):
        end = min(begin + 256, len(L))
        least, largest = (
            choose(norms[begin:end, None], norms[begin:]) for choose in (torch.minimum, torch.maximum)
        )
        # torch's hypot is not used, as its last bits differ where it is not vectorised.
        both = largest * (1 + (least / torch.where(largest > 0, largest, 1.0)).square()).sqrt()
        share = L[begin:end, begin:] / torch.where(both > 0, both, 1.0)
        entries = 1 - share.square()
        diagonal = entries[:, : end - begin]
        diagonal.copy_(diagonal.triu(1) + diagonal.triu(1).mT).fill_diagonal_(1)
        L[begin:end, begin:] = entries
        L[end:, begin:end] = entries[:, end - begin :].mT
