"""Matrices of many samples: tiles in a folder that any number of processes make, and the number that comes of them."""

from __future__ import annotations

import math
import mmap
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._choices import DEVICES
from ._eigenvalues import DENSE_BYTES, check_dense, check_negative, check_solver
from ._folder import MOST_SAMPLES, Folder, folder_of
from ._group import as_enqueued, measured_tile, summed
from ._identity import identity_of
from ._krylov import PROBES, usual_dimension, usual_products
from ._measured import measured, reported, warn_of_offsets
from ._memory import available, said_bytes, said_seconds
from ._native import Progress
from ._plane import Plane
from ._samples import checked_samples
from ._settings import Settings
from ._whole import Whole
from .spectrum import Measurement, measurement

# The eigenproblem that is solved to know the machine's pace, and the seconds that a measurement takes for that.
TRIED = 1024
LONG_ENOUGH = 0.3
# In `dense_seconds`: by the times at N = 1024 to 20 000 with MKL on 2 cores, which it gives to 15 %.
EXTRA = 2600
# The samples of a matrix that is multiplied to know that pace: 64 MB in float32, more than caches hold.
MULTIPLIED = 4096
# What an estimate takes beside this: a share for projections, and for products with fewer vectors or of larger matrices, which
# are slower; and seconds for polynomials. Measured on 2 cores.
PROJECTED, POLYNOMIALS = 0.6, 0.2


def tiles(
    f: Callable[[Tensor], Tensor],
    x: Tensor | np.ndarray,
    out: str | os.PathLike[str],
    *,
    shard: tuple[int, int] = (1, 1),
    method: str = "path",
    points: int = 21,
    rule: str = "uniform",
    budget: int | None = None,
    stabiliser: float = 0.0,
    progress: bool | Progress = False,
) -> list[Path]:
    """Measures tiles of a connectivity matrix into files; :func:`solve` makes the number of them.

    Any number of processes and machines that share the folder may work at once, each on its shard. Tiles that are there are
    not measured again, so the same call goes on after a stop. A tile is written whole or not at all, and carries a checksum and
    the hash of network, samples and settings. Their numbers have the same bits for any number of shards, and for a fused chain
    those of :func:`connectivity`; method "jacobian" has them to rounding.

    Args:
        f: as in :func:`connectivity`.
        x: (N, *in), the samples; also a numpy array, as ``numpy.load("x.npy", mmap_mode="r")``, of which only the samples of a
            tile are in memory at a time. Of an array in memory that torch cannot hold as it is (steps below 0, another byte
            order) a copy is made.
        out: the folder. One folder is for one measurement. If all tiles of the shard are there, nothing is written.
        shard: (k, n): the k-th of n parts of the tiles, k from 1 to n.
        method, points, rule, budget, stabiliser, progress: as in :func:`connectivity`.

    Returns:
        The files of this shard's tiles.

    Raises:
        TypeError, ValueError: as :func:`connectivity`. ValueError also for a shard out of range, for a file in the place of the
            folder, and for a folder with tiles of another network, other samples or settings, or with a damaged manifest.
        OSError: tiles are missing and the folder cannot be written, or the disk is full. The tiles before are whole.

    Source:
        docs/scale.md.

    Example:
        >>> f, x = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)), torch.randn(500, 8)
        >>> for k in (1, 2):  # two processes in practice
        ...     files = lmnfast.tiles(f, x, "tiles", shard=(k, 2))
        >>> m = lmnfast.solve("tiles")
        >>> m == lmnfast.measure(f, x)
        True
    """
    check_shard(shard)
    settings = Settings(method, points, rule, budget, stabiliser)
    path = folder_of(out)
    return make_tiles(f, x, path, shard, settings, progress, f"lmnfast.tiles(f, x, {os.fspath(out)!r}, ...)")


def check_shard(shard: Any) -> None:
    """Raises ValueError or TypeError for a shard that is none."""
    if (
        not isinstance(shard, (tuple, list))
        or len(shard) != 2
        or not all(type(part) is int for part in shard)
    ):
        raise TypeError(f"shard: expected two integers (k, n), got {shard!r}")
    if not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard: expected k of n with k from 1 to n, got {shard[0]} of {shard[1]}")


