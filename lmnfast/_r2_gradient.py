"""The gradient of r2 along a path in the outputs there, in closed form, and the pairs that have none."""

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


# The gradient of a pair of samples at a relative distance d is of the order of d, and what rounding adds to it is of the order
# of an epsilon over d^2: measured on two MLPs, 0.1 d to 300 d, and in float64 4.5e-20 / d^2. Near this d the two are equal.
LEAST_DISTANCE = {torch.float32: 2.0**-14, torch.float64: 2.0**-22}


def of_distant_pairs(
    gradient: Tensor, x: Tensor, least: float, first: Tensor | None = None, second: Tensor | None = None
) -> Tensor:
    """The gradient of entries, with 0 for the pairs whose samples are too close to have a gradient beside rounding.

    Args:
        gradient: (N, N), or (pairs,) with a list of pairs.
        x: (N, *in), the samples.
        least: the least distance, in the largest coordinate, as a share of the larger sample's largest coordinate.
        first, second: (pairs,) int64, or None.
    """
    flat = x.detach().flatten(1)
    if first is not None and second is not None:
        sizes = flat.abs().amax(1)
        apart = (flat[first] - flat[second]).abs().amax(1)
        return torch.where(apart <= least * torch.maximum(sizes[first], sizes[second]), 0.0, gradient)
    if flat.numel() == 0 or len(flat) < 2:
        return gradient
    distances = torch.pdist(flat if flat.dtype == torch.float64 else flat.float(), torch.inf)
    low, high = flat.aminmax()
    if float(distances.min()) > least * max(-float(low), float(high)):  # waits on CUDA
        return gradient
    sizes = flat.abs().amax(1)
    i, j = torch.triu_indices(len(flat), len(flat), 1, device=flat.device)
    close = distances <= least * torch.maximum(sizes[i], sizes[j])
    kept = gradient.clone()
    kept[i[close], j[close]] = kept[j[close], i[close]] = 0.0
    return kept
