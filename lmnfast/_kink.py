"""Polynomials for |w| and |w| ln |w|, and polynomials that nowhere lie below the errors of these.

A polynomial is an array of its coefficients in Chebyshev polynomials of w / radius. docs/mathematics.md, "An estimate for large
N", has the formulas.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

# Widths of Gaussians in the angle arccos(w / radius), times the degree. With them the mean of the upper polynomial is smallest
# at degrees 64 to 512, and as small as linear programming over such Gaussians makes it. DAMPING is for the end of a series,
# NARROWEST for the upper polynomial's narrowest peak.
DAMPING = 3.0
NARROWEST = 2.5
FINE = 32  # points of the grid, times the degree
BETWEEN = 1.01  # for what lies between the points of the grid


class Kink:
    """Polynomials of one degree on [-radius, radius] for the two functions whose sums give an entropy.

    `magnitude` is for |w|, and `logged` for |w| ln |w|; with `clip` these functions are 0 below w = 0.
    """

    def __init__(self, degree: int, radius: float, clip: bool = False) -> None:
        self.degree = degree
        self._points = FINE * degree
        cosines = np.cos(np.pi * np.arange(self._points + 1) / self._points)
        cosines[self._points // 2] = 0.0
        self._far = np.abs(cosines)
        w = radius * (cosines.clip(min=0) if clip else self._far)
        exact = w, w * np.log(np.where(w > 0, w, 1.0))
        u = (np.arange(degree + 1) * DAMPING / degree) ** 2 / 2
        damping = (1 + u + u * u / 2) * np.exp(-u)
        self.magnitude, self.logged = (_series(f)[: degree + 1] * damping for f in exact)
        self._errors = exact[0] - self._values(self.magnitude), exact[1] - self._values(self.logged)

    def upper(self, slope: float) -> Values:
        """A polynomial of the degree that is nowhere on [-radius, radius] below the error of ``slope * magnitude - logged``."""
        error = np.abs(slope * self._errors[0] - self._errors[1])
        upper, reached = np.zeros(self.degree + 1), np.zeros(self._points + 1)
        inner = 0.0
        for width, peak in self._peaks():
            values = self._values(peak)
            ring = (self._far >= inner) & (self._far < width / 2)
            height = max(0.0, float(((error - reached)[ring] / values[ring]).max(initial=0.0)))
            upper += height * peak
            reached += height * values
            inner = width / 2
        upper[0] += max(0.0, float((error - reached).max()))
        return BETWEEN * upper

    def _peaks(self) -> list[tuple[float, Values]]:
        """Gaussians around w = 0 whose widths in the angle double from one to the next, and these widths."""
        k = np.arange(self.degree + 1)
        at_zero = np.cos(k * np.pi / 2) * np.where(k > 0, 2.0, 1.0)
        count = max(1, int(math.log2(0.7 * self.degree / NARROWEST)) + 1)
        widths = [NARROWEST / self.degree * 2**i for i in range(count)]
        return [(width, width * at_zero * np.exp(-((k * width) ** 2) / 2)) for width in widths]

    def _values(self, polynomial: Values) -> Values:
        """The polynomial's values on the grid."""
        spread = np.zeros(self._points + 1)
        spread[: len(polynomial)] = polynomial
        spread[1:-1] /= 2
        return np.asarray(np.fft.rfft(_mirrored(spread)).real)


def _series(values: Values) -> Values:
    """The Chebyshev coefficients of the interpolation of values at the cosines of equally spaced angles."""
    found = np.fft.rfft(_mirrored(values)).real / (len(values) - 1)
    found[[0, -1]] /= 2
    return np.asarray(found)


def _mirrored(values: Values) -> Values:
    return np.concatenate([values, values[-2:0:-1]])
