"""A connectivity on its way: prepares a function and its samples, runs the route, checks what came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from . import _native
from ._chain import Chain
from ._checks import Checks, Findings, NotTheChain, is_like
from ._features import of_chain, of_other
from ._generic import generic_paths
from ._native import Progress
from ._outputs import Calls, first_outputs, gives_outputs, outputs_of, rows_again
from ._polynomials import generic_polynomials
from ._route import Route, find_route, refuted
from ._samples import checked_samples
from ._settings import DEFAULT, Settings
from ._tiles import bytes_of, tile_bytes
from ._undisturbed import evaluating
from .ops.path_connectivity import ChainConnectivity, chain_connectivity
from .reference import CONSTANT_ULPS

# Share of constant outputs from which on an offset is warned of. Measured on an MLP with 5 outputs and 200 samples, by the
# size of the offset: LMN is 1 % low at a share of 0.1 %, 3 % at 0.8 %, 12 % at 2.7 %, 89 % at 50 %.
WARNED_SHARE = 0.002

# Share of the outputs that an offset must have, and above which one dead output among hundreds stays silent.
OFFSET_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Enqueued:
    """A connectivity matrix on its way. Its values count once `check` has returned."""

    measured: ChainConnectivity
    precision: str
    """As `Measurement.precision`."""
    outputs: int
    """K, after flattening."""
    verdicts: Tensor | None = None
    """(checks, 2) int64, how many values fail a check and which is the first; None where all was looked at."""
    errors: tuple[Callable[[int, int], Exception], ...] = ()
    offset: Tensor | Callable[[], Tensor] | None = None
    """0-dim float64, as `offset_of` gives it, or what gives it; None: of no interest, as next to no output counts as constant."""
    findings: Findings | None = None
    """In place of verdicts, of a chain on a device."""
    together: Tensor | None = None
    """(networks, N, N), of which L is one, where several networks were measured together."""

    @property
    def L(self) -> Tensor:
        return self.measured.L

    @property
    def constants(self) -> int:
        """Outputs that were counted as constant to rounding, over all pairs i < j."""
        if self.findings is not None and not self.findings.unresolved:
            return self.findings.constants
        return int(self.measured.counts[0])

    def check(self) -> None:
        """Raises what is wrong with samples, outputs or L, as `connectivity` does; waits for the device.

        Pairs that the samples' dtype cannot resolve are measured here, where that was not done before.
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
        """Share of the pairs i < j, over all outputs, that count as constant; waits for the device."""
        pairs = len(self.L) * (len(self.L) - 1) // 2
        return self.constants / (pairs * self.outputs) if pairs else 0.0

    def offset_problem(self) -> str | None:
        """What is wrong where outputs vary so little beside their size that rounding hides it; waits for the device."""
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
) -> Enqueued:
    """:func:`lmnfast.connectivity` without waiting for a CUDA device, where f is a chain.

    Of other functions it waits for the number of unresolved pairs, which are measured with the parameters of now. What a check
    has to read from the device is left to :meth:`Enqueued.check`. Elsewhere every check is made at once, before the work that
    follows it.

    Args:
        f, x: as there.
        settings: how it is measured.
        fuse: use the fused kernel for a chain.
        expected: f(x), where that is known.
        known: what `recognise` gives for f, where that is known.
        deferred: leave the checks to `check`; None: on CUDA.
        stream: CUDA, another than the current one, that takes the work; see `_Prepared.on`. x itself must not change.
        progress: is told the share that is done.

    Raises:
        As connectivity; RuntimeError when f(x) is not what was expected; NotTheChain in `check` only, as
        elsewhere the chain is just not used.
    """
    x = checked_samples(f, x)
    checks = Checks(x.is_cuda if deferred is None else deferred)
    with evaluating(f) as kept:
        calls = Calls(f, kept.put_back)
        if not checks.deferred:  # of not finite samples f may say anything
            checks.finite("x", x)
        ends: Tensor | None = None
        if kept.in_order:
            route = find_route(f, x, settings.method, fuse=fuse, known=known, put_back=kept.put_back)
            by_kernels = settings.method == "jacobian" and _native.on_cuda(x) and expected is None
            if not (by_kernels and route.chain is not None and gives_outputs(route.chain, x)):
                ends = first_outputs(calls, x, route.chain)
        else:
            ends = first_outputs(calls, x, None)
            route = find_route(f, x, settings.method, fuse=fuse, known=known, put_back=kept.put_back)
        expected = None if expected is None else expected.reshape(len(x), -1)
        prepared = _Prepared(calls, x, ends, route, settings, checks, kept.in_order, expected, progress)
        with prepared.on(stream):
            enqueued = prepared.run_behind_kernels()
            if enqueued is None:
                prepared.check_outputs()
                enqueued = prepared.checked(prepared.run())
            return enqueued


