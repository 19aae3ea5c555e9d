"""Checks of samples, outputs and matrices, made at once, or enqueued on a device and read later."""

import math
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from ._chain import Chain
from ._outputs import on_device, outputs_of
from ._samples import same_output
from ._unresolved import in_double
from ._whole import Part
from .ops.check_outputs import find

# The error of a float32 product, as a share of its magnitude, at each precision of torch.set_float32_matmul_precision. The
# factors may be rounded to TF32 at "high", and at "medium" to bfloat16, as a CPU with AMX does for products of large batches.
PRODUCTS = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}


class OtherModel(RuntimeError):
    """A tail has other outputs than its model."""


class NotTheChain(RuntimeError):
    """The chain that f was recognised as, or the affine maps at its beginning, give other outputs than f."""


def is_like(values: Tensor, ends: Tensor) -> bool:
    """Whether one pass can compare the two: they have the same shape, dtype and device."""
    return (values.shape, values.dtype, values.device) == (ends.shape, ends.dtype, ends.device)


def all_finite(values: Tensor) -> bool:
    """Whether the values have no NaN and no Inf. Waits for their device."""
    if values.numel() == 0:
        return True
    # 20 times faster than isfinite(). Both are NaN if any value is.
    low, high = torch.aminmax(values.detach())
    return math.isfinite(low) and math.isfinite(high)


class Findings:
    """The results of one pass behind a chain's kernels: all errors of `Checks`, and the kernels' counts, read together."""

    def __init__(
        self,
        x: Tensor,
        ends: Tensor,
        again: Tensor | None,
        expected: Tensor | None,
        matrix: Tensor | None = None,
        counts: Tensor | None = None,
        numbers: Tensor | None = None,
    ) -> None:
        """Enqueues the pass, in the matrix's dtype, which is as wide as the others.

        x: (N, *in), the samples. ends: (N, K), f's outputs. again: (N, K), the chain's outputs. expected: (N, K), the
        model's outputs. matrix: (N, M), a connectivity or Jacobians. counts: (2,) int64 or float64, read with the results.
        numbers: as of `Checks`.
        """
        widest = torch.promote_types(torch.promote_types(x.dtype, ends.dtype), torch.float32)
        dtype = widest if matrix is None else matrix.dtype
        counts = counts.view(torch.int64) if counts is not None and counts.is_floating_point() else counts

        def cast(values: Tensor | None) -> Tensor | None:
            return values if values is None or values.dtype == dtype else values.to(dtype)

        samples, outputs = x.flatten(1).to(dtype), ends.to(dtype)
        epsilon = torch.finfo(ends.dtype).eps
        self.found = find(samples, outputs, cast(again), cast(expected), matrix, counts, epsilon)
        self._samples, self._called = len(x), numbers
        self._numbers: list[int] | None = None

    def read(self) -> list[int]:
        """The numbers of `reference.check_outputs`. The first call waits for the device."""
        if self._numbers is None:
            found = self.found.tolist()
            differ = int(found[4] > 0 or _as_float(found[5]) > _as_float(found[6]))
            self._numbers = [*found[:4], differ, *found[7:]]
        return self._numbers

    def check(self) -> None:
        """Raises the first error in samples and outputs. Waits for the device."""
        in_x, x_reach, in_y, y_reach, differ, others, *_ = self.read()
        if in_x:
            raise _not_finite("x", in_x, self._number(self._samples - x_reach))
        if in_y:
            raise _not_finite("f(x)", in_y, self._number(self._samples - y_reach))
        if differ:
            raise _other_model()
        if others:
            raise _other_chain()

    def check_entries(self) -> None:
        """Raises ValueError for a connectivity that is not finite."""
        failing, reach = self.read()[6:8]
        if failing:
            raise _not_finite_path(*map(self._number, divmod(self._samples**2 - reach, self._samples)))

    def _number(self, sample: int) -> int:
        return sample if self._called is None else int(self._called[sample])

    @property
    def finite(self) -> bool:
        """Whether all entries of the matrix are finite."""
        return self.read()[6] == 0

    @property
    def constants(self) -> int:
        return self.read()[8]

    @property
    def unresolved(self) -> int:
        return self.read()[9]

    @property
    def count(self) -> float:
        """The first of the counts, for counts in float64."""
        return _as_float(self.read()[8])


