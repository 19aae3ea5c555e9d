"""The size of a tile of path points, and the memory that a function takes."""

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._outputs import Calls, original_of, outputs_of, rows_between

DEFAULT_BUDGET = 256 * 2**20

# On a CPU the results that exist at one time should stay near the caches, and a tile should hold many points, as a deep network
# calls many small operations. Time per point with 0.5, 1, 2, 4, 8, 16, 32 MB, as a multiple of the best, on 2 cores of an AMD
# EPYC: residual 1.7 1.2 1.3 1.3 1.0 1.3 2.4, convolutional 2.8 1.7 1.3 1.1 1.1 1.0 1.0, transformer of 2 blocks 2.8 1.5 1.4 1.1
# 1.0 1.0 1.4, of 10 blocks 2.5 1.6 1.3 1.1 1.0 1.0 1.3, of 3 wide blocks 1.6 1.6 1.6 1.4 1.1 1.0 1.2, ResNet of 8 blocks 2.9
# 2.1 1.5 1.2 1.0 1.1 1.8.
CPU_TILE = 8 * 2**20

# Of a block, whose rows are counted by themselves. Time for a pair of a block 768-3072-768 with 8, 16, 32, 64 MB, as a multiple
# of the best, on the same machine: 1.10 1.04 1.00 1.08.
CPU_TILE_OF_BLOCK = 32 * 2**20

# Of a compiled function, which keeps fewer results than the original, whose bytes are counted. Time with 8, 16, 24, 32, 48 MB
# on 2 cores of an Intel Xeon, as a multiple of the best: GPT-2 1.18 1.02 1.04 1.02 1.0, BERT 1.06 1.05 1.0 1.06 1.05, Llama
# 1.12 1.04 1.05 1.05 1.0, ResNet 1.02 1.0 1.0 1.03 1.39, ViT 1.05 1.02 1.0 1.04 1.11.
CPU_TILE_COMPILED = 24 * 2**20

# Differentiation keeps results. All of them are counted, and a tile may hold more.
CPU_TILE_DIFFERENTIATED = 24 * 2**20

# On CUDA a tile should keep the card busy and be large enough for the fast convolution algorithms, but leave memory for a
# training. Measured on an H200 with a residual network and a transformer: 4 GiB is 1.1 to 2.8 times faster than 256 MiB, and
# more than 4 GiB is no faster.
CUDA_SHARE, CUDA_MOST = 0.25, 4 * 2**30


@cache
def keep_freed_pages() -> None:
    """Makes the C library keep the memory of freed tiles for the next tile, in place of giving it back to the system.

    glibc keeps blocks up to the size of the largest block freed so far, at most 32 MB. This function frees a block of that
    size without touching it, which costs nothing. Measured on the residual network of bench_connectivity: 144 000 page faults
    and 0.38 s before, 1 000 and 0.22 s after.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8, device="cpu")


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device: those of the driver, and those that torch's allocator holds but does not use."""
    try:
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    except (RuntimeError, NotImplementedError):  # the allocator is not torch's
        held = 0
    return torch.cuda.mem_get_info(device)[0] + held


def tile_bytes(
    budget: int | None,
    device: torch.device,
    *,
    differentiated: bool = False,
    of_block: bool = False,
    is_compiled: bool = False,
) -> int:
    """Bytes for a tile on a device, as `bytes_of` counts them.

    budget: as in :func:`lmnfast.connectivity`, which documents the default.
    """
    if device.type == "cpu":
        most = CPU_TILE_OF_BLOCK if of_block else CPU_TILE_DIFFERENTIATED if differentiated else CPU_TILE
        most = CPU_TILE_COMPILED if is_compiled else most
        return min(DEFAULT_BUDGET if budget is None else budget, most)
    if budget is not None or device.type != "cuda":
        return DEFAULT_BUDGET if budget is None else budget
    return max(1, min(int(CUDA_SHARE * free_memory(device)), CUDA_MOST))


def tile_pairs(tile: int, samples: int, allocated: int, interior: int) -> int:
    """The number of paths in a tile, at most all, beside the samples of `rows_between`.

    tile: bytes of the tile. allocated: bytes that f takes for all samples. interior: points of a path between its ends.
    """
    within = (tile * samples // allocated - len(rows_between(samples))) // interior
    return max(1, min(within, samples * (samples - 1) // 2))


def tile_points(pairs: int, samples: int, interior: int) -> int:
    """The number of points in one call of f: those of the paths, and the samples of `rows_between`."""
    return pairs * interior + len(rows_between(samples))


class AllocationCount(TorchFunctionMode):
    """Counts the bytes of all results of torch calls.

    f rarely holds more than that at a time, and a differentiated f rarely less. live: count the largest number of bytes that
    exist at one time instead.
    """

    def __init__(self, live: bool = False) -> None:
        super().__init__()
        self.bytes = 1
        self._follows, self._live = live, 0
        self._tensors: set[int] = set()
        self._storages: dict[int, int] = {}  # by address, the number of tensors in the storage

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                if not self._follows:
                    self.bytes += value.numel() * value.element_size()
                elif id(value) not in self._tensors:  # otherwise it was changed in place
                    self._follow(value)
        return result

    def _follow(self, value: Tensor) -> None:
        size = value.numel() * value.element_size()
        try:
            storage = value.untyped_storage()
            address = storage.data_ptr()
        except (RuntimeError, NotImplementedError):  # vmap, torch.func and sparse layouts hide the storage
            self._live += size
            self.bytes = max(self.bytes, self._live)
            return
        size = min(size, storage.nbytes())  # a view of an older tensor may have a large storage
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


def outputs_for(f: Callable[[Tensor], Tensor], x: Tensor, rows: list[int]) -> Tensor:
    """f's outputs for some of the samples, in a call of its own."""
    return outputs_of(f, torch.stack([x[row] for row in rows]))


def bytes_of(
    f: Callable[[Tensor], Tensor], x: Tensor, rows: list[int], differentiated: bool = False
) -> tuple[Tensor, int]:
    """`outputs_for`, and the bytes that f takes for all samples. Following the bytes takes as long as a small call.

    These are the bytes that exist at one time; with differentiation, which keeps results, the bytes of all results. Of a
    compiled f they are those of the original, as a compiler would follow the count too.
    """
    chosen = torch.stack([x[row] for row in rows])
    given = f.f if isinstance(f, Calls) else f
    original = original_of(given)
    with AllocationCount(live=not differentiated) as count:
        again = outputs_of(f if original is given else original, chosen)
    if original is not given:
        again = outputs_of(f, chosen)
    return again, -(-count.bytes * len(x) // len(rows))
