"""Along which dimension of each tensor the samples lie, found by calling a model on some of the samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ._nested import mapped, tensors_in

# Readings of the inputs that are tried for each dimension. A tensor has more than one reading only where several of its
# dimensions are as long as there are samples.
MOST_READINGS = 16

# The attribute in which a tail keeps its layout, if that is not the plain one.
LAYOUT = "_lmnfast_layout"


@dataclass(frozen=True)
class Layout:
    """Where the samples lie. inputs: for each tensor the dimension; None: the tensor is the same for every sample."""

    inputs: tuple[int | None, ...]
    layer: int = 0
    output: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the samples lie along the first dimension wherever there are any."""
        return not (self.layer or self.output or any(self.inputs))

    def rows_of(self, inputs: Any) -> int:
        """The number of samples."""
        return next(t.shape[d] for t, d in zip(tensors_in(inputs), self.inputs, strict=True) if d is not None)

    def selected(self, inputs: Any, rows: Tensor) -> Any:
        """The inputs of some samples, by their numbers."""
        dimensions = iter(self.inputs)

        def select(tensor: Tensor) -> Tensor:
            dimension = next(dimensions)
            return tensor if dimension is None else tensor.index_select(dimension, rows.to(tensor.device))

        return mapped(inputs, select)

    def with_rows(self, numbers: Sequence[int]) -> Layout:
        """Only these inputs, by number, belong to the samples. The others are the same for all of them."""
        return replace(self, inputs=tuple(d if n in numbers else None for n, d in enumerate(self.inputs)))

    def with_states(self, inputs: Any) -> Layout:
        """Also along the only other dimension of that length, as in a recurrent network's states (layers, samples, width)."""
        rows, read = self.rows_of(inputs), []
        for tensor, dimension in zip(tensors_in(inputs), self.inputs, strict=True):
            along = [d for d, length in enumerate(tensor.shape) if length == rows]
            read.append(along[0] if dimension is None and len(along) == 1 else dimension)
        return replace(self, inputs=tuple(read))


def plain_layout(inputs: Any, rows: int | None = None) -> Layout:
    """Samples along the first dimension of every tensor with so many rows. None: as many as the first tensor has."""
    tensors = list(tensors_in(inputs))
    rows = len(tensors[0]) if rows is None else rows
    return Layout(tuple(0 if t.ndim and len(t) == rows else None for t in tensors))


def layout_of(tail: nn.Module) -> Layout | None:
    """The layout with which a tail was cut; None for the plain one."""
    return getattr(tail, LAYOUT, None)


def check_batch_dim(batch_dim: int | None) -> None:
    """Raises TypeError or ValueError for a batch_dim that no layout can have."""
    if batch_dim is None:
        return
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int):
        raise TypeError(f"batch_dim: expected an integer or None, got {type(batch_dim).__name__}")
    if batch_dim < 0:
        raise ValueError(f"batch_dim: expected a dimension counted from 0 on, got {batch_dim}")


def find_layout(
    run: Callable[[Any], tuple[Any, Any]], inputs: Any, layer: Tensor, output: Tensor, batch_dim: int | None
) -> tuple[Layout | None, str]:
    """The layout with which the model gives some of the samples the same outputs; or None and why there is none.

    Args:
        run: calls the model on inputs; returns the layer's output and the model's.
        inputs: of the model.
        layer, output: run(inputs).
        batch_dim: the dimension that the user named. The samples may lie along another one in some of the tensors.
    """
    if batch_dim is not None and batch_dim >= max(t.ndim for t in (*tensors_in(inputs), layer, output)):
        return None, "no tensor of the inputs or the outputs has that many dimensions"
    dimensions = dict.fromkeys((0, 1) if batch_dim is None else (batch_dim, 0))
    reasons = []
    for dimension in dimensions:
        why = ""
        for reading in _readings(list(tensors_in(inputs)), dimension):
            rows = Layout(reading).rows_of(inputs)
            if rows not in layer.shape or rows not in output.shape:
                shapes = f"{tuple(layer.shape)} and the model's {tuple(output.shape)}"
                why = f"{rows} samples, and not in both the layer's output {shapes}"
                break
            found, why = _tried(run, inputs, layer, output, Layout(reading), rows)
            if found is not None:
                return found, ""
        if why:
            reasons.append(f"along dimension {dimension} of the inputs there are {why}")
    return None, "; ".join(reasons)


def _readings(tensors: Sequence[Tensor], dimension: int) -> Iterator[tuple[int | None, ...]]:
    """Dimensions of the samples in each tensor, if they lie along this dimension of the first. The likely ones come first."""
    first, *others = tensors
    if dimension >= first.ndim or first.shape[dimension] == 0:
        return
    rows = first.shape[dimension]
    options: list[list[int | None]] = [[dimension]]
    for other in others:
        along = [d for d, length in enumerate(other.shape) if length == rows]
        options.append([*sorted(along, key=lambda d: (d != dimension, d)), None])
    yield from itertools.islice(itertools.product(*options), MOST_READINGS)


def _tried(
    run: Callable[[Any], tuple[Any, Any]],
    inputs: Any,
    layer: Tensor,
    output: Tensor,
    reading: Layout,
    rows: int,
) -> tuple[Layout | None, str]:
    """The layout if the model, on other samples, gives other lengths along one dimension and the same values; else why not."""
    last = rows - 1
    chosen = torch.arange(last, 0, -1) if rows > 2 else torch.tensor([last, 0, last])
    said = f"{rows} samples; called on {len(chosen)} of them the model"
    try:
        part, result = run(reading.selected(inputs, chosen))
    except Exception as error:
        return None, f"{said} fails ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
    if not isinstance(part, Tensor) or not isinstance(result, Tensor):
        return None, f"{said} gives no tensors"
    along = [_changed(whole, some, rows, len(chosen)) for whole, some in ((layer, part), (output, result))]
    if along[0] is None or along[1] is None:
        return None, f"{said} gives shapes {tuple(part.shape)} and {tuple(result.shape)}"
    if not _same(output.index_select(along[1], chosen.to(output.device)), result):
        return None, f"{said} gives them other outputs: they depend on each other, or the model is random"
    return Layout(reading.inputs, along[0], along[1]), ""


def _changed(whole: Tensor, some: Tensor, rows: int, fewer: int) -> int | None:
    """The only dimension in which two results differ, if it has one row per sample in both."""
    if whole.ndim != some.ndim:
        return None
    pairs = list(zip(whole.shape, some.shape, strict=True))
    changed = [d for d, (a, b) in enumerate(pairs) if a != b]
    return changed[0] if len(changed) == 1 and pairs[changed[0]] == (rows, fewer) else None


def _same(expected: Tensor, result: Tensor) -> bool:
    """Whether outputs are equal but for rounding, which differs with the size of a batch; see `takes_any_rows`."""
    if not expected.numel():
        return result.shape == expected.shape
    largest = torch.where(expected.isfinite(), expected.abs(), 0).amax()
    return torch.allclose(result, expected, rtol=0, atol=1e-3 * float(largest), equal_nan=True)
