"""``lmnfast::path_connectivity_backward``: gradients of a chain's linear connectivity, fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from .._chain import Chain
from .._native import plain
from .._r2_gradient import LEAST_DISTANCE, of_distant_pairs
from .._settings import Statistic
from .._unresolved import UNRESOLVED, Entries, ListEntries
from ._by_reference import parts_of_arguments
from ._checks import check_tensor
from ._gradients import Gradients, add_unresolved, values_of_parts
from ._hoisted import Hoisted, hoisted, slopes_behind
from .path_connectivity import check_arguments, native_call


def path_connectivity_backward(
    chain: Chain,
    x: Tensor,
    gradient: Tensor,
    nodes: Tensor,
    weights: Tensor,
    *,
    stabiliser: float = 0.0,
    pooled: bool = False,
) -> list[Tensor]:
    """``reference.path_connectivity_backward`` of a chain, in its samples, weights and biases, fused.

    No path is stored: the outputs along the paths are computed again, and with them the gradients go back through the layers.
    The chord of every layer is split off, so that what is summed over nodes is the residual from it. Sums over pairs are in the
    samples' dtype within a task, of at most 64 first samples and a vector of second ones, and in float64 between tasks. Their
    order is fixed, so the kernel's bits are the same for any thread count. Pairs that float32 cannot resolve are differentiated
    in float64, as `path_connectivity` measures them. The gradient of an output that is constant to rounding is 0; at a kink of
    an activation it is PyTorch's. Samples so close that rounding would be the larger part of their pair's gradient have
    0: at a relative distance of 2^-14 in float32, 2^-22 in float64.

    Args:
        chain: weights on the samples' device, of their dtype.
        x: (N, D), or (N, *in) where the chain flattens.
        gradient: (N, N), for every entry of the connectivity: entries (i, j) and (j, i) are both meant.
        nodes, weights: (nodes,) float64, as :func:`lmnfast.quadrature.path_nodes` returns them.
        stabiliser, pooled: as in :func:`lmnfast.connectivity`.

    Returns:
        The gradients in x, in each weight, and in each bias that is not None, of their shapes and dtypes.

    Raises:
        TypeError, ValueError, RuntimeError: as `path_connectivity`. ValueError also for a gradient of another shape.

    Source:
        docs/mathematics.md, "The gradient".

    Example:
        >>> chain = lmnfast.ops.recognise(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3)))
        >>> rule = lmnfast.quadrature.path_nodes("uniform", 21)
        >>> x = torch.randn(50, 8)
        >>> [tuple(g.shape) for g in lmnfast.ops.path_connectivity_backward(chain, x, torch.ones(50, 50), *rule)]
        [(50, 8), (16, 8), (3, 16), (16,), (3,)]
    """
    tensors = [x, *chain.weights, *(b for b in chain.biases if b is not None)]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    rest = iter(leaves[1 + len(chain.weights) :])
    biases = tuple(None if b is None else next(rest) for b in chain.biases)
    own = replace(chain, weights=tuple(leaves[1 : 1 + len(chain.weights)]), biases=biases)
    with torch.enable_grad():
        parts = hoisted_with_graph(own, leaves[0])
    found = chain_gradients(parts, x, gradient, nodes, weights, Statistic(stabiliser, pooled))
    return found.through(parts, leaves)


def hoisted_with_graph(chain: Chain, x: Tensor) -> Hoisted:
    """`hoisted` with torch's products, so that autograd follows from the chain's tensors and x to the parts."""
    return hoisted(chain, x, linear=_linear_in_double)


def _linear_in_double(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def chain_gradients(
    parts: Hoisted,
    x: Tensor,
    gradient: Tensor,
    nodes: Tensor,
    weights: Tensor,
    statistic: Statistic,
    first: Tensor | None = None,
    second: Tensor | None = None,
) -> Gradients:
    """The gradients of ``(gradient * L).sum()`` in the tensors of `parts`, complete.

    Args:
        parts: the chain and its samples.
        x: (N, *in), the samples that `parts` were made from. Equal rows are the same sample.
        gradient: (N, N) or (pairs,).
        nodes, weights: the rule.
        statistic: `pooled` says which of the two matrices is meant.
        first, second: (pairs,) int64, a list of pairs, on the CPU; None: all pairs.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    plain_parts = detached(parts)
    samples = plain_parts.samples().to(dtype)
    by_kernel = of_distant_pairs(gradient, samples, LEAST_DISTANCE[dtype], first, second)
    at_once: dict[str, Any] = {**statistic._asdict(), "first": first, "second": second}
    arguments = *plain_parts.arguments(dtype), nodes, weights, by_kernel.to(dtype)
    L, pooled, counts, z, own_weights, biases, shifts = torch.ops.lmnfast.path_connectivity_backward(
        *arguments, **at_once
    )
    have_bias = iter(biases)
    have_shift = iter(shifts)
    found = Gradients(
        z,
        own_weights,
        [None if b is None else next(have_bias) for b in parts.biases],
        [None if s is None else next(have_shift) for s in parts.shifts],
        _entries(L, pooled if statistic.pooled else None, counts, statistic.stabiliser, first, second),
    )
    if int(counts[1]):
        gradient = of_distant_pairs(gradient, samples, LEAST_DISTANCE[torch.float64], first, second)
        add_unresolved(plain_parts, x, gradient, nodes, weights, statistic.pooled, found)
    return found


