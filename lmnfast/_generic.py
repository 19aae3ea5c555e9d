"""Measures paths of a function that is no chain by calling the function on tiles of path points."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._checks import Checks
from ._native import Progress
from ._outputs import Calls, on_device, out_of_memory, outputs_of, rows_between, widened
from ._tiles import keep_freed_pages, tile_pairs, tile_points
from ._unresolved import CLOSE, UNRESOLVED, Widened, are_close, resolve
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


def generic_paths(
    f: Calls,
    x: Tensor,
    ends: Tensor,
    nodes: Tensor,
    weights: Tensor,
    tile: int,
    allocated: int,
    checks: Checks,
    progress: Progress | None,
) -> ChainConnectivity:
    """The connectivity of f by calls on tiles of path points. At the paths' ends f's outputs on the samples are used.

    ends: (N, K), f(x). tile: bytes of a tile. allocated: bytes that f takes for all samples.
    """
    original, ends = ends, widened(ends)
    L = torch.ones(len(x), len(x), dtype=ends.dtype, device=x.device)
    counts = torch.zeros(2, dtype=torch.int64, device=x.device)
    t = _like(x, nodes[1:-1]).reshape(-1, *[1] * (x.dim() - 1))
    if x.device.type == "cpu":
        keep_freed_pages()
    widened_f = Widened(f, x, original)
    most = tile_pairs(tile, len(x), allocated, len(t))
    near, finished = mark_near(x, L, counts)
    for first, second in pairs_apart(x, max(most, BLOCK), near):
        r2 = x.new_empty(len(first), dtype=ends.dtype)
        done = 0
        while done < len(first):
            pair = slice(done, done + most)
            try:
                taken = len(first[pair])
                points = x.new_empty(tile_points(taken, len(x), len(t)), *x.shape[1:])
                on_paths = points[: taken * len(t)].unflatten(0, (taken, len(t)))
                torch.lerp(x[first[pair], None], x[second[pair], None], t, out=on_paths)
                y = widened(outputs_between(f, points, x, original, checks)).reshape(
                    -1, len(t), ends.shape[1]
                )
                r2[pair], found = torch.ops.lmnfast.path_r2(
                    y, ends, first[pair], second[pair], nodes, weights, widened_f.rounding
                )
                counts += found
            except RuntimeError as error:
                if most == 1 or not out_of_memory(error):
                    raise
                most = -(-most // 2)  # also for later tiles; finished pairs keep their results
                continue
            done += taken
            finished += taken
            if progress is not None:
                progress(2 * finished / (len(x) * (len(x) - 1)))
        L[first, second] = r2
        L[second, first] = r2

    at_once = tile * len(x) // allocated
    return ChainConnectivity(L, counts, resolver(widened_f, x, L, counts, nodes, weights, at_once))


def resolver(
    widened_f: Widened, x: Tensor, L: Tensor, counts: Tensor, nodes: Tensor, weights: Tensor, points: int
) -> Callable[[], None]:
    """`ChainConnectivity.resolve` for f called in float64. points: that a tile holds in x's dtype."""

    def resolved() -> None:
        if int(counts[1]):
            fewer = max(1, points // 4)  # float64 takes more memory
            values, noise = widened_f.values(), widened_f.noise()
            resolve(values, x, L, counts, nodes, weights, points=fewer, noise=noise)

    return resolved


def mark_near(x: Tensor, L: Tensor, counts: Tensor) -> tuple[Tensor | None, int]:
    """Marks pairs of close samples in L as UNRESOLVED, and counts them: in their own dtype a path between them has few distinct
    points. Returns `_near` and the number of these pairs.
    """
    near = _near(x)
    if near is None:
        return None, 0
    first, second = _numbered(near.nonzero().flatten(), len(x))
    differ = (x[first] != x[second]).flatten(1).any(1)  # other pairs are equal samples, and their entry is 1
    finished, first, second = len(first), first[differ], second[differ]
    L[first, second] = L[second, first] = UNRESOLVED
    counts[1] += len(first)
    return near, finished


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
        yield _numbered(pair if near is None else pair[~near[start : start + size]], len(x))


def _numbered(pair: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """The samples i < j of pairs that are numbered row by row."""
    row_starts = torch.arange(samples, device=pair.device).neg().add(samples - 1).cumsum(0)
    first = torch.searchsorted(row_starts, pair, right=True)
    return first, pair - row_starts[first] + samples
