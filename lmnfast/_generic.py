"""Measures paths of a function that is no chain by calling the function on tiles of path points."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._checks import Checks
from ._native import Progress
from ._outputs import Calls, on_device, out_of_memory, outputs_of, rows_between, widened
from ._settings import Statistic
from ._tiles import keep_freed_pages, tile_pairs, tile_points
from ._unresolved import CLOSE, UNRESOLVED, Entries, ListEntries, Widened, are_close, resolve
from .ops.path_connectivity import ChainConnectivity

# Pairs whose entries are written together, if a tile has fewer.
BLOCK = 2**14


def outputs_between(f: Calls, points: Tensor, x: Tensor, ends: Tensor, checks: Checks) -> Tensor:
    """f's outputs (B, K) at the first B of the points (B + B', *in).

    The last B' places are filled with samples, whose outputs must be as before: f may depend on the number of rows or on
    earlier calls.
    """
    rows = rows_between(len(x))
    samples = points[len(points) - len(rows) :]
    for place, row in zip(samples, rows):
        place.copy_(x[row])
    y = outputs_of(f, points)
    checks.repeats(f, x, ends, y[-len(rows) :], rows, f"a batch of {len(points)}, after other batches")
    return y[: -len(rows)]


class Paths(ABC):
    """Measures paths between samples: all, or those of a list of pairs. A subclass says how it measures some of them.

    Args:
        x: (N, *in), the samples. dtype: of the results.
        nodes, weights: the rule.
        together: the number of pairs that `entries` is given at a time.
        widened: f in float64. at_once: the number of points that a tile holds in x's dtype.
        progress: receives the share of pairs that is done.
    """

    def __init__(
        self,
        x: Tensor,
        dtype: torch.dtype,
        nodes: Tensor,
        weights: Tensor,
        statistic: Statistic,
        together: int,
        widened: Widened,
        at_once: int,
        progress: Progress | None,
    ) -> None:
        self.x, self.dtype, self.rule, self.statistic = x, dtype, (nodes, weights), statistic
        self.together, self.widened, self.at_once, self.progress = together, widened, at_once, progress
        self.counts = torch.zeros(2, dtype=torch.int64, device=x.device)
        self._finished = self._pairs = 0

    @abstractmethod
    def entries(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
        """r2 of pairs, (pairs,), and r2 pooled over the outputs if it is asked for; UNRESOLVED where they are not resolved.

        Adds to the counts, and calls `finished`.
        """

    def finished(self, pairs: int) -> None:
        """Counts pairs as done."""
        self._finished += pairs
        if self.progress is not None:
            self.progress(self._finished / self._pairs)

    def all(self) -> ChainConnectivity:
        """The connectivity matrix."""
        samples = len(self.x)
        entries = Entries(*self._ones(samples, samples), self.counts, self.statistic.stabiliser)
        self._pairs = samples * (samples - 1) // 2
        near, self._finished = mark_near(self.x, entries)
        for first, second in pairs_apart(self.x, self.together, near):
            if len(first):
                entries.write((first, second), *self.entries(first, second))
        return self._of(entries)

    def of_list(self, first: Tensor, second: Tensor) -> ChainConnectivity:
        """The entries of some pairs. first, second: (pairs,) int64."""
        ones = self._ones(len(first))
        entries = ListEntries(*ones, self.counts, self.statistic.stabiliser, first=first, second=second)
        apart = mark_near_pairs(self.x, entries)
        self._pairs, self._finished = len(first), len(first) - len(apart)
        for pair in apart.split(self.together):
            if len(pair):
                entries.write(pair, *self.entries(first[pair], second[pair]))
        return self._of(entries)

    def _ones(self, *shape: int) -> tuple[Tensor, Tensor | None]:
        """L and pooled."""
        ones = torch.ones(shape, dtype=self.dtype, device=self.x.device)
        return ones, ones.clone() if self.statistic.pooled else None

    def _of(self, entries: Entries) -> ChainConnectivity:
        resolve = resolver(self.widened, self.x, entries, *self.rule, self.at_once)
        return ChainConnectivity(entries.L, self.counts, resolve, entries.pooled)


class GenericPaths(Paths):
    """Measures paths of f by calls on tiles of path points. At the paths' ends f's outputs on the samples are used.

    Args:
        ends: (N, K), f(x).
        tile: bytes of a tile. allocated: bytes that f takes for all samples.
        x, nodes, weights, statistic, progress: as of `Paths`.
    """

    def __init__(
        self,
        f: Calls,
        x: Tensor,
        ends: Tensor,
        nodes: Tensor,
        weights: Tensor,
        tile: int,
        allocated: int,
        checks: Checks,
        progress: Progress | None,
        statistic: Statistic,
    ) -> None:
        self.f, self.original, self.ends, self.checks = f, ends, widened(ends), checks
        self.t = _like(x, nodes[1:-1]).reshape(-1, *[1] * (x.dim() - 1))
        self.most = tile_pairs(tile, len(x), allocated, len(self.t))
        super().__init__(
            x,
            self.ends.dtype,
            nodes,
            weights,
            statistic,
            max(self.most, BLOCK),
            Widened(f, x, ends, checks.whole),
            tile * len(x) // allocated,
            progress,
        )
        if x.device.type == "cpu":
            keep_freed_pages()

    def entries(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
        x, t = self.x, self.t
        r2 = x.new_empty(len(first), dtype=self.dtype)
        pooled = torch.empty_like(r2) if self.statistic.pooled else None
        done = 0
        while done < len(first):
            pair = slice(done, done + self.most)
            try:
                taken = len(first[pair])
                points = x.new_empty(tile_points(taken, len(x), len(t)), *x.shape[1:])
                on_paths = points[: taken * len(t)].unflatten(0, (taken, len(t)))
                torch.lerp(x[first[pair], None], x[second[pair], None], t, out=on_paths)
                y = widened(outputs_between(self.f, points, x, self.original, self.checks))
                y = y.reshape(-1, len(t), self.ends.shape[1])
                arguments = y, self.ends, first[pair], second[pair], *self.rule, self.widened.rounding
                r2[pair], found, pool = torch.ops.lmnfast.path_r2(*arguments, *self.statistic)
                if pooled is not None:
                    pooled[pair] = pool
                self.counts += found
            except RuntimeError as error:
                if self.most == 1 or not out_of_memory(error):
                    raise
                self.most = -(-self.most // 2)  # also for later tiles; finished pairs keep their results
                continue
            done += taken
            self.finished(taken)
        return r2, pooled


def resolver(
    widened_f: Widened, x: Tensor, entries: Entries, nodes: Tensor, weights: Tensor, points: int
) -> Callable[[], None]:
    """`ChainConnectivity.resolve` for f called in float64. points: that a tile holds in x's dtype."""

    def resolved() -> None:
        if int(entries.counts[1]):
            fewer = max(1, points // 4)  # float64 takes more memory
            values, noise = widened_f.values(), widened_f.noise()
            resolve(values, x, entries, nodes, weights, points=fewer, noise=noise)

    return resolved


def mark_near(x: Tensor, entries: Entries) -> tuple[Tensor | None, int]:
    """Marks pairs of close samples as UNRESOLVED, and counts them: in their own dtype a path between them has few distinct
    points. Returns `_near` and the number of these pairs.
    """
    near = _near(x)
    if near is None:
        return None, 0
    first, second = numbered(near.nonzero().flatten(), len(x))
    differ = (x[first] != x[second]).flatten(1).any(1)  # other pairs are equal samples, and their entry is 1
    finished, first, second = len(first), first[differ], second[differ]
    _leave(entries, (first, second), len(first))
    return near, finished


def mark_near_pairs(x: Tensor, entries: ListEntries) -> Tensor:
    """`mark_near` of a list of pairs. Returns the places of the other pairs."""
    first, second = entries.first, entries.second
    near = [
        _are_near(x[i], x[j]) for i, j in zip(first.split(BLOCK), second.split(BLOCK))
    ]  # some pairs at a time
    found = torch.cat([*near, first.new_empty(0, dtype=torch.bool)])
    places = found.nonzero()[:, 0]
    places = places[(x[first[places]] != x[second[places]]).flatten(1).any(1)]
    _leave(entries, places, len(places))
    return (~found).nonzero()[:, 0]


def _leave(entries: Entries, at: Any, count: int) -> None:
    """Marks pairs as UNRESOLVED."""
    left = torch.full((count,), UNRESOLVED, dtype=entries.L.dtype, device=entries.L.device)
    entries.write(at, left, None if entries.pooled is None else left)
    entries.counts[1] += count


def _are_near(first: Tensor, second: Tensor) -> Tensor:
    """Whether samples are close, see `are_close`; in float64, whether they are equal. (pairs,) bool."""
    if first.dtype == torch.float64:
        return (first == second).flatten(1).all(1)
    return are_close(first, second)


def _near(x: Tensor) -> Tensor | None:
    """Which pairs i < j of samples are close, see `are_close`; in float64, which are equal. None: no pair is."""
    if len(x) < 2:
        return None
    if x.dtype in (torch.float32, torch.float64) and x.device.type in ("cpu", "cuda"):
        flat = x.flatten(1)
        distance, size = torch.pdist(flat, torch.inf), flat.abs().amax(1)
        share = CLOSE if x.dtype == torch.float32 else 0.0
        if distance.min() > share * size.max():  # waits on CUDA
            return None
        larger = torch.cat([torch.maximum(size[i], size[i + 1 :]) for i in range(len(x))])
        near = distance <= share * larger
    else:
        near = torch.cat([are_close(x[i : i + 1], x[i + 1 :]) for i in range(len(x) - 1)])
    return near if near.any() else None


def _like(x: Tensor, values: Tensor) -> Tensor:
    """The values in x's dtype on x's device."""
    return on_device(values.to(x.dtype), x.device)


def pairs_apart(x: Tensor, size: int, near: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs i < j that are not near, row by row. The indices of all pairs never exist at once."""
    pairs = len(x) * (len(x) - 1) // 2
    for start in range(0, pairs, size):
        pair = torch.arange(start, min(start + size, pairs), device=x.device)
        yield numbered(pair if near is None else pair[~near[start : start + size]], len(x))


def numbered(pair: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """The samples i < j of pairs that are numbered row by row."""
    row_starts = torch.arange(samples, device=pair.device).neg().add(samples - 1).cumsum(0)
    first = torch.searchsorted(row_starts, pair, right=True)
    return first, pair - row_starts[first] + samples
