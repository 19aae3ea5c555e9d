"""Gradients of the connectivity of any function, by calls on tiles of path points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._generic import mark_near_pairs, numbered
from ._outputs import Calls, original_of, outputs_of, rows_again, widened
from ._r2_gradient import LEAST_DISTANCE, of_distant_pairs, r2_gradient
from ._settings import Settings
from ._tiles import bytes_of, tile_bytes
from ._undisturbed import Kept, evaluating
from ._unresolved import UNRESOLVED, InDouble, ListEntries, Widened, _between, _by_mode, outputs_on_paths

# Bytes that the statistics of an output at a point take in float64, with the closed form's temporaries.
STATISTICS = 8 * 8

AT_ONCE = 64  # samples in a call that looks for the tensors behind f

NO_GRAPH = (
    "differentiable: there is no graph, as x does not require grad and f's outputs do not depend on a tensor that does; "
    "expected parameters or samples that require grad, and an f without detach and no_grad around them"
)


class Recomputed:
    """A function whose outputs along the paths are computed again in the backward pass, tile by tile.

    f: (B, *in) -> (B, *out). x: (N, *in), checked, with its graph. pairs: as in `with_graph`.

    Raises RuntimeError if neither x nor a tensor behind f requires grad.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        x: Tensor,
        settings: Settings,
        pairs: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.f = original_of(f)  # derivatives are not compiled
        self.settings, self.pairs, self.of_x = settings, pairs, x
        self.x = x.detach()
        kind = x.device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        leaves: dict[int, Tensor] = {}
        differentiable, ends = False, []
        with evaluating(self.f) as kept, torch.enable_grad(), self._as_before():
            kept.trained = True
            for y in self._outputs(kept):  # all samples: some of them may reach other parameters
                leaves.update((id(leaf), leaf) for leaf in _leaves_behind(y))
                differentiable |= y.requires_grad
                ends.append(y.detach().clone())
        self.leaves, self.ends = list(leaves.values()), torch.cat(ends)
        if not (x.requires_grad or self.leaves):
            raise RuntimeError(NO_GRAPH)
        if wrong := [leaf for leaf in self.leaves if not leaf.is_floating_point()]:
            raise TypeError(
                f"differentiable: expected real parameters, got a tensor of {wrong[0].dtype} behind f"
            )
        if not differentiable:
            raise RuntimeError(
                "differentiable: f's outputs have no grad_fn, though x requires grad; expected an f that autograd can "
                "differentiate, without detach, no_grad and numpy"
            )

    def tensors(self) -> list[Tensor]:
        return [self.of_x, *self.leaves]

    def kept(self) -> list[Tensor]:
        return []

    def gradients(self, gradient: Tensor) -> list[Tensor | None]:
        gradient = of_distant_pairs(
            gradient, self.x, LEAST_DISTANCE[torch.float64], *(e.to(self.x.device) for e in self.pairs or ())
        )
        with evaluating(self.f) as kept, self._as_before(), _without_hooks(self.leaves):
            kept.trained = True
            self._check_unchanged(kept)
            sums = _Sums(self, Calls(self.f, kept.put_back), gradient)
            sums.add_all()
        found = [sums.of_x.to(self.x.dtype) if self.of_x.requires_grad else None]
        return found + [total.to(leaf.dtype) for total, leaf in zip(sums.of_leaves, self.leaves)]

    def _outputs(self, kept: Kept) -> Iterator[Tensor]:
        """f's outputs on all samples, some at a time; every call behaves like the first."""
        f = Calls(self.f, kept.put_back)
        for rows in self.x.split(AT_ONCE):
            yield outputs_of(f, rows.clone().requires_grad_(self.of_x.requires_grad))

    def _check_unchanged(self, kept: Kept) -> None:
        """Raises RuntimeError if f has other outputs on the samples than it had when it was measured."""
        with torch.no_grad():
            now = torch.cat([y.detach().clone() for y in self._outputs(kept)])
        size = self.ends.abs().double()
        rounding = 256 * torch.finfo(self.ends.dtype).eps * (size + size.amax(0))
        if now.shape != self.ends.shape or ((now.double() - self.ends.double()).abs() > rounding).any():
            raise RuntimeError(
                "differentiable: f has other outputs in the backward pass than when it was measured; expected an f that does "
                "not change before backward(). A forward pass in training mode changes the running statistics of BatchNorm: "
                "run it before the measurement"
            )

    def _as_before(self) -> AbstractContextManager[Any]:
        enabled, dtype = self.autocast
        return torch.autocast(self.x.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)


