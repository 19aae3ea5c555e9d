"""Prepares a function for any measurement: its checked samples, its outputs on them, and the route that gives the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from . import _native
from ._block import Block
from ._chain import Chain
from ._checks import Checks, is_like
from ._outputs import COMPILED, Calls, first_outputs, gives_outputs, original_of, outputs_of, rows_again
from ._route import DIFFERENTIATING, Route, find_route, refuted
from ._samples import check_dtypes, checked_samples
from ._selected import selected
from ._tiles import AllocationCount, bytes_of, outputs_for
from ._undisturbed import evaluating
from ._whole import Part


@dataclass
class Prepared:
    """A function with everything that its measurement needs, including its outputs on the samples."""

    calls: Calls
    x: Tensor
    own_ends: Tensor | None
    """f(x), (N, K). None if the chain gives these outputs."""
    route: Route
    method: str
    checks: Checks
    late: bool
    """Whether samples and outputs of a chain are checked behind its kernels, in one pass: `Findings`."""
    in_order: bool
    """Whether f is a sequence of torch's own modules without a state. Its outputs are then certain to be the chain's."""
    expected: Tensor | None
    """(N, K), the model's outputs, if known."""
    allocated: int
    """Bytes of f's results for all samples. Not needed for a chain."""
    again: Tensor | None = None
    """(N, K), the chain's outputs, for `Findings`. None for modules in order."""
    matmul_precision: str = field(default_factory=torch.get_float32_matmul_precision)

    @property
    def chain(self) -> Chain | None:
        return self.route.chain

    @property
    def known(self) -> Chain | Block | None:
        """What f is measured as, if it is not called."""
        return self.route.chain or self.route.block

    @property
    def ends(self) -> Tensor:
        assert self.own_ends is not None
        return self.own_ends

    @property
    def precision(self) -> str:
        return precision_of(self.matmul_precision, self.chain is not None, self.x)

    def refute(self) -> None:
        """Takes the next route, as f has other outputs than the recognised parts."""
        self.route = refuted(self.route, self.calls.f, self.method)

    def chain_before_checks(self) -> Chain | None:
        """The chain whose kernels run before the checks, which then take `again`. None if the checks come first."""
        chain = self.chain
        if chain is None or not self.late:
            return None
        self.again = None if self.in_order else chain(self.x)
        compared = [t for t in (self.again, self.expected) if t is not None]
        comparable = self.own_ends is None or all(is_like(t, self.own_ends) for t in compared)
        return chain if comparable else None

    def check_outputs(self) -> None:
        """Checks samples and outputs. Takes another route if the recognised chain has other outputs than f."""
        checks = self.checks
        if self.late or checks.deferred:
            checks.finite("x", self.x)
        checks.finite("f(x)", self.ends)
        if self.expected is not None:
            checks.agree(self.ends, self.expected)
        chain = self.chain
        if not (chain is None or self.in_order or checks.reproduces(chain, self.x, self.ends)):
            self.refute()

    def settle(self) -> None:
        """Also checks, if f is no chain, that f repeats its outputs and that a block is f; and hoists f's affine maps."""
        self.check_outputs()
        if self.chain is not None:
            return
        if self.expected is None and (original := original_of(self.calls.f)) is not self.calls.f:
            calls = Calls(original, self.calls.begin_anew, self.calls.shape)
            self.checks.agree(self.ends, outputs_of(calls, self.x.clone()), compiled=True)
        self._move_index()
        last, first = rows_again(len(self.x))
        again = outputs_for(self.calls, self.x, last)
        self.checks.repeats(self.calls, self.x, self.ends, again, last, f"{len(last)} samples alone")
        again, self.allocated = bytes_of(self.calls, self.x, first, self.method != "path")
        self.checks.repeats(self.calls, self.x, self.ends, again, first, f"{len(first)} samples alone")
        block = self.route.block
        if block is not None and not self._is_block(block):
            self.refute()
        if self.route.parts is not None:
            self._hoist(*self.route.parts)

    def _is_block(self, block: Block) -> bool:
        """Whether f is the block, on all samples, and half way between some of them."""
        rows = rows_again(len(self.x))[0]
        between = torch.lerp(self.x[rows], self.x.roll(1, 0)[rows], 0.5)
        y = block(torch.cat([self.x, between])).flatten(1)
        return self.checks.same(y, torch.cat([self.ends, outputs_of(self.calls, between)]))

    def _move_index(self) -> None:
        """Takes the graph in which the last index of f stands in front, if it then gives f's outputs."""
        if self.method != "path" or self.route.kind != "generic" or self.checks.deferred:
            return
        moved = selected(self.calls.f, self.x)
        if moved is not None:
            calls = Calls(moved, self.calls.begin_anew, self.calls.shape)
            if self.checks.same(outputs_of(calls, self.x.clone()), self.ends):
                self.calls = calls

    def _hoist(self, first: nn.Module, rest: nn.Module) -> None:
        """Applies the affine maps at f's beginning to the samples, if the rest of f then gives f's outputs."""
        x = first(self.x).detach()
        if torch.is_autocast_enabled(x.device.type) and x.dtype != self.x.dtype:
            x = x.to(self.x.dtype)  # the paths between these samples need not be in low precision
        calls = Calls(rest, self.calls.begin_anew, self.calls.shape)
        if self.checks.same(outputs_of(calls, x.clone()), self.ends):
            self.calls, self.x = calls, x
            if self.checks.whole is not None:
                self.checks.whole = self.checks.whole.behind(first)
        else:
            self.refute()


