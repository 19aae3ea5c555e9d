"""``lmnfast::hermite_connectivity``: path connectivity of the polynomials through ends, end slopes and midpoints."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._chain import Chain
from .._settings import Statistic
from .path_connectivity import chain_connectivity, fake, run


def hermite_connectivity(
    chain: Chain,
    x: Tensor,
    nodes: Tensor,
    weights: Tensor,
    midpoint: bool,
    *,
    stabiliser: float = 0.0,
    pooled: bool = False,
) -> Tensor:
    """``reference.hermite_connectivity`` of the same arguments, fused.

    Devices and precision are those of ``path_connectivity``. The kernel carries the slopes at both ends of every path from
    layer to layer, as their difference from the chord's slope. Between the ends it evaluates only the midpoint, if at all. It
    forms no Jacobian.

    Args:
        chain: weights on the samples' device, of their dtype.
        x: (N, D), or (N, *in) where the chain flattens.
        nodes, weights: (nodes,) float64, as :func:`lmnfast.quadrature.path_nodes` returns them.
        midpoint: whether the polynomials also match the outputs half way.
        stabiliser, pooled: as in :func:`lmnfast.connectivity`.

    Returns:
        (N, N) float64 for float64 samples, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as ``path_connectivity``.

    Source:
        docs/mathematics.md.

    Example:
        >>> chain = lmnfast.ops.recognise(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)))
        >>> rule = lmnfast.quadrature.path_nodes("uniform", 21)
        >>> lmnfast.ops.hermite_connectivity(chain, torch.randn(50, 8), *rule, midpoint=False).shape
        torch.Size([50, 50])
    """
    measured = chain_connectivity(chain, x, nodes, weights, midpoint, Statistic(stabiliser, pooled))
    measured.resolve()
    return measured.L if measured.pooled is None else measured.pooled


torch.library.define(
    "lmnfast::hermite_connectivity",
    "(Tensor z, Tensor[] weights, Tensor?[] biases, int[] activations, float[] parameters, int[] skips, "
    "Tensor?[] shifts, Tensor nodes, Tensor node_weights, bool midpoint, Tensor? exact=None, Tensor? inputs=None, "
    "float stabiliser=0.0, bool pooled=False, Tensor? first=None, Tensor? second=None) -> (Tensor, Tensor, Tensor)",
)


# The midpoint is argument 9, before the optional arguments, which `run` and `fake` also have.
@torch.library.impl("lmnfast::hermite_connectivity", "default")
def _hermite_connectivity(*arguments: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    path: Callable[..., tuple[Tensor, Tensor, Tensor]] = run
    return path(*arguments[:9], *arguments[10:], midpoint=arguments[9], **more)


@torch.library.register_fake("lmnfast::hermite_connectivity")
def _(*arguments: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake(*arguments[:9], *arguments[10:], **more)
