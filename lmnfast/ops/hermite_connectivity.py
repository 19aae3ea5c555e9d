"""``lmnfast::hermite_connectivity``: path connectivity of the polynomials through ends, end slopes and midpoints."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._chain import Chain
from .path_connectivity import chain_connectivity, fake, run


def hermite_connectivity(chain: Chain, x: Tensor, nodes: Tensor, weights: Tensor, midpoint: bool) -> Tensor:
    """``reference.hermite_connectivity(chain, x, nodes, weights, midpoint)``, fused.

    Devices and precision are those of ``path_connectivity``. The kernel carries the slopes at both ends of every path from
    layer to layer, as their difference from the chord's slope. Between the ends it evaluates only the midpoint, if at all. It
    forms no Jacobian.

    Args:
        chain: weights on the samples' device, of their dtype.
        x: (N, D), or (N, *in) where the chain flattens.
        nodes, weights: (nodes,) float64, as :func:`lmnfast.quadrature.path_nodes` returns them.
        midpoint: whether the polynomials also match the outputs half way.

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
    measured = chain_connectivity(chain, x, nodes, weights, midpoint)
    measured.resolve()
    return measured.L


torch.library.define(
    "lmnfast::hermite_connectivity",
    "(Tensor z, Tensor[] weights, Tensor?[] biases, int[] activations, float[] parameters, int[] skips, "
    "Tensor?[] shifts, Tensor nodes, Tensor node_weights, bool midpoint, Tensor? exact=None, Tensor? inputs=None) -> "
    "(Tensor, Tensor)",
)


# The midpoint is argument 9, before the two optional arguments, which `run` and `fake` also have.
@torch.library.impl("lmnfast::hermite_connectivity", "default")
def _hermite_connectivity(*arguments: Any) -> tuple[Tensor, Tensor]:
    path: Callable[..., tuple[Tensor, Tensor]] = run
    return path(*arguments[:9], *arguments[10:], midpoint=arguments[9])


@torch.library.register_fake("lmnfast::hermite_connectivity")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return fake(*arguments[:9], *arguments[10:])
