"""The extreme eigenvalues of a symmetric matrix from products with it, and what they leave of the matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16  # vectors that the matrix is multiplied by at once
ROWS = 4096  # that are converted to float64 at once


class Matrix:
    """A symmetric matrix that is known by its products alone, with a count of them, and random vectors for it."""

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        samples: int,
        like: Tensor,
        generator: torch.Generator | None,
    ) -> None:
        self._product, self.samples, self._like, self._generator = product, samples, like, generator
        self.products = 0

    def times(self, vectors: Tensor) -> Tensor:
        """The product with vectors (samples, b). Raises ValueError if what comes back is not of that shape, or not finite."""
        result = self._product(vectors)
        self.products += vectors.shape[1]
        if not isinstance(result, Tensor) or result.shape != vectors.shape:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"product: expected a tensor of shape {tuple(vectors.shape)}, got {got}")
        if not math.isfinite(float(result.sum())):
            raise ValueError("product: expected finite values, got NaN or Inf")
        return result.to(vectors)

    def empty(self, count: int) -> Tensor:
        return self._like.new_empty(self.samples, count)

    def random(self, count: int) -> Tensor:
        """(samples, count) independent normal numbers, drawn on the CPU."""
        drawn = torch.randn(self.samples, count, generator=self._generator, dtype=self._like.dtype)
        return drawn.to(self._like)

    def orthonormal(self, vectors: Tensor, against: Tensor, least: float = 0.0) -> Tensor:
        """An orthonormal basis of the vectors without their parts in the span of `against`. Columns that lie in the span of
        those before them, up to a length of `least`, are replaced by random ones."""
        basis, triangle = torch.linalg.qr(without(vectors, against))
        lengths = triangle.diagonal().abs()
        short = lengths <= least
        if short.any():
            basis[:, short] = self.random(int(short.sum()))
        # What rounding gives a column that is much shorter than others is not orthogonal to `against`.
        if lengths.min() <= max(least, math.sqrt(torch.finfo(basis.dtype).eps) * float(lengths.max())):
            for _ in range(2):
                basis = torch.linalg.qr(without(basis, against))[0]
        return basis


def without(vectors: Tensor, basis: Tensor) -> Tensor:
    """The vectors without their parts in the span of an orthonormal basis, removed twice because of rounding."""
    for _ in range(2):
        vectors = vectors - basis @ (basis.mT @ vectors)
    return vectors


@dataclass(frozen=True)
class Deflated:
    """A subspace that is nearly invariant, with the matrix's eigenvalues there."""

    basis: Tensor
    """(samples, d), orthonormal up to rounding."""
    values: Tensor
    """(d,) float64, on the CPU, by falling magnitude."""
    moved: float
    """The sum of the distances between the matrix's eigenvalues and those of its two parts, at most."""
    radius: float
    """What no other eigenvalue is expected to exceed in magnitude."""

    @property
    def rest(self) -> int:
        """The number of the other eigenvalues."""
        return self.basis.shape[0] - len(self.values)

    @property
    def misses(self) -> bool:
        """Whether the radius is more than twice as large as 16 of the deflated eigenvalues.

        Krylov spaces show eigenvalues from the outermost inwards. So this is of an approximate one with a large residual, a
        part of an eigenvalue of which more equal ones exist than were found. Of connectivities at most 6 were seen so low.
        """
        return len(self.values) >= BLOCK and float(2 * self.values[-BLOCK].abs()) < self.radius