@dataclass
class _Prepared:
    """A function with all that its measurement needs, the function's outputs on the samples included."""

    calls: Calls
    x: Tensor
    own_ends: Tensor | None
    """f(x), (N, K); None where the kernels give these outputs."""
    route: Route
    settings: Settings
    checks: Checks
    in_order: bool
    """Whether f is made of torch's own modules without a state, one after the other: nothing but what the chain gives can
    come out."""
    expected: Tensor | None
    progress: Progress | None
    setting: str = field(default_factory=torch.get_float32_matmul_precision)
    allocated: int = 0
    """Bytes of f's results for all samples; of a chain nobody asks."""

    @property
    def ends(self) -> Tensor:
        assert self.own_ends is not None
        return self.own_ends

    @contextmanager
    def on(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Makes a stream the current one for the work that follows. None: the current stream takes the work.

        What the stream of before is given next may change f's parameters. A chain's weights are therefore copied first; for
        any other f that stream waits for this one.
        """
        if stream is None:
            yield
            return
        before = torch.cuda.current_stream(self.x.device)
        chain = self.route.chain
        if chain is not None:
            chain = _copied(chain)
            self.route = replace(self.route, chain=chain)
            for tensor in (self.x, self.own_ends, self.expected, *chain.weights, *chain.biases):
                if tensor is not None:  # else its memory may be used again before `stream` has read it
                    tensor.record_stream(stream)
        stream.wait_stream(before)
        try:
            with on_stream(stream):
                yield
        finally:
            if self.route.chain is None:
                before.wait_stream(stream)

    def checked(self, measured: ChainConnectivity) -> Enqueued:
        """The connectivity with its checks made, but for those that are left to `Enqueued.check`."""
        deferred = self.checks.deferred
        if not (deferred and self.route.chain is not None):  # else by `check`, on the chain's own weights
            measured.resolve()
            self.checks.entries(measured.L)
        enqueued = Enqueued(
            measured,
            precision_of(self.setting, self.route.chain is not None, self.x),
            self.ends.shape[1],
            self.checks.pending(),
            tuple(self.checks.errors),
        )
        if deferred:
            return replace(enqueued, offset=partial(offset_of, self.route.chain, self.ends))
        if enqueued.constant_share() >= WARNED_SHARE:
            return replace(enqueued, offset=offset_of(self.route.chain, self.ends))
        return enqueued

    def run_behind_kernels(self) -> Enqueued | None:
        """The connectivity of a chain on a device, where one pass behind the kernels checks everything.

        None for what is no chain, elsewhere, where that pass cannot compare the outputs, and where the chain has other outputs
        than f.
        """
        chain, of_jacobians = self.route.chain, self.settings.method == "jacobian"
        if chain is None or not (_native.on_cuda(self.x) if of_jacobians else self.checks.deferred):
            return None
        again = None if self.in_order else chain(self.x)
        compared = [t for t in (again, self.expected) if t is not None]
        if self.own_ends is not None and not all(is_like(t, self.own_ends) for t in compared):
            return None
        if of_jacobians:
            try:
                L = of_chain(
                    chain, self.x, self.own_ends, "connectivity", again=again, expected=self.expected
                )
            except NotTheChain:
                self.route = refuted(self.route, self.calls.f, self.settings.method)
                return None
            return Enqueued(
                _resolved(L),
                precision_of(self.setting, self.route.chain is not None, self.x),
                len(chain.weights[-1]),
            )
        nodes, weights = self.settings.nodes()
        measured = chain_connectivity(chain, self.x, nodes, weights, self.settings.midpoint)
        return Enqueued(
            measured,
            precision_of(self.setting, self.route.chain is not None, self.x),
            self.ends.shape[1],
            offset=partial(offset_of, chain, self.ends),
            findings=Findings(self.x, self.ends, again, self.expected, measured.L, measured.counts),
        )

    def check_outputs(self) -> None:
        """Looks at samples and outputs, and takes another route where the recognised parts have other outputs."""
        checks, x, ends = self.checks, self.x, self.ends
        if checks.deferred:
            checks.finite("x", x)
        checks.finite("f(x)", ends)
        if self.expected is not None:
            checks.agree(ends, self.expected)
        chain = self.route.chain
        if chain is not None and not self.in_order and not checks.reproduces(chain, x, ends):
            self.route = refuted(self.route, self.calls.f, self.settings.method)
        if self.route.chain is not None:
            return
        for rows in rows_again(len(x)):
            again, self.allocated = bytes_of(self.calls, x, rows, self.settings.method != "path")
            checks.repeats(self.calls, x, ends, again, rows, f"{len(rows)} samples alone")
        if self.route.parts is not None:
            self._hoist(*self.route.parts)

    def _hoist(self, first: nn.Module, rest: nn.Module) -> None:
        """Puts the samples behind the affine maps that f begins with, where the rest then gives f's outputs."""
        x = first(self.x).detach()
        if torch.is_autocast_enabled(x.device.type) and x.dtype != self.x.dtype:
            x = x.to(self.x.dtype)  # paths between them need not be in low precision
        calls = Calls(rest, self.calls.begin_anew, self.calls.shape)
        if self.checks.same(outputs_of(calls, x.clone()), self.ends):
            self.calls, self.x = calls, x
        else:
            self.route = refuted(self.route, self.calls.f, self.settings.method)

    def run(self) -> ChainConnectivity:
        """The connectivity by the route."""
        chain, settings = self.route.chain, self.settings
        if settings.method == "jacobian":
            if chain is not None:
                return _resolved(of_chain(chain, self.x, self.ends, "connectivity"))
            return _resolved(
                of_other(self.calls, self.x, self.ends, self.allocated, "connectivity", False, self.checks)
            )
        nodes, weights = settings.nodes()
        if chain is not None:
            with _native.reporting(self.progress):
                return chain_connectivity(chain, self.x, nodes, weights, settings.midpoint)
        tile = tile_bytes(settings.budget, self.x.device)
        how = tile, self.allocated, self.checks, self.progress
        if settings.midpoint is None:
            return generic_paths(self.calls, self.x, self.ends, nodes, weights, *how)
        return generic_polynomials(self.calls, self.x, self.ends, nodes, weights, settings.midpoint, *how)


def offset_of(chain: Chain | None, ends: Tensor) -> Tensor:
    """The size of outputs (N, K) in units of their range over the samples, which a hundredth of the outputs exceed.

    0 where the size is below ten ranges, or where rounding it hides less than a ten-thousandth of the range: saturated and
    dead units are constant by right. An output that is the same for all samples is dead, too, unless it is so large that
    rounding would hide as much of a range of 1: inf. The kernels of a chain leave its last bias out, so that is no offset.
    """
    if chain is not None and chain.biases[-1] is not None:
        ends = ends - chain.biases[-1]
    low, high = (values.double() for values in ends.aminmax(dim=0))
    size = torch.maximum(low.abs(), high.abs())
    tolerated = max(10.0, 1e-4 / (CONSTANT_ULPS * torch.finfo(ends.dtype).eps))
    swallowed = torch.where(size >= tolerated, math.inf, 0.0) if chain is None else torch.zeros_like(size)
    ratio = torch.where(high > low, size / (high - low), swallowed)
    ratio = ratio.topk(math.ceil(OFFSET_SHARE * len(ratio))).values[-1]
    return torch.where(ratio >= tolerated, ratio, 0.0)


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    """Makes a stream the current one; None leaves CUDA alone, where torch's own context would initialise it."""
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


def precision_of(setting: str, fused: bool, x: Tensor) -> str:
    """As `Measurement.precision`; the setting is torch's."""
    if x.dtype == torch.float64:
        return "float64"
    if fused:
        return "highest" if x.device.type == "cpu" else setting
    if torch.is_autocast_enabled(x.device.type):
        return str(torch.get_autocast_dtype(x.device.type)).removeprefix("torch.")
    return setting if x.dtype == torch.float32 else str(x.dtype).removeprefix("torch.")
