"""The methods hermite and hermite-midpoint for a function that is no chain."""

import torch
from torch import Tensor

from ._checks import Checks
from ._differentiated import Differentiated
from ._generic import outputs_between
from ._native import Progress
from ._outputs import Calls, rows_between, widened
from ._settings import Statistic
from ._unresolved import CLOSE, LEAST_ROUNDING, RESOLVED_ULPS, TOTALS, UNRESOLVED, Entries, Widened, resolve
from .ops.path_connectivity import ChainConnectivity
from .reference import CONSTANT_ULPS


def generic_polynomials(
    f: Calls,
    x: Tensor,
    ends: Tensor,
    nodes: Tensor,
    weights: Tensor,
    midpoint: bool,
    tile: int,
    allocated: int,
    checks: Checks,
    progress: Progress | None,
    statistic: Statistic,
) -> ChainConnectivity:
    """The polynomials' r2, from Jacobians of two tiles of samples at a time. allocated: bytes that f takes for all samples.

    A and B are the slopes at both ends minus the slope of the chord. C is the distance of the midpoint from the chord. The
    residual is ``e(t) = A t (1-t)^2 - B t^2 (1-t) + 16 t^2 (1-t)^2 (C - (A - B)/8)``; without C only the first two terms.
    """
    y, outputs, inputs = widened(ends), ends.shape[1], x[0].numel()
    L = torch.ones(len(x), len(x), dtype=y.dtype, device=x.device)
    counts = torch.zeros(2, dtype=torch.int64, device=x.device)
    pooled = L.clone() if statistic.pooled else None
    entries = Entries(L, pooled, counts, statistic.stabiliser)
    sample = torch.arange(len(x), device=x.device)
    differentiated = Differentiated(f, x, ends, allocated, tile // 2, checks)
    moments = _PolynomialMoments(nodes, weights, midpoint, statistic.stabiliser)
    widened_f = Widened(f, x, ends, checks.whole)
    # rounding: size of the terms behind each output. least: magnitude below which an output may be rounding alone. Both as in
    # csrc/statistics.h.
    errors = torch.zeros_like(y) if widened_f.errors is None else widened_f.errors.to(y.dtype)
    seen = widened_f.seen
    rounding = seen.largest.to(y.dtype) * LEAST_ROUNDING + (
        0.0 if seen.errors is None else seen.errors.to(y.dtype)
    )
    least = errors / CONSTANT_ULPS
    # Two tiles of Jacobians take a quarter of the bytes each, the work on their pairs takes half.
    pair = y.element_size() * (inputs + 8 * outputs) + (-(-allocated // len(x)) if midpoint else 0)
    most = max(1, tile // max(4 * y.element_size() * outputs * inputs, 2 * pair))
    flat = x.flatten(1).to(torch.promote_types(x.dtype, y.dtype))
    for begin in range(0, len(x), most):
        J_first = differentiated(begin, min(begin + most, len(x)))
        for other in range(begin, len(x), most):
            J_second = J_first if other == begin else differentiated(other, min(other + most, len(x)))
            together = max(1, tile // (2 * pair * len(J_second)))
            for i in range(begin, begin + len(J_first), together):
                first = slice(i, min(i + together, begin + len(J_first)))
                second = slice(max(i, other), other + len(J_second))
                # Differences are taken before products, so that close samples keep their digits.
                step = flat[second] - flat[first, None]  # [first, second, inputs]
                chord = y[second] - y[first, None]  # [first, second, outputs]
                A = step @ J_first[first.start - begin : first.stop - begin].mT - chord
                B = (step.transpose(0, 1) @ J_second[second.start - other :].mT).transpose(0, 1) - chord
                values = [A, B]
                if midpoint:
                    values.append(_half_way(f, x, ends, first, second, checks))
                magnitude = torch.maximum(y[first, None].abs(), y[second].abs())
                length = step.abs().amax(-1)
                # The slopes of an output that is 0 at both ends may be rounding alone. GELU far below zero is an example.
                slight = torch.where(magnitude == 0, torch.maximum(length[..., None], rounding), rounding)
                share, pool, constant, unresolved = moments.nonlinear_share(
                    chord, values, magnitude, slight, torch.maximum(least[first, None], least[second])
                )
                left = unresolved.any(-1)
                if x.dtype != torch.float64:
                    largest = torch.maximum(flat[second].abs().amax(1), flat[first, None].abs().amax(2))
                    left |= length <= CLOSE * largest
                equal = (step == 0).all(-1)
                above = ~equal & (sample[second] > sample[first, None])
                counts[0] += (constant & (above & ~left)[..., None]).sum()
                counts[1] += (left & above).sum()
                for matrix, r2 in ((L, 1 - share.mean(-1)), (pooled, pool)):
                    if matrix is None:
                        continue
                    r2 = torch.where(equal, 1.0, torch.where(left, UNRESOLVED, r2))
                    if second.start == i:  # this block holds the diagonal, and every pair twice
                        diagonal = r2[:, : len(r2)]
                        diagonal.copy_(diagonal.triu(1) + diagonal.triu(1).mT).fill_diagonal_(1)
                    matrix[first, second], matrix[second, first] = r2, r2.mT
        if progress is not None:
            later = len(x) - begin - len(J_first)  # samples whose pairs with one another are not measured yet
            progress(1 - (later / len(x)) ** 2)

    def resolved() -> None:
        if int(counts[1]):
            points = max(1, tile // 4 * len(x) // allocated)
            values, noise = widened_f.values(), widened_f.noise()
            resolve(values, x, entries, nodes, weights, points=points, midpoint=midpoint, noise=noise)

    return ChainConnectivity(L, counts, resolved, pooled)


def _half_way(f: Calls, x: Tensor, ends: Tensor, first: slice, second: slice, checks: Checks) -> Tensor:
    """Distance of f from the chord at the midpoint of each path with i < j; 0 for the other pairs."""
    y = widened(ends)
    sample = torch.arange(len(x), device=x.device)
    i, j = (sample[second] > sample[first, None]).nonzero(as_tuple=True)
    result = y.new_zeros(first.stop - first.start, second.stop - second.start, y.shape[1])
    i, j = i + first.start, j + second.start
    if len(i):
        points = x.new_empty(len(i) + len(rows_between(len(x))), *x.shape[1:])
        torch.lerp(x[i], x[j], 0.5, out=points[: len(i)])
        middle = widened(outputs_between(f, points, x, ends, checks))
        result[i - first.start, j - second.start] = middle - torch.lerp(y[i], y[j], 0.5)
    return result


class _PolynomialMoments:
    """Sums over the nodes of the polynomials that belong to A, B and C, computed once; see csrc/statistics.h."""

    def __init__(self, nodes: Tensor, weights: Tensor, midpoint: bool, stabiliser: float) -> None:
        self.stabiliser = stabiliser
        t = nodes - weights @ nodes
        self.variance_t = float(weights @ t**2)
        bump = 16 * (nodes * (1 - nodes)) ** 2
        half = bump / 8 if midpoint else 0 * bump
        phi = torch.stack(
            [nodes * (1 - nodes) ** 2 - half, half - nodes**2 * (1 - nodes), bump][: 2 + midpoint]
        )
        e, te = phi @ weights, phi @ (weights * t)
        self.te = te.tolist()
        # var(t) var(e) - cov(e, t)^2 as a quadratic form of the values
        self.residual = (
            self.variance_t * ((phi * weights) @ phi.mT - torch.outer(e, e)) - torch.outer(te, te)
        ).tolist()

    def nonlinear_share(
        self, chord: Tensor, values: list[Tensor], magnitude: Tensor, rounding: Tensor, least: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """1 - r2 of outputs (without a stabiliser 0 for a constant output), r2 pooled over them, which outputs are constant,
        and which are unresolved. Overwrites ``values``.
        """
        scale = chord.abs()
        for value in values:
            torch.maximum(scale, value.abs(), out=scale)
        safe = torch.where(scale > 0, scale, 1.0)  # squares of tiny or huge outputs would not be finite
        covariance = chord * (self.variance_t / safe)
        for value, te in zip(values, self.te):
            covariance += value.div_(safe) * te
        nonlinear = torch.zeros_like(covariance)
        for v, value in enumerate(values):
            row = value * self.residual[v][v]
            for u in range(v):
                row += values[u] * (2 * self.residual[v][u])
            nonlinear += row.mul_(value)
        total = covariance.square_() + nonlinear.clamp_(min=0)
        epsilon = torch.finfo(chord.dtype).eps * self.variance_t**0.5
        variation = total.sqrt() * scale
        constant = (variation <= magnitude * (CONSTANT_ULPS * epsilon)) & (magnitude >= least)
        bend, total = torch.where(constant, 0.0, nonlinear), torch.where(constant, 0.0, total)
        added = self._added(safe)
        share = torch.where(
            constant & (added == 0), 0.0, (bend + added) / (total + added)
        )  # unresolved ones are dropped
        largest = scale.amax(-1)
        largest = torch.where(largest > 0, largest, 1.0)
        factor = (safe / largest[..., None]) ** 2
        stable = (total * factor).sum(-1) + self._added(largest)
        pool = 1 - ((bend * factor).sum(-1) + self._added(largest)) / stable
        pool = torch.where(stable > 0, pool, 1.0)
        varied = variation if self.stabiliser == 0 else torch.hypot(variation, safe * added.sqrt())
        ulps = RESOLVED_ULPS[chord.dtype]
        unresolved = ~(varied > torch.hypot(magnitude, rounding) * (ulps * epsilon)) & ~constant
        return share, pool, constant, unresolved

    def _added(self, scale: Tensor) -> Tensor:
        """The stabiliser where outputs are divided by `scale`, within the limits of scaled_stabiliser in csrc/statistics.h."""
        least = torch.finfo(scale.dtype).smallest_normal if self.stabiliser else 0.0
        return (scale.new_tensor(self.stabiliser) / scale / scale).clamp(least, TOTALS[scale.dtype][1])
