"""When a probe measures."""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

Every = int | Iterable[int] | str | Callable[[int], bool]
EXPECTED = 'expected a number of steps, at least 1, a sequence of steps, "log", or a function of a step'


class Schedule:
    """The steps that are due, from the argument `every` of a `Probe`.

    Raises:
        ValueError: a number below 1, no steps, a step below 0, or another word than "log".
        TypeError: something else.
    """

    def __init__(self, every: Any) -> None:
        self._number = 0
        self._steps: list[int] | None = None
        self._function: Callable[[Any], bool] | None = None
        if isinstance(every, str):
            if every != "log":
                raise ValueError(f"every: {EXPECTED}, got {every!r}")
        elif isinstance(every, Iterable) and getattr(every, "ndim", None) != 0:
            self._steps = sorted({_whole(step) for step in every})
            if not self._steps or self._steps[0] < 0:
                raise ValueError(f"every: expected one step or more, none below 0, got {every!r}")
        elif callable(every) and not hasattr(every, "__index__"):
            self._function = every
        else:
            self._number = _whole(every)
            if self._number < 1:
                raise ValueError(f"every: expected at least 1, got {every}")

    def due(self, step: float) -> bool:
        """Whether this step is due."""
        return bool(self._function(step)) if self._function else self._last(step) == step

    def passed(self, before: float, step: float) -> bool:
        """Whether a step after `before` is due, up to and with `step`."""
        if self._function:
            return any(self._function(each) for each in range(math.floor(before) + 1, math.floor(step) + 1))
        last = self._last(step)
        return last is not None and last > before

    def _last(self, step: float) -> float | None:
        """The last step up to this one that is due; None if there is none."""
        if self._number:
            return step // self._number * self._number
        if self._steps is not None:
            place = bisect_right(self._steps, step)
            return self._steps[place - 1] if place else None
        if step < 1:
            return 0 if step >= 0 else None
        power = 10 ** (len(str(int(step))) - 1)
        return max(digit for digit in (1, 2, 5) if digit * power <= step) * power


def _whole(value: Any) -> int:
    """A whole number, also one that is written as 100.0."""
    try:
        return int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    except TypeError as error:
        raise TypeError(f"every: {EXPECTED}, got {value!r}") from error


def plain_step(step: Any) -> int | float:
    """A step of any type (of numpy, a tensor, a fraction) as an int or a float, which JSON and CSV files can hold.

    Raises:
        TypeError: no number.
        ValueError: not finite.
    """
    found = step
    with suppress(RuntimeError, ValueError):  # several numbers
        found = step.item() if hasattr(step, "item") else step
    if not isinstance(found, (Real, Decimal)):
        raise TypeError(f"step: expected a number, got {step!r}")
    if not math.isfinite(found):
        raise ValueError(f"step: expected a finite number, got {step!r}")
    if isinstance(found, Integral):
        return int(found)
    number = float(found)
    return int(number) if number == found and number.is_integer() and not isinstance(found, float) else number


def plain(value: Any) -> Any:
    """A fraction or a decimal number as a float; any other value as it is."""
    return float(value) if isinstance(value, (Fraction, Decimal)) else value