def make_tiles(
    f: Callable[[Tensor], Tensor],
    x: Tensor | np.ndarray,
    out: Path,
    shard: tuple[int, int],
    settings: Settings,
    progress: bool | Progress,
    command: str,
) -> list[Path]:
    """`tiles` with checked arguments. command: what makes the tiles that are missing, for messages."""
    x = _as_tensor(x)
    _check_length(x)
    with reported(progress) as report:
        identity = identity_of(f, x, settings)
        dtype = "float64" if identity.settings["outputs"] == "torch.float64" else "float32"
        folder = Folder.begun(out, identity, dtype, command)
        plane = Plane(len(x))
        mine, whole = plane.of_shard(shard[0] - 1, shard[1]), Whole(x)
        for done, number in enumerate(mine):
            if isinstance(folder.tile(number), str):
                folder.check_writable()
                tile, (L, *_) = measured_tile(f, x, plane, number, settings, whole=whole)
                folder.write(number, tile, L)
            if report is not None:
                report((done + 1) / len(mine))
    return [folder.file(number) for number in mine]


def _check_length(x: Tensor) -> None:
    """Raises ValueError for samples of which no folder can be. What is no tensor is left to others."""
    if isinstance(x, Tensor) and x.dim() and not 2 <= len(x) <= MOST_SAMPLES:
        expected = "two samples or more" if len(x) < 2 else f"{MOST_SAMPLES} samples or fewer"
        raise ValueError(f"x: expected {expected}, got {len(x)}")


def _as_tensor(x: Tensor | np.ndarray) -> Tensor:
    """The samples as a tensor: without a copy where torch can hold them, and never with a copy of a file."""
    if not isinstance(x, np.ndarray):
        return x
    masked = isinstance(x, np.ma.MaskedArray)
    if masked or x.dtype.kind != "f" or x.dtype.itemsize > 8:
        kind = "one with a mask" if masked else f"one of {x.dtype}"
        raise TypeError(f"x: expected floating-point samples, a numpy array of at most 64 bits, got {kind}")
    with warnings.catch_warnings():  # torch warns that the samples cannot be written; nothing writes them
        warnings.filterwarnings("ignore", ".*not writable")
        try:
            return torch.from_numpy(x)
        except (TypeError, ValueError):  # steps below 0 or between items, or another byte order
            if _is_of_file(x):
                raise ValueError(
                    f"x: is a view of a file that torch cannot hold as it is, with steps of {x.strides} bytes and dtype "
                    f"{x.dtype.str!r}; numpy.ascontiguousarray(x, dtype={x.dtype.name!r}) reads it into memory"
                ) from None
            return torch.from_numpy(np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("=")))


def _is_of_file(x: Any) -> bool:
    """Whether an array, or what it is a view of, is a file that is mapped into memory."""
    while x is not None and not isinstance(x, mmap.mmap):
        x = x.obj if isinstance(x, memoryview) else getattr(x, "base", None)
    return x is not None


def solve(
    out: str | os.PathLike[str],
    *,
    solver: str = "dense",
    negative: str = "absolute",
    device: str = "auto",
    say: Callable[[str], None] | None = None,
) -> Measurement:
    """The linear mapping number of a folder of tiles.

    The tiles are checked and put together in one file of the folder, connectivity.npy, some rows at a time; ``numpy.load``
    reads it. The matrix of the result is that file, mapped into memory: it is not to be deleted while the result is used.

    Args:
        out: the folder of :func:`tiles`.
        solver: "dense": all eigenvalues by LAPACK or cuSOLVER, in float64. "estimate": as of :func:`measure`, from products
            with the mapped matrix.
        negative: as in :func:`lmn`.
        device: where to solve: "cpu", "cuda", or "auto", a CUDA device if there is one.
        say: receives one line before any work: the memory and the time that the dense solver needs.

    Returns:
        The `Measurement` of the network, samples and settings. Of a fused chain it is equal to that of :func:`measure`, except
        for method "jacobian". That, and another function, is equal to rounding, because the products are of other batches.

    Raises:
        ValueError: no folder of tiles, or its manifest is damaged; tiles are missing or damaged, which the message names with
            what makes them; more memory is needed than there is; an unknown solver, negative or device.
        TypeError: out is no path, or say no function.
        OSError: the matrix is not there and cannot be written.

    Warns:
        UserWarning: as :func:`measure`.

    Example:
        >>> f, x = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)), torch.randn(300, 8)
        >>> files = lmnfast.tiles(f, x, "folder", points=9, rule="lobatto")
        >>> m = lmnfast.solve("folder")
        >>> m.samples, m.points, 1 < m.lmn < 300
        (300, 9, True)
    """
    check_negative(negative)
    check_solver(solver)
    where = _solving_device(device)
    if say is not None and not callable(say):
        raise TypeError(f"say: expected a function of a line of text or None, got {say!r}")
    folder = Folder.read(folder_of(out))
    plane = folder.plane
    if solver == "dense":
        check_dense(plane.samples, where)
        if say is not None:
            say(
                f"solver dense, N = {plane.samples}: {said_bytes(DENSE_BYTES * plane.samples**2)} of memory, about "
                f"{said_seconds(dense_seconds(plane.samples, where))}"
            )
    about = summed(folder.tiles(), plane)
    L = folder.assembled()
    enqueued = as_enqueued(about, L, None)
    warn_of_offsets([enqueued])
    return measurement(enqueued, folder.settings, negative, where, solver)


