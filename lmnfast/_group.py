"""Measurements that the processes of a group of torch.distributed share: each measures some tiles of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ._chain import Chain
from ._enqueue import Enqueued
from ._identity import PARTS, Identity, identity_of
from ._measured import measured, measured_stack, reported
from ._native import Progress
from ._pairs import measured_pairs
from ._plane import Plane
from ._settings import Settings
from ._stacked import Stacked
from ._whole import Part, Whole
from .ops.path_connectivity import ChainConnectivity

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group: TypeAlias = "ProcessGroup | str"

ALONE = "alone"
# A draw of pairs is measured in so many pieces.
PIECES = 64
T = TypeVar("T")


def is_alone(group: Any) -> bool:
    """Whether a measurement is this process's alone. Raises ValueError or TypeError for a group that cannot be used."""
    if isinstance(group, str) and group == ALONE:
        return True
    if group is None or not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f'group: expected "{ALONE}" or a process group of torch.distributed, got {group!r} without an initialised one; '
            "torch.distributed.group.WORLD is None before torch.distributed.init_process_group"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f'group: expected "{ALONE}" or a process group of torch.distributed that this process is in, got {group!r}'
        )
    return False


def refuse_group(group: Any, **given: Any) -> None:
    """Raises ValueError for a group together with an argument that no group takes."""
    if not is_alone(group):
        for name, value in given.items():
            if value is not None and value is not False:
                raise ValueError(f'group: expected "{ALONE}" with {name}, got {group!r}')


@contextmanager
def refused_together(group: Any) -> Iterator[None]:
    """An error in this block, before any exchange, also ends the other processes of the group in their next one."""
    try:
        yield
    except BaseException as error:
        if dist.is_available() and isinstance(group, dist.ProcessGroup):
            Ranks(group).tell(error)
        raise


class Ranks:
    """The processes of a group, and what they tell one another. All of them call the same methods in the same order."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.count: int = dist.get_world_size(group)

    def every(self, compute: Callable[[], T], what: str = "end of a measurement") -> list[T]:
        """What a function returns on each rank. Where it fails on one, all raise: that one its own error.

        what: the name of the exchange. Ranks that are in another one raise RuntimeError, as those that they meet there.
        """
        try:
            own = compute()
        except BaseException as error:
            self.tell(error)
            raise
        found = self._exchanged((what, own))
        if said := [f"rank {self.name(n)}: {value}" for n, (kind, value) in enumerate(found) if kind is None]:
            raise RuntimeError(f"group: another process failed, {'; '.join(said)}")
        kinds = [kind for kind, _ in found]
        if (other := self.other(kinds)) is not None:
            raise RuntimeError(
                f"group: expected the same calls on all ranks, got a {kinds[other]} on rank {self.name(other)} and a "
                f"{kinds[0]} on rank {self.name(0)}"
            )
        return [value for _, value in found]

    def tell(self, error: BaseException) -> None:
        """Ends the `every` of the other ranks with an error of this one."""
        said = type(error).__name__
        with suppress(Exception):  # of code of the user
            said += f": {error}"
        with suppress(Exception):  # of a group that is broken; the error that is told counts
            self._exchanged((None, said))

    def _exchanged(self, own: tuple[str | None, Any]) -> list[Any]:
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, own, group=self.group)
        return found

    def other(self, each: list[Any]) -> int | None:
        """The first rank whose value, one from each, is not that of rank 0; None: all are the same."""
        return next((rank for rank, value in enumerate(each) if value != each[0]), None)

    def name(self, rank: int) -> int:
        """A rank of the group as all processes count it."""
        return dist.get_global_rank(self.group, rank)

    def send(self, owner: int, tensor: Tensor) -> None:
        """Overwrites the tensor on all ranks by that of its owner."""
        dist.broadcast(tensor, self.name(owner), group=self.group)

    def told(self, value: T) -> T:
        """The value of the first rank, on all ranks."""
        values = [value]
        dist.broadcast_object_list(values, self.name(0), group=self.group)
        return values[0]

    def add(self, tensor: Tensor) -> None:
        """Overwrites the tensor on all ranks by the sum over all."""
        dist.all_reduce(tensor, group=self.group)

    def device(self, x: Tensor) -> torch.device:
        """Where tensors must be to be sent."""
        backend = dist.get_backend(self.group)
        if backend == "gloo":
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else x.device

    def agree(self, compute: Callable[[], Identity]) -> None:
        """Raises ValueError on every rank if they are about to measure different things."""
        each = self.every(compute, "beginning of a measurement")
        differing = {rank: each[0].differs(own) for rank, own in enumerate(each)}
        said = []
        for part, name in PARTS.items():
            ranks = [rank for rank, parts in differing.items() if part in parts]
            if ranks:
                names = [str(self.name(rank)) for rank in ranks]
                which = f"{name} on rank{'s' * (len(ranks) > 1)} {', '.join(names)}"
                if part == "settings":
                    places = f"on rank {self.name(0)}", f"on rank {names[0]}"
                    values = each[0].settings_said(each[ranks[0]], *places)
                    which += f" ({values})"
                said.append(which)
        if said:
            raise ValueError(
                f"group: expected the same network, samples and settings on all ranks, got {' and '.join(said)} than "
                f"on rank {self.name(0)}"
            )


def in_all(group: Any, compute: Callable[[], T], what: str) -> list[T]:
    """`Ranks.every` of a group; without one, None, what the function returns alone."""
    return [compute()] if group is None else Ranks(group).every(compute, what)


def check_same(group: Any, value: Any, name: str, what: str) -> None:
    """Raises ValueError on every rank if the value of an argument is not the same on all."""
    if group is None:
        return
    ranks = Ranks(group)
    each = ranks.every(lambda: value, what)
    if (other := ranks.other(each)) is not None:
        raise ValueError(
            f"{name}: expected the same on all ranks, got {each[other]!r} on rank {ranks.name(other)} and {each[0]!r} on rank "
            f"{ranks.name(0)}"
        )


@dataclass(frozen=True)
class Tile:
    """What is known of a measured tile beside its entries."""

    outputs: int
    precision: str
    kind: str
    constants: int
    """Outputs that were counted as constant, over all pairs of the tile's samples."""
    within: int
    """As many of them in pairs within a block, if this tile is the one that counts for these; else 0."""
    offset: float
    """As of `Enqueued`; 0 if it is not needed."""