def detached(parts: Hoisted) -> Hoisted:
    """The parts without their graph."""
    return replace(
        parts,
        z=parts.z.detach(),
        weights=[w.detach() for w in parts.weights],
        biases=[None if b is None else b.detach() for b in parts.biases],
        shifts=[None if s is None else s.detach() for s in parts.shifts],
    )


def _entries(
    L: Tensor,
    pooled: Tensor | None,
    counts: Tensor,
    stabiliser: float,
    first: Tensor | None,
    second: Tensor | None,
) -> Entries:
    if first is None or second is None:
        return Entries(L, pooled, counts, stabiliser)
    return ListEntries(L, pooled, counts, stabiliser, first=first, second=second)


# ---- the registered op ----


torch.library.define(
    "lmnfast::path_connectivity_backward",
    "(Tensor z, Tensor[] weights, Tensor?[] biases, int[] activations, float[] parameters, int[] skips, Tensor?[] shifts, "
    "Tensor nodes, Tensor node_weights, Tensor gradient, float stabiliser=0.0, bool pooled=False, Tensor? first=None, "
    "Tensor? second=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[], Tensor[])",
)

Results = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]


@dataclass(frozen=True, eq=False)
class _Raw:
    """The kernel's results, all float64, see PathConnectivityBackward in csrc/ops.h."""

    products: Tensor
    sums: Tensor
    ends: Tensor
    widths: list[int]
    summed: list[int]
    """The numbers of the values that `sums` is of."""

    @classmethod
    def empty(cls, parts: Hoisted) -> _Raw:
        widths = [parts.z.shape[1], *(len(w) for w in parts.weights)]
        summed = [
            v for v in range(2 * len(widths)) if v % 2 == 0 or (parts.shifts and parts.shifts[v] is not None)
        ]
        rows = len(parts.z)

        def numbers(count: int) -> Tensor:
            return parts.z.new_empty(count)

        return cls(
            numbers(sum(w.numel() for w in parts.weights)),
            numbers(rows * sum(widths[v // 2] for v in summed)),
            numbers(rows * widths[-1]).view(rows, -1),
            widths,
            summed,
        )

    def products_of(self) -> list[Tensor]:
        """(outputs, inputs), for each weight."""
        shapes = list(zip(self.widths[1:], self.widths))
        each = self.products.split([rows * columns for rows, columns in shapes])
        return [product.view(shape) for product, shape in zip(each, shapes)]

    def gradients(self, parts: Hoisted) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Those in z, weights, biases and shifts, of complete results. An op's results may not share their memory, so all but
        the first of those that lie in one tensor are copies."""
        sums, products = self.sums_of(), self.products_of()
        biases = [sums[2 * n + 2].sum(0) for n, bias in enumerate(parts.biases) if bias is not None]
        shifts = [sums[v].clone() for v, shift in enumerate(parts.shifts) if shift is not None]
        return sums[0], [*products[:1], *(product.clone() for product in products[1:])], biases, shifts

    def sums_of(self) -> dict[int, Tensor]:
        """(samples, width), by the value's number."""
        rows = len(self.ends)
        each = self.sums.split([rows * self.widths[v // 2] for v in self.summed])
        return {v: part.view(rows, -1) for v, part in zip(self.summed, each)}


@torch.library.impl("lmnfast::path_connectivity_backward", "default")
def _path_connectivity_backward(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Sequence[float],
    skips: Sequence[int],
    shifts: Sequence[Tensor | None],
    nodes: Tensor,
    node_weights: Tensor,
    gradient: Tensor,
    stabiliser: float = 0.0,
    pooled: bool = False,
    first: Tensor | None = None,
    second: Tensor | None = None,
) -> Results:
    chain = z, weights, biases, activations, parameters, skips, shifts
    widths = check_arguments(*chain, nodes, node_weights, stabiliser=stabiliser, first=first, second=second)
    shape = _check_gradient(z, gradient, first)
    parts = parts_of_arguments(*chain)
    counts = torch.zeros(2, dtype=torch.int64, device=z.device)
    L, pool = _native.empty(z, *shape), _native.empty(z, *(shape if pooled else (0,)))
    raw = _Raw.empty(parts)
    if _native.HAS_CORE and L.numel():
        gradient = plain(gradient)
        more = (_native.address(gradient),)
        made = _native._C.PathConnectivityBackward
        rule = nodes, node_weights
        call, kept = native_call(made, chain, widths, rule, stabiliser, pooled, first, second, more=more)
        _native.run(call, L, pool if pooled else None, counts, raw.products, raw.sums, raw.ends)
        del kept
        if _native.on_cuda(z):
            _complete(parts, raw)
    else:  # every pair is left unresolved
        for results in (raw.products, raw.sums):
            results.zero_()
        for entries in (L, pool):
            entries.fill_(UNRESOLVED)
            if first is None and entries.numel():
                entries.fill_diagonal_(1)
        counts[1] = (L == UNRESOLVED).sum() // (2 if first is None else 1)
    return L, pool, counts, *raw.gradients(parts)


def _check_gradient(z: Tensor, gradient: Tensor, first: Tensor | None) -> tuple[int, ...]:
    """Raises TypeError or ValueError for a gradient that does not fit; returns its shape."""
    check_tensor("gradient", gradient, (z.dtype,), z.device)
    if z.dim() != 2:
        raise ValueError(f"z: expected (samples, D), got shape {tuple(z.shape)}")
    shape = (len(z), len(z)) if first is None else tuple(first.shape)
    if gradient.shape != shape:
        raise ValueError(f"gradient: expected {shape}, got shape {tuple(gradient.shape)}")
    return shape


def _complete(parts: Hoisted, raw: _Raw) -> None:
    """Adds to the results of the CUDA kernels what depends on a sample alone, as the CPU kernel does.

    The adjoints at the samples themselves (`ends`) go back through the layers. At an interior node a value is its chord plus a
    residual. The chord's part of a weight's gradient is the sum of the adjoints that belong to a sample, times the value there.
    """
    weights = [w.double() for w in parts.weights]
    wide = replace(parts, weights=weights, biases=[None if b is None else b.double() for b in parts.biases])
    ends_linear = parts.activations[-1].name == "identity"
    with torch.no_grad():
        values = values_of_parts(wide, parts.samples(), _native.linear, _pointwise, with_last=not ends_linear)
    products, sums, last = raw.products_of(), raw.sums_of(), len(parts.activations) - 1
    skips, shifts = parts.skips or [-1] * (2 * last + 2), parts.shifts or [None] * (2 * last + 2)
    later: dict[int, Tensor] = {}  # by the value's number, adjoints of values to which it is added

    def arrived(value: int, adjoint: Tensor) -> Tensor:
        adjoint = adjoint + later[value] if value in later else adjoint
        if skips[value] != -1:
            source = skips[value]
            later[source] = later[source] + adjoint if source in later else adjoint
        if value in sums:
            sums[value] += adjoint
        return adjoint

    adjoint = raw.ends
    for layer in range(last, -1, -1):
        activation = parts.activations[layer]
        if activation.name != "identity":
            adjoint = arrived(2 * layer + 1, adjoint)
            before, behind = values[2 * layer], values[2 * layer + 1]
            if skips[2 * layer + 1] != -1 or shifts[2 * layer + 1] is not None:
                behind = _pointwise(activation, before)  # without what is added
            adjoint = slopes_behind(activation, adjoint, before, behind, _pointwise)
        adjoint = arrived(2 * layer, adjoint)
        if layer == 0:
            break
        products[layer - 1] += _product(sums[2 * layer].T, values[2 * layer - 1])
        adjoint = _product(adjoint, weights[layer - 1])


def _pointwise(function: Callable[..., Tensor], *z: Tensor) -> Tensor:
    """`_native.pointwise`, which takes longer than the function of few numbers. These torch does not split."""
    return function(*z) if z[0].numel() < _native.SERIAL else _native.pointwise(function, *z)


def _product(first: Tensor, second: Tensor) -> Tensor:
    """``first @ second`` in float64, with the same bits for any thread count."""
    return _native.linear(first, second.T, None)


@torch.library.register_fake("lmnfast::path_connectivity_backward")
def _(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Sequence[float],
    skips: Sequence[int],
    shifts: Sequence[Tensor | None],
    nodes: Tensor,
    node_weights: Tensor,
    gradient: Tensor,
    stabiliser: float = 0.0,
    pooled: bool = False,
    first: Tensor | None = None,
    second: Tensor | None = None,
) -> Results:
    chain = z, weights, biases, activations, parameters, skips, shifts
    check_arguments(*chain, nodes, node_weights, stabiliser=stabiliser, first=first, second=second, fake=True)
    shape = _check_gradient(z, gradient, first)

    def as_double(tensors: Sequence[Tensor | None]) -> list[Tensor]:
        return [t.new_empty(t.shape, dtype=torch.float64) for t in tensors if t is not None]

    counts = z.new_empty(2, dtype=torch.int64)
    pool = z.new_empty(shape if pooled else (0,))
    return (
        z.new_empty(shape),
        pool,
        counts,
        z.new_empty(z.shape, dtype=torch.float64),
        as_double(weights),
        as_double(biases),
        as_double(shifts),
    )
