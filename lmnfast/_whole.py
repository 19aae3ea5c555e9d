"""What all samples of a measurement show of a function's rounding, where parts of the samples are measured one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Samples that are looked at together, at most. The number is fixed, so that all processes see the same bits, and no larger than
# most tiles, so that f takes no more memory than it does for a tile.
TOGETHER = 512


@dataclass(frozen=True)
class Seen:
    """What some samples show of the outputs of f."""

    largest: Tensor
    """(K,), of the outputs' magnitudes."""
    errors: Tensor | None
    """(K,), the largest of `Widened.errors`; None: not known."""
    zeros_are_exact: Tensor
    """(K,) bool: whether an output that is 0 is 0 in float64, too."""

    def joined(self, other: Seen) -> Seen:
        """Of the samples of both."""
        errors = None
        if self.errors is not None and other.errors is not None:
            errors = torch.maximum(self.errors, other.errors)
        largest = torch.maximum(self.largest, other.largest)
        return Seen(largest, errors, self.zeros_are_exact & other.zeros_are_exact)


@dataclass(frozen=True, eq=False)
class Whole:
    """All samples of a measurement. What they show is computed once, and is then that of every part.

    Without it, an output that is nearly constant to rounding would count as constant in one part, and not in another.
    """

    samples: Tensor
    """(N, *in); it may be a file that is mapped into memory."""
    before: Callable[[Tensor], Tensor] | None = None
    """What is applied to the samples first: the affine maps at f's beginning, if only the rest of f is called."""
    kept: dict[tuple[Any, ...], Seen] = field(default_factory=dict)

    def behind(self, before: Callable[[Tensor], Tensor]) -> Whole:
        """The same samples behind the affine maps at f's beginning."""
        return Whole(self.samples, before, self.kept)

    def seen(self, kind: str, of: Callable[[Tensor], Seen], like: Tensor) -> Seen:
        """What all samples show.

        Args:
            kind: of the outputs that are looked at.
            of: what samples (n, *in) show.
            like: has the dtype and the device that samples are called with.
        """
        key = kind, self.before is not None, like.dtype, like.device
        if key not in self.kept:
            found: Seen | None = None
            for part in self.samples.tensor_split(-(-len(self.samples) // TOGETHER)):  # none has one sample
                own = part.to(like.device) if self.before is None else self.before(part.to(like.device))
                seen = of(own.detach().to(like.dtype))
                found = seen if found is None else found.joined(seen)
            assert found is not None
            self.kept[key] = found
        return self.kept[key]


@dataclass(frozen=True, eq=False)
class Part:
    """Which of the caller's samples are measured."""

    numbers: Tensor
    """(n,) int64, the caller's numbers of the samples, for messages."""
    whole: Whole | None = None
    """None: the part stands for itself."""
