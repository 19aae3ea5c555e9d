"""Nodes and weights of the sums over a path."""

import operator
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from ._choices import RULES

PAPER_POINTS = 21  # arXiv 2310.05918 walks t = 0, 0.05, ..., 1


def path_nodes(rule: str, points: int) -> tuple[Tensor, Tensor]:
    """Nodes on a path and their weights.

    Args:
        rule: "uniform": equal weights on equidistant points; 21 points are the definition in the paper. "lobatto": the
            Gauss-Lobatto rule of the discrete uniform measure on the paper's 21 points. M nodes give the 21-point sums exactly
            for polynomials up to degree 2 M - 3, and approximately for other functions.
        points: any integer type, at least 3: two points always lie on a line, so every network would have LMN 1.

    Returns:
        Nodes t in [0, 1], including both ends, and weights that sum to 1; each (points,) float64 on the CPU.

    Raises:
        TypeError: points is not an integer.
        ValueError: unknown rule, points < 3, or more than 21 points for "lobatto".

    Source:
        The 21 points: arXiv 2310.05918. The discrete rule: docs/mathematics.md.

    Example:
        >>> nodes, weights = lmnfast.quadrature.path_nodes("lobatto", 3)
        >>> nodes
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
        >>> round(float(weights.sum()), 12)
        1.0
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    try:
        if isinstance(points, bool):
            raise TypeError
        points = operator.index(points)
    except TypeError:
        raise TypeError(f"points: expected an integer, got {points!r}") from None
    if points < 3:
        raise ValueError(f"points: expected at least 3, as 2 always lie on a straight line, got {points}")
    if rule == "lobatto" and points > PAPER_POINTS:
        raise ValueError(f"points: the lobatto rule has at most {PAPER_POINTS} points, got {points}")
    nodes, weights = _lobatto(points) if rule == "lobatto" else _uniform(points)
    return torch.from_numpy(nodes.copy()), torch.from_numpy(weights.copy())


@lru_cache(maxsize=8)
def _uniform(points: int) -> tuple[np.ndarray, np.ndarray]:
    return np.linspace(0.0, 1.0, points), np.full(points, 1.0 / points)


@cache
def _lobatto(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Interior nodes: the Gauss nodes of the measure weighted by t (1 - t) (Golub and Welsch, 1969)."""
    grid = _uniform(PAPER_POINTS)[0][1:-1]
    density = grid * (1 - grid) / PAPER_POINTS
    # Stieltjes' recurrence in the Lanczos form. Each vector is orthogonalised against all earlier vectors: the plain
    # three-term recurrence on an equidistant grid loses its digits when the degree exceeds 2 sqrt(21).
    basis = np.sqrt(density / density.sum())[None]
    for _ in range(points - 3):
        product = (2 * grid - 1) * basis[-1]
        for _ in range(2):
            product -= basis.T @ (basis @ product)
        basis = np.vstack([basis, product / np.linalg.norm(product)])
    basis = basis[: points - 2]
    jacobi = basis @ ((2 * grid - 1) * basis).T  # tridiagonal: multiplication by 2 t - 1
    gauss, vectors = np.linalg.eigh(jacobi)
    interior = (1 + gauss) / 2
    weights = density.sum() * vectors[0] ** 2 / (interior * (1 - interior))
    # The measure is symmetric. The rule is made symmetric to the last bit, so that both directions of a path give the same
    # entry: L[i, j] = L[j, i].
    interior, weights = (interior + 1 - interior[::-1]) / 2, (weights + weights[::-1]) / 2
    end = (1 - weights.sum()) / 2
    return np.concatenate([[0.0], interior, [1.0]]), np.concatenate([[end], weights, [end]])


def orthonormal_polynomials(nodes: Tensor, weights: Tensor) -> Tensor:
    """Values of the polynomials of degree 1, 2, ... that are orthonormal under a rule, times the rule's weights.

    The constant is left out. Degrees end where the rule does: at the number of nodes with a weight, less 1. Applied to values
    at the nodes, row d gives their coefficient of degree d + 1, and the squared coefficients sum to the values' variance.

    Args:
        nodes, weights: as `path_nodes` returns them.

    Returns:
        (degrees, nodes) float64.

    Example:
        >>> nodes, weights = lmnfast.quadrature.path_nodes("uniform", 21)
        >>> polynomials = lmnfast.quadrature.orthonormal_polynomials(nodes, weights)
        >>> coefficients = polynomials @ nodes**2  # a parabola has degree 2
        >>> [round(float(c), 4) for c in coefficients[:4]]
        [0.3028, 0.0734, 0.0, 0.0]
    """
    t, w = nodes.numpy(), weights.numpy()
    basis = np.sqrt(w)[None]
    for _ in range(int((w > 0).sum()) - 1):
        product = (2 * t - 1) * basis[-1]
        for _ in range(2):  # as in `_lobatto`: the plain three-term recurrence loses its digits
            product -= basis.T @ (basis @ product)
        basis = np.vstack([basis, product / np.linalg.norm(product)])
    return torch.from_numpy(basis[1:] * np.sqrt(w))
