"""Curvature: the mean nonlinearity of a network's paths, from all pairs of samples or from a draw of pairs, with its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, SupportsIndex, overload

import torch
from torch import Tensor

from ._differentiable import check_differentiable, mean_curvature, with_graph
from ._group import ALONE, Group, is_alone, measurer, refuse_group, refused_together, sharded_pairs
from ._kept import html_table
from ._measured import matrix_of, warn_of_offsets
from ._pairs import Moments, check_generator, checked_pairs, draw_pairs, measured_pairs
from ._samples import checked_samples
from ._settings import Settings, check_flag, check_level


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs of samples, with its errors and everything that it depends on; :func:`curvature` returns it.

    ``float(estimate)`` is its value.

    Example:
        >>> f, x = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)), torch.randn(500, 8)
        >>> estimate = lmnfast.curvature(f, x, pairs=2000)
        >>> low, high = estimate.interval()
        >>> low < float(estimate) < high, estimate.pairs, estimate.samples
        (True, 2000, 500)
    """

    value: float
    """The mean of 1 - r2 over the pairs, from 0 (straight) to 1."""
    standard_error: float
    """Of the value as an estimate of the mean over all pairs of these samples. 0 if all pairs were measured."""
    sample_standard_error: float
    """Of the value as an estimate of the mean over the distribution that the samples are independent draws from. It contains
    the error of the draw of pairs. NaN if there are too few pairs: no two of them share a sample, or all do."""
    pairs: int
    """The number of pairs that were measured."""
    samples: int
    """N, the number of samples that the pairs were drawn from."""
    outputs: int
    """K, the number of f's outputs after flattening."""
    pooled: bool
    """Whether the outputs are pooled."""
    points: int
    """Nodes on a path, ends included."""
    rule: str
    """The places of the nodes, as in :func:`connectivity`."""
    stabiliser: float
    """As in :func:`connectivity`."""
    precision: str
    """As in `Measurement`."""
    constant_share: float
    """As in `Measurement`, of the pairs that were measured."""

    def __float__(self) -> float:
        return self.value

    def _repr_html_(self) -> str:
        return html_table("Estimate", asdict(self))

    def interval(self, level: float = 0.95, of: Literal["pairs", "samples"] = "pairs") -> tuple[float, float]:
        """An interval that contains the true mean in a share `level` of all draws, by the normal distribution.

        This needs many pairs. Measured for a level of 95 %: an interval from 20 pairs contained the mean in 86 % of draws, one
        from 2000 pairs in 93 to 97 %. "samples" also needs many samples: 84 % from all pairs of 10 samples, 93 % of 200.

        Args:
            level: above 0 and below 1.
            of: "pairs": the true mean is that over all pairs of these samples. "samples": it is that over the samples'
                distribution.

        Returns:
            The lower and the upper end.

        Raises:
            TypeError: the level is no number.
            ValueError: a level out of range, or another `of`.

        Source:
            docs/mathematics.md, "A draw of pairs".
        """
        check_level(level)
        if of not in ("pairs", "samples"):
            raise ValueError(f"of: expected 'pairs' or 'samples', got {of!r}")
        from statistics import NormalDist  # here, so that importing lmnfast does not load it

        error = self.standard_error if of == "pairs" else self.sample_standard_error
        reach = NormalDist().inv_cdf((1 + level) / 2) * error
        return self.value - reach, self.value + reach


@overload
def curvature(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    pooled: bool = ...,
    pairs: SupportsIndex | None = ...,
    generator: torch.Generator | None = ...,
    points: int = ...,
    rule: str = ...,
    budget: int | None = ...,
    stabiliser: float = ...,
    differentiable: Literal[False] = ...,
    group: Group = ...,
) -> Estimate: ...


@overload
def curvature(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    pooled: bool = ...,
    pairs: SupportsIndex | None = ...,
    generator: torch.Generator | None = ...,
    points: int = ...,
    rule: str = ...,
    budget: int | None = ...,
    stabiliser: float = ...,
    differentiable: Literal[True],
) -> Tensor: ...


