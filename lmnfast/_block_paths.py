"""Measures paths of a transformer's block: a kernel takes the hidden layer, and the last Linear is applied to few coefficients.

docs/mathematics.md, "A block of a transformer", has the formulas and the bound that says how many coefficients are enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import _native
from ._block import Block
from ._generic import indistinct, pairs_of
from ._native import Progress
from ._outputs import Calls
from ._unresolved import LEAST_ROUNDING, RESOLVED_ULPS, UNRESOLVED, Widened, resolve
from .ops.block_coefficients import Normalisation, block_coefficients
from .ops.path_connectivity import ChainConnectivity
from .quadrature import orthonormal_polynomials
from .reference import CONSTANT_ULPS

# Bytes of the coefficients in a tile, all degrees of the first guess together. Larger tiles leave the caches between the kernel
# and the product, smaller ones are too few rows for the product.
CPU_TILE, CUDA_TILE = 16 * 2**20, 2**30

# The degrees of the first guess. A GELU or SiLU layer of PyTorch's initialisation needs 4 to 6, a trained one 6 to 10.
FIRST_DEGREES = 6

# The bound of the operator norm comes from half this many products with W^T W of so many random vectors. It fails with a
# probability of 1e-18 at a width of 3072: Dixon (1983), P(norm^2 > factor estimate) <= 0.8 factor^(-powers / 2) sqrt(width) for
# each vector.
POWERS, PROBES, FACTOR = 24, 16, 1.7

# Degrees are left out if they change the mean of a row's 1 - r2 by at most this many epsilons, 1e-6 in float32. That is the
# bound, and the size of float32's own rounding there. The change itself is some thousand times smaller, as the bound lets all
# that is left out fall on the output that varies least.
LEFT_OUT_ULPS = 8


@dataclass
class _Rows:
    """A block at N samples of P positions each, as rows sample * P + position; everything in float64 but `z` and `shift`."""

    z: Tensor
    """(N * P, units), or (N * P, 2 * units) with a gate; in the dtype of the measurement."""
    shift: Tensor | None
    own: Tensor | None
    """(N * P,), the samples' variances or mean squares; None without a normalisation."""
    normalised: Tensor | None
    """(N * P, inputs), the samples, centred for a LayerNorm."""
    outputs: Tensor
    """(N * P, K), the block's outputs."""
    hidden_scale: float

    @classmethod
    def of(cls, block: Block, x: Tensor) -> _Rows:
        """x: (N * P, inputs)."""
        dtype, wide = x.dtype, x.double()
        first, bias = _stacked(block.first, block.gate), _stacked_biases(block)
        shift = own = normalised = None
        if block.norm is None:
            z = _native.linear(wide, first.double(), None if bias is None else bias.double())
            a = z
        else:
            norm = block.norm
            normalised = wide - wide.mean(-1, keepdim=True) if norm.centers else wide
            own = normalised.square().mean(-1)
            weight = first.double() if norm.scale is None else first.double() * norm.scale.double()
            z = _native.linear(normalised, weight, None)
            shift = (
                _native.linear(norm.shift.double()[None], first.double(), None)[0]
                if norm.shift is not None
                else None
            )
            if bias is not None:
                shift = bias.double() if shift is None else shift + bias.double()
            a = z * torch.rsqrt(own + norm.epsilon)[:, None]
            a = a if shift is None else a + shift
        a, *gate = a.chunk(2, -1) if block.gate is not None else (a,)
        hidden = _native.pointwise(block.activation, a.contiguous())
        hidden = hidden * gate[0] if gate else hidden
        y = _native.linear(
            hidden, block.last.double(), None if block.last_bias is None else block.last_bias.double()
        )
        largest = float(hidden.abs().amax()) if hidden.numel() else 0.0
        return cls(
            z.to(dtype),
            None if shift is None else shift.to(dtype),
            own,
            normalised,
            wide + y if block.adds_input else y,
            2.0 ** -math.frexp(largest)[1] if 0 < largest < math.inf else 1.0,
        )

    def normalisation(self, block: Block, first: Tensor, second: Tensor) -> Normalisation | None:
        if self.own is None or self.normalised is None or block.norm is None:
            return None
        cross = (
            torch.linalg.vecdot(self.normalised[first], self.normalised[second]) / self.normalised.shape[1]
        )
        return Normalisation(self.own, cross, block.norm.epsilon)


def _stacked(first: Tensor, gate: Tensor | None) -> Tensor:
    return first if gate is None else torch.cat([first, gate])


def _stacked_biases(block: Block) -> Tensor | None:
    if block.gate is None or (block.first_bias is None and block.gate_bias is None):
        return block.first_bias
    zero = block.first.new_zeros(len(block.first))
    parts = (zero if bias is None else bias for bias in (block.first_bias, block.gate_bias))
    return torch.cat(list(parts))


