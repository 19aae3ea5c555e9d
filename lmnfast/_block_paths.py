"""Measures paths of a transformer's block: a kernel takes the hidden layer, and the last Linear is applied to few coefficients.

docs/mathematics.md, "A block of a transformer", has the formulas and the bound that says how many coefficients are enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from ._block import Block
from ._chain import ACTIVATIONS
from ._generic import Paths
from ._native import Progress
from ._settings import PLAIN, Statistic
from ._unresolved import LEAST_ROUNDING, RESOLVED_ULPS, TOTALS, UNRESOLVED, Widened
from ._whole import Whole
from .quadrature import orthonormal_polynomials
from .reference import CONSTANT_ULPS

# The number of terms with which the size of a tile is computed. A GELU or SiLU layer 768-3072-768 of PyTorch's initialisation
# needs 6 to 9, one with weights three times as large 9 to 14, one with kinks all.
FIRST_TERMS = 8

# A pair is measured again in float64 if what a normalisation divides by falls at a node below this share of what it is at the
# ends, in squares. The samples cancel there. The square loses a digit for each digit of this, twice as many as f itself does.
VANISHING = 2.0**-16

STATISTICS = 8  # numbers that exist for an output at one time, beside its coefficients
# What a row costs in addition, counted in terms, if its first terms are too few: the kernel runs again.
AGAIN = 5
SAMPLE_VALUES = 2**22  # values of the first Linear that are computed at a time at the samples, 32 MB
TURNED = 16  # rows that determine the polynomials

# The bound of |W|^2, for the operator norm |W| of a matrix. PROBES random vectors v are multiplied POWERS / 2 times by W^T W.
# The largest estimate (v^T (W^T W)^POWERS v)^(1 / POWERS), times FACTOR, is the bound. For each vector the bound fails with a
# probability of at most 0.8 FACTOR^(-POWERS / 2) sqrt(width) (Dixon, 1983): for all, 1e-18 at a width of 3072.
POWERS, PROBES, FACTOR = 24, 16, 1.7

# Terms are left out if they change the mean of a row's 1 - r2 by at most this many epsilons, 1e-6 in float32. That is about the
# size of float32's own rounding there. The number is a bound, which counts all that is left out for the outputs that vary
# least. Measured on blocks 768-3072-768, the largest change is 760 to 4800 times smaller.
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
    """(N * P, K), the block's outputs without the last bias, which would only cost digits."""
    hidden_scale: float

    @classmethod
    def of(cls, block: Block, x: Tensor) -> _Rows:
        """x: (N * P, inputs)."""
        wide = x.double()
        weight, shift = _first_linear(block)
        own = normalised = None
        if block.norm is not None:
            normalised = wide - wide.mean(-1, keepdim=True) if block.norm.centers else wide
            own = normalised.square().mean(-1)
        last, largest, z, y = block.last.double(), 0.0, [], []
        # A few samples at a time: their values in float64 would not fit every machine.
        most = max(1, SAMPLE_VALUES // len(weight))
        for n, inputs in enumerate((wide if normalised is None else normalised).split(most)):
            a = _native.linear(inputs, weight, shift if block.norm is None else None)
            z.append(a.to(x.dtype))
            if own is not None and block.norm is not None:
                a = a * torch.rsqrt(own[n * most : (n + 1) * most] + block.norm.epsilon)[:, None]
                a = a if shift is None else a + shift
            a, *gate = a.chunk(2, -1) if block.gate is not None else (a,)
            hidden = _native.pointwise(block.activation, a.contiguous())
            hidden = hidden * gate[0] if gate else hidden
            largest = max(largest, float(hidden.abs().amax()))
            y.append(_native.linear(hidden, last, None))
        return cls(
            torch.cat(z),
            None if shift is None or block.norm is None else shift.to(x.dtype),
            own,
            normalised,
            wide + torch.cat(y) if block.adds_input else torch.cat(y),
            _scale_for(largest, x.dtype),
        )

    def cross(self, first: Tensor, second: Tensor) -> Tensor | None:
        """(rows,), the covariance, or mean product, of the two samples of a path; None without a normalisation."""
        if self.normalised is None:
            return None
        return torch.linalg.vecdot(self.normalised[first], self.normalised[second]) / self.normalised.shape[1]


def _scale_for(largest: float, dtype: torch.dtype) -> float:
    """A power of two, a number of this dtype, that brings numbers to a size near 1. largest: of them."""
    if not 0 < largest < math.inf:
        return 1.0
    most = -math.frexp(torch.finfo(dtype).smallest_normal)[1]
    return 2.0 ** max(-most, min(most, -math.frexp(largest)[1]))


def _first_linear(block: Block) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float64 of one Linear for the units and the gate's, with the normalisation's scale and shift."""
    weight = (block.first if block.gate is None else torch.cat([block.first, block.gate])).double()
    bias = block.first_bias
    if block.gate is not None and not (bias is None and block.gate_bias is None):
        zero = block.first.new_zeros(len(block.first))
        bias = torch.cat([zero if each is None else each for each in (bias, block.gate_bias)])
    shift = None if bias is None else bias.double()
    norm = block.norm
    if norm is not None and norm.shift is not None:
        moved = _native.linear(norm.shift.double()[None], weight, None)[0]
        shift = moved if shift is None else shift + moved
    return (weight if norm is None or norm.scale is None else weight * norm.scale.double()), shift


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


class _Shares(NamedTuple):
    """Of rows, each (rows,)."""

    nonlinear: Tensor
    """1 - r2, averaged over the row's outputs."""
    sums: Tensor | None
    """(rows, 2), the terms of 1 - r2 pooled over the outputs, and of its denominator; None if it is not asked for."""
    constants: Tensor
    unresolved: Tensor
    """Counts of constant and of unresolved outputs."""
    sensitivity: Tensor
    """A bound for the error of 1 - r2, for each unit of energy in the degrees that are left out."""


class _Outputs:
    """The statistics of a block's outputs along rows' paths, from the coefficients of its hidden layer."""

    def __init__(
        self,
        block: Block,
        rows: _Rows,
        positions: int,
        nodes: Tensor,
        weights: Tensor,
        own: Tensor | None,
        statistic: Statistic,
    ) -> None:
        """own: `Widened.rounding`, (2, P * K)."""
        self.pooled = statistic.pooled
        self.positions, self.dtype = positions, block.last.dtype
        self.epsilon = torch.finfo(self.dtype).eps
        self.variance_t = float(weights @ nodes**2 - (weights @ nodes) ** 2)
        spread = (rows.outputs - rows.outputs[:1]).abs().amax(0)
        scale = torch.where(
            spread > 0, torch.exp2(-torch.frexp(spread)[1].double()), 1.0
        )  # (K,), powers of two
        # The limits are those of scaled_stabiliser in csrc/statistics.h.
        limits = (
            torch.finfo(self.dtype).smallest_normal if statistic.stabiliser else 0.0,
            TOTALS[self.dtype][1],
        )
        self.added = (statistic.stabiliser * scale**2).clamp(*limits).to(self.dtype)
        # Brings the outputs to a unit that all share, that of the output that varies most.
        common = scale[spread > 0].amin() if bool((spread > 0).any()) else torch.ones_like(scale[0])
        self.pooling = ((common / scale) ** 2).to(self.dtype)
        self.pooled_added = float((statistic.stabiliser * common**2).clamp(*limits))
        self.last = (block.last * scale[:, None]).to(self.dtype)
        self.outputs = rows.outputs * scale
        self.magnitudes = self.outputs.abs().to(self.dtype)
        self.least = self.magnitudes.new_zeros(positions, len(scale))
        self.terms = self.magnitudes.unflatten(0, (-1, positions)).amax(0) * LEAST_ROUNDING
        if own is not None:
            own = own.double().unflatten(1, self.terms.shape) * scale
            self.terms, self.least = self.terms + own[0].to(self.dtype), own[1].to(self.dtype)
        directions = block.last.double() * scale[:, None]
        largest = directions.abs().amax(1)  # taken out first: a square may overflow or underflow
        directions = directions / torch.where(largest > 0, largest, 1.0)[:, None]
        sizes = directions.norm(dim=1)
        directions = (directions / torch.where(sizes > 0, sizes, 1.0)[:, None]).to(self.dtype)
        factor = self.variance_t / len(scale)
        self.bound = ((sizes * largest / rows.hidden_scale).square() * factor).to(self.dtype)
        # How much of the energy that is left out each of a row's most sensitive outputs can have.
        most = min(squared_norm_bound(directions), float(len(scale)))
        self.most = (most - torch.arange(math.ceil(most), dtype=self.dtype)).clamp(max=1).to(scale.device)

    def shares(self, coefficients: Tensor, first: Tensor, second: Tensor) -> _Shares:
        """The statistics of each row, and a bound for their error for each unit of energy in the degrees that are left out.

        coefficients: (degrees, rows, K), from degree 1 on, by `last`. The rules are those of csrc/statistics.h.
        """
        chord = (self.outputs[second] - self.outputs[first]).to(self.dtype)
        bend = torch.zeros_like(coefficients[0])
        for each in coefficients[1:]:  # faster than a reduction over the first dimension
            bend.addcmul_(each, each, value=self.variance_t)
        covariance = torch.add(chord * self.variance_t, coefficients[0], alpha=math.sqrt(self.variance_t))
        total = covariance.square_().add_(bend)
        stable = total + self.added
        magnitude = torch.maximum(self.magnitudes[first], self.magnitudes[second])
        terms = self._of_rows(self.terms, first)
        rounding = (RESOLVED_ULPS[self.dtype] * self.epsilon) ** 2 * self.variance_t
        least, largest = TOTALS[self.dtype]
        resolved = (
            stable > torch.addcmul(terms.square(), magnitude, magnitude).mul_(rounding).clamp_(min=least)
        ) & (total < largest)
        sensitivity = torch.where(self.bound > 0, self.bound / stable, 0.0)
        sensitivity = (sensitivity.topk(len(self.most), 1).values * self.most).sum(1)
        if total.device.type == "cpu" and bool(resolved.all()):  # then no output is constant either
            none = first.new_zeros(len(first))
            return self._summed(bend, total, sensitivity, stable, none, none.clone())
        tolerance = (magnitude * (CONSTANT_ULPS * self.epsilon)).square_().mul_(self.variance_t)
        still = (chord == 0) & (coefficients[0] == 0) & (bend == 0)
        constant = torch.where(tolerance >= least, total <= tolerance, still)
        known = self._of_rows(self.least, first)
        constant &= magnitude >= torch.where(magnitude > 0, known.abs(), known)
        moving, total = torch.where(constant, 0.0, bend), torch.where(constant, 0.0, total)
        stable = total + self.added
        counts = constant.sum(1), (~constant & ~resolved).sum(1)
        return self._summed(moving, total, sensitivity, stable, *counts)

    def of(self, hidden: Tensor) -> Tensor:
        """The outputs' coefficients (degrees, rows, K), from those of the hidden layer."""
        return (hidden.flatten(0, 1) @ self.last.mT).unflatten(0, hidden.shape[:2])

    def _summed(
        self,
        bend: Tensor,
        total: Tensor,
        sensitivity: Tensor,
        stable: Tensor,
        constants: Tensor,
        unresolved: Tensor,
    ) -> _Shares:
        """The sums over a row's outputs."""
        sums = None
        if self.pooled:
            sums = torch.stack([bend @ self.pooling, total @ self.pooling], 1)
            largest = (self.bound * self.pooling).amax() * len(self.pooling) * self.most.sum()
            sensitivity = torch.maximum(sensitivity, largest / (sums[:, 1] + self.pooled_added))
        share = torch.where(stable > 0, (bend + self.added) / stable, 0.0).mean(1)
        return _Shares(share, sums, constants, unresolved, sensitivity)

    def _of_rows(self, values: Tensor, first: Tensor) -> Tensor:
        """Values (P, K) for rows (rows, K), or (1, K) if there is one position."""
        return values if self.positions == 1 else values[first % self.positions]


class _Measured:
    """A block's rows, measured with as many degrees as each of them needs."""

    def __init__(self, block: Block, rows: _Rows, outputs: _Outputs, nodes: Tensor, weights: Tensor) -> None:
        self.block, self.rows, self.outputs = block, rows, outputs
        self.nodes = nodes.to(rows.z.device)
        self.polynomials = orthonormal_polynomials(nodes, weights).to(rows.z.device)
        self.degrees = len(self.polynomials)
        # The op with the arguments that all tiles share.
        self.epsilon = 0.0 if block.norm is None else block.norm.epsilon
        self.hidden = partial(
            torch.ops.lmnfast.block_coefficients,
            rows.z,
            activation=ACTIVATIONS.index(block.activation.name),
            parameters=[block.activation.alpha, block.activation.beta],
            nodes=self.nodes,
            gated=block.gate is not None,
            shift=rows.shift,
            own=rows.own,
            epsilon=self.epsilon,
            scale=rows.hidden_scale,
        )
        self.guess = min(FIRST_TERMS, self.degrees)

    def turn(self, first: Tensor, second: Tensor) -> None:
        """Turns all polynomials but the first, so that these rows' hidden layers have most energy in the first few, and
        guesses how many are enough.

        Sums of squares stay as they are, so any rows may be used. Principal components of 16 rows: a GELU layer behind a
        LayerNorm then needs 8 polynomials in place of 12.
        """
        how = {"polynomials": self.polynomials, "cross": self.rows.cross(first, second)}
        hidden, energy = self.hidden(first, second, begin=0, end=self.degrees, **how)
        scaled = (hidden[1:].double() * self.rows.hidden_scale).flatten(1)
        products = (scaled @ scaled.mT).cpu()
        if not bool(products.isfinite().all()):  # eigh would raise
            return
        _, vectors = torch.linalg.eigh(products)  # in rising order
        turn = vectors.flip(1).mT.to(scaled.device)
        self.polynomials = torch.cat([self.polynomials[:1], turn @ self.polynomials[1:]])
        hidden = torch.cat([hidden[:1], (turn.to(hidden.dtype) @ hidden[1:].flatten(1)).view_as(hidden[1:])])
        energy[:, 1:] = (turn @ scaled).view(self.degrees - 1, len(first), -1).square().sum(-1).mT
        sensitivity = self.outputs.shares(hidden @ self.outputs.last.mT, first, second).sensitivity
        self._guess(self._needed(sensitivity, self._left(energy)))

    def _left(self, energy: Tensor) -> Tensor:
        """The energy in all degrees from each one on. (rows, degrees)"""
        # Squares that underflow are counted as the smallest number that does not.
        least = len(self.block.first) * torch.finfo(self.rows.z.dtype).smallest_normal
        return (energy + least).flip(1).cumsum(1).flip(1)

    def _needed(self, sensitivity: Tensor, left: Tensor) -> Tensor:
        """The number of terms that each row needs; all for a NaN. (rows,)"""
        return (~(sensitivity[:, None] * left <= LEFT_OUT_ULPS * self.outputs.epsilon)).sum(1)

    def _guess(self, needed: Tensor) -> None:
        """Sets the terms with which the next rows begin: those that would have cost these rows least."""
        terms = torch.arange(self.degrees + 1, device=needed.device)
        more = (needed[:, None] - terms).clamp(min=0).double()
        more = (more + (more > 0) * AGAIN).mean(0)
        self.guess = min(self.degrees, max(2, int((terms + more).argmin())))

    def shares(self, first: Tensor, second: Tensor) -> _Shares:
        """The statistics of each row, with as many terms as it needs."""
        end = self.guess
        cross = self.rows.cross(first, second)
        hidden, energy = self.hidden(
            first, second, polynomials=self.polynomials, cross=cross, begin=0, end=end
        )
        coefficients = self.outputs.of(hidden)
        left = self._left(energy)
        result = self.outputs.shares(coefficients, first, second)
        needed = self._needed(result.sensitivity, left)
        rows = (needed > end).nonzero()[:, 0]
        coefficients = coefficients[:, rows]
        while len(rows):
            begin, end = end, min(end + max(2, end // 3), self.degrees)
            how = {"polynomials": self.polynomials, "cross": None if cross is None else cross[rows]}
            hidden, _ = self.hidden(first[rows], second[rows], begin=begin, end=end, **how)
            coefficients = torch.cat([coefficients, self.outputs.of(hidden)])
            found = self.outputs.shares(coefficients, first[rows], second[rows])
            for whole, part_of in zip(result, found):
                if whole is not None and part_of is not None:
                    whole[rows] = part_of
            if end == self.degrees:
                break
            open = ~(found.sensitivity * left[rows, end] <= LEFT_OUT_ULPS * self.outputs.epsilon)
            rows, coefficients = rows[open], coefficients[:, open]
        self._guess(needed)
        if cross is not None and self.rows.own is not None:
            own = self.rows.own[first], self.rows.own[second]
            result.unresolved.add_(_vanishes(*own, cross, self.epsilon, self.nodes))
        return result


def _vanishes(first: Tensor, second: Tensor, cross: Tensor, epsilon: float, nodes: Tensor) -> Tensor:
    """Which rows' samples nearly cancel at a node, as VANISHING says. (rows,) bool.

    first, second, cross: (rows,), the squares of a row's two samples and their product, as the normalisation takes them.
    """
    t, (i, j) = nodes[1:-1].to(first.device), (first[:, None], second[:, None])
    least = ((1 - t) ** 2 * i + 2 * t * (1 - t) * cross[:, None] + t**2 * j).amin(1)
    return least + epsilon < VANISHING * (torch.maximum(first, second) + epsilon)


def _row_bytes(block: Block) -> int:
    """Bytes that a row takes: coefficients of the hidden layer and of the outputs, statistics of these, and two samples."""
    units, inputs = block.first.shape
    numbers = FIRST_TERMS * (units + len(block.last)) + STATISTICS * len(block.last)
    return numbers * block.first.element_size() + (0 if block.norm is None else 2 * 8 * inputs)


class BlockPaths(Paths):
    """Measures paths of a block.

    x: (N, *tokens, inputs). tile: bytes of a tile. allocated: bytes that the block takes for all samples. Other arguments are
    those of `Paths`.
    """

    def __init__(
        self,
        block: Block,
        x: Tensor,
        nodes: Tensor,
        weights: Tensor,
        tile: int,
        allocated: int,
        progress: Progress | None = None,
        statistic: Statistic = PLAIN,
        whole: Whole | None = None,
    ) -> None:
        self.positions = math.prod(x.shape[1:-1])
        with torch.no_grad():
            rows = _Rows.of(block, x.reshape(-1, x.shape[-1]))
            # Without the last bias, like the rows: next to a large one float32 rounds all that the outputs vary.
            bare = replace(block, last_bias=None)
            in_double = Widened(bare, x, bare(x).flatten(1), whole, "block")
            self.outputs = _Outputs(
                block, rows, self.positions, nodes, weights, in_double.rounding, statistic
            )
            self.measured = _Measured(block, rows, self.outputs, nodes, weights)
        together = max(1, tile // (_row_bytes(block) * self.positions))
        at_once = tile * len(x) // allocated
        super().__init__(x, x.dtype, nodes, weights, statistic, together, in_double, at_once, progress)
        self.places = torch.arange(self.positions, device=x.device)
        self.turned = False

    def entries(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.turned:
            self.turned = True
            some = torch.linspace(0, len(first) - 1, TURNED, device=first.device).long()
            where = torch.arange(TURNED, device=first.device) * 7 % self.positions
            self.measured.turn(first[some] * self.positions + where, second[some] * self.positions + where)
        at = [(samples[:, None] * self.positions + self.places).flatten() for samples in (first, second)]
        found = self.measured.shares(*at)
        share, constants, unresolved = (
            values.unflatten(0, (-1, self.positions))
            for values in (found.nonlinear, found.constants, found.unresolved)
        )
        left = unresolved.any(1)
        pooled = None
        if found.sums is not None:
            bend, total = found.sums.unflatten(0, (-1, self.positions)).sum(1).unbind(1)
            added, outputs = self.outputs.pooled_added, self.positions * len(self.outputs.pooling)
            stable = total + added
            left = left | ((constants.sum(1) < outputs) & ~(stable > TOTALS[share.dtype][0]))
            pooled = torch.where(stable > 0, 1 - (bend + added) / stable, 1.0)
            pooled = torch.where(left, UNRESOLVED, pooled)
        self.counts[0] += constants[~left].sum()
        self.counts[1] += left.sum()
        self.finished(len(first))
        return torch.where(left, UNRESOLVED, 1 - share.mean(1)), pooled
