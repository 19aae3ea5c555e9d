"""Calling the user's network on samples: what it may be given, what it may return, and what is wrong with it.

Shared by the measures that rest on it, `connectivity` and `jacobian`.
"""

import math
import struct
import weakref
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import _native
from .network import CHAIN_DTYPES, IDENTITY, Chain, check_function, same_output
from .ops.check_outputs import check_outputs
from .state import evaluating
from .unresolved import in_double

DEFAULT_BUDGET = 256 * 2**20
# On a CPU a tile is to stay near the caches, and off fresh pages, which the C library maps for large results, and for
# many at once. Fastest of seven runs in turns, residual, convolutional and transformer network of bench_connectivity:
# 0.23, 0.23, 0.43 s with 4 MB, 0.18, 0.18, 0.29 with 16, 0.17, 0.17, 0.27 with 24, 0.23, 0.17, 0.27 with 64.
CPU_TILE = 24 * 2**20
# On CUDA a tile is to keep the card busy, and to be large enough for the fast algorithms of convolutions, beside a training that
# needs memory, too. Measured on an H200 with a residual network and a transformer: 1.1 to 2.8 times faster with 4 GiB than with
# 256 MiB, and no faster beyond.
CUDA_SHARE, CUDA_MOST = 0.25, 4 * 2**30


class NotTheChain(RuntimeError):
    """What f was taken for, a chain or one that f begins with, does not give f's outputs."""


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


def check_budget(budget: int | None) -> None:
    """Raises ValueError for what is no number of bytes."""
    if budget is not None and budget <= 0:
        raise ValueError(f"budget: expected a positive number of bytes, got {budget}")