def about_of(enqueued: Enqueued, within: int = 0) -> Tile:
    offset = enqueued.offset() if callable(enqueued.offset) else enqueued.offset
    return Tile(
        outputs=enqueued.outputs,
        precision=enqueued.precision,
        kind=enqueued.kind,
        constants=enqueued.constants,
        within=within,
        offset=0.0 if offset is None else float(offset),
    )


def as_enqueued(about: Tile, L: Tensor, pooled: Tensor | None) -> Enqueued:
    counts = torch.tensor([about.constants, 0], device="cpu")
    offset = torch.tensor(about.offset, dtype=torch.float64, device="cpu") if about.offset else None
    found = ChainConnectivity(L, counts, lambda: None, pooled)
    return Enqueued(found, about.precision, about.outputs, offset=offset, kind=about.kind)


def measured_tile(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    plane: Plane,
    number: int,
    settings: Settings,
    known: Chain | None = None,
    expected: Tensor | None = None,
    *,
    whole: Whole,
) -> tuple[Tile, list[Tensor]]:
    """The connectivity of a tile's samples (n, n), with r2 pooled over the outputs behind it if the settings ask for it."""
    members = plane.members(number)
    own = x[members.to(x.device)]
    given = None if expected is None else expected[members.to(expected.device)]
    (enqueued,) = measured(f, own, settings, known=known, expected=given, part=Part(members, whole))
    within = 0
    if enqueued.constants and plane.is_last_of_blocks(number):
        for block in plane.blocks(number):
            if len(block) > 1:
                part = Part(torch.arange(block.start, block.stop, device="cpu"), whole)
                (alone,) = measured(f, x[block.start : block.stop], settings, known=known, part=part)
                within += alone.constants
    tile = about_of(enqueued, within)
    return tile, [entries for entries in (enqueued.L, enqueued.pooled) if entries is not None]


def summed(tiles: list[Tile], plane: Plane) -> Tile:
    """What is known of the whole matrix. The pairs within a block are in as many tiles as the order, and one more."""
    constants = sum(tile.constants for tile in tiles) - plane.order * sum(tile.within for tile in tiles)
    each = {name: dict.fromkeys(getattr(tile, name) for tile in tiles) for name in ("precision", "kind")}
    names = {name: "+".join(found) for name, found in each.items()}
    return Tile(
        outputs=tiles[0].outputs,
        constants=max(0, constants),
        within=0,
        offset=max(tile.offset for tile in tiles),
        **names,
    )


def measurer(group: Any, stacked: Stacked | None = None, **more: Any) -> Callable[..., list[Enqueued]]:
    """The function of (f, x, settings, progress) that measures: in this process alone, or in those of a group together.

    more: what else must be the same on all processes of the group, with the settings.
    """
    if is_alone(group):
        return measured if stacked is None else partial(measured_stack, stacked=stacked)
    return lambda f, x, settings, progress=False: [
        sharded(f, x, settings, group, progress=progress, **more)[0]
    ]


def sharded(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    settings: Settings,
    group: ProcessGroup,
    *,
    gather: bool = True,
    progress: bool | Progress = False,
    known: Chain | None = None,
    expected: Tensor | None = None,
    **more: Any,
) -> tuple[Enqueued, int]:
    """`measured` by all processes of a group together. Arguments and errors as there; more: as of `measurer`.

    Returns:
        The connectivity, and the number of its first row: 0. Without `gather` its L and pooled have some rows (rows, N) alone.
    """
    ranks = Ranks(group)
    report: Progress | None = None
    with ExitStack() as stack:

        def prepared() -> Identity:
            nonlocal report
            report = stack.enter_context(reported(progress))
            return identity_of(f, x, settings, gather=gather, **more)

        ranks.agree(prepared)
        return _sharded(f, x, settings, ranks, gather, report, known, expected)