@contextmanager
def prepared(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    method: str,
    *,
    fuse: bool = True,
    known: Chain | None = None,
    expected: Tensor | None = None,
    deferred: bool | None = None,
    spare: bool = False,
    points: int = 3,
    part: Part | None = None,
) -> Iterator[Prepared]:
    """f on its checked samples, in eval mode for as long as the context lasts.

    Modules in order are called after the route is found, and not at all if the chain gives their outputs; others before.

    Args:
        f, x: as in :func:`lmnfast.connectivity`.
        method, fuse, known, points: as in `find_route`.
        expected: f(x), if known.
        deferred: leave the checks to the caller. None: only on CUDA.
        part: as of `Checks`.
        spare: do not call modules in order whose outputs the chain gives, also for methods without Jacobians.

    Raises:
        TypeError, ValueError: as connectivity.
    """
    if method != "path" and getattr(f, COMPILED, False):
        f = original_of(f)
    x = checked_samples(f, x)
    checks = Checks(x.is_cuda if deferred is None else deferred, part)
    late = _native.on_cuda(x) if method in DIFFERENTIATING else checks.deferred
    with evaluating(f) as kept:
        calls = Calls(f, kept.put_back)
        if not (late or checks.deferred):  # f may do anything on samples that are not finite
            checks.finite("x", x)
        find = partial(
            find_route, f, x, method, fuse=fuse, known=known, put_back=kept.put_back, points=points
        )
        route = find() if kept.in_order else None
        chain = None if route is None else route.chain
        ends, allocated = None, 0
        spared = (spare or method in DIFFERENTIATING) and late and expected is None
        if not (spared and chain is not None and gives_outputs(chain, x)):
            ends, allocated = _outputs(calls, x, chain, counted=method == "jacobians")
        yield Prepared(
            calls=calls,
            x=x,
            own_ends=ends,
            route=route or find(),
            method=method,
            checks=checks,
            late=late,
            in_order=kept.in_order,
            expected=None if expected is None else expected.reshape(len(x), -1),
            allocated=allocated,
        )


def _outputs(calls: Calls, x: Tensor, chain: Chain | None, counted: bool) -> tuple[Tensor, int]:
    """f(x), (N, K), and if counted the bytes of f's results, 0 for modules in order that are a chain."""
    count = AllocationCount() if counted and chain is None else None
    try:
        with count or nullcontext():
            y = first_outputs(calls, x, chain)
    except Exception as error:  # f may raise anything on samples that are not finite, or of another dtype
        Checks(False).finite("x", x)
        if isinstance(error, RuntimeError):
            check_dtypes(calls.f, x)
        raise
    return y, 0 if count is None else count.bytes


def precision_of(setting: str, fused: bool, x: Tensor) -> str:
    """The value of `Measurement.precision`. setting: torch.get_float32_matmul_precision() at the time of the measurement."""
    if x.dtype == torch.float64:
        return "float64"
    if fused:
        return "highest" if x.device.type == "cpu" else setting
    if torch.is_autocast_enabled(x.device.type):
        return str(torch.get_autocast_dtype(x.device.type)).removeprefix("torch.")
    return setting if x.dtype == torch.float32 else str(x.dtype).removeprefix("torch.")
