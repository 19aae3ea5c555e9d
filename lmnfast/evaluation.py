"""Calling the user's network on samples: what it may be given, what it may return, and what is wrong with it.

Shared by the measures that rest on it, `connectivity` and `jacobian`.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import _native
from .network import Chain, check_function, evaluating, same_output

DEFAULT_BUDGET = 256 * 2**20
# On a CPU a tile is to stay near the caches, and off fresh pages, which the C library maps for large results, and for
# many at once. Fastest of seven runs in turns, residual, convolutional and transformer network of bench_connectivity:
# 0.23, 0.23, 0.43 s with 4 MB, 0.18, 0.18, 0.29 with 16, 0.17, 0.17, 0.27 with 24, 0.23, 0.17, 0.27 with 64.
CPU_TILE = 24 * 2**20


class NotTheChain(RuntimeError):
    """What f was taken for, a chain or one that f begins with, does not give f's outputs."""


@cache
def keep_freed_pages() -> None:
    """Has the C library keep what tiles free, for the next tile, and not give it back to the system.

    glibc learns from the largest block freed so far, up to 32 MB, which is untouched here and costs nothing. Measured on
    the residual network of bench_connectivity: 144 000 page faults and 0.38 s, 1 000 and 0.22 s after this.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8)


def has_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" or (x.is_cuda and _native.cuda_built())


def has_kernel_of(chain: Chain, x: Tensor) -> bool:
    """Whether there is a kernel of paths for a chain on samples like these."""
    return (x.dim() == 2 or chain.flattens) and (not chain.skips or _native.knows_sums(x))


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN or Inf among them; waits for their device."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values.detach())  # both NaN where a value is; 20 times faster than isfinite()
    return math.isfinite(low) and math.isfinite(high)


class Checks:
    """Raises at once, or collects what fails on the device, to be read there all together."""

    def __init__(self, deferred: bool) -> None:
        self.deferred = deferred
        self.verdicts: list[Tensor] = []
        self.errors: list[Callable[[int, int], Exception]] = []

    def finite(self, name: str, values: Tensor) -> None:
        if not self.deferred and all_finite(values):
            return
        self._expect(
            values.isfinite().flatten(1).all(1),
            lambda failing, first: ValueError(
                f"{name}: NaN or Inf in sample {first}, the first of {failing}"
            ),
        )

    def agree(self, ends: Tensor, expected: Tensor) -> None:
        self._expect(
            same_output(ends, expected),
            lambda *_: RuntimeError(
                "f: its outputs on the samples are not those of the model that it was cut from; the model's "
                "forward has changed since, in a way that only its outputs show"
            ),
        )

    def reproduces(self, chain: Chain, x: Tensor, ends: Tensor) -> bool:
        """Whether the recognised chain is f on the samples: a wrong number is worse than a slow one."""
        return self.same(chain(x), ends)

    def same(self, y: Tensor, ends: Tensor) -> bool:
        """Whether these are f's outputs on the samples; on the device, where they are not, NotTheChain is raised later."""
        if y.shape != ends.shape:
            return False
        # max, which is the faster one of max and amax along rows
        same = ((y - ends).abs_().max(0).values <= 1e-3 * ends.abs().max(0).values + 1e-30).all()
        if not self.deferred:
            return bool(same)
        self._expect(
            same,
            lambda *_: NotTheChain(
                "f: looks like a chain of Linear and activations, or begins with affine maps, but that chain has "
                "other outputs"
            ),
        )
        return True

    def repeats(self, again: Tensor, ends: Tensor) -> None:
        """`again` are outputs of the first samples alone."""
        ends = ends[: len(again)]
        tolerance = max(1e-3, 8 * torch.finfo(ends.dtype).eps)
        self._expect(
            ((again - ends).abs() <= tolerance * ends.abs().amax(0) + 1e-30).all(1),
            lambda failing, first: ValueError(
                f"f: gives other outputs for sample {first} when called on {len(again)} samples alone; it is random "
                "(dropout left on, sampling, noise), or rows of a batch depend on each other (batch norm of the batch)"
            ),
        )

    def entries(self, L: Tensor) -> None:
        def error(_: int, first: int) -> Exception:
            i, j = divmod(first, len(L))
            return ValueError(f"f: NaN or Inf in an output on the path from sample {i} to sample {j}")

        if self.deferred or not all_finite(L):
            self._expect(L.isfinite().flatten(), error)

    def pending(self) -> Tensor | None:
        return torch.stack(self.verdicts) if self.deferred else None

    def _expect(self, good: Tensor | bool, error: Callable[[int, int], Exception]) -> None:
        if isinstance(good, bool):
            if not good:
                raise error(1, 0)
        elif not self.deferred:
            if not good.all():
                raise error(int((~good).sum()), int((~good).flatten().nonzero()[0]))
        else:
            bad = (~good).flatten()
            self.verdicts.append(torch.stack((bad.sum(), bad.byte().argmax())))
            self.errors.append(error)


class AllocationCount(TorchFunctionMode):
    """Counts the bytes of all results of torch calls: what f holds at a time is hardly ever more."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.bytes += value.numel() * value.element_size()
        return result


def outputs_of(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = f(x)
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise TypeError(f"f: expected a floating-point tensor, got {getattr(y, 'dtype', type(y).__name__)}")
    if y.dim() == 0 or len(y) != len(x) or y.numel() == 0:
        raise ValueError(
            f"f: expected outputs ({len(x)}, *out) for {len(x)} samples, got shape {tuple(y.shape)}; samples are rows along "
            "the first dimension (batch_first=True)"
        )
    return y.reshape(len(x), -1)


def out_of_memory(error: Exception) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def widened(y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else y.float()


def _runs(f: nn.Module, x: Tensor) -> bool:
    """Whether a module takes samples in the dtype of some of its parameters, and itself casts to that of others."""
    with evaluating(f):
        try:
            f(x.clone())  # f may work in place
        except RuntimeError:  # dtypes that do not fit
            return False
    return True


def checked_samples(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The samples as they are measured, detached, and under autocast float32; raises what is wrong with them."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor of samples, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"x: expected floating-point samples, got {x.dtype}; integers (tokens) cannot be interpolated: "
            "cut the network at a layer with lmnfast.cut"
        )
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: expected samples (N, *in) with N > 0, got shape {tuple(x.shape)}")
    if x.is_meta:
        raise ValueError("x: on meta, where tensors have no values; expected samples on a real device")
    if isinstance(f, nn.Module):
        check_function(f, len(x))
    x = x.detach()
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast and x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()  # an output of a layer in low precision; paths between such need not be in it
    parameters = list(f.named_parameters()) if isinstance(f, nn.Module) else []
    for name, p in parameters:
        if p.device != x.device:
            raise ValueError(
                f"x: on {x.device}, but f's parameter {name!r} is on {p.device}; move one of them"
            )
    dtypes = {p.dtype: name for name, p in reversed(parameters) if p.is_floating_point()}
    others = [dtype for dtype in dtypes if dtype != x.dtype]
    if others and not autocast and (len(others) == len(dtypes) or not _runs(f, x)):
        raise TypeError(
            f"x: is {x.dtype}, but f's parameter {dtypes[others[-1]]!r} is {others[-1]}; convert one of them"
        )
    return x
