"""How all pairs of samples are split into tiles of one size, and the tiles among shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# The order is the largest prime for which a tile has this many samples or more: with fewer a kernel takes longer for a pair.
LEAST_SAMPLES = 512
# With many samples tiles have about this many, so that a tile fits into memory: up to a sixth more, as the order is a prime.
MOST_SAMPLES = 4096
LEAST_ORDER, MOST_ORDER = 3, 31


@dataclass(frozen=True)
class Plane:
    """Samples in q x q blocks, and as tiles the lines of this affine plane of prime order q.

    A block is a run of consecutive samples with a place (x, y). A line has q blocks: those with ``y = s x + c`` modulo q, or
    those with ``x = c``. Two blocks lie on exactly one line together. So the connectivities of the samples on each line have
    every pair of samples of different blocks once. Pairs within a block are on q + 1 lines; the last of these, ``x = c``,
    counts. All lines have the same number of samples, but for one more or less in a block. Blocks and lines follow from the
    number of samples alone.

    Source:
        Affine planes over a prime field, for example M. Hall, Combinatorial Theory (1986), chapter 12; docs/scale.md.
    """

    samples: int

    @cached_property
    def order(self) -> int:
        """q."""
        most = max(MOST_ORDER, -(-self.samples // MOST_SAMPLES))
        wanted = max(LEAST_ORDER, min(self.samples // LEAST_SAMPLES, most))
        return next(q for q in range(wanted, 1, -1) if all(q % d for d in range(2, q)))

    @property
    def tiles(self) -> int:
        """The number of tiles, q (q + 1)."""
        return self.order * (self.order + 1)

    def blocks(self, tile: int) -> list[range]:
        """The samples of a tile, block by block, in rising order."""
        q = self.order
        slope, shift = divmod(tile, q)
        numbers = [shift * q + y if slope == q else y * q + (slope * y + shift) % q for y in range(q)]
        return [range(self.samples * n // q**2, self.samples * (n + 1) // q**2) for n in numbers]

    def members(self, tile: int) -> Tensor:
        """The samples of a tile, (n,) int64, in rising order."""
        return torch.cat([torch.arange(block.start, block.stop, device="cpu") for block in self.blocks(tile)])

    def is_last_of_blocks(self, tile: int) -> bool:
        """Whether this tile is the one that counts for the pairs within its blocks."""
        return tile >= self.order**2

    def pairs(self, tile: int) -> int:
        """The number of pairs that are measured for a tile."""
        samples = sum(map(len, self.blocks(tile)))
        return samples * (samples - 1) // 2

    def of_shard(self, number: int, count: int) -> list[int]:
        """The tiles of one of several shards, in rising order: consecutive ones, as all tiles take the same time.

        Tiles of fewer than two samples, which have no pair, are left out.
        """
        every = range(self.tiles * number // count, self.tiles * (number + 1) // count)
        if self.samples >= 2 * self.order**2:
            return list(every)
        return [tile for tile in every if self.pairs(tile)]

    def each(self) -> Iterator[int]:
        """All tiles that have a pair, in rising order."""
        return iter(self.of_shard(0, 1))
