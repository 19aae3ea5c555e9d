"""An estimate of the linear mapping number of a matrix from products with it, with its error.

docs/mathematics.md, "An estimate for large N", has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ._choices import NEGATIVE
from ._deflated import BLOCK, ROWS, Deflated, Matrix, deflate
from ._kink import Kink
from ._moments import Moments, Outside
from ._settings import check_level
from ._threads import one_core_after_fork

ESTIMATOR = "krylov-chebyshev"  # its name in a `Measurement`

TOLERANCE = 0.01
PROBES = 32  # in the first draw, and at most in a later one
MOST_PROBES = 512
FIRST_DEGREE, MOST_DEGREE = 48, 4096
MOST_ROUNDING = 2e-4  # of a product with a random vector, as a share of the eigenvalues that are not deflated
CONTROLS = 2  # the known traces: of the matrix, and of its square
OF_KINK, OF_DEFLATION = 0.2, 0.1  # shares of the tolerance
REPEATED = 3  # further Krylov spaces, at most, where the first has missed equal eigenvalues
# The degree from which on these are looked for: in many matrices what is missed does not matter.
PATIENCE = 128


@dataclass(frozen=True)
class SpectralEstimate:
    """An estimate of the linear mapping number of a matrix, with its errors; :meth:`Rows.estimate` returns it.

    ``float(estimate)`` is its LMN.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", init_method="file:///tmp/lmnfast-estimate", rank=0, world_size=1)
        >>> f = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> rows = lmnfast.connectivity(f, torch.randn(600, 8), group=dist.group.WORLD, gather=False)
        >>> estimate = rows.estimate()
        >>> low, high = estimate.interval()
        >>> low < float(estimate) < high < 1.05 * low
        True
        >>> dist.destroy_process_group()
    """

    lmn: float
    """The linear mapping number, from 1 to N, without a unit."""
    complexity_bits: float
    """Its binary logarithm, in bits."""
    standard_error: float
    """Of `lmn`, from the draw of random vectors."""
    bound: float
    """The error of `lmn` that is not by chance, at most: of the polynomials, and of the deflated pairs."""
    negative_share: float
    """As in `Measurement`, estimated."""
    samples: int
    """N, the number of samples."""
    eigenvalues: Tensor
    """(deflated,) float64, on the CPU, by falling magnitude: those that were found one by one."""
    probes: int
    """The number of random vectors for the other eigenvalues."""
    degree: int
    """Of the polynomials; 0 if there are no other eigenvalues."""
    products: int
    """The number of vectors that the matrix was multiplied by."""

    def __float__(self) -> float:
        return self.lmn

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """An interval that contains the LMN of the matrix in a share `level` of all draws, or more.

        Args:
            level: above 0 and below 1.

        Returns:
            The lower and the upper end.

        Raises:
            TypeError: the level is no number.
            ValueError: a level out of range.

        Source:
            docs/mathematics.md, "An estimate for large N".
        """
        check_level(level)
        return interval(self.lmn, self.standard_error, self.bound, level, self.samples)


def interval(
    lmn: float, standard_error: float, bound: float, level: float, samples: float = math.inf
) -> tuple[float, float]:
    """The ends of an interval, as far from LMN by ratio: Student's quantile of the standard error, and the bound. What no LMN
    can be, below 1 or above the number of samples, is left out."""
    reach = min((student(level) * standard_error + bound) / lmn, 700.0)  # whose exponential is finite
    low, high = lmn * math.exp(-reach), lmn * math.exp(reach)
    return max(low, min(1.0, lmn)), min(high, max(samples, lmn))


def student(level: float, degrees: int = PROBES - CONTROLS - 1) -> float:
    """What the magnitude of Student's variable exceeds with a probability of 1 - level, to 4 digits at 20 degrees of freedom.

    Source:
        Abramowitz and Stegun, 26.7.5.
    """
    from statistics import NormalDist  # here, so that importing lmnfast does not load it

    x = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / degrees**power for power, term in enumerate(terms, 1))


class Rounded(ValueError):
    """In the dtype of the vectors rounding is larger than the eigenvalues that are to be summed, as of a matrix near ones."""


def estimate(
    product: Callable[[Tensor], Tensor],
    samples: int,
    *,
    squares: float,
    trace: float | None = None,
    negative: str = "absolute",
    tolerance: float = TOLERANCE,
    dimension: int | None = None,
    generator: torch.Generator | None = None,
    like: Tensor | None = None,
) -> SpectralEstimate:
    """The linear mapping number of a symmetric matrix L from products with it; it is never that of a part of the matrix.

    Args:
        product: gives ``L @ v`` for v (samples, b) of the dtype and device of `like`.
        samples: N.
        squares: the sum of the squares of all entries of L, exact to rounding in float64.
        trace: of L; None: N, as for a connectivity.
        negative: as in :func:`linear_mapping_number`.
        tolerance: what the 95 % bar is to stay below, as a share of LMN. More random vectors and a higher degree are taken
            for it, up to MOST_PROBES and MOST_DEGREE; the bar of the result is what was reached.
        dimension: of the Krylov space; None: `usual_dimension`. N gives all eigenvalues.
        generator: of the random vectors, on the CPU. None: torch's default generator, whose state then changes.
        like: a tensor of the dtype and on the device of the vectors; None: float32, on the CPU.

    Returns:
        The `SpectralEstimate`.

    Raises:
        TypeError, ValueError: an argument is not as described, as far as this can be seen; or all eigenvalues are 0.
        Rounded: the products of this matrix need float64.
    """
    vectors = torch.empty(0) if like is None else like
    trace = float(samples) if trace is None else float(trace)
    _check(samples, squares, trace, negative, tolerance, dimension, vectors)
    matrix = Matrix(product, samples, vectors, generator)
    least = max(abs(trace), math.sqrt(squares))  # that sum |w| can be
    most_moved = (
        OF_DEFLATION * tolerance * least / _weight(samples, squares, OF_DEFLATION * tolerance * least)
    )
    dimension = min(samples, dimension or usual_dimension(samples))
    rounding = torch.finfo(vectors.dtype).eps * math.sqrt(squares / samples)

    def more(known: Deflated | None = None) -> tuple[Deflated, _Sums]:
        deflated = deflate(matrix, dimension, most_moved / 2 if known else most_moved, known)
        if deflated.rest and vectors.dtype != torch.float64 and rounding > MOST_ROUNDING * deflated.radius:
            raise Rounded(
                f"like: expected float64, as rounding hides the smaller eigenvalues of this matrix in {vectors.dtype}"
            )
        return deflated, _Sums(deflated, squares, trace, negative == "clip", torch.finfo(vectors.dtype).eps)

    found, deflated = _settled(matrix, more, tolerance)
    # No entropy is below 0 or above ln N, so this brings it nearer to the exact one.
    entropy = min(max(found.entropy, 0.0), math.log(samples))
    lmn = min(math.exp(entropy), float(samples))
    return SpectralEstimate(
        lmn=lmn,
        complexity_bits=entropy / math.log(2),
        standard_error=lmn * found.chance,
        bound=lmn * found.bound,
        negative_share=_negative_share(found.total, trace, negative == "clip"),
        samples=samples,
        eigenvalues=deflated.values,
        probes=found.probes,
        degree=found.degree,
        products=matrix.products,
    )


def usual_dimension(samples: int) -> int:
    """Of the Krylov space, by the number of samples: 16 sqrt(N / 2), so 512 at N = 2048 and 1024 from 8192 on.

    Measured on connectivities at initialisation, on 2 cores: a larger space at N = 2048 and 4096 makes the degree smaller by a
    factor of 4 to 8 and the time by 2 to 5, against N / 16; beyond 1024 it takes longer than it saves.
    """
    return min(max(BLOCK * math.ceil(math.sqrt(samples / 2)), 256), 1024)


def usual_products(samples: int) -> float:
    """About how many vectors a connectivity is multiplied by; docs/mathematics.md has a table."""
    return min(2.5 * samples, 1700 + 28 * math.sqrt(samples))


def _weight(samples: int, squares: float, goal: float) -> float:
    """What the sum of the eigenvalues' moves counts in the entropy, times sum |w|, at most; see `_Sums.of`."""
    return 1 + math.log(math.sqrt(samples * squares)) + math.log(40 * samples / goal)


