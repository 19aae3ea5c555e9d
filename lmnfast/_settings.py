"""The settings of a measurement: the arguments that `connectivity`, `measure`, `lmn` and `Probe` have in common."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .quadrature import path_nodes

METHODS = ("path", "hermite", "hermite-midpoint", "jacobian")


@dataclass(frozen=True)
class Settings:
    """Checked arguments, as :func:`lmnfast.connectivity` describes them.

    Raises:
        ValueError: unknown method or rule; points or budget out of range.
        TypeError: points is not an integer.
    """

    method: str = "path"
    points: int = 21
    rule: str = "uniform"
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        _ = self.nodes
        object.__setattr__(self, "points", operator.index(self.points))
        check_budget(self.budget)

    @cached_property
    def nodes(self) -> tuple[Tensor, Tensor]:
        """Nodes on a path and their weights, each (points,) float64 on the CPU."""
        return path_nodes(self.rule, self.points)

    @property
    def midpoint(self) -> bool | None:
        """Whether the method's polynomial uses the midpoint; None if the method uses no polynomial."""
        return self.method == "hermite-midpoint" if self.method.startswith("hermite") else None


def check_budget(budget: int | None) -> None:
    """Raises ValueError if the budget is not a positive number of bytes."""
    if budget is not None and budget <= 0:
        raise ValueError(f"budget: expected a positive number of bytes, got {budget}")


DEFAULT = Settings()  # the paper's
