"""Gradients of a chain's connectivity, and those of the pairs that a kernel leaves unresolved: in float64, along the paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._chain import Activation
from .._r2_gradient import r2_gradient
from .._unresolved import Entries, outputs_on_paths
from ._hoisted import Hoisted


class Gradients(NamedTuple):
    """Gradients in the tensors of a `Hoisted`, float64, and the entries that the kernel made on the way."""

    z: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    """None for a bias that is None."""
    shifts: list[Tensor | None]
    entries: Entries
    """The entries of the connectivity, with UNRESOLVED where the kernel has left a pair. The gradients are complete all the
    same."""

    def through(self, parts: Hoisted, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The gradients in the leaves of a graph that ends in `parts`. Leaves that it does not reach have zeros."""
        pairs = [
            (parts.z, self.z),
            *zip(parts.weights, self.weights),
            *zip(parts.biases, self.biases),
            *zip(parts.shifts, self.shifts),
        ]
        ends = [(t, g.to(t.dtype)) for t, g in pairs if t is not None and g is not None and t.requires_grad]
        if not ends:
            return [torch.zeros_like(leaf) for leaf in leaves]
        # A tensor may stand twice: a weight that two layers share.
        tensors, gradients = zip(*ends)
        return list(
            torch.autograd.grad(tensors, leaves, gradients, materialize_grads=True, retain_graph=True)
        )


def add_unresolved(
    parts: Hoisted, x: Tensor, gradient: Tensor, nodes: Tensor, weights: Tensor, pooled: bool, into: Gradients
) -> None:
    """Adds the gradients of the unresolved pairs to `into`, computed in float64 along the paths themselves.

    Args:
        parts, x, gradient, nodes, weights: as in `chain_gradients`; parts without a graph.
        pooled: whether the gradient is of the pooled entries.
        into: the gradients, and the entries.
    """
    entries, leaves = into.entries, _Leaves(parts)
    width = max(parts.z.shape[1], *(len(w) for w in parts.weights), 1)
    most = max(1, 2 ** (18 if x.device.type == "cpu" else 22) // width // len(nodes))
    samples, inputs, on_device = parts.samples(), x.flatten(1), nodes.to(x.device)
    for at, first, second in entries.unresolved(most):
        own = gradient[at].double()
        if gradient.dim() == 2:
            own = own + gradient[second, first].double()
        where, y, rounding = outputs_on_paths(
            parts.values(), samples, first, second, on_device, entries.L.dtype, inputs
        )
        if len(where) == 0:
            continue
        delta = r2_gradient(y, nodes, weights, rounding, stabiliser=entries.stabiliser, pooled=pooled)
        with torch.enable_grad():
            t = on_device[:, None]
            ends = leaves.samples()
            points = torch.lerp(ends[first[where], None], ends[second[where], None], t).flatten(0, 1)
            again = leaves.outputs(points).unflatten(0, (len(where), len(nodes)))
        dead = (y == 0) & (again.detach() != 0)  # nothing but rounding
        delta = torch.where(dead, 0.0, delta * own[where, None, None])
        leaves.add(again, delta)
    leaves.write(into)


class _Leaves:
    """The tensors of a chain in float64, with their gradients."""

    def __init__(self, parts: Hoisted) -> None:
        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().double().clone().requires_grad_()

        self.z = parts.z.detach().double().clone().requires_grad_()
        self.weights = [w.detach().double().clone().requires_grad_() for w in parts.weights]
        self.biases, self.shifts = [leaf(b) for b in parts.biases], [leaf(s) for s in parts.shifts]
        self.activations, self.skips = parts.activations, parts.skips or [-1] * (2 * len(parts.activations))
        self.sums = [torch.zeros_like(each) for each in self._all()]

    def _all(self) -> list[Tensor]:
        return [self.z, *self.weights, *(t for t in (*self.biases, *self.shifts) if t is not None)]

    def samples(self) -> Tensor:
        """As `Hoisted.samples`."""
        return torch.cat([self.z, *(s for s in self.shifts if s is not None)], -1)

    def outputs(self, points: Tensor) -> Tensor:
        """The chain at rows of `samples`."""
        return values_of_parts(self, points)[-1]

    def add(self, y: Tensor, gradient: Tensor) -> None:
        """Adds the gradients of ``(gradient * y).sum()``."""
        every = self._all()
        for total, part in zip(self.sums, torch.autograd.grad(y, every, gradient, materialize_grads=True)):
            total += part

    def write(self, into: Gradients) -> None:
        """Adds the sums to `into`."""
        given = [into.z, *into.weights, *(t for t in (*into.biases, *into.shifts) if t is not None)]
        for total, part in zip(given, self.sums, strict=True):
            total += part


def values_of_parts(
    parts: Any,
    points: Tensor,
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
    pointwise: Callable[[Activation, Tensor], Tensor] = lambda activation, z: activation(z),
    with_last: bool = True,
) -> list[Tensor]:
    """All values of a chain at rows of `Hoisted.samples`, numbered as in `Chain.skips`. By default autograd follows.

    with_last: also those behind the last Linear.
    """
    widths = [parts.z.shape[1], *(s.shape[1] for s in parts.shifts if s is not None)]
    z, *moved = points.split(widths, 1)
    skips = parts.skips or [-1] * (2 * len(parts.activations))
    shifts = parts.shifts or [None] * len(skips)
    values: list[Tensor] = []
    for n, activation in enumerate(parts.activations):
        if n and n == len(parts.activations) - 1 and not with_last:
            break
        z = linear(z, parts.weights[n - 1], parts.biases[n - 1]) if n else z
        for into in (2 * n, 2 * n + 1):
            z = pointwise(activation, z) if into % 2 and activation.name != "identity" else z
            z = z + values[skips[into]] if skips[into] != -1 else z
            z = z + moved.pop(0) if shifts[into] is not None else z
            values.append(z)
    return values
