"""``path_connectivity`` and ``hermite_connectivity`` in an install without the compiled core: all of it in float64.

Every pair is measured as a pair that a kernel has left unresolved, by the reference and in tiles of bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._chain import ACTIVATIONS, Activation
from .._settings import Statistic
from .._unresolved import UNRESOLVED, Entries, ListEntries, resolve
from ._hoisted import Hoisted


@dataclass(frozen=True, eq=False)
class _Reported(Entries):
    """All pairs, whose share that is done is reported."""

    def unresolved(self, most: int) -> Iterator[tuple[Any, Tensor, Tensor]]:
        done, every = 0, len(self.L) * (len(self.L) - 1) // 2
        for at, first, second in super().unresolved(most):
            yield at, first, second
            done += len(first)
            _native.report(done / every)


def by_reference(
    parts: Hoisted,
    inputs: Tensor,
    dtype: torch.dtype,
    nodes: Tensor,
    weights: Tensor,
    midpoint: bool | None,
    statistic: Statistic,
    first: Tensor | None = None,
    second: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """L, counts and pooled, as the registered ops return them, without an unresolved pair.

    Args:
        parts: the chain and its samples, of one network or of several.
        inputs: (N, *), the tensor that the samples were computed from, with as many networks in front as `parts`.
        dtype: of the results. Its machine epsilon determines which outputs are constant.
        nodes, weights, midpoint, statistic, first, second: as in `path_connectivity.run`.
    """
    how = dtype, nodes, weights, midpoint, statistic
    if parts.z.dim() == 3:
        each = [by_reference(parts.of_network(n), inputs[n], *how) for n in range(len(inputs))]
        L, counts, pooled = (torch.stack(values) for values in zip(*each))
        return L, counts, pooled if statistic.pooled else pooled.flatten()
    samples, on = len(parts.z), parts.z.device
    shape = (samples, samples) if first is None else first.shape
    L = torch.full(shape, UNRESOLVED, dtype=dtype, device=on)
    if first is None:
        L.fill_diagonal_(1)
    pooled = L.clone() if statistic.pooled else L.new_empty(0)
    counts = torch.tensor([0, int((L == UNRESOLVED).sum())], device=on)
    given = L, pooled if statistic.pooled else None, counts, statistic.stabiliser
    if first is None or second is None:
        entries: Entries = _Reported(*given)
    else:
        entries = ListEntries(*given, first=first, second=second)
    with torch.no_grad():
        resolve_in_float64(parts, inputs, entries, nodes, weights, midpoint)
    return L, counts, pooled


def resolve_in_float64(
    parts: Hoisted, inputs: Tensor, entries: Entries, nodes: Tensor, weights: Tensor, midpoint: bool | None
) -> None:
    """`resolve` for a chain. inputs: as in `by_reference`."""
    width = max(parts.z.shape[1], *(len(w) for w in parts.weights), 1)
    # On the CPU a layer's values (2 MB) stay in the cache. On CUDA 16 times as many values cost the same per call.
    values = 2**18 if inputs.device.type == "cpu" else 2**22
    resolve(
        parts.values(),
        parts.samples(),
        entries,
        nodes,
        weights,
        points=values // width,
        midpoint=midpoint,
        inputs=inputs.flatten(1),
    )


def parts_of_arguments(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    parameters: Sequence[float],
    skips: Sequence[int],
    shifts: Sequence[Tensor | None],
) -> Hoisted:
    """The chain behind the arguments of the registered ops; the inverse of `Hoisted.arguments`."""
    return Hoisted(
        z.double(),
        list(weights),
        list(biases),
        [Activation(ACTIVATIONS[code], *parameters[2 * n : 2 * n + 2]) for n, code in enumerate(activations)],
        list(skips),
        [None if s is None else s.double() for s in shifts],
    )