def _negative_share(total: float, trace: float, clip: bool) -> float:
    magnitudes = 2 * total - trace if clip else total
    return min(max((magnitudes - trace) / 2 / magnitudes, 0.0), 1.0)


def of_matrix(L: Tensor, negative: str) -> SpectralEstimate:
    """The estimate of a checked matrix (N, N), in the dtype of the matrix; of the same matrix it is the same.

    LMN does not depend on the matrix's scale. The products are those of the matrix over the power of two that is nearest to its
    largest entry, 1 for a connectivity: so nothing overflows, and L times a power of two gives the same bits. Where torch's
    float32 products are set to be less than float32, and for a matrix so near ones that they hide its smaller eigenvalues, all
    is in float64, with parts of the matrix at a time.
    """
    L = L.detach()
    L = L if L.dtype in (torch.float32, torch.float64) else L.float()
    parts = L.split(max(1, ROWS**2 // L.shape[1]))
    largest = max(float(end.abs()) for part in parts for end in part.aminmax())
    if largest == 0:
        raise _no_sum(largest, negative == "clip")
    # Two factors of about the same size, as one may be beyond the numbers of the dtype.
    power = -math.frexp(largest * math.sqrt(0.5))[1]
    before, after = 2.0 ** (power // 2), 2.0 ** (power - power // 2)

    def scaled(entries: Tensor) -> Tensor:
        return entries.double() if before == after == 1 else entries.double() * before * after

    def product(vectors: Tensor) -> Tensor:
        # By columns: measured on 2 cores, up to twice as fast.
        vectors = (vectors * before).mT.contiguous().mT
        if vectors.dtype == L.dtype:
            return (L @ vectors) * after
        return torch.cat([part.double() @ vectors for part in parts]) * after

    squares = math.fsum(float(scaled(part).square().sum()) for part in parts)
    found = of_product(product, len(L), squares, float(scaled(L.diagonal()).sum()), negative, L)
    return replace(found, eigenvalues=found.eigenvalues / before / after)


def of_product(
    product: Callable[[Tensor], Tensor],
    samples: int,
    squares: float,
    trace: float,
    negative: str,
    like: Tensor,
) -> SpectralEstimate:
    """As `of_matrix`, of a matrix of like's dtype that is known by its products with vectors of float32 and float64.

    Its entries are those of a connectivity, or so many times as large that no square of theirs leaves the dtype.
    """

    def estimated(like: Tensor) -> SpectralEstimate:
        generator = torch.Generator().manual_seed(0)
        return estimate(
            product,
            samples,
            squares=squares,
            trace=trace,
            negative=negative,
            generator=generator,
            like=like,
        )

    with one_core_after_fork(), torch.autocast(like.device.type, enabled=False):
        if like.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest":
            with suppress(Rounded):
                return estimated(like)
        return estimated(like.new_empty(0, dtype=torch.float64))


@dataclass(frozen=True)
class _Found:
    """The entropy of a matrix in nats, with the shares of its errors."""

    entropy: float
    total: float
    """The sum of the magnitudes."""
    chance: float
    """The standard error."""
    kink: float
    """Of the polynomials, at most."""
    other: float
    """Of the deflated pairs and of the known traces, at most."""
    probes: int
    degree: int

    @property
    def bound(self) -> float:
        return self.kink + self.other


def _settled(
    matrix: Matrix, more: Callable[..., tuple[Deflated, _Sums]], tolerance: float
) -> tuple[_Found, Deflated]:
    """The entropy to a tolerance, and what was deflated for it.

    A Krylov space does not show all of more equal eigenvalues than a block has vectors. Where it seems so and the degree
    becomes high, or where an eigenvalue is found to lie outside of the interval, `more` is deflated, with new random vectors.
    If this shows nothing, or has been done often enough, the interval is as wide as it must be.
    """
    deflated, sums = more()
    radius, repeats = max(deflated.radius, sums.least_radius), REPEATED
    while deflated.rest:
        most = PATIENCE if repeats and deflated.misses else MOST_DEGREE
        try:
            return _within(matrix, deflated, sums, radius, tolerance, most), deflated
        except Outside as outside:
            radius = outside.radius
        if repeats:
            known = len(deflated.values)
            deflated, sums = more(deflated)
            repeats = repeats - 1 if len(deflated.values) > known else 0
            radius = max(deflated.radius, sums.least_radius)
    return sums.exact(), deflated


def _within(
    matrix: Matrix, deflated: Deflated, sums: _Sums, radius: float, tolerance: float, most_degree: int
) -> _Found:
    """First the degree for the bound, then the number of random vectors for the standard error (Stein's two stages).

    Raises:
        Outside: an eigenvalue lies outside; or the degree exceeds `most_degree`, if this is not MOST_DEGREE.
    """
    most = min(MOST_PROBES, deflated.rest)
    drawn = matrix.orthonormal(matrix.random(min(PROBES, most)), deflated.basis)
    moments = Moments(matrix, deflated, drawn, radius, sums.most_radius)
    degree, found = FIRST_DEGREE, sums.of(moments.to(FIRST_DEGREE), radius)
    while found.kink > _goal(found, tolerance) and degree < MOST_DEGREE:
        degree = min(math.ceil(1.2 * degree), MOST_DEGREE)
        if degree > most_degree:
            raise Outside(radius)
        found = sums.of(moments.to(degree), radius)
    ratio = student(0.95) * found.chance / max(tolerance - found.bound, tolerance / 4)
    needed = min(math.ceil(PROBES * ratio**2), most)
    every = [moments.to(degree)]
    while drawn.shape[1] < needed:
        count = min(PROBES, needed - drawn.shape[1])
        more = matrix.orthonormal(matrix.random(count), torch.cat([deflated.basis, drawn], 1))
        every.append(Moments(matrix, deflated, more, radius, sums.most_radius).to(degree))
        drawn = torch.cat([drawn, more], 1)
    return sums.of(torch.cat(every, 1), radius)


def _goal(found: _Found, tolerance: float) -> float:
    """What the error of the polynomials is to stay below: all that the tolerance leaves, or a fifth of it if it leaves less."""
    return max(OF_KINK * tolerance, tolerance - student(0.95) * found.chance - found.other)


class _Sums:
    """From the deflated eigenvalues and the moments of the rest to the entropy."""

    def __init__(self, deflated: Deflated, squares: float, trace: float, clip: bool, epsilon: float) -> None:
        values = deflated.values
        found = float(values.square().sum())
        if found > squares * (1 + 1e-3):
            raise ValueError(
                f"squares: expected the sum of the squares of all entries, got {squares}, which is less than the "
                f"{found} of {len(values)} eigenvalues"
            )
        counted = values.clamp(min=0) if clip else values.abs()
        self.clip, self._deflated = clip, deflated
        self._exact = torch.stack([counted.sum(), torch.special.xlogy(counted, counted).sum()])
        self._known = torch.stack([trace - values.sum(), squares - values.square().sum()])
        # What rounding may have done to the known traces of the rest.
        off = epsilon * float(values.abs().max()) if len(values) else 0.0
        self._doubt = self._known.new_tensor([math.sqrt(len(values)) * off, 2 * math.sqrt(found) * off])
        self.least_radius = max(epsilon * math.sqrt(squares), 1e-300)
        left = max(0.0, squares - found) + float(self._doubt[1]) + epsilon * squares
        self.most_radius = max(1.01 * math.sqrt(left), self.least_radius)

    def of(self, moments: Tensor, radius: float) -> _Found:
        """The entropy from the moments (degree + 1, probes) of the rest.

        The means over the probes, or, where this gives a smaller error, the values that a line through the probes has at the
        known traces.
        """
        probes = moments.shape[1]
        ones = moments.new_ones(probes, 1)
        # Over the radius and its square, so that all columns are of one scale.
        scale = moments.new_tensor([radius, radius**2])
        traces = torch.stack([moments[1], (moments[0] + moments[2]) / 2], 1)
        designs = [ones]
        if 4 * CONTROLS < probes < self._deflated.rest:
            designs.append(torch.cat([ones, traces - self._known / scale], 1))
        kink = Kink(len(moments) - 1, radius, self.clip)
        fits = [self._fitted(moments, kink, design, self._doubt / scale) for design in designs]
        found, slope = min(fits, key=lambda fit: student(0.95) * fit[0].chance + fit[0].other)
        upper = moments.mT @ torch.from_numpy(kink.upper(slope))
        over = float(upper.mean() + 2 * upper.std(correction=0) / math.sqrt(probes))
        return replace(found, kink=max(0.0, over) / found.total)

    def _fitted(self, moments: Tensor, kink: Kink, design: Tensor, doubt: Tensor) -> tuple[_Found, float]:
        """The entropy from the constant terms of least squares on the columns of a design (probes, terms), without the error of
        the polynomials; and the slope of ``|w| (slope - ln |w|)``, whose sum changes as the entropy does, times `total`."""
        probes, terms = design.shape
        inverse = torch.linalg.pinv(design)
        sums = moments.mT @ torch.from_numpy(np.stack([kink.magnitude, kink.logged], 1))
        total, logged = (self._exact + inverse[0] @ sums).tolist()
        if not total > 0:
            raise _no_sum(total, self.clip)
        slope = 1 + logged / total
        each = sums @ sums.new_tensor([slope, -1.0])
        fit = inverse @ each
        # The residual of each as if it had no part in the fit.
        leverage = (design * inverse.mT).sum(1).clamp(max=1 - 1e-6)
        variance = float((inverse[0] * (each - design @ fit) / (1 - leverage)).square().sum())
        chance = math.sqrt(variance * (1 - probes / self._deflated.rest)) / total
        other = (self._moves(slope, total) + float(fit[1:].abs() @ doubt[: terms - 1])) / total
        return _Found(math.log(total) - logged / total, total, chance, 0.0, other, probes, kink.degree), slope

    def exact(self) -> _Found:
        """The entropy of a matrix without a rest."""
        total, logged = self._exact.tolist()
        if not total > 0:
            raise _no_sum(total, self.clip)
        moves = self._moves(1 + logged / total, total) / total
        return _Found(math.log(total) - logged / total, total, 0.0, 0.0, moves, 0, 0)

    def _moves(self, slope: float, total: float) -> float:
        """What `moved` and the rounding of sums in float64 change the sum of ``|w| (slope - ln |w|)`` by, at most."""
        moved, samples = self._deflated.moved, len(self._deflated.basis)
        moved += samples * torch.finfo(torch.float64).eps * total
        return moved * (slope + math.log(samples / moved)) if moved else 0.0


def _no_sum(total: float, clip: bool) -> ValueError:
    return ValueError(
        f"L: expected eigenvalues whose magnitudes have a finite sum above 0, got a sum of about {total:.3g} "
        f"(negative={'clip' if clip else 'absolute'!r})"
    )


def _check(
    samples: int,
    squares: float,
    trace: float,
    negative: str,
    tolerance: float,
    dimension: int | None,
    like: Tensor,
) -> None:
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if not 1e-200 < squares < 1e200:
        raise ValueError(f"squares: expected a finite sum of squares above 0, 1e-200 to 1e200, got {squares}")
    if not math.isfinite(trace):
        raise ValueError(f"trace: expected a finite number, got {trace}")
    if negative not in NEGATIVE:
        raise ValueError(f"negative: expected one of {', '.join(NEGATIVE)}, got {negative!r}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a share of LMN above 0 and below 1, got {tolerance}")
    if dimension is not None and not 1 <= dimension <= samples:
        raise ValueError(f"dimension: expected 1 to {samples}, the number of samples, got {dimension}")
    if like.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"like: expected a tensor of float32 or float64, got {like.dtype}")
