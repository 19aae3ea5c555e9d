"""What the package's own derivatives have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def without_second(gradients: Sequence[Tensor | None], sources: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients that a backward pass has computed, so that their own derivative is an error and not 0.

    sources: what the gradients depend on. Torch's `once_differentiable` gives such an error only where the gradient that comes
    in has a graph.
    """
    anchors = [t for t in sources if t.requires_grad]
    if not anchors or not torch.is_grad_enabled():  # no graph of the backward pass is asked for
        return gradients
    refused: Sequence[Tensor | None] = _Refused.apply(len(anchors), *anchors, *gradients)
    return refused


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in tensors[anchors:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "differentiable: there is no second derivative of a connectivity and its measures; expected a penalty on "
            "them alone, and not on their gradient"
        )