def squared_norm_bound(weight: Tensor) -> float:
    """A bound of the squared operator norm of a matrix, as POWERS says. The same bits at every call."""
    generator = torch.Generator(weight.device).manual_seed(0)
    v = torch.randn(PROBES, weight.shape[1], generator=generator, dtype=weight.dtype, device=weight.device)
    v = v / v.norm(dim=1, keepdim=True)
    logarithm = torch.zeros(PROBES, dtype=torch.float64, device=weight.device)
    for _ in range(POWERS // 2):  # |(W^T W)^(powers / 2) v|^2 = v^T (W^T W)^powers v
        v = (v @ weight.mT) @ weight
        size = v.norm(dim=1)
        logarithm += size.double().log()
        v = v / torch.where(size > 0, size, 1.0)[:, None]
    return FACTOR * math.exp(2 * float(logarithm.amax()) / POWERS)


class _Outputs:
    """The statistics of a block's outputs along rows' paths, from the coefficients of its hidden layer."""

    def __init__(
        self, block: Block, rows: _Rows, positions: int, nodes: Tensor, weights: Tensor, own: Tensor | None
    ) -> None:
        """own: `Widened.rounding`, (2, P * K)."""
        self.last, self.positions = block.last, positions
        self.dtype, self.device = block.last.dtype, block.last.device
        t = nodes - weights @ nodes
        self.variance_t = float(weights @ t**2)
        outputs = rows.outputs.unflatten(0, (-1, positions))  # (N, P, K)
        spread = (outputs - outputs[:1]).abs().amax(0)
        self.scale = torch.where(spread > 0, torch.exp2(-torch.frexp(spread)[1].double()), 1.0)  # (P, K)
        self.outputs = (outputs * self.scale).flatten(0, 1)
        magnitude = self.outputs.abs().unflatten(0, (-1, positions)).amax(0)
        least = magnitude * LEAST_ROUNDING
        own = None if own is None else own.double().unflatten(1, self.scale.shape) * self.scale
        self.computed_from = (least if own is None else least + own[0]).to(self.dtype)
        self.least = torch.zeros_like(self.computed_from) if own is None else own[1].to(self.dtype)
        squared = self.last.double().square().sum(1)
        bound = squared.clamp(max=squared_norm_bound(self.last))  # (K,)
        self.bound = bound * self.scale**2 * (self.variance_t / rows.hidden_scale**2 / self.last.shape[0])

    @cached_property
    def epsilon(self) -> float:
        return torch.finfo(self.dtype).eps

    def shares(
        self, coefficients: Tensor, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """1 - r2 of each row, averaged over its outputs; counts of constant and of unresolved outputs; and the error of
        the first for each unit of energy in the degrees that are left out. Each (rows,).

        coefficients: (degrees, rows, K), from degree 1 on, of the block's last Linear. The rules are those of
        csrc/statistics.h.
        """
        position = first % self.positions
        scale = self.scale[position].to(self.dtype)
        start, end = self.outputs[first], self.outputs[second]
        chord = (end - start).to(self.dtype)
        magnitude = torch.maximum(start.abs(), end.abs()).to(self.dtype)
        slope = coefficients[0] * scale
        bend = (coefficients[1:] * scale).square().sum(0) * self.variance_t
        covariance = chord * self.variance_t + slope * math.sqrt(self.variance_t)
        total = covariance.square() + bend
        tolerance = magnitude * (CONSTANT_ULPS * self.epsilon)
        constant_total = tolerance.square() * self.variance_t
        least_total, largest_total = (1e-24, 1e30) if self.dtype == torch.float32 else (1e-280, 1e290)
        moved = (chord != 0) | (slope != 0) | (bend != 0)
        constant = torch.where(constant_total >= least_total, total <= constant_total, ~moved)
        least = self.least[position]
        constant &= magnitude >= torch.where(magnitude > 0, least.abs(), least)
        computed_from = self.computed_from[position]
        resolved_ulps = RESOLVED_ULPS[self.dtype] * self.epsilon
        resolved_total = (magnitude.square() + computed_from.square()) * (resolved_ulps**2 * self.variance_t)
        resolved = (total > resolved_total) & (total > least_total) & (total < largest_total)
        share = torch.where(constant | ~(total > 0), 0.0, bend / total)
        bound = self.bound[position]
        sensitivity = torch.where(bound > 0, bound / total, 0.0).amax(1)
        return share.mean(1), constant.sum(1), (~constant & ~resolved).sum(1), sensitivity


class _Measured:
    """A block's rows, measured with as many degrees as each of them needs."""

    def __init__(self, block: Block, rows: _Rows, outputs: _Outputs, nodes: Tensor, weights: Tensor) -> None:
        self.block, self.rows, self.outputs, self.nodes = block, rows, outputs, nodes
        self.polynomials = orthonormal_polynomials(nodes, weights)
        self.degrees = len(self.polynomials)
        self.guess = min(FIRST_DEGREES, self.degrees)

    def shares(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """1 - r2 of each row, averaged over its outputs, and counts of constant and of unresolved outputs. Each (rows,)."""
        end = self.guess
        coefficients, energy = self._coefficients(first, second, 0, end)
        # The energy in all degrees from each one on; none is left behind the last.
        left = energy.flip(1).cumsum(1).flip(1)
        left = torch.cat([left, left.new_zeros(len(left), 1)], 1)
        share, constants, unresolved, sensitivity = self.outputs.shares(coefficients, first, second)
        most = LEFT_OUT_ULPS * self.outputs.epsilon
        needed = (sensitivity[:, None] * left > most).sum(1)
        rows = (needed > end).nonzero()[:, 0]
        coefficients = coefficients[:, rows]
        while len(rows):
            begin, end = end, min(end + max(2, self.guess // 2), self.degrees)
            more, _ = self._coefficients(first[rows], second[rows], begin, end)
            coefficients = torch.cat([coefficients, more])
            found = self.outputs.shares(coefficients, first[rows], second[rows])
            share[rows], constants[rows], unresolved[rows], sensitivity = found
            open = sensitivity * left[rows, end] > most
            rows, coefficients = rows[open], coefficients[:, open]
        # The next tile begins with the degrees that nine of ten rows of this one need.
        self.guess = max(2, int(needed.kthvalue(max(1, 9 * len(needed) // 10)).values))
        return share, constants, unresolved

    def _coefficients(self, first: Tensor, second: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """The coefficients of the outputs (end - begin, rows, K), and the energy of the hidden layer (rows, degrees)."""
        block, rows = self.block, self.rows
        hidden, energy = block_coefficients(
            rows.z,
            first,
            second,
            block.activation,
            self.nodes,
            self.polynomials,
            gated=block.gate is not None,
            normalisation=rows.normalisation(block, first, second),
            shift=rows.shift,
            begin=begin,
            end=end,
            scale=rows.hidden_scale,
        )
        return (hidden.flatten(0, 1) @ block.last.mT).unflatten(0, hidden.shape[:2]), energy


def block_paths(
    block: Block,
    f: Calls,
    x: Tensor,
    ends: Tensor,
    nodes: Tensor,
    weights: Tensor,
    tile: int,
    allocated: int,
    progress: Progress | None,
) -> ChainConnectivity:
    """The connectivity of f, which is the block. The arguments are those of `generic_paths`; f is for unresolved pairs."""
    positions = math.prod(x.shape[1:-1])
    with torch.no_grad():
        rows = _Rows.of(block, x.reshape(-1, x.shape[-1]))
        widened_f = Widened(f, x, ends)
        outputs = _Outputs(block, rows, positions, nodes, weights, widened_f.rounding)
        measured = _Measured(block, rows, outputs, nodes, weights)
    L = torch.ones(len(x), len(x), dtype=x.dtype, device=x.device)
    counts = torch.zeros(2, dtype=torch.int64, device=x.device)
    of_row = FIRST_DEGREES * len(block.first) * x.element_size()
    most = max(1, min(tile, CPU_TILE if x.device.type == "cpu" else CUDA_TILE) // (of_row * positions))
    places = torch.arange(positions, device=x.device)
    finished = 0
    for first, second in pairs_of(len(x), most, x.device):
        finished += len(first)
        apart = ~indistinct(x[first], x[second])
        if not apart.all():
            i, j = first[~apart], second[~apart]
            near = (x[i] != x[j]).flatten(1).any(1)  # other pairs are equal samples, and their entry is 1
            L[i[near], j[near]] = L[j[near], i[near]] = UNRESOLVED
            counts[1] += near.sum()
            first, second = first[apart], second[apart]
        if len(first):
            at = [(samples[:, None] * positions + places).flatten() for samples in (first, second)]
            share, constants, unresolved = (
                values.unflatten(0, (-1, positions)) for values in measured.shares(*at)
            )
            left = unresolved.any(1)
            r2 = torch.where(left, UNRESOLVED, 1 - share.mean(1))
            L[first, second] = L[second, first] = r2
            counts[0] += constants[~left].sum()
            counts[1] += left.sum()
        if progress is not None:
            progress(2 * finished / (len(x) * (len(x) - 1)))

    def resolved() -> None:
        if int(counts[1]):
            points = max(1, tile * len(x) // allocated // 4)  # float64 takes more memory
            values, noise = widened_f.values(), widened_f.noise()
            resolve(values, x, L, counts, nodes, weights, points=points, noise=noise)

    return ChainConnectivity(L, counts, resolved)
