"""The gradient of r2 along a path in the outputs there, in closed form."""

import torch
from torch import Tensor

from .reference import _moments


def r2_gradient(
    y: Tensor,
    nodes: Tensor,
    weights: Tensor,
    rounding: Tensor | None = None,
    *,
    stabiliser: float = 0.0,
    pooled: bool = False,
) -> Tensor:
    """Gradient of `lmnfast.reference.r2_along_path` in the outputs.

    With t and y centred, c = cov(t, y), v = var(t), D the denominator of r2, and b the residual of y from its regression line
    ``c / v t``: ``2 w (c / D) ((1 - r2) t - (c / D) v b)`` at the node t of weight w, over the number of outputs. 1 - r2 is
    computed from b, so nothing cancels on a path that is nearly straight. Pooled: ``2 w / D (c (1 - R2) t - R2 v b)``. An
    output that is constant to rounding has gradient 0.

    Args:
        y: (..., nodes, outputs).
        nodes, weights: (nodes,) float64.
        rounding, stabiliser, pooled: as in `lmnfast.reference.r2_of_outputs` and `r2_along_path`.

    Returns:
        As y.

    Source:
        docs/mathematics.md, "The gradient".
    """
    covariance, _, variance_t, scale, constant, centred = _moments(y, nodes, weights, rounding)
    t, w = (v.to(y)[:, None] for v in (nodes - weights @ nodes, weights))
    residual = centred - (covariance / variance_t)[..., None, :] * t
    on_line, off_line = covariance**2, variance_t * (w * residual**2).sum(-2)
    unit = scale  # of an output, or common to all
    if pooled:
        unit = torch.where(constant, 0.0, scale).amax(-1, keepdim=True)
        unit = torch.where(unit > 0, unit, 1.0)
        share = torch.where(constant, 0.0, (scale / unit) ** 2)
        on_line, off_line = ((part * share).sum(-1, keepdim=True) for part in (on_line, off_line))
    off_line = off_line + scale.new_tensor(stabiliser) / unit / unit
    total = on_line + off_line
    total = torch.where(total > 0, total, 1.0)
    if pooled:
        factor, along, across = share / total, covariance * (off_line / total), on_line / total * variance_t
    else:
        factor, along, across = (
            covariance / total / y.shape[-1],
            off_line / total,
            covariance / total * variance_t,
        )
    gradient = along[..., None, :] * t - across[..., None, :] * residual
    gradient = 2 * w * (factor / scale)[..., None, :] * gradient
    # It sums to 0. On a short path, where f's derivatives are nearly equal, the sum must be 0 to the gradient's own rounding.
    gradient = gradient - w * gradient.sum(-2, keepdim=True)
    return torch.where(constant[..., None, :], 0.0, gradient)