def _solving_device(device: str) -> torch.device:
    if device not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ValueError("device: cuda is not available")
    return torch.device("cuda" if cuda and device != "cpu" else "cpu")


def dense_seconds(samples: int, where: torch.device) -> float:
    """About how long the dense solver takes, by a small matrix that is solved now.

    LAPACK's time is about a N^2 (N + EXTRA): its steps of N^2 limit small matrices.
    """
    n = min(TRIED, samples)
    tried = torch.eye(n, dtype=torch.float64, device=where)
    tried += torch.arange(n, dtype=torch.float64, device=where).outer(torch.ones_like(tried[0])).sin() / n
    tried = tried + tried.mT

    def run() -> float:
        started = time.perf_counter()
        torch.linalg.eigvalsh(tried).sum().item()
        return time.perf_counter() - started

    # The fastest of some: other processes only take time.
    return min(run() for _ in range(3)) * (samples / n) ** 2 * (samples + EXTRA) / (n + EXTRA)


def estimate_seconds(samples: int, like: Tensor) -> float:
    """About how long solver "estimate" takes for a matrix in memory, by products that are made now.

    like: has the dtype and the device of the matrix.
    """
    n = min(MULTIPLIED, samples)
    matrix, vectors = like.new_ones(n, n), like.new_ones(PROBES, n).mT

    def run() -> float:
        started = time.perf_counter()
        (matrix @ vectors)[0, 0].item()
        return time.perf_counter() - started

    # The fastest of some: other processes only take time.
    one = min(run() for _ in range(8)) / PROBES * (samples / n) ** 2
    return usual_products(samples) * one * (1 + PROJECTED) + POLYNOMIALS


@dataclass(frozen=True)
class Plan:
    """What a matrix of many samples takes; :func:`plan` returns it. ``str(plan)`` says it in a few lines.

    Example:
        >>> f, x = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)), torch.randn(300, 8)
        >>> plan = lmnfast.plan(f, x, samples=20_000, ranks=4)
        >>> plan.tiles, plan.dense_bytes, plan.pair_seconds < 1e-3
        (992, 6400000000, True)
    """

    samples: int
    """N."""
    ranks: int
    """Processes that share the tiles."""
    tiles: int
    """The number of tiles, equally large."""
    pairs: int
    """The number of pairs that are measured, some of them in several tiles."""
    pair_seconds: float
    """Of one pair on this machine, as measured now, with this process's threads."""
    tiles_seconds: float
    """Of all tiles by so many processes like this one. A process on the same cores takes time from the others."""
    disk_bytes: int
    """Of all tile files. connectivity.npy takes nearly as many again."""
    tile_bytes: int
    """Of a tile: a process that writes tiles holds a few times this, and the samples of a tile."""
    gathered_bytes: int
    """In each process of a group that gathers the matrix."""
    row_bytes: int
    """In each process of a group that keeps some rows (gather=False)."""
    dense_bytes: int
    """Of the dense solver."""
    dense_seconds: float
    """About, of the dense solver, by a small matrix."""
    estimate_bytes: int
    """Of solver "estimate": the matrix, of which parts may be on disk, and vectors."""
    estimate_seconds: float
    """About, of solver "estimate" while the matrix is in memory, by some products. How many a matrix needs is known to a factor
    of 2."""
    free_bytes: int | None
    """Memory that is free where the solver runs; None: not known."""
    device: str
    """Where the solver runs."""

    @property
    def dense_fits(self) -> bool:
        """Whether the dense solver has the memory that it needs."""
        return self.free_bytes is None or self.dense_bytes <= self.free_bytes

    def to_dict(self) -> dict[str, Any]:
        """All values by their names."""
        return {**asdict(self), "dense_fits": self.dense_fits}

    def __str__(self) -> str:
        free = "an unknown amount is" if self.free_bytes is None else f"{said_bytes(self.free_bytes)} are"
        by = "1 process" if self.ranks == 1 else f"{self.ranks} processes, each with cores of its own"
        fits = "" if self.dense_fits else ": does not fit, take solver 'estimate'"
        group = (
            ""
            if self.ranks == 1
            else f"; in a group {said_bytes(self.gathered_bytes)} a process for the whole matrix, "
            f"{said_bytes(self.row_bytes)} for its rows"
        )
        lines = (
            f"N = {self.samples}: {self.tiles} tiles, {self.pairs:.3g} pairs at {self.pair_seconds * 1e6:.3g} us",
            f"tiles    {said_seconds(self.tiles_seconds)} by {by}; on disk {said_bytes(self.disk_bytes)}, and as many for "
            "connectivity.npy",
            f"memory   {said_bytes(self.tile_bytes)} for a tile{group}",
            f"solve    dense: {said_bytes(self.dense_bytes)}, about {said_seconds(self.dense_seconds)} on {self.device}; "
            f"{free} free{fits}",
            f"estimate {said_bytes(self.estimate_bytes)}, about {said_seconds(self.estimate_seconds)} on {self.device}, "
            "for a bar of about 1 %",
        )
        return "\n".join(lines)


