"""Connectivities with a graph: to the parameters of the function, and to the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ._autograd import without_second
from ._chain import Chain
from ._enqueue import Enqueued
from ._measured import matrix_of, measured, measured_chain
from ._native import Progress
from ._pairs import measured_pairs
from ._recognise import NotAChain, chain_with_graph
from ._recomputed import NO_GRAPH, Recomputed
from ._route import why_no_kernel
from ._samples import checked_samples
from ._settings import Settings
from ._threads import one_core_after_fork
from .ops._by_reference import resolve_in_float64
from .ops._gradients import Gradients
from .ops._hoisted import Hoisted
from .ops.path_connectivity import ChainConnectivity
from .ops.path_connectivity_backward import chain_gradients, detached, hoisted_with_graph


@dataclass(frozen=True, eq=False)
class WithGraph:
    """The entries of a connectivity, with a graph."""

    entries: Tensor
    """(N, N), or (pairs,) of a list of pairs; pooled if the settings ask for it."""
    enqueued: Enqueued


@one_core_after_fork()
def with_graph(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    settings: Settings,
    *,
    pairs: tuple[Tensor, Tensor] | None = None,
    progress: bool | Progress = False,
    known: Chain | None = None,
    expected: Tensor | None = None,
) -> WithGraph:
    """The entries of `connectivity`, to the bit, with a graph to x and to all tensors behind f that require grad.

    Args:
        f, x, progress: as in :func:`lmnfast.connectivity`.
        settings: of method "path".
        pairs: the first and the second samples of some pairs. None: all pairs.
        known: the chain that f is, with its graph, if the caller knows it.
        expected: f(x), if known. With a known chain and None, nothing checks that f is this chain.

    Raises:
        As `connectivity`; ValueError for another method, and RuntimeError if there is nothing to differentiate in.
    """
    check_differentiable(settings)
    if known is not None and pairs is None:
        found = measured_chain(known.detached(), x.detach(), expected, settings)
        if found is not None:
            return _with_graph(OfChain(known, x, settings, None), found, settings)
    own = checked_samples(f, x, detached=False)
    chain = known or _chain(f)
    if chain is not None and why_no_kernel(chain, own, "path"):
        chain = None
    source: Source
    source = Recomputed(f, own, settings, pairs) if chain is None else OfChain(chain, own, settings, pairs)
    plain = None if chain is None else chain.detached()
    if pairs is None:
        (enqueued,) = measured(f, x, settings, progress=progress, known=plain, expected=expected)
    else:
        enqueued = measured_pairs(f, x, settings, *pairs, known=plain, expected=expected)
    if chain is not None and enqueued.kind not in ("fused", "block"):  # the chain has other outputs than f
        source = Recomputed(f, own, settings, pairs)
    return _with_graph(source, enqueued, settings)


@one_core_after_fork()
def mean_curvature_with_graph(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    settings: Settings,
    *,
    pairs: tuple[Tensor, Tensor] | None = None,
    known: Chain | None = None,
    expected: Tensor | None = None,
) -> Tensor:
    """`mean_curvature` of the entries that `with_graph` returns for the same arguments, to the bit.

    Every entry has the same gradient, known beforehand. So if f is known to be a chain, one run of the kernel measures and
    differentiates.
    """
    if known is not None and pairs is None:
        check_differentiable(settings)
        source = OfChain(known, x, settings, None)
        gradients: list[Tensor | None] = []
        run = partial(source.run, len(x) * (len(x) - 1), gradients)
        found = measured_chain(known.detached(), source.x, expected, settings, run)
        if found is not None:
            value = mean_curvature(matrix_of(found, settings.pooled))
            return _Mean.apply([value], gradients, source, *source.tensors())
    return mean_curvature(with_graph(f, x, settings, pairs=pairs, known=known, expected=expected).entries)


def _with_graph(source: Source, enqueued: Enqueued, settings: Settings) -> WithGraph:
    # The entries are handed over in a list: the graph of a tensor that keeps itself would never be freed.
    entries = [matrix_of(enqueued, settings.pooled)]
    return WithGraph(_Entries.apply(source, entries, *source.tensors()), enqueued)


def check_differentiable(settings: Settings, stacked: Any = None) -> None:
    """Raises the errors of arguments that allow no graph."""
    if settings.method != "path":
        raise ValueError(f"differentiable: expected with method 'path', got method {settings.method!r}")
    if stacked is not None:
        raise ValueError("differentiable: expected without stacked; differentiate one network at a time")
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        off = "torch.inference_mode" if torch.is_inference_mode_enabled() else "torch.no_grad"
        raise RuntimeError(f"differentiable: expected a call with gradients on, got one under {off}")


def _chain(f: Any) -> Chain | None:
    try:
        return chain_with_graph(f)
    except NotAChain:
        return None


class Source(Protocol):
    """What entries are differentiated in."""

    def tensors(self) -> list[Tensor]:
        """The tensors whose gradients are computed. A tensor may stand twice."""

    def kept(self) -> list[Tensor]:
        """Other tensors that must not change before the backward pass."""

    def gradients(self, gradient: Tensor) -> Sequence[Tensor | None]:
        """The gradients of ``(gradient * entries).sum()`` in `tensors`."""


class _Entries(torch.autograd.Function):
    """Gives entries that are computed already a graph to the tensors of a source."""

    @staticmethod
    def forward(ctx: Any, source: Source, entries: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.source = source
        ctx.save_for_backward(*tensors, *source.kept())
        return entries.pop()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved = ctx.saved_tensors  # raises if one of them was changed in place, or the graph was freed
        with torch.no_grad():
            found = ctx.source.gradients(gradient.detach())
        return None, None, *without_second(found, saved)


class _Mean(torch.autograd.Function):
    """Gives a number whose gradients are computed already a graph to the tensors of a source."""

    @staticmethod
    def forward(
        ctx: Any, value: list[Tensor], gradients: list[Tensor | None], source: Source, *tensors: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*tensors, *source.kept())
        return value.pop()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved = ctx.saved_tensors  # as in _Entries
        with torch.no_grad():
            found = [None if g is None else g * gradient.to(g.dtype) for g in ctx.gradients]
        return None, None, None, *without_second(found, saved)


class OfChain:
    """A chain, whose gradients a fused kernel computes.

    They are those in the tensors of the hoisted chain. Autograd goes on from there to the parameters and the samples.
    """

    def __init__(
        self, chain: Chain, x: Tensor, settings: Settings, pairs: tuple[Tensor, Tensor] | None
    ) -> None:
        self.x, self.settings, self.pairs = x.detach(), settings, pairs
        self.sources = [t for t in (x, *chain.weights, *chain.biases) if t is not None]
        if pairs is None:
            self.parts = hoisted_with_graph(chain, x)
        else:  # only the samples of these pairs
            used, places = torch.stack(pairs).unique(return_inverse=True)
            used = used.to(x.device)
            self.pairs, self.x = (places[0], places[1]), self.x[used]
            self.parts = hoisted_with_graph(chain, x[used])
        # The bias behind the last Linear changes nothing, and is no part of `parts`. Its gradient is 0.
        last = chain.biases[-1]
        self.unused = [last] if last is not None and all(last is not b for b in self.parts.biases) else []
        if not any(t.requires_grad for t in self.tensors()):
            raise RuntimeError(NO_GRAPH)

    def tensors(self) -> list[Tensor]:
        return [*self.unused, *(t for t in _of_parts(self.parts) if t is not None)]

    def kept(self) -> list[Tensor]:
        return self.sources

    def gradients(self, gradient: Tensor) -> list[Tensor | None]:
        return self._in_tensors(self._found(gradient))

    def run(self, entries: int, gradients: list[Tensor | None]) -> ChainConnectivity:
        """The connectivity, and into `gradients` those of the mean of 1 - r2 over that many entries."""
        found = self._found(self.x.new_full((len(self.x), len(self.x)), -1 / max(1, entries)))
        gradients.extend(self._in_tensors(found))
        given = found.entries

        def resolve() -> None:
            if int(given.counts[1]):
                resolve_in_float64(detached(self.parts), self.x, given, *self.settings.nodes, midpoint=None)

        return ChainConnectivity(given.L, given.counts, resolve, given.pooled)

    def _found(self, gradient: Tensor) -> Gradients:
        first, second = self.pairs or (None, None)
        return chain_gradients(
            self.parts, self.x, gradient, *self.settings.nodes, self.settings.statistic, first, second
        )

    def _in_tensors(self, found: Gradients) -> list[Tensor | None]:
        own = [found.z, *found.weights, *found.biases, *found.shifts]
        return [torch.zeros_like(bias) for bias in self.unused] + [
            g.to(t.dtype) if t.requires_grad and g is not None else None
            for t, g in zip(_of_parts(self.parts), own, strict=True)
            if t is not None
        ]


def _of_parts(parts: Hoisted) -> list[Tensor | None]:
    return [parts.z, *parts.weights, *parts.biases, *parts.shifts]


def mean_curvature(entries: Tensor) -> Tensor:
    """The mean of 1 - r2 over the pairs, 0-dim float64, from (N, N) or (pairs,)."""
    if entries.dim() == 1:
        return (1 - entries.double()).mean()
    return (1 - entries).sum(dtype=torch.float64) / (len(entries) * (len(entries) - 1))
