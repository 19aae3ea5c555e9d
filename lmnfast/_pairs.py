"""Measures a draw of pairs of samples, and the statistics of such a draw."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from . import _native
from ._chain import Chain
from ._checks import Checks
from ._enqueue import Enqueued, paths_of, with_offset
from ._generic import numbered
from ._prepare import prepared
from ._samples import checked_samples
from ._settings import Settings
from ._whole import Part, Whole
from .ops.path_connectivity import chain_pairs

# A permutation of all pairs is drawn if all are at most this many times the number that is asked for. Else pairs are drawn one
# by one, and repeats are dropped.
PERMUTED = 4


def draw_pairs(samples: int, pairs: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A uniform draw of pairs i < j without replacement, each (pairs,) int64 on the CPU, in rising order."""
    every = samples * (samples - 1) // 2
    if every <= PERMUTED * pairs:
        numbers = torch.randperm(every, generator=generator, device="cpu")[:pairs]
    else:
        numbers = torch.empty(0, dtype=torch.int64, device="cpu")
        while len(numbers) < pairs:
            more = torch.randint(every, (pairs,), generator=generator, device="cpu")
            numbers = _without_repeats(torch.cat([numbers, more]))
        numbers = numbers[:pairs]
    return numbered(numbers.sort().values, samples)


def _without_repeats(numbers: Tensor) -> Tensor:
    """The numbers in the order of their first places."""
    found, which = numbers.unique(return_inverse=True)
    places = torch.full((len(found),), len(numbers), device="cpu")
    places.scatter_reduce_(0, which, torch.arange(len(numbers), device="cpu"), "amin")
    return numbers[places.sort().values]


def measured_pairs(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    settings: Settings,
    first: Tensor,
    second: Tensor,
    known: Chain | None = None,
    expected: Tensor | None = None,
    whole: Whole | None = None,
) -> Enqueued:
    """The checked entries of some pairs: `Enqueued` with L and pooled as (pairs,).

    f is called on the samples of these pairs alone. Arguments and errors as in :func:`lmnfast.connectivity`: samples that are
    not drawn must be finite, too. known: the chain that f is, if the caller knows it. expected: f(x), if known.
    whole: all samples of the measurement, if these pairs are a part of a draw.
    """
    x = checked_samples(f, x)
    Checks(deferred=False).finite("x", x)
    used, places = torch.stack([first, second]).unique(return_inverse=True)
    first, second = (ends.to(x.device) for ends in places)
    own = x[used.to(x.device)]
    expected = None if expected is None else expected[used.to(expected.device)]
    how: dict[str, Any] = {"points": settings.points, "known": known, "expected": expected}
    with prepared(f, own, "path", deferred=False, part=Part(used, whole), **how) as function:
        if function.chain is not None and not _takes_lists(own):
            function.refute()
        function.settle()
        if function.chain is not None:
            rule = *settings.nodes, settings.midpoint, settings.statistic
            found = chain_pairs(function.chain, function.x, first, second, *rule)
        else:
            found = paths_of(function, settings).of_list(first, second)
        found.resolve()
        for entries in (found.L, found.pooled):
            if entries is not None:
                function.checks.pairs(entries, first, second)
        enqueued = Enqueued(found, function.precision, function.ends.shape[1], kind=function.route.kind)
        return with_offset(enqueued, function)


def _takes_lists(x: Tensor) -> bool:
    """Whether the kernel takes lists of pairs. On CUDA, also emulated, it takes all pairs only."""
    return x.device.type == "cpu" and not _native.emulates_cuda(x)


