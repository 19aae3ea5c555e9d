"""Rows of a connectivity matrix that the processes of a group share: products with it, and an estimate of its LMN."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._eigenvalues import check_negative, warn_of_bar
from ._group import Ranks, check_same, refused_together
from ._identity import hash_of
from ._krylov import SpectralEstimate, of_product

# Rows that are multiplied at one time. The pieces begin at multiples of this, and a piece that is cut is filled up with zeros.
# So the product of a row has the same bits, whichever process has the row.
PIECE = 256


@dataclass(frozen=True, eq=False)
class Rows:
    """Consecutive rows of a connectivity matrix, whose other rows the other processes of a group hold.

    ``connectivity(..., group=..., gather=False)`` returns it. No process ever holds the whole matrix.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", init_method="file:///tmp/lmnfast-rows", rank=0, world_size=1)
        >>> f = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> rows = lmnfast.connectivity(f, torch.randn(50, 8), group=dist.group.WORLD, gather=False)
        >>> rows.first, rows.values.shape, rows.product(torch.ones(50, 2)).shape  # all rows, as there is one process
        (0, torch.Size([50, 50]), torch.Size([50, 2]))
        >>> 1 < rows.estimate().lmn < 50
        True
        >>> dist.destroy_process_group()
    """

    values: Tensor
    """(rows, N); float64 for float64 samples, otherwise float32."""
    first: int
    """The sample that the first row belongs to."""
    samples: int
    """N."""
    group: Any
    """The process group that holds all rows."""
    mark: str = field(repr=False)
    """A random word of the matrix, the same on all processes."""

    @classmethod
    def of(cls, values: Tensor, first: int, samples: int, group: Any) -> Rows:
        """The rows of a new matrix. All processes of the group call it."""
        return cls(values, first, samples, group, Ranks(group).told(uuid.uuid4().hex))

    def product(self, V: Tensor) -> Tensor:
        """The matrix times some vectors. All processes of the group call it, with the same vectors.

        Args:
            V: (N, vectors), floating point, on the rows' device.

        Returns:
            (N, vectors) of V's dtype, on every process, with the same bits for any number of processes.

        Raises:
            TypeError, ValueError: V has another dtype, shape or device, or is not the same on all processes; or the processes
                have rows of different matrices.
        """
        ranks = Ranks(self.group)
        self._check_matrix(ranks, "product of rows")
        hashes = ranks.every(lambda: hash_of(self._checked(V)), "product of rows")
        if (other := ranks.other(hashes)) is not None:
            places = f"rank {ranks.name(other)} than on rank {ranks.name(0)}"
            raise ValueError(f"V: expected the same vectors on all ranks, got others on {places}")
        with torch.no_grad():
            return self._product(ranks, V)

    def estimate(self, *, negative: str = "absolute") -> SpectralEstimate:
        """An estimate of the matrix's linear mapping number, with its errors. All processes of the group call it.

        The first process of the group draws random vectors and leads; every product with the matrix is made by all of them
        together. Beside the rows it takes memory for some hundred to a thousand vectors, on the first process.

        Args:
            negative: as in :func:`linear_mapping_number`.

        Returns:
            The `SpectralEstimate` on every process, with the same bits for any number of processes.

        Raises:
            ValueError: another `negative`, or not the same on all processes; or all eigenvalues are 0.
            RuntimeError: another process of the group failed.

        Warns:
            UserWarning: the estimate may be further than 1 % from the value.

        Source:
            docs/mathematics.md, "An estimate for large N".
        """
        ranks = Ranks(self.group)
        with refused_together(self.group):
            check_negative(negative)
        self._check_matrix(ranks, "beginning of an estimate")
        check_same(self.group, negative, "negative", "negative of an estimate")
        squares = math.fsum(s for own in ranks.every(self._squares, "squares of rows") for s in own)

        def product(V: Tensor) -> Tensor:
            ranks.told((tuple(V.shape), V.dtype))
            return self._product(ranks, self._sent(ranks, V))

        def lead() -> SpectralEstimate:
            try:
                like = self.values.new_empty(0)
                return of_product(product, self.samples, squares, float(self.samples), negative, like)
            finally:
                ranks.told(None)

        def follow() -> None:
            while (meant := ranks.told(None)) is not None:
                shape, dtype = meant
                self._product(ranks, self._sent(ranks, self.values.new_empty(shape, dtype=dtype)))

        found = ranks.every(follow if ranks.rank else lead, "end of an estimate")[0]
        assert found is not None
        warn_of_bar(found, stacklevel=2)
        return found

    def _check_matrix(self, ranks: Ranks, what: str) -> None:
        """Raises ValueError on every rank if they have rows of different matrices."""
        marks = ranks.every(lambda: self.mark, what)
        if (other := ranks.other(marks)) is not None:
            raise ValueError(
                f"rows: expected those of one matrix, got others on rank {ranks.name(other)} than on rank {ranks.name(0)}"
            )

    def _checked(self, V: Tensor) -> Tensor:
        if not isinstance(V, Tensor) or not V.is_floating_point():
            raise TypeError(
                f"V: expected floating-point numbers, got {getattr(V, 'dtype', type(V).__name__)}"
            )
        if V.dim() != 2 or len(V) != self.samples:
            raise ValueError(f"V: expected ({self.samples}, vectors), got shape {tuple(V.shape)}")
        if V.device != self.values.device:
            raise ValueError(
                f"V: expected vectors on {self.values.device}, where the rows are, got them on {V.device}"
            )
        return V

    def _product(self, ranks: Ranks, V: Tensor) -> Tensor:
        whole = torch.zeros_like(V, memory_format=torch.contiguous_format)
        with torch.autocast(V.device.type, enabled=False):
            for own, piece, inside in self._pieces():
                whole[own] = (piece.to(V.dtype) @ V)[inside]
        on = whole.to(ranks.device(whole))
        ranks.add(on)
        return on.to(V.device)

    def _sent(self, ranks: Ranks, V: Tensor) -> Tensor:
        on = V.to(ranks.device(V)).contiguous()
        ranks.send(0, on)
        return on.to(V.device)

    def _squares(self) -> list[float]:
        """The sum of the squares of each row."""
        each = [piece.double().square().sum(1)[inside] for _, piece, inside in self._pieces()]
        return torch.cat(each).tolist() if each else []

    def _pieces(self) -> Iterator[tuple[slice, Tensor, slice]]:
        """The rows by pieces of PIECE: which samples' they are, the piece, and where they are in it."""
        last = self.first + len(self.values)
        for start in range(self.first // PIECE * PIECE, last, PIECE):
            begin, end = max(start, self.first), min(start + PIECE, last)
            piece = self.values[begin - self.first : end - self.first]
            if end - begin < PIECE:
                piece = F.pad(piece, (0, 0, begin - start, start + PIECE - end))
            yield slice(begin, end), piece, slice(begin - start, end - start)