def _sharded(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    settings: Settings,
    ranks: Ranks,
    gather: bool,
    progress: Progress | None,
    known: Chain | None,
    expected: Tensor | None,
) -> tuple[Enqueued, int]:
    plane = Plane(len(x))
    rows = range(len(x))
    if not gather:
        rows = range(*(len(x) * place // ranks.count for place in (ranks.rank, ranks.rank + 1)))
    if not any(plane.each()):  # one sample
        kept: list[Enqueued] = []
        ranks.every(lambda: kept.extend(measured(f, x, settings, known=known, expected=expected)))
        (enqueued,) = kept
        L, pooled = (None if m is None else m[rows.start : rows.stop] for m in (enqueued.L, enqueued.pooled))
        assert L is not None
        return as_enqueued(about_of(enqueued), L, pooled), rows.start
    own: dict[int, list[Tensor]] = {}
    whole = Whole(x)

    def measure() -> tuple[list[Tile], set[torch.dtype]]:
        found, mine = [], plane.of_shard(ranks.rank, ranks.count)
        for done, number in enumerate(mine):
            tile, own[number] = measured_tile(f, x, plane, number, settings, known, expected, whole=whole)
            found.append(tile)
            if progress is not None:
                progress((done + 1) / len(mine))
        return found, {entries.dtype for each in own.values() for entries in each}

    each = ranks.every(measure)
    about = summed([tile for tiles, _ in each for tile in tiles], plane)
    wide = any(torch.float64 in dtypes for _, dtypes in each)
    empty = x.new_empty(0, dtype=torch.float64 if wide else torch.float32)
    matrices = _collected(ranks, plane, own, rows, empty, 1 + settings.pooled)
    return as_enqueued(about, matrices[0], matrices[1] if settings.pooled else None), rows.start


def _collected(
    ranks: Ranks, plane: Plane, own: dict[int, list[Tensor]], rows: range, like: Tensor, kinds: int
) -> list[Tensor]:
    """Some rows (rows, N) of the matrices, one for each kind, of which every rank has some tiles. Empties `own`.

    like: has the dtype and the device of the matrices.
    """
    device = ranks.device(like)
    whole = [like.new_zeros(len(rows), plane.samples) for _ in range(kinds)]
    for matrix in whole:
        matrix[torch.arange(len(rows)), torch.arange(rows.start, rows.stop)] = 1.0
    for owner in range(ranks.count):
        for number in plane.of_shard(owner, ranks.count):
            members = plane.members(number)
            places = ((members >= rows.start) & (members < rows.stop)).nonzero()[:, 0].to(like.device)
            members = members.to(like.device)
            for kind, matrix in enumerate(whole):
                if owner == ranks.rank:
                    entries = own[number][kind].to(device, like.dtype).contiguous()
                else:
                    entries = torch.empty(len(members), len(members), dtype=like.dtype, device=device)
                ranks.send(owner, entries)
                matrix[(members[places] - rows.start)[:, None], members] = entries.to(like.device)[places]
            own.pop(number, None)
    return whole


def sharded_pairs(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    settings: Settings,
    drawn: tuple[Tensor, Tensor],
    group: ProcessGroup,
    **more: Any,
) -> tuple[Enqueued, tuple[Tensor, Tensor]]:
    """`measured_pairs` by all processes of a group together. Arguments and errors as there; more: as of `measurer`.

    Returns:
        The entries, and the pairs: those that rank 0 has drawn.
    """
    ranks = Ranks(group)
    ranks.agree(lambda: identity_of(f, x, settings, gather=True, pairs=len(drawn[0]), **more))
    first, second = ranks.every(lambda: drawn if ranks.rank == 0 else None, "draw of pairs")[0] or drawn
    pieces = torch.arange(len(first), device="cpu").tensor_split(min(PIECES, len(first)))
    whole = Whole(x[torch.cat([first, second]).unique().to(x.device)])

    def measure() -> list[tuple[Tile, Tensor, Tensor | None]]:
        found = []
        for piece in pieces[
            len(pieces) * ranks.rank // ranks.count : len(pieces) * (ranks.rank + 1) // ranks.count
        ]:
            one = measured_pairs(f, x, settings, first[piece], second[piece], whole=whole)
            found.append((about_of(one), one.L.cpu(), None if one.pooled is None else one.pooled.cpu()))
        return found

    every = [part for each in ranks.every(measure) for part in each]
    about = summed([tile for tile, *_ in every], Plane(len(x)))
    pooled = torch.cat([pool for *_, pool in every if pool is not None]) if settings.pooled else None
    return as_enqueued(about, torch.cat([r2 for _, r2, _ in every]), pooled), (first, second)