def check_generator(generator: Any) -> None:
    """Raises TypeError for a generator that is none."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {generator!r}")


def checked_count(pairs: SupportsIndex | None) -> int | None:
    """Raises TypeError for a number of pairs that is no integer."""
    try:
        return None if pairs is None else operator.index(pairs)
    except TypeError:
        raise TypeError(f"pairs: expected an integer or None, got {pairs!r}") from None


def checked_pairs(pairs: SupportsIndex | None, samples: int) -> int | None:
    """A number of pairs that can be drawn of so many samples; None stands for all. Raises TypeError or ValueError."""
    every = samples * (samples - 1) // 2
    if every < 1:
        raise ValueError(f"x: expected two samples or more, got {samples}")
    count = checked_count(pairs)
    if count is None:
        return None
    if every < 2:
        raise ValueError(f"pairs: expected None for two samples, which have one pair, got {count}")
    if not 2 <= count <= every:
        raise ValueError(
            f"pairs: expected 2 to {every}, the number of pairs of {samples} samples, or None for all, got {count}"
        )
    return count


@dataclass(frozen=True)
class Moments:
    """Sums over a draw of values h of pairs, and what they say about the mean of h: a U-statistic of order 2.

    Source: Hoeffding, Ann. Math. Statist. 19 (1948); docs/mathematics.md, "A draw of pairs".
    """

    samples: int
    pairs: int
    mean: float
    variance: float
    """Of the pairs' values about their mean, over pairs - 1."""
    between: float
    """Covariance of the values of two pairs that share one sample; at least 0. NaN if no two pairs share one, or all do."""
    single: float
    """Variance of one pair's value, from pairs without a common sample; NaN as above."""

    @classmethod
    def of_list(cls, h: Tensor, first: Tensor, second: Tensor, samples: int) -> Moments:
        """h: (pairs,). first, second: (pairs,) int64."""
        h = h.double()
        centred = h - h.mean()
        sums, counts = (torch.zeros(samples, dtype=torch.float64, device=h.device) for _ in range(2))
        for ends in (first, second):
            sums.index_add_(0, ends, centred)
            counts.index_add_(0, ends, torch.ones_like(centred))
        squares = float(centred.square().sum())
        return cls._of_sums(samples, len(h), float(h.mean()), squares, sums, counts)

    @classmethod
    def of_matrix(cls, h: Tensor) -> Moments:
        """h: (N, N), symmetric, 0 on the diagonal."""
        samples = len(h)
        pairs = samples * (samples - 1) // 2
        mean = float(h.sum(dtype=torch.float64)) / (2 * pairs)
        sums, squares = torch.empty(samples, dtype=torch.float64, device=h.device), 0.0
        for rows in torch.arange(samples, device=h.device).split(max(1, 2**22 // samples)):
            centred = h[rows].double() - mean
            centred[torch.arange(len(rows), device=h.device), rows] = 0.0
            sums[rows] = centred.sum(1)
            squares += float(centred.square().sum()) / 2
        return cls._of_sums(samples, pairs, mean, squares, sums, torch.full_like(sums, samples - 1))

    @classmethod
    def _of_sums(
        cls, samples: int, pairs: int, mean: float, squares: float, sums: Tensor, counts: Tensor
    ) -> Moments:
        """squares: of the centred values. sums, counts: (N,), of the centred values of a sample's pairs, and their number."""
        total = float(sums.sum()) / 2  # 0 but for rounding
        sharing = float(sums.square().sum()) - 2 * squares
        number = float(counts.square().sum()) - 2 * pairs
        apart, number_apart = total**2 - squares - sharing, float(pairs) ** 2 - pairs - number
        variance = squares / (pairs - 1) if pairs > 1 else math.nan
        if number <= 0 or number_apart <= 0:
            return cls(samples, pairs, mean, variance, math.nan, math.nan)
        level = apart / number_apart  # estimates the square of the mean's error, which the centring left
        return cls(
            samples, pairs, mean, variance, max(0.0, sharing / number - level), squares / pairs - level
        )

    @property
    def of_pairs(self) -> float:
        """Variance of the mean as an estimate of the mean over all pairs of these samples."""
        every = self.samples * (self.samples - 1) // 2
        return 0.0 if self.pairs == every else (1 - self.pairs / every) * self.variance / self.pairs

    @property
    def of_samples(self) -> float:
        """Variance of the mean as an estimate of the mean over the distribution that the samples are drawn from."""
        every = self.samples * (self.samples - 1) // 2
        return (2 * (self.samples - 2) * self.between + max(0.0, self.single)) / every + self.of_pairs