class StackFindings:
    """`Findings` of several networks, from one pass over all of them.

    If that pass finds an error, each network gets a pass of its own.
    """

    def __init__(
        self, x: Tensor, ends: Tensor, again: Tensor | None, matrices: Tensor, counts: Tensor
    ) -> None:
        """Enqueues the pass.

        x: (B, N, *in), the samples. ends: (B, N, K), the networks' outputs. again: (B, N, K), the chains' outputs, or None.
        matrices: (B, N, N), the connectivities. counts: (B, 2) int64.
        """
        self._x, self._ends, self._again, self._matrices, self._counts = x, ends, again, matrices, counts
        rows = x.shape[1]
        # The check for finite values accepts any layout. The chains' outputs need one column per output.
        y = ends.reshape(rows, -1) if again is None else _side_by_side(ends)
        other = None if again is None else _side_by_side(again)
        found = Findings(x.reshape(rows, -1), y, other, None, matrices.reshape(rows, -1)).found
        self._found: Tensor | None = torch.cat([found[:-2], counts.flatten()])
        self._numbers: list[list[int]] = []

    def counts(self) -> list[list[int]] | None:
        """The counts of each network; None if any network has an error. The first call waits for the device."""
        if self._found is not None:
            numbers = self._found.tolist()
            self._found, first = None, len(numbers) - 2 * len(self._counts)
            if not any(numbers[:first]):
                self._numbers = [numbers[n : n + 2] for n in range(first, len(numbers), 2)]
        return self._numbers or None

    def of_network(self, number: int) -> Findings:
        """The findings of one network, as from a pass of its own."""
        return _NetworkFindings(self, number)

    def alone(self, number: int) -> Findings:
        """Enqueues a pass over one network."""
        again = None if self._again is None else self._again[number]
        own = self._matrices[number], self._counts[number]
        return Findings(self._x[number], self._ends[number], again, None, *own)


def _side_by_side(values: Tensor) -> Tensor:
    """Reshapes (B, N, K) to (N, B K)."""
    return values.transpose(0, 1).flatten(1)


class _NetworkFindings(Findings):
    def __init__(self, stack: StackFindings, number: int) -> None:
        self._stack, self._network, self._samples = stack, number, stack._x.shape[1]
        self._numbers = self._called = None

    def read(self) -> list[int]:
        if self._numbers is None:
            counts = self._stack.counts()
            alone = None if counts is not None else self._stack.alone(self._network).read()
            self._numbers = [*[0] * 8, *counts[self._network]] if counts is not None else alone
        assert self._numbers is not None
        return self._numbers


def _as_float(bits: int) -> float:
    return float(struct.unpack("=d", struct.pack("=q", bits))[0])


def _not_finite(name: str, failing: int, first: int) -> ValueError:
    return ValueError(f"{name}: NaN or Inf in {first_sample(first, failing)}")


def first_sample(first: int, failing: int) -> str:
    """The first of the samples that a check has found, for messages. It may have looked at a part of all samples."""
    return f"sample {first}" + (f", the first of {failing} found" if failing > 1 else "")


def _not_finite_path(i: int, j: int) -> ValueError:
    return ValueError(f"f: NaN or Inf in an output on the path from sample {i} to sample {j}")


def _other_model() -> OtherModel:
    return OtherModel(
        "f: its outputs on the samples are not those of the model that it was cut from; the model's "
        "forward has changed since, in a way that only its outputs show"
    )


def _other_compiled() -> RuntimeError:
    return RuntimeError(
        "f: has other outputs on the samples compiled by torch.compile than uncompiled; measure it uncompiled"
    )


def _other_chain() -> NotTheChain:
    return NotTheChain(
        "f: looks like a chain of Linear and activations, or begins with affine maps, but that chain has other outputs"
    )


