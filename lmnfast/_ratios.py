"""Numbers of a connectivity matrix beside the linear mapping number."""

from torch import Tensor

from ._eigenvalues import check_graph, check_matrix, eigenvalues
from ._observed import participation
from ._settings import check_flag


def participation_ratio(L: Tensor, *, differentiable: bool = False) -> Tensor:
    """Participation ratio ``N^2 / |L|_F^2`` of a connectivity matrix: 1 for one linear map, k for k equal, unrelated blocks.

    This is ``(sum w)^2 / sum w^2`` over the eigenvalues w, with their signs, as all diagonal entries are 1. It needs no
    eigenvalues. All of it in float64.

    Args:
        L: (..., N, N), floating point, symmetric, with ones on the diagonal; without a unit, as r2 has none.
        differentiable: keep L's graph.

    Returns:
        (...) float64 on L's device, from 1 to N.

    Raises:
        TypeError, ValueError: as :func:`eigenvalues`. ValueError also if all entries are 0.
        RuntimeError: differentiable, and L has no graph, or gradients are off.

    Source:
        docs/mathematics.md, section 11.

    Example:
        >>> lmnfast.participation_ratio(torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)))
        tensor(2.0000, dtype=torch.float64)
    """
    check_flag("differentiable", differentiable)
    (check_graph if differentiable else check_matrix)(L)
    ratio = participation(L if differentiable else L.detach())
    if bool(ratio.isinf().any()):
        raise ValueError("L: expected entries that are not all 0")
    return ratio


def negative_share(L: Tensor) -> Tensor:
    """Share of the negative eigenvalues of a connectivity matrix: ``sum |w| over w < 0, divided by sum |w|``, in float64.

    Args:
        L: (..., N, N), floating point, symmetric; without a unit, as r2 has none.

    Returns:
        (...) float64 on L's device, from 0 (a covariance) to 1; below 1/2 if the diagonal entries are not negative.

    Raises:
        TypeError, ValueError: as :func:`eigenvalues`. ValueError also if all eigenvalues are 0.

    Source:
        arXiv 2310.05918, Figure 4, shows the negative eigenvalues.

    Example:
        >>> lmnfast.negative_share(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))  # eigenvalues 4 and -2
        tensor(0.3333, dtype=torch.float64)
    """
    values = eigenvalues(L)
    total = values.abs().sum(-1)
    if not (total > 0).all():
        raise ValueError("L: expected eigenvalues that are not all 0")
    return values.clamp(max=0).abs().sum(-1) / total
