"""The settings of a measurement: the arguments that `connectivity`, `measure`, `lmn` and `Probe` have in common."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from ._choices import METHODS
from .quadrature import path_nodes


class Statistic(NamedTuple):
    """What is computed of the outputs along a path."""

    stabiliser: float = 0.0
    """As in :func:`lmnfast.connectivity`."""
    pooled: bool = False
    """Whether r2 pooled over the outputs is computed beside the mean of r2."""


PLAIN = Statistic()


@dataclass(frozen=True)
class Settings:
    """Checked arguments, as :func:`lmnfast.connectivity` describes them.

    Raises:
        ValueError: unknown method or rule; points, budget or stabiliser out of range, or a stabiliser or pooled outputs with
            method "jacobian".
        TypeError: points is not an integer, or the stabiliser is not a number.
    """

    method: str = "path"
    points: int = 21
    rule: str = "uniform"
    budget: int | None = None
    stabiliser: float = 0.0
    pooled: bool = False
    """Also compute r2 pooled over the outputs."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        _ = self.nodes
        object.__setattr__(self, "points", operator.index(self.points))
        check_budget(self.budget)
        object.__setattr__(self, "stabiliser", checked_stabiliser(self.stabiliser))
        if self.method == "jacobian" and (self.stabiliser or self.pooled):
            name, value = ("stabiliser", self.stabiliser) if self.stabiliser else ("pooled", True)
            raise ValueError(f"{name}: expected a method with paths, got {value} with method 'jacobian'")

    @property
    def statistic(self) -> Statistic:
        return Statistic(self.stabiliser, self.pooled)

    @cached_property
    def nodes(self) -> tuple[Tensor, Tensor]:
        """Nodes on a path and their weights, each (points,) float64 on the CPU."""
        return path_nodes(self.rule, self.points)

    @property
    def midpoint(self) -> bool | None:
        """Whether the method's polynomial uses the midpoint; None if the method uses no polynomial."""
        return self.method == "hermite-midpoint" if self.method.startswith("hermite") else None


def checked_stabiliser(stabiliser: float) -> float:
    """The stabiliser as a float. Raises TypeError if it is no number, ValueError if it is below 0 or not finite."""
    if (
        isinstance(stabiliser, bool)
        or not hasattr(stabiliser, "__float__")
        or getattr(stabiliser, "ndim", 0) != 0
    ):
        raise TypeError(f"stabiliser: expected a number of at least 0, got {stabiliser!r}")
    if not 0 <= float(stabiliser) < math.inf:
        raise ValueError(f"stabiliser: expected a number of at least 0, got {stabiliser!r}")
    return float(stabiliser)


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError for an argument that is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def completed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a row, with stabiliser 0 behind "negative" if a version without stabilisers made it.

    A row whose settings are empty gets an empty entry. A row without settings gets none.
    """
    if "stabiliser" in row:
        return dict(row)
    whole: dict[str, Any] = {}
    for name, value in row.items():
        whole[name] = value
        if name == "negative":
            whole["stabiliser"] = 0.0 if value else value
    return whole


def check_budget(budget: int | None) -> None:
    """Raises TypeError or ValueError if the budget is not a positive number of bytes."""
    if budget is not None and not hasattr(budget, "__float__"):
        raise TypeError(f"budget: expected a number of bytes or None, got {budget!r}")
    if budget is not None and budget <= 0:
        raise ValueError(f"budget: expected a positive number of bytes, got {budget}")


DEFAULT = Settings()  # the paper's


def check_level(level: float) -> None:
    """Raises TypeError or ValueError if an interval cannot have this level."""
    if isinstance(level, (str, bytes)) or not hasattr(level, "__float__"):
        raise TypeError(f"level: expected a number above 0 and below 1, got {level!r}")
    if not 0 < float(level) < (1 - 1e-12):
        raise ValueError(f"level: expected a number above 0 and below 1, got {level!r}")