class Checks:
    """Checks that raise at once, or, deferred, are collected on the device and read together later."""

    def __init__(self, deferred: bool, part: Part | None = None) -> None:
        """part: which of the caller's samples these are. None: all."""
        self.deferred = deferred
        self.numbers = None if part is None else part.numbers
        self.whole = None if part is None else part.whole
        self.verdicts: list[Tensor] = []
        self.errors: list[Callable[[int, int], Exception]] = []
        self._repeated: tuple[Tensor, list[int], Tensor, Tensor, float] | None = None

    def finite(self, name: str, values: Tensor) -> None:
        if not self.deferred and all_finite(values):
            return
        self._expect(
            values.isfinite().flatten(1).all(1),
            lambda failing, first: _not_finite(name, failing, self._number(first)),
        )

    def agree(self, ends: Tensor, expected: Tensor, compiled: bool = False) -> None:
        """Checks f's outputs against the model's; compiled: against those of f uncompiled."""
        self._expect(
            same_output(ends, expected),
            lambda *_: _other_compiled() if compiled else _other_model(),
        )

    def reproduces(self, chain: Chain, x: Tensor, ends: Tensor) -> bool:
        """Whether the recognised chain is f on the samples: a wrong number is worse than a slow one."""
        return self.same(chain(x), ends)

    def same(self, y: Tensor, ends: Tensor) -> bool:
        """Whether y are f's outputs on the samples, to rounding and 1e-3 of each output's spread over the samples.

        The spread is the yardstick, not the size: an offset does not change how outputs vary. A deferred check returns True
        and raises NotTheChain later.
        """
        if y.shape != ends.shape:
            return False
        if not self.deferred and torch.equal(y, ends):  # true of most chains
            return True
        # Along rows max and min are faster than amax and amin.
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
        """Checks that f gives the same outputs for these rows of x in another call.

        ends: f(x). again: the outputs of `rows` in the other call. called: how that call was made, for the error message.
        The two may differ by rounding, as another batch rounds in another way. If they differ by more, the effect of rounding
        is measured: f is called again on x, where a function must repeat itself, and on x with some last bits changed.
        """
        epsilon = _epsilon(x, ends)
        if self._repeated is None or self._repeated[0] is not ends or self._repeated[1] != rows:
            index = on_device(torch.tensor(rows, device="cpu"), ends.device)
            # The largest over all samples and outputs, as a single output may happen to be small.
            magnitude = ends.abs().amax()
            tight = 0.0 if self.deferred else 8 * epsilon * float(magnitude) + 1e-30
            self._repeated = ends, rows, ends[index], magnitude, tight
        _, _, expected, magnitude, tight = self._repeated
        difference = (again - expected).abs()
        # Nearly always. Every tile of paths comes here.
        if not self.deferred and float(difference.max()) <= tight:
            return
        difference = difference.amax(1)
        if self.deferred:
            loose = max(1e-4 if torch.get_float32_matmul_precision() == "highest" else 1e-3, 8 * epsilon)
            good = difference <= loose * magnitude + 1e-30
        else:
            good = difference <= tight
            if (
                not good.all()
                and ((first := outputs_of(f, x.clone())) - outputs_of(f, x.clone())).abs().amax() <= tight
            ):
                signs = torch.arange(x.numel(), device=x.device).sin().sign().to(x.dtype).reshape(x.shape)
                moved = x + 8 * epsilon * x.abs().amax() * signs
                rounding = (outputs_of(f, moved) - first).abs().amax()
                # Rounding may move a value to the next level of a quantised layer. It does not excuse more than 1 %.
                good = difference <= torch.clamp(16 * rounding, 1e-4 * magnitude, 1e-2 * magnitude)
                most, within = difference.max(), bool((difference <= 16 * rounding).all())
                if not good.all() and _rounds(f, x, ends, rows, most, within):
                    good = difference <= 1e-2 * magnitude
                    if not good.all():
                        raise ValueError(
                            f"f: rounding decides its outputs: called on {called}, it gives others by "
                            f"{most / magnitude:.1%} of their largest; expected samples and weights of a size that "
                            f"{ends.dtype} resolves"
                        )
        at = self._number
        self._expect(
            good,
            lambda _, first: ValueError(
                f"f: gives other outputs for sample {at(rows[first])} when called on {called}; it is random (dropout left on, "
                "sampling, noise), keeps a state between calls (a hidden state, a cache, observers of quantisation), or rows "
                "of a batch depend on each other (batch norm or quantisation by the batch's statistics, a sequence along the "
                "first axis where batch_first=True is forgotten; lmnfast.cut takes batch_dim=1)"
            ),
        )

    def _number(self, sample: int) -> int:
        return sample if self.numbers is None else int(self.numbers[sample])

    def pairs(self, r2: Tensor, first: Tensor, second: Tensor) -> None:
        """Checks the entries of a list of pairs (pairs,)."""
        if not all_finite(r2):
            at = int((~r2.isfinite()).byte().argmax())
            i, j = (self._number(int(samples[at])) for samples in (first, second))
            raise _not_finite_path(i, j)

    def entries(self, L: Tensor) -> None:
        if self.deferred or not all_finite(L):
            self._expect(
                L.isfinite().flatten(),
                lambda _, first: _not_finite_path(*map(self._number, divmod(first, len(L)))),
            )

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


def _epsilon(x: Tensor, y: Tensor) -> float:
    """The machine epsilon of the coarsest dtype that f is known to compute in.

    At a matmul precision other than "highest" torch may round the factors of float32 products, for large batches only.
    """
    kinds = [x.dtype, y.dtype]
    if torch.is_autocast_enabled(x.device.type):
        kinds.append(torch.get_autocast_dtype(x.device.type))
    epsilon = max(torch.finfo(kind).eps for kind in kinds)
    if torch.float32 in kinds and (x.is_cuda or torch.backends.mkldnn.is_available()):
        epsilon = max(epsilon, PRODUCTS[torch.get_float32_matmul_precision()])
    return epsilon


def _rounds(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    ends: Tensor,
    rows: list[int],
    difference: Tensor,
    otherwise: bool,
) -> bool:
    """Whether rounding explains that f's outputs for these rows differ by `difference` between two calls.

    It does if f's rounding errors are as large, and the outputs agree in float64. ends: f(x). otherwise: the answer if f cannot
    be evaluated in float64.
    """
    if x.dtype == torch.float64 or torch.is_autocast_enabled(x.device.type):
        return otherwise
    try:
        y = in_double(f, x)
        alone = in_double(f, torch.stack([x[row] for row in rows]))
    except Exception:  # the user's code may fail on a dtype that it was not written for
        return otherwise
    is_function = (alone - y[rows]).abs().max() <= 1e-5 * difference  # float64's epsilon is 2e-9 of float32's
    return bool(is_function and difference <= 16 * (y - ends).abs().max())