def _leaves_behind(y: Tensor) -> list[Tensor]:
    """The leaf tensors that require grad in the graph of y, in the order of a walk over it. y's own input is left out."""
    leaves: dict[int, Tensor] = {}
    todo, seen = [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        todo += [following for following, _ in node.next_functions]
    return list(leaves.values())


@contextmanager
def _without_hooks(leaves: list[Tensor]) -> Iterator[None]:
    """Takes away the hooks of leaves meanwhile: they are to see the whole gradient, and not its parts."""
    kept = [(leaf._backward_hooks, dict(leaf._backward_hooks)) for leaf in leaves if leaf._backward_hooks]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in kept:
            hooks.update(entries)


class _Sums:
    """The sums of a backward pass, in float64, in an order that depends on the sizes alone."""

    def __init__(self, given: Recomputed, f: Calls, gradient: Tensor) -> None:
        self.f, self.x, self.leaves, self.settings = f, given.x, given.leaves, given.settings
        self.pairs, self.gradient, self.own_ends = given.pairs, gradient, given.ends
        self.x_counts = given.of_x.requires_grad
        self.nodes, self.weights = given.settings.nodes
        self.t = self.nodes.to(self.x.device)
        self.of_x = torch.zeros(
            self.x.shape if self.x_counts else (0,), dtype=torch.float64, device=self.x.device
        )
        self.of_leaves = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in self.leaves]

    def add_all(self) -> None:
        x, f = self.x, self.f
        with torch.no_grad():
            _, allocated = bytes_of(f, x, rows_again(len(x))[1], differentiated=True)
            self.wide = Widened(f, x, self.own_ends)
        ends = self.own_ends
        self.ends = widened(ends)
        self.of_ends = torch.zeros(ends.shape, dtype=torch.float64, device=x.device)
        tile = tile_bytes(self.settings.budget, x.device, differentiated=True)
        # A backward pass keeps the results of f, and makes a gradient for each.
        a_point = 2 * allocated // len(x) + 2 * x[0].nbytes + STATISTICS * ends.shape[1]
        self.points = max(1, tile // a_point)
        most = max(1, self.points // (len(self.nodes) - 2))
        for at, first, second in self._tiles(most):
            self._add(first, second, self._weight(at, first, second))
        for start in range(0, len(x), self.points):
            rows = slice(start, start + self.points)
            add = self.of_x[rows].add_ if self.x_counts else None
            self._back(x[rows], self.of_ends[rows], add)

    def _tiles(self, most: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The pairs, some at a time, each with its number in the list or among all pairs i < j."""
        if self.pairs is not None:
            first, second = (ends.to(self.x.device) for ends in self.pairs)
            for at in torch.arange(len(first), device=self.x.device).split(most):
                yield at, first[at], second[at]
            return
        every = len(self.x) * (len(self.x) - 1) // 2
        for start in range(0, every, most):
            at = torch.arange(start, min(start + most, every), device=self.x.device)
            yield at, *numbered(at, len(self.x))

    def _weight(self, at: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The gradient of the pairs' entries, (pairs,) float64."""
        g = self.gradient
        if g.dim() == 1:
            return g[at].double()
        return g[first, second].double() + g[second, first].double()

    def _add(self, first: Tensor, second: Tensor, weight: Tensor) -> None:
        """Adds what some pairs give."""
        x, inner = self.x, self.t[1:-1]
        left = self._near(first, second)
        points = torch.lerp(x[first, None], x[second, None], inner.to(x).reshape(-1, *[1] * (x.dim() - 1)))
        with self._tracked(points.flatten(0, 1)) as (own, y):
            at = widened(y.detach()).unflatten(0, (len(first), len(inner)))
            statistic = self.settings.statistic
            rule = self.nodes, self.weights
            r2, _, _ = torch.ops.lmnfast.path_r2(
                at, self.ends, first, second, *rule, self.wide.rounding, *statistic
            )
            left |= r2 == UNRESOLVED
            whole = torch.cat([self.ends[first, None], at, self.ends[second, None]], 1)
            rounding = (
                torch.finfo(at.dtype).eps * torch.maximum(whole[:, 0].abs(), whole[:, -1].abs()).double()
            )
            delta = self._delta(whole.double(), rounding)
            delta = torch.where(left[:, None, None], 0.0, delta) * weight[:, None, None]
            self.of_ends.index_put_((first,), delta[:, 0], accumulate=True)
            self.of_ends.index_put_((second,), delta[:, -1], accumulate=True)
            self._back_from(own, y, delta[:, 1:-1].flatten(0, 1), partial(self._spread, first, second, inner))
        if bool(left.any()):
            self._add_in_double(first[left], second[left], weight[left])

    def _delta(self, y: Tensor, rounding: Tensor) -> Tensor:
        """The gradient of r2 in the outputs along paths (pairs, nodes, K) float64."""
        stabiliser, pooled = self.settings.statistic
        return r2_gradient(y, self.nodes, self.weights, rounding, stabiliser=stabiliser, pooled=pooled)

    def _near(self, first: Tensor, second: Tensor) -> Tensor:
        """Which pairs are of samples that are close, but not equal: these are measured in float64."""
        empty = torch.zeros(len(first), device=self.x.device)
        counts = torch.zeros(2, dtype=torch.int64, device=self.x.device)
        entries = ListEntries(empty, None, counts, first=first, second=second)
        mark_near_pairs(self.x, entries)
        return empty == UNRESOLVED

    def _add_in_double(self, first: Tensor, second: Tensor, weight: Tensor) -> None:
        """`_add` of pairs that the samples' dtype does not resolve. Without float64 there is no gradient of these."""
        x = self.x
        is_double = x.dtype == torch.float64
        with torch.no_grad():
            if not (is_double or self.wide.is_exact):
                return
            values, noise = self.wide.values(), self.wide.noise()
        most = max(1, self.points // (4 * len(self.nodes)))
        for pair in torch.arange(len(first), device=x.device).split(most):
            i, j = first[pair], second[pair]
            with torch.no_grad():
                found = outputs_on_paths(values, x, i, j, self.t, self.ends.dtype, x, noise=noise)
            where, y, rounding = found
            if len(where) == 0:
                continue
            delta = self._delta(y, rounding)
            delta = delta * weight[pair][where, None, None]
            i, j = i[where], j[where]
            t = self.t.reshape(-1, *[1] * (x.dim() - 1))
            points = _between(x[i, None].double(), x[j, None].double(), t).flatten(0, 1)
            f = self.f if is_double else _InDouble(self.f)
            with self._tracked(points, f) as (own, again):
                if again.dtype == torch.float64:
                    self._back_from(own, again, delta.flatten(0, 1), partial(self._spread, i, j, self.t))

    def _spread(self, first: Tensor, second: Tensor, t: Tensor, gradient: Tensor) -> None:
        """Adds the gradient in path points to that in the samples. gradient: (pairs * nodes, *in) float64."""
        gradient = gradient.unflatten(0, (len(first), len(t)))
        shares = t.reshape(-1, *[1] * (gradient.dim() - 2))
        self.of_x.index_put_((first,), (gradient * (1 - shares)).sum(1), accumulate=True)
        self.of_x.index_put_((second,), (gradient * shares).sum(1), accumulate=True)

    def _back(self, points: Tensor, gradient: Tensor, add: Callable[[Tensor], Any] | None) -> None:
        with self._tracked(points) as (own, y):
            self._back_from(own, y, gradient, add)

    @contextmanager
    def _tracked(
        self, points: Tensor, f: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Points (B, *in) and f's outputs there (B, K), with a graph."""
        points = points.detach().requires_grad_(self.x_counts)
        with torch.enable_grad():
            y = outputs_of(f or self.f, points.clone())  # f may work in place
        yield points, y

    def _back_from(
        self, points: Tensor, y: Tensor, gradient: Tensor, add: Callable[[Tensor], Any] | None
    ) -> None:
        """Adds the gradients of ``(gradient * y).sum()``. add: takes the gradient in the points."""
        sources = [*([points] if self.x_counts else []), *self.leaves]
        # What a closure has computed before keeps its graph.
        # The gradient in outputs of 1e-38 would be infinite in float32. A power of two brings it to the order of 1.
        largest = gradient.abs().amax() if gradient.numel() else gradient.new_zeros(())
        scale = torch.exp2(-torch.frexp(torch.where(largest > 0, largest, 1.0)).exponent.double())
        scaled = (gradient * scale).to(y.dtype)
        found = torch.autograd.grad(y, sources, scaled, retain_graph=True, allow_unused=True)
        if add is not None and self.x_counts and found[0] is not None:
            add(found[0].double() / scale)
        for total, part in zip(self.of_leaves, found[self.x_counts :]):
            if part is not None:
                total += part.double() / scale


class _InDouble:
    """f in float64, with its graph."""

    def __init__(self, f: Calls) -> None:
        self._f = f

    def __call__(self, points: Tensor) -> Tensor:
        return _by_mode(InDouble(), self._f, points)