def deflate(matrix: Matrix, dimension: int, most_moved: float, known: Deflated | None = None) -> Deflated:
    """The eigenpairs that a block Krylov space of this dimension approximates, as long as `moved` stays below `most_moved`.

    With the dimension of the whole space it is all of them. A Krylov space has as many of equal eigenvalues as a block has
    vectors. More of them are found beside those that are `known`, in a space of new random vectors orthogonal to these, as long
    as `moved` grows by less than `most_moved`.

    Raises:
        ValueError: the products are not finite, or not those of a symmetric matrix.
    """
    before = matrix.empty(0) if known is None else known.basis
    left_over = matrix.samples - before.shape[1]
    dimension = min(dimension, left_over)
    largest = float(known.values.abs().max()) if known is not None and len(known.values) else 0.0
    space, projected, left = _krylov(matrix, dimension, before, largest)
    values, vectors = torch.linalg.eigh(projected)
    ends = vectors[dimension - left.shape[1] :]
    gram = (left.mT @ left).double().cpu()
    residuals = (ends * (gram @ ends)).sum(0).clamp(min=0).sqrt()
    order = residuals.argsort()
    count = dimension if dimension == left_over else int((2 * residuals[order].cumsum(0) <= most_moved).sum())
    chosen, others = order[:count], order[count:]
    basis = space[:, before.shape[1] :] @ vectors[:, chosen].to(space)
    if count:
        basis = torch.linalg.qr(torch.cat([before, basis], 1))[0]
    elif known:
        basis = before
    del space
    found, moved = _rayleigh(matrix, basis)
    reach = float((values.abs() + residuals)[others].max()) if len(others) else float(residuals.max())
    return Deflated(basis, found, moved, 1.02 * reach)


def _krylov(matrix: Matrix, dimension: int, before: Tensor, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    """A block Krylov space of random vectors for the part of the matrix that is orthogonal to the orthonormal vectors `before`:
    `before` and an orthonormal basis of the space (N, dimension) beside them; the matrix in the space, float64, on the CPU; and
    what the products with the last vectors have outside of all this.

    largest: of the eigenvalues of `before`, by magnitude, whose rounding is in every product.
    """
    first = before.shape[1]
    space = matrix.empty(first + dimension)
    space[:, :first] = before
    projected = torch.zeros(dimension, dimension, dtype=torch.float64)
    left = matrix.random(min(BLOCK, dimension))
    for start in range(0, dimension, BLOCK):
        stop = min(start + BLOCK, dimension)
        least = 10 * torch.finfo(space.dtype).eps * largest
        earlier, known = space[:, : first + start], space[:, : first + stop]
        known[:, first + start :] = matrix.orthonormal(left[:, : stop - start], earlier, least)
        left = matrix.times(known[:, first + start :].contiguous())
        largest = max(largest, float(torch.linalg.vector_norm(left, dim=0).max()))
        for _ in range(2):
            shares = known.mT @ left
            left = left - known @ shares
            projected[:stop, start:stop] += shares[first:].double().cpu()
        if not _symmetric(projected[start:stop, start:stop], largest):
            raise ValueError("product: expected the products of a symmetric matrix")
    upper = projected.triu()
    return space, upper + upper.triu(1).mT, left


def _symmetric(block: Tensor, largest: float) -> bool:
    return bool((block - block.mT).abs().max() <= 1e-3 * largest)


def _rayleigh(matrix: Matrix, basis: Tensor) -> tuple[Tensor, float]:
    """The eigenvalues of the matrix in the span of a basis, in float64, and what these and the others are moved by together.

    The product is in the basis's dtype. Its rounding is a part of the residual, but for that within the span. There the other
    half of it, which makes the product's part unsymmetric, is counted.
    """
    d = basis.shape[1]
    if d == 0:
        return torch.zeros(0, dtype=torch.float64), 0.0
    images = matrix.times(basis)
    pieces = list(zip(basis.split(ROWS), images.split(ROWS), strict=True))
    overlap = sum_of([v.double().mT @ v.double() for v, _ in pieces])
    shares = sum_of([v.double().mT @ w.double() for v, w in pieces])
    inverse = torch.linalg.inv(torch.linalg.cholesky(overlap))
    values = torch.linalg.eigvalsh(inverse @ (shares + shares.mT) @ inverse.mT / 2)
    within = torch.linalg.solve(overlap, shares)
    squares = sum_of([(w.double() - v.double() @ within).square().sum(0) for v, w in pieces])
    order = values.abs().argsort(descending=True)
    unsymmetric = torch.linalg.vector_norm(shares - shares.mT, dim=0) / 2
    return values[order].cpu(), 2 * float(squares.sqrt().sum()) + float(unsymmetric.sum())


def sum_of(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)
