"""Enqueues a connectivity: prepares a function and its samples, runs the route, and checks the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from . import _native
from ._block import Block
from ._block_paths import BlockPaths
from ._chain import Chain
from ._checks import Checks, Findings, NotTheChain
from ._features import compare_chain, compare_differentiated
from ._generic import GenericPaths, Paths
from ._native import Progress
from ._outputs import original_of
from ._polynomials import generic_polynomials
from ._prepare import Prepared, prepared
from ._settings import DEFAULT, Settings
from ._tiles import tile_bytes
from ._whole import Part
from .ops.path_connectivity import ChainConnectivity, chain_connectivity
from .reference import CONSTANT_ULPS

# A warning comes if the share of constant outputs is at least this and an offset explains it. Measured on an MLP with 5
# outputs and 200 samples, with growing offsets: LMN is 1 % low at a share of 0.1 %, 3 % at 0.8 %, 12 % at 2.7 %, 89 % at 50 %.
WARNED_SHARE = 0.002

# Share of the outputs that must have the offset. One dead output among hundreds is below it and gives no warning.
OFFSET_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Enqueued:
    """A connectivity matrix that is enqueued. Its values are valid after `check` has returned."""

    measured: ChainConnectivity
    precision: str
    """As `Measurement.precision`."""
    outputs: int
    """K, after flattening."""
    verdicts: Tensor | None = None
    """(checks, 2) int64, for each check how many values fail, and the first of them. None: all checks are made already."""
    errors: tuple[Callable[[int, int], Exception], ...] = ()
    offset: Tensor | Callable[[], Tensor] | None = None
    """0-dim float64 from `offset_of`, or a function that computes it. None: not needed, as hardly any output is constant."""
    findings: Findings | None = None
    """For a chain on a device: takes the place of verdicts."""
    together: tuple[Tensor, Tensor | None] | None = None
    """(networks, N, N) each, if several networks were measured together. L and `pooled` are parts of these."""
    kind: str = ""
    """Of the route, as `Route.kind`; "" where several networks were measured together."""

    @property
    def L(self) -> Tensor:
        return self.measured.L

    @property
    def pooled(self) -> Tensor | None:
        """As L, r2 pooled over the outputs. None if the settings do not ask for it."""
        return self.measured.pooled

    @property
    def constants(self) -> int:
        """Outputs that were counted as constant to rounding, over all pairs i < j."""
        if self.findings is not None and not self.findings.unresolved:
            return self.findings.constants
        return int(self.measured.counts[0])

    def check(self) -> None:
        """Raises the errors of `connectivity` in samples, outputs or L. Waits for the device.

        Also measures the pairs that the samples' dtype cannot resolve, if that is not done yet.
        """
        if self.findings is not None:
            self.findings.check()
            if self.findings.unresolved:
                self.measured.resolve()
                Checks(False).entries(self.L)
            else:
                self.findings.check_entries()
            return
        if self.verdicts is None:
            return
        for (failing, first), error in zip(self.verdicts.cpu().tolist(), self.errors, strict=True):
            if failing:
                raise error(failing, first)
        self.measured.resolve()
        Checks(False).entries(self.L)

    def constant_share(self) -> float:
        """Share of the pairs i < j, over all outputs, that count as constant. Waits for the device."""
        n = self.L.shape[-1]  # of a matrix, or of some rows of one
        pairs = n * (n - 1) // 2 if self.L.dim() == 2 else n
        return self.constants / (pairs * self.outputs) if pairs else 0.0

    def offset_problem(self) -> str | None:
        """The warning for outputs that vary so little against their size that rounding hides it. Waits for the device."""
        share = self.constant_share()
        if share < WARNED_SHARE or self.offset is None:
            return None
        offset = float(self.offset() if callable(self.offset) else self.offset)
        if offset == 0:
            return None
        size = (
            "outputs are the same large value for all samples"
            if math.isinf(offset)
            else f"outputs are {offset:.1e} times as large as their range over the samples"
        )
        return (
            f"{share:.1%} of the outputs' paths between two samples are constant to rounding and count as straight, "
            f"while some {size}; if an offset hides how they vary, measure in float64, or subtract it from the outputs "
            "(output=lambda y: y - offset, in lmnfast.cut and Probe)"
        )


def enqueue(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    settings: Settings = DEFAULT,
    *,
    fuse: bool = True,
    expected: Tensor | None = None,
    known: Chain | None = None,
    deferred: bool | None = None,
    stream: torch.cuda.Stream | None = None,
    progress: Progress | None = None,
    part: Part | None = None,
) -> Enqueued:
    """:func:`lmnfast.connectivity`. For a chain it does not wait for a CUDA device.

    For other functions it waits for the number of unresolved pairs, as these are measured with the parameters of now. Checks
    that must read values from the device are left to :meth:`Enqueued.check`. On other devices every check is made at once,
    before the work that depends on it.

    Args:
        f, x: as in :func:`lmnfast.connectivity`.
        settings: how to measure.
        fuse: use the fused kernel for a chain.
        expected: f(x), if known.
        known: the result of `recognise` for f, if known.
        deferred: leave the checks to `check`. None: only on CUDA.
        stream: a CUDA stream for the work, in place of the current one; see `_on`. x itself must not change.
        progress: receives the share that is done.
        part: as of `Checks`.

    Raises:
        As connectivity; RuntimeError if f(x) is not `expected`; NotTheChain only in `check`: on other devices the chain is
        simply not used.
    """
    with (
        prepared(
            f,
            x,
            settings.method,
            fuse=fuse,
            known=known,
            expected=expected,
            deferred=deferred,
            points=settings.points,
            part=part,
        ) as function,
        _on(stream, function),
    ):
        enqueued = _run_before_checks(function, settings)
        if enqueued is None:
            function.settle()
            enqueued = _checked(function, _run(function, settings, progress))
        return enqueued


@contextmanager
def _on(stream: torch.cuda.Stream | None, function: Prepared) -> Iterator[None]:
    """Makes a stream the current stream for the work that follows. None: the current stream stays.

    Later work on the previous stream may change f's parameters. A chain's weights are therefore copied first. For any
    other f the previous stream waits for this one.
    """
    if stream is None:
        yield
        return
    before = torch.cuda.current_stream(function.x.device)
    chain = function.chain
    if chain is not None:
        chain = _copied(chain)
        function.route = replace(function.route, chain=chain)
        for tensor in (function.x, function.own_ends, function.expected, *chain.weights, *chain.biases):
            # Without this, the memory could be used again before `stream` has read it.
            if tensor is not None:
                tensor.record_stream(stream)
    stream.wait_stream(before)
    try:
        with on_stream(stream):
            yield
    finally:
        if function.chain is None:
            before.wait_stream(stream)


def _run_before_checks(function: Prepared, settings: Settings) -> Enqueued | None:
    """Runs a chain on a device, where one pass behind the kernels makes all checks.

    Returns None for a function that is no chain, on other devices, if that pass cannot compare the outputs, and if the
    chain has other outputs than f.
    """
    chain = function.chain_before_checks()
    if chain is None:
        return None
    x, again, expected = function.x, function.again, function.expected
    if settings.method == "jacobian":
        with suppress(NotTheChain):
            L = compare_chain(chain, x, function.own_ends, "connectivity", again=again, expected=expected)
            return Enqueued(_resolved(L), function.precision, len(chain.weights[-1]))
        function.refute()
        return None
    measured = chain_connectivity(chain, x, *settings.nodes, settings.midpoint, settings.statistic)
    return Enqueued(
        measured,
        function.precision,
        function.ends.shape[1],
        offset=partial(offset_of, chain, function.ends),
        findings=Findings(
            x, function.ends, again, expected, measured.L, measured.counts, function.checks.numbers
        ),
        kind=function.route.kind,
    )


def _run(function: Prepared, settings: Settings, progress: Progress | None) -> ChainConnectivity:
    """The connectivity by the route."""
    chain, x, ends = function.chain, function.x, function.ends
    if settings.method == "jacobian":
        if chain is not None:
            return _resolved(compare_chain(chain, x, ends, "connectivity"))
        return _resolved(
            compare_differentiated(
                function.calls, x, ends, function.allocated, "connectivity", False, function.checks
            )
        )
    nodes, weights = settings.nodes
    if chain is not None:
        with _native.reporting(progress):
            return chain_connectivity(chain, x, nodes, weights, settings.midpoint, settings.statistic)
    if settings.midpoint is None:
        return paths_of(function, settings, progress).all()
    tile = tile_bytes(settings.budget, x.device, differentiated=True)
    given = tile, function.allocated, function.checks, progress, settings.statistic
    return generic_polynomials(function.calls, x, ends, nodes, weights, settings.midpoint, *given)


def paths_of(function: Prepared, settings: Settings, progress: Progress | None = None) -> Paths:
    """The paths of a function that is no chain."""
    block, x = function.route.block, function.x
    if block is not None:
        tile = tile_bytes(settings.budget, x.device, of_block=True)
        own = block, x, *settings.nodes, tile, function.allocated
        return BlockPaths(*own, progress, settings.statistic, function.checks.whole)
    compiled = original_of(function.calls.f) is not function.calls.f
    tile = tile_bytes(settings.budget, x.device, is_compiled=compiled)
    nodes, weights = settings.nodes
    given = tile, function.allocated, function.checks, progress, settings.statistic
    return GenericPaths(function.calls, x, function.ends, nodes, weights, *given)


def _checked(function: Prepared, measured: ChainConnectivity) -> Enqueued:
    """The connectivity with its checks made, but for those that are left to `Enqueued.check`."""
    checks = function.checks
    # Deferred, `check` does this for a chain, on the chain's own weights.
    if not (checks.deferred and function.chain is not None):
        measured.resolve()
        checks.entries(measured.L)
    enqueued = Enqueued(
        measured,
        function.precision,
        function.ends.shape[1],
        checks.pending(),
        tuple(checks.errors),
        kind=function.route.kind,
    )
    if checks.deferred:
        return replace(enqueued, offset=partial(offset_of, function.known, function.ends))
    return with_offset(enqueued, function)


def with_offset(enqueued: Enqueued, function: Prepared) -> Enqueued:
    """The connectivity, whose checks are made, with the offset of f's outputs if so many are constant that it matters."""
    if enqueued.constant_share() >= WARNED_SHARE:
        return replace(enqueued, offset=offset_of(function.known, function.ends))
    return enqueued


