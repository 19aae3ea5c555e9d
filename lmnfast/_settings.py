"""How a connectivity is measured: the arguments that `connectivity`, `measure`, `lmn` and `Probe` have in common."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor

from .quadrature import path_nodes

METHODS = ("path", "hermite", "hermite-midpoint", "jacobian")


@dataclass(frozen=True)
class Settings:
    """Arguments as :func:`lmnfast.connectivity` describes them, checked.

    Raises:
        ValueError: unknown method or rule, points or budget out of range.
        TypeError: points is no integer.
    """

    method: str = "path"
    points: int = 21
    rule: str = "uniform"
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        self.nodes()
        object.__setattr__(self, "points", operator.index(self.points))
        check_budget(self.budget)

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Nodes on a path and their weights, (points,) float64 on the CPU each."""
        return path_nodes(self.rule, self.points)

    @property
    def midpoint(self) -> bool | None:
        """Whether a polynomial stands in for the path, with a midpoint or without; None: no polynomial does."""
        return self.method == "hermite-midpoint" if self.method.startswith("hermite") else None


def check_budget(budget: int | None) -> None:
    """Raises ValueError for what is no number of bytes."""
    if budget is not None and budget <= 0:
        raise ValueError(f"budget: expected a positive number of bytes, got {budget}")


DEFAULT = Settings()  # the paper's
