"""Chebyshev moments of random vectors, for the part of a matrix that is orthogonal to what is deflated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._deflated import ROWS, Deflated, Matrix, sum_of


class Outside(Exception):
    """An eigenvalue lies outside of the interval of the polynomials, or it would take too high a degree to keep it within."""

    def __init__(self, radius: float) -> None:
        self.radius = radius


class Moments:
    """x^T T_k(L / radius) x for random vectors x in the rest's space, whose squared length is the dimension of that space."""

    def __init__(
        self, matrix: Matrix, deflated: Deflated, drawn: Tensor, radius: float, most_radius: float
    ) -> None:
        self._matrix, self._basis, self._radius, self._most = matrix, deflated.basis, radius, most_radius
        self._length = float(deflated.rest)
        self._before = drawn * math.sqrt(deflated.rest)
        self._now = self._times(self._before)
        self._found = [_dots(self._before, self._before), _dots(self._before, self._now)]

    def to(self, degree: int) -> Tensor:
        """The moments up to this degree, (degree + 1, vectors) float64."""
        zeroth, first = self._found[:2]
        while len(self._found) <= degree:
            size = _dots(self._now, self._now)
            growth = float(size.max()) / self._length
            if not growth <= 1.01 and self._radius < self._most:
                ratio = math.sqrt(float((size / _dots(self._before, self._before)).nan_to_num(4.0).max()))
                ratio = min(max(ratio, 1.5), 100.0)
                raise Outside(min(self._radius * (ratio + 1 / ratio) / 2 * 1.02, self._most))
            following = 2 * self._times(self._now) - self._before
            self._found += [2 * size - zeroth, 2 * _dots(self._now, following) - first]
            self._before, self._now = self._now, following
        return torch.stack(self._found[: degree + 1])

    def _times(self, vectors: Tensor) -> Tensor:
        images = self._matrix.times(vectors / self._radius)
        return images - self._basis @ (self._basis.mT @ images)


def _dots(one: Tensor, other: Tensor) -> Tensor:
    pieces = zip(one.split(ROWS), other.split(ROWS), strict=True)
    return sum_of([(a.double() * b).sum(0) for a, b in pieces]).cpu()