def offset_of(known: Chain | Block | None, ends: Tensor) -> Tensor:
    """The size of outputs (N, K), in units of their range over the samples; a hundredth of the outputs are at least this large.

    The result is 0 if the size is below ten ranges, or if its rounding hides less than a ten-thousandth of the range: saturated
    and dead units are constant by right. An output that is the same for all samples counts as dead, too. It counts as
    infinitely offset if it is so large that rounding would hide a ten-thousandth of a range of 1. The last bias of a
    chain or block is left out of its measurement, so that bias is no offset.
    """
    bias = known.biases[-1] if isinstance(known, Chain) else None if known is None else known.last_bias
    if bias is not None:
        ends = (ends.unflatten(1, (-1, len(bias))) - bias).flatten(1)
    low, high = (values.double() for values in ends.aminmax(dim=0))
    size = torch.maximum(low.abs(), high.abs())
    tolerated = max(10.0, 1e-4 / (CONSTANT_ULPS * torch.finfo(ends.dtype).eps))
    swallowed = torch.where(size >= tolerated, math.inf, 0.0) if known is None else torch.zeros_like(size)
    ratio = torch.where(high > low, size / (high - low), swallowed)
    ratio = ratio.topk(math.ceil(OFFSET_SHARE * len(ratio))).values[-1]
    return torch.where(ratio >= tolerated, ratio, 0.0)


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    """Makes a stream the current stream. None does not touch CUDA; torch's own context would initialise it."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _copied(chain: Chain) -> Chain:
    return replace(
        chain,
        weights=tuple(w.clone() for w in chain.weights),
        biases=tuple(None if b is None else b.clone() for b in chain.biases),
    )


def _resolved(L: Tensor) -> ChainConnectivity:
    """A matrix without constant outputs and unresolved pairs."""
    return ChainConnectivity(L, torch.zeros(2, dtype=torch.int64, device="cpu"), lambda: None)