def check_counts(samples: int | None = None, ranks: int = 1) -> None:
    """Raises ValueError for numbers that no plan can have."""
    n = 2 if samples is None else samples
    for name, value, least in (("samples", n, 2), ("ranks", ranks, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value!r}")
    if n > MOST_SAMPLES:
        raise ValueError(f"samples: expected {MOST_SAMPLES} or fewer, as many as tiles can be of, got {n}")


def plan(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    samples: int | None = None,
    ranks: int = 1,
    method: str = "path",
    points: int = 21,
    rule: str = "uniform",
    budget: int | None = None,
    stabiliser: float = 0.0,
) -> Plan:
    """Time and memory for the matrix of many samples, by a short measurement of some pairs on this machine.

    Args:
        f: as in :func:`connectivity`.
        x: (n, *in), some samples. Two are enough, some hundred give a better time.
        samples: N, at most 2^24, as many as :func:`tiles` takes. None: as many as x has.
        ranks: the number of processes, each with as many threads as this one.
        method, points, rule, budget, stabiliser: as in :func:`connectivity`.

    Returns:
        The `Plan`.

    Raises:
        TypeError, ValueError: as :func:`connectivity`; fewer than two samples; ranks or samples out of range.

    Example:
        >>> f, x = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)), torch.randn(300, 8)
        >>> plan = lmnfast.plan(f, x, samples=20_000)
        >>> print(plan)
        N = 20000: 992 tiles, 2.06e+08 pairs at ... us
        tiles ...
        memory ...
        solve ...
        estimate 1.93 GB, about ...
    """
    settings = Settings(method, points, rule, budget, stabiliser)
    check_counts(samples, ranks)
    _check_length(x)
    x = checked_samples(f, x)
    n = len(x) if samples is None else samples
    plane = Plane(n)
    item = 8 if x.dtype == torch.float64 else 4
    size = n / plane.order  # of a tile, but for less than one sample in a block
    pace = _pair_seconds(f, x, settings, math.ceil(size))
    pairs, tile_bytes, most = (
        max(0.0, size * (size - 1) / 2),
        math.ceil(size**2) * item,
        -(-plane.tiles // ranks),
    )
    where = _solving_device("auto")
    return Plan(
        samples=n,
        ranks=ranks,
        tiles=plane.tiles,
        pairs=round(plane.tiles * pairs),
        pair_seconds=pace,
        tiles_seconds=most * pairs * pace,
        disk_bytes=plane.tiles * tile_bytes,
        tile_bytes=tile_bytes,
        gathered_bytes=n**2 * item + most * tile_bytes,
        row_bytes=-(-n // ranks) * n * item + most * tile_bytes,
        dense_bytes=DENSE_BYTES * n**2,
        dense_seconds=dense_seconds(n, where),
        estimate_bytes=item * n * (n + 4 * usual_dimension(n)),
        estimate_seconds=estimate_seconds(
            n, torch.empty(0, dtype=torch.float64 if item == 8 else torch.float32, device=where)
        ),
        free_bytes=available(where),
        device=str(where),
    )


def _pair_seconds(f: Callable[[Tensor], Tensor], x: Tensor, settings: Settings, most: int) -> float:
    """The time of a pair, from as many samples as take long enough to be timed, or as there are, or as a tile has."""

    def run(n: int) -> float:
        started = time.perf_counter()
        (found,) = measured(f, x[:n], settings)
        found.L[0, 0].item()  # waits for a device
        return time.perf_counter() - started

    n, most = 16, max(2, min(most, len(x)))
    run(min(n, most))  # what a first call alone does
    while True:
        n = min(n, most)
        taken = run(n)
        if n == most or taken > LONG_ENOUGH:
            break
        n *= 2
    if taken < LONG_ENOUGH:  # the fastest of some: other processes only take time
        taken = min(taken, run(n), run(n))
    return taken / (n * (n - 1) / 2)