def curvature(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    pooled: bool = True,
    pairs: SupportsIndex | None = None,
    generator: torch.Generator | None = None,
    points: int = 21,
    rule: str = "uniform",
    budget: int | None = None,
    stabiliser: float = 0.0,
    differentiable: bool = False,
    group: Group = ALONE,
) -> Estimate | Tensor:
    """Mean curvature of f on the samples x: the mean of 1 - r2 over pairs of samples.

    No eigenproblem is solved. A draw of pairs needs no N x N matrix, so N may be any number: f is called on the samples of the
    drawn pairs alone. Unlike LMN, the curvature of some samples is an estimate of that of all. In float32, r2 near 1 is a
    multiple of 6e-8: measure a network whose curvature is below about 1e-5 in float64.

    Args:
        f: maps a batch (B, *in) to (B, *out), each row independent of the others. Outputs are flattened to K.
        x: (N, *in), floating point, the samples, of f's dtype and on its device.
        pooled: pool the outputs of a pair (``R2`` of :func:`connectivity`), or take the mean of r2 over them.
        pairs: the number of pairs, drawn without replacement. None: all, which takes two N x N matrices if pooled.
        generator: of the draw, on the CPU. None: torch's default generator, whose state then changes.
        points, rule, budget, stabiliser: as in :func:`connectivity`.
        differentiable: return the value alone, with a graph to x and to all tensors behind f that require grad, as in
            :func:`connectivity`. Of the same samples and pairs it is the same value.
        group: as in :func:`connectivity`; the pairs are those that its first process draws. Not with `differentiable`.

    Returns:
        The `Estimate`, without a unit; differentiable a 0-dim float64 tensor on x's device.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`connectivity`, also for samples that no pair needs. TypeError also for a
            generator or a number of pairs that is none. ValueError also for fewer than two samples, and for pairs below 2 or
            above N (N - 1) / 2.

    Warns:
        UserWarning: as :func:`measure`.

    Source:
        The U-statistic and its variance: Hoeffding, Ann. Math. Statist. 19 (1948); docs/mathematics.md, "A draw of pairs".

    Example:
        >>> f, x = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)), torch.randn(100, 8)
        >>> all_pairs = lmnfast.curvature(f, x)
        >>> 0 < all_pairs.value < 1, all_pairs.standard_error, all_pairs.pairs
        (True, 0.0, 4950)
        >>> round(lmnfast.curvature(nn.Linear(8, 3), x, pairs=50).value, 6)  # a linear map
        0.0
        >>> lmnfast.curvature(f, x, pairs=50, differentiable=True).backward()
        >>> f[2].weight.grad.shape
        torch.Size([3, 16])
    """
    with refused_together(group):
        settings = Settings("path", points, rule, budget, stabiliser, bool(pooled))
        check_flag("differentiable", differentiable)
        refuse_group(group, differentiable=differentiable)
        if differentiable:
            check_differentiable(settings)
        x = checked_samples(f, x, detached=not differentiable)
        check_generator(generator)
        count = checked_pairs(pairs, len(x))
        drawn = None if count is None else draw_pairs(len(x), count, generator)
    if differentiable:
        found = with_graph(f, x, settings, pairs=drawn)
        warn_of_offsets([found.enqueued])
        return mean_curvature(found.entries)
    if drawn is None:
        (enqueued,) = measurer(group, function="curvature")(f, x, settings)
        matrix = matrix_of(enqueued, settings.pooled)
        moments = Moments.of_matrix((1 - matrix).fill_diagonal_(0))
    else:
        if is_alone(group):
            enqueued = measured_pairs(f, x, settings, *drawn)
        else:
            enqueued, drawn = sharded_pairs(f, x, settings, drawn, group, function="curvature")
        entries = matrix_of(enqueued, settings.pooled)
        moments = Moments.of_list(1 - entries.cpu().double(), *drawn, len(x))
    warn_of_offsets([enqueued])
    return Estimate(
        value=moments.mean,
        standard_error=math.sqrt(moments.of_pairs),
        sample_standard_error=math.sqrt(moments.of_samples),
        pairs=moments.pairs,
        samples=moments.samples,
        outputs=enqueued.outputs,
        pooled=settings.pooled,
        points=settings.points,
        rule=settings.rule,
        stabiliser=settings.stabiliser,
        precision=enqueued.precision,
        constant_share=enqueued.constant_share(),
    )