def tile_pairs(tile: int, samples: int, allocated: int, interior: int) -> int:
    """Paths, of so many interior points, in so many bytes, beside samples that have to come out as before, see `rows_between`.
    allocated: bytes that f takes for all samples."""
    return max(1, (tile * samples // allocated - len(rows_between(samples))) // interior)


def has_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" or (x.is_cuda and _native.cuda_built())


def has_kernel_of(chain: Chain, x: Tensor) -> bool:
    """Whether there is a kernel of paths for a chain on samples like these."""
    return x.dim() == 2 or chain.flattens


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN or Inf among them; waits for their device."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values.detach())  # both NaN where a value is; 20 times faster than isfinite()
    return math.isfinite(low) and math.isfinite(high)


class Findings:
    """What is found in one pass behind a chain's kernels, to be read all together: the errors of `Checks`, and the counts."""

    def __init__(
        self,
        x: Tensor,
        ends: Tensor,
        again: Tensor | None,
        expected: Tensor | None,
        matrix: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Enqueues the pass over samples (N, *in), outputs (N, K), those of the chain and of the model, and a matrix (N, M); in
        the matrix's dtype, which theirs fits in. counts: (2,) int64 or float64, to be read with what is found."""
        if matrix is None:
            dtype = torch.promote_types(torch.promote_types(x.dtype, ends.dtype), torch.float32)
        else:
            dtype = matrix.dtype
        counts = counts.view(torch.int64) if counts is not None and counts.is_floating_point() else counts
        values = (
            t if t is None or t.dtype == dtype else t.to(dtype) for t in (x.flatten(1), ends, again, expected)
        )
        self.found = check_outputs(*values, matrix, counts, torch.finfo(ends.dtype).eps)
        self._samples = len(x)
        self._numbers: list[int] | None = None

    def read(self) -> list[int]:
        """The numbers, see `reference.check_outputs`; waits for the device, once."""
        if self._numbers is None:
            found = self.found.tolist()
            differ = int(found[4] > 0 or _as_float(found[5]) > _as_float(found[6]))
            self._numbers = [*found[:4], differ, *found[7:]]
        return self._numbers

    def check(self) -> None:
        """Raises what is wrong with samples and outputs; waits for the device."""
        in_x, x_reach, in_y, y_reach, differ, others, *_ = self.read()
        if in_x:
            raise _not_finite("x", in_x, self._samples - x_reach)
        if in_y:
            raise _not_finite("f(x)", in_y, self._samples - y_reach)
        if differ:
            raise _other_model()
        if others:
            raise _other_chain()

    def check_entries(self) -> None:
        """Raises what is wrong with a connectivity."""
        failing, reach = self.read()[6:8]
        if failing:
            raise _not_finite_entry(self._samples**2 - reach, self._samples)

    @property
    def finite(self) -> bool:
        """Whether all of the matrix is."""
        return self.read()[6] == 0

    @property
    def constants(self) -> int:
        return self.read()[8]

    @property
    def unresolved(self) -> int:
        return self.read()[9]

    @property
    def count(self) -> float:
        """The first of the counts, where they are float64."""
        return _as_float(self.read()[8])


class StackFindings:
    """`Findings` of several networks, from one pass over all of them; where that finds anything, they are looked at one by one."""

    def __init__(
        self, x: Tensor, ends: Tensor, again: Tensor | None, matrices: Tensor, counts: Tensor
    ) -> None:
        """Enqueues the pass over samples (B, N, *in), outputs (B, N, K), those of the chains or None, connectivities (B, N, N), and
        counts (B, 2) int64."""
        self.arguments = x, ends, again, matrices, counts
        rows = x.shape[1]
        # Whether all is finite does not depend on what stands where; the chains' outputs are compared one by one over the samples.
        columns = (t if t is None else t.transpose(0, 1).flatten(1) for t in (ends, again))
        values = (ends.reshape(rows, -1), None) if again is None else columns
        found = Findings(x.reshape(rows, -1), *values, None, matrices.reshape(rows, -1)).found
        self._found = torch.cat([found[:-2], counts.flatten()])
        self._counts: list[list[int]] = []

    def counts(self) -> list[list[int]] | None:
        """Of each network, where nothing is wrong with any; else None. Waits for the device, once."""
        if self._found is not None:
            numbers = self._found.tolist()
            self._found, first = None, len(numbers) - 2 * len(self.arguments[-1])
            if not any(numbers[:first]):
                self._counts = [numbers[n : n + 2] for n in range(first, len(numbers), 2)]
        return self._counts or None

    def of_network(self, number: int) -> Findings:
        return _OfNetwork(self, number)


class _OfNetwork(Findings):
    def __init__(self, stack: StackFindings, number: int) -> None:
        self._stack, self._number = stack, number
        self._numbers = None

    def read(self) -> list[int]:
        if self._numbers is None and (counts := self._stack.counts()) is not None:
            self._numbers = [*[0] * 8, *counts[self._number]]
        elif self._numbers is None:
            x, ends, again, matrix, counts = (
                t if t is None else t[self._number] for t in self._stack.arguments
            )
            super().__init__(x, ends, again, None, matrix, counts)
        return super().read()


def _as_float(bits: int) -> float:
    return float(struct.unpack("=d", struct.pack("=q", bits))[0])


def _not_finite(name: str, failing: int, first: int) -> ValueError:
    return ValueError(f"{name}: NaN or Inf in sample {first}, the first of {failing}")


def _not_finite_entry(first: int, samples: int) -> ValueError:
    i, j = divmod(first, samples)
    return ValueError(f"f: NaN or Inf in an output on the path from sample {i} to sample {j}")


def _other_model() -> RuntimeError:
    return RuntimeError(
        "f: its outputs on the samples are not those of the model that it was cut from; the model's "
        "forward has changed since, in a way that only its outputs show"
    )


def _other_chain() -> NotTheChain:
    return NotTheChain(
        "f: looks like a chain of Linear and activations, or begins with affine maps, but that chain has other outputs"
    )


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
            lambda failing, first: _not_finite(name, failing, first),
        )

    def agree(self, ends: Tensor, expected: Tensor) -> None:
        self._expect(
            same_output(ends, expected),
            lambda *_: _other_model(),
        )

    def reproduces(self, chain: Chain, x: Tensor, ends: Tensor) -> bool:
        """Whether the recognised chain is f on the samples: a wrong number is worse than a slow one."""
        return self.same(chain(x), ends)

    def same(self, y: Tensor, ends: Tensor) -> bool:
        """Whether these are f's outputs on the samples, to 1e-3 of each output's spread over them and to rounding: an
        offset of the outputs is no measure of how they vary. On the device, where they are not, NotTheChain is raised later.
        """
        if y.shape != ends.shape:
            return False
        if not self.deferred and torch.equal(y, ends):  # of a chain they mostly are
            return True
        # max and min, which are faster than amax and amin along rows
        high, low = ends.max(0).values, ends.min(0).values
        rounding = 8 * torch.finfo(ends.dtype).eps * torch.maximum(high.abs(), low.abs())
        same = ((y - ends).abs_().max(0).values <= 1e-3 * (high - low) + rounding + 1e-30).all()
        if not self.deferred:
            return bool(same)
        self._expect(
            same,
            lambda *_: _other_chain(),
        )
        return True

    def repeats(
        self,
        f: Callable[[Tensor], Tensor],
        x: Tensor,
        ends: Tensor,
        again: Tensor,
        rows: list[int],
        called: str,
    ) -> None:
        """Whether f(x) is `ends` for these rows of x in another call, too: `again` are its outputs there.

        They may differ by rounding, which other batches have in another way. Where they differ by more, how much rounding can
        do is measured: f is called again on x, where a function gives the same, and on x moved by some of its last bits.
        """
        index = torch.tensor(rows, device="cpu")
        difference = (again - ends[on_device(index, ends.device)]).abs().amax(1)
        # Of all samples and outputs, as single ones may happen to be small.
        magnitude = ends.abs().amax()
        epsilon = _epsilon(x, ends)
        if self.deferred:
            loose = max(1e-4 if torch.get_float32_matmul_precision() == "highest" else 1e-3, 8 * epsilon)
            good = difference <= loose * magnitude + 1e-30
        else:
            tight = 8 * epsilon * magnitude + 1e-30
            good = difference <= tight
            if (
                not good.all()
                and ((first := outputs_of(f, x.clone())) - outputs_of(f, x.clone())).abs().amax() <= tight
            ):
                signs = torch.arange(x.numel(), device=x.device).sin().sign().to(x.dtype).reshape(x.shape)
                moved = x + 8 * epsilon * x.abs().amax() * signs
                rounding = (outputs_of(f, moved) - first).abs().amax()
                # Rounding may move a value to the next one of a quantised layer: beyond 1 % it is no excuse.
                good = difference <= torch.clamp(16 * rounding, 1e-4 * magnitude, 1e-2 * magnitude)
                most, within = difference.max(), bool((difference <= 16 * rounding).all())
                if not good.all() and _rounds(f, x, ends, rows, most, within):
                    good = difference <= 1e-2 * magnitude
                    if not good.all():
                        raise ValueError(
                            f"f: rounding decides its outputs: called on {called}, it gives others by {most / magnitude:.1%} of "
                            f"their largest; expected samples and weights of a size that {ends.dtype} resolves"
                        )
        self._expect(
            good,
            lambda _, first: ValueError(
                f"f: gives other outputs for sample {rows[first]} when called on {called}; it is random (dropout left on, "
                "sampling, noise), keeps a state between calls (a hidden state, a cache, observers of quantisation), or rows "
                "of a batch depend on each other (batch norm or quantisation by the batch's statistics, a sequence along the "
                "first axis where batch_first=True is forgotten)"
            ),
        )

    def entries(self, L: Tensor) -> None:
        if self.deferred or not all_finite(L):
            self._expect(L.isfinite().flatten(), lambda _, first: _not_finite_entry(first, len(L)))

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
    """Counts the bytes of all results of torch calls: what f holds at a time is hardly ever more, and where it is differentiated
    hardly less. live: the most that there are at a time."""

    def __init__(self, live: bool = False) -> None:
        super().__init__()
        self.bytes = 1
        self._live: int | None = 0 if live else None
        self._tensors: set[int] = set()
        self._storages: dict[int, int] = {}  # by address, how many tensors there are in it

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                if self._live is None:
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


class Calls:
    """f as it is measured: every call is like the first one, and on any number of samples.

    begin_anew: of `state.evaluating`, which puts back what f keeps between calls. shape: of its outputs on all samples, once
        they are known.
    """

    def __init__(
        self, f: Callable[[Tensor], Tensor], begin_anew: Callable[[], None], shape: torch.Size | None = None
    ) -> None:
        self.f, self.begin_anew, self.shape = f, begin_anew, shape

    def __call__(self, x: Tensor) -> Tensor:
        self.begin_anew()
        if self.shape is None or len(x) == self.shape[0] or torch.is_grad_enabled():
            return self.f(x)  # whoever differentiates it explains what fails
        try:
            return self.f(x)
        except Exception as error:
            if out_of_memory(error):
                raise
            first = next(iter(str(error).splitlines()), "")
            raise ValueError(
                f"f: fails on another number of samples, {len(x)} for {self.shape[0]}: {type(error).__name__}: {first}; "
                "expected a function of a batch of any size (a hidden state or a mask may have that of one batch)"
            ) from error


def first_outputs(f: Calls, x: Tensor, chain: Chain | None) -> Tensor:
    """`outputs_of` f on all samples; f may work in place, and may return a buffer that its next call overwrites.

    chain: what f is, where it is made of torch's own modules in order: then only an activation on the input may write into
    anything but a result of its own. Else None.
    """
    if chain is not None and chain.activations[0] == IDENTITY:
        return outputs_of(f, x)
    return outputs_of(f, x.clone()).clone()


def outputs_of(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f's outputs (B, K) on a batch; raises what is wrong with them."""
    y = f(x)
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise TypeError(f"f: expected a floating-point tensor, got {getattr(y, 'dtype', type(y).__name__)}")
    known = f.shape if isinstance(f, Calls) else None
    if y.dim() == 0 or len(y) != len(x) or y.numel() == 0 or (known is not None and y.shape[1:] != known[1:]):
        expected, hint = ("*out",), ""
        if known is not None:
            expected = known[1:]
            hint = f", though it gives {tuple(known)} for {known[0]}; does the shape follow the number of samples?"
        shape = ", ".join(map(str, (len(x), *expected)))
        raise ValueError(
            f"f: expected outputs ({shape}) for {len(x)} samples, got shape {tuple(y.shape)}{hint}; samples are rows along "
            "the first dimension (batch_first=True)"
        )
    if isinstance(f, Calls) and known is None:
        f.shape = y.shape
    return y.reshape(len(x), -1)


def rows_again(samples: int) -> tuple[list[int], list[int]]:
    """Samples to call f on once more: the last quarter and the first, each in reversed order.

    Rows that depend on those before or behind them, or on all of them, then have other outputs; so have those that depend on
    an extreme sample, which one of the quarters is without. Both calls have the same shape, so the second one goes on with a
    state that the first one has left.
    """
    quarter = max(1 if samples < 4 else 2, samples // 4)
    return list(range(samples - 1, samples - 1 - quarter, -1)), list(range(quarter - 1, -1, -1))


def rows_between(samples: int) -> list[int]:
    """Samples that are among the points of every batch: the first, the middle and the last one, in reversed order."""
    return sorted({0, samples // 2, samples - 1}, reverse=True)


def _epsilon(x: Tensor, y: Tensor) -> float:
    """Of the coarsest type that f is known to compute in."""
    kinds = [x.dtype, y.dtype]
    if torch.is_autocast_enabled(x.device.type):
        kinds.append(torch.get_autocast_dtype(x.device.type))
    return max(torch.finfo(kind).eps for kind in kinds)


def _rounds(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    ends: Tensor,
    rows: list[int],
    difference: Tensor,
    otherwise: bool,
) -> bool:
    """Whether it is by rounding that f(x), which is `ends`, differs by so much for these rows in another call: f's rounding
    errors are as large, and in float64 the rows do not differ. `otherwise` where f cannot be evaluated there."""
    if x.dtype == torch.float64 or torch.is_autocast_enabled(x.device.type):
        return otherwise
    try:
        y = in_double(f, x)
        alone = in_double(f, torch.stack([x[row] for row in rows]))
    except Exception:  # the user's code, on a dtype that it was not written for
        return otherwise
    is_function = (alone - y[rows]).abs().max() <= 1e-5 * difference  # an epsilon is 2e-9 of float32's
    return bool(is_function and difference <= 16 * (y - ends).abs().max())


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for a GPU: a copy from memory that is not page-locked would."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


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
    if x.layout != torch.strided or x.is_nested or x.dtype not in CHAIN_DTYPES:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(
            f"x: expected a dense tensor of float64, float32, float16 or bfloat16, got a {kind} one of {x.dtype}"
        )
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: expected samples (N, *in) with N > 0, got shape {tuple(x.shape)}")
    if x.is_meta:
        raise ValueError("x: on meta, where tensors have no values; expected samples on a real device")
    parameters = check_function(f, len(x)) if isinstance(f, nn.Module) else {}
    x = x.detach()
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast and x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()  # an output of a layer in low precision; paths between such need not be in it
    for name, p in parameters.items():
        if p.device != x.device:
            raise ValueError(
                f"x: on {x.device}, but f's parameter {name!r} is on {p.device}; move one of them"
            )
    dtypes = {p.dtype: name for name, p in reversed(parameters.items()) if p.is_floating_point()}
    others = [dtype for dtype in dtypes if dtype != x.dtype]
    if others and not autocast and (len(others) == len(dtypes) or not _runs(f, x)):
        raise TypeError(
            f"x: is {x.dtype}, but f's parameter {dtypes[others[-1]]!r} is {others[-1]}; convert one of them"
        )
    return x
