"""How much a tile of path points may hold, and what a function takes."""

import weakref
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._outputs import outputs_of, rows_between

DEFAULT_BUDGET = 256 * 2**20

# On a CPU a tile is to stay near the caches, and off fresh pages, which the C library maps for large results, and for
# many at once. Fastest of seven runs in turns, residual, convolutional and transformer network of bench_connectivity:
# 0.23, 0.23, 0.43 s with 4 MB, 0.18, 0.18, 0.29 with 16, 0.17, 0.17, 0.27 with 24, 0.23, 0.17, 0.27 with 64.
CPU_TILE = 24 * 2**20

# On CUDA a tile is to keep the card busy, and to be large enough for the fast algorithms of convolutions, beside a training that
# needs memory, too. Measured on an H200 with a residual network and a transformer: 1.1 to 2.8 times faster with 4 GiB than with
# 256 MiB, and no faster beyond.
CUDA_SHARE, CUDA_MOST = 0.25, 4 * 2**30


@cache
def keep_freed_pages() -> None:
    """Has the C library keep what tiles free, for the next tile, and not give it back to the system.

    glibc learns from the largest block freed so far, up to 32 MB, which is untouched here and costs nothing. Measured on
    the residual network of bench_connectivity: 144 000 page faults and 0.38 s, 1 000 and 0.22 s after this.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8, device="cpu")


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that nobody uses: of the driver's, and of what torch's allocator holds and has not given away."""
    try:
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    except (RuntimeError, NotImplementedError):  # of another allocator than torch's
        held = 0
    return torch.cuda.mem_get_info(device)[0] + held


def tile_bytes(budget: int | None, device: torch.device) -> int:
    """Bytes for a tile on a device; None: as many as :func:`lmnfast.connectivity` says."""
    if device.type == "cpu":
        return min(DEFAULT_BUDGET if budget is None else budget, CPU_TILE)
    if budget is not None or device.type != "cuda":
        return DEFAULT_BUDGET if budget is None else budget
    return max(1, min(int(CUDA_SHARE * free_memory(device)), CUDA_MOST))


def tile_pairs(tile: int, samples: int, allocated: int, interior: int) -> int:
    """Paths, of so many interior points, in so many bytes, beside samples that have to come out as before, see `rows_between`.
    allocated: bytes that f takes for all samples."""
    return max(1, (tile * samples // allocated - len(rows_between(samples))) // interior)


class AllocationCount(TorchFunctionMode):
    """Counts the bytes of all results of torch calls: what f holds at a time is hardly ever more, and where it is differentiated
    hardly less. live: the most that there are at a time."""

    def __init__(self, live: bool = False) -> None:
        super().__init__()
        self.bytes = 1
        self._follows, self._live = live, 0
        self._tensors: set[int] = set()
        self._storages: dict[int, int] = {}  # by address, how many tensors there are in it

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                if not self._follows:
                    self.bytes += value.numel() * value.element_size()
                elif id(value) not in self._tensors:  # else it was worked on in place
                    self._follow(value)
        return result

    def _follow(self, value: Tensor) -> None:
        size = value.numel() * value.element_size()
        try:
            storage = value.untyped_storage()
            address = storage.data_ptr()
        except (RuntimeError, NotImplementedError):  # of vmap, torch.func, sparse layouts: not accessible
            self._live += size
            self.bytes = max(self.bytes, self._live)
            return
        size = min(size, storage.nbytes())  # a view of what was there before may have a large one
        if address not in self._storages:
            self._live += size
            self.bytes = max(self.bytes, self._live)
        self._storages[address] = self._storages.get(address, 0) + 1
        self._tensors.add(id(value))

        def drop(tensor: int) -> None:
            self._tensors.discard(tensor)
            self._storages[address] -= 1
            if self._storages[address] == 0:
                del self._storages[address]
                self._live -= size

        weakref.finalize(value, drop, id(value)).atexit = False


def bytes_of(
    f: Callable[[Tensor], Tensor], x: Tensor, rows: list[int], differentiated: bool = False
) -> tuple[Tensor, int]:
    """f's outputs for some of the samples, and the bytes that it takes for all of them: on CUDA, where f is not
    differentiated, at a time. CPU_TILE was chosen by all of them together."""
    some = torch.stack([x[row] for row in rows])
    with AllocationCount(live=x.is_cuda and not differentiated) as count:
        again = outputs_of(f, some)
    return again, -(-count.bytes * len(x) // len(rows))
