"""Writes down the calls of torch's functions while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ._nested import entries_of

# Rows of the two runs. Not 1, as code may treat one row in another way.
ROWS = (2, 3)

# Methods that give Python code facts of a tensor that do not depend on its values.
FACTS = {
    *(
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "element_size",
        "__len__",
        "get_device",
    ),
    *(
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "is_same_size",
        "is_inference",
        "__hash__",
    ),
}

# Attributes of tensors of the same kind.
ATTRIBUTES = {
    *(
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "requires_grad",
        "is_cuda",
        "is_cpu",
        "is_mps",
        "is_meta",
        "is_sparse",
    ),
    *(
        "is_quantized",
        "is_nested",
        "is_leaf",
        "grad_fn",
        "grad",
        "itemsize",
        "nbytes",
        "_version",
        "names",
        "is_mkldnn",
    ),
}

# Functions whose result has as many rows as values say. Python code could read these numbers.
SHAPED_BY_VALUES = {
    *(
        "nonzero",
        "nonzero_static",
        "argwhere",
        "masked_select",
        "unique",
        "unique_consecutive",
        "_unique2",
        "combinations",
    ),
    *("bincount", "histogram"),
}

# Functions that take sizes, behind the tensor that they work on, and functions that take nothing else. A tensor among the sizes
# decides a shape.
SIZED = {
    *(
        "view",
        "reshape",
        "expand",
        "repeat",
        "tile",
        "narrow",
        "split",
        "split_with_sizes",
        "tensor_split",
        "chunk",
    ),
    *("unflatten", "unfold", "resize_", "broadcast_to", "hsplit", "vsplit", "dsplit", "as_strided"),
    *("new_zeros", "new_ones", "new_empty", "new_full"),
}
FACTORIES = {
    *("arange", "range", "linspace", "logspace", "eye", "zeros", "ones", "empty", "full", "rand", "randn"),
}

DIFFERENT = "the model runs differently on two samples and on three"


class NotTaped(Exception):
    """The tape has no graph for a model. The message can follow "as"."""


@dataclass(frozen=True)
class Value:
    """A tensor in the arguments of a call. number: in the order in which the tensors of a run appear."""

    number: int


@dataclass(frozen=True)
class Rows:
    """An integer in the arguments of a call that follows the number of rows: each * rows + more."""

    each: int
    more: int


@dataclass
class Step:
    """A call of a function of torch."""

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    results: list[tuple[list, int]] = field(default_factory=list)
    """Keys that lead to each tensor in the result, and the number of its value."""
    writes: list[int] = field(default_factory=list)
    """The values that the call has written into."""
    grad: bool = True
    """Whether gradients were recorded."""

    @property
    def taken(self) -> set[int]:
        """The values in the arguments."""
        return {value.number for value in values_in((self.args, self.kwargs))}


class Unseen(TorchDispatchMode):
    """Counts operations outside of the calls that a tape writes down, as those of scripted functions."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tape.unseen |= not self.tape.inside
        return func(*args, **(kwargs or {}))


class Tape(TorchFunctionMode):
    """Writes down the calls of torch's functions. samples: the tensor that the tail takes; its value has the number 0."""

    def __init__(self, samples: Tensor) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.tensors: list[Tensor] = []  # they stay alive, so an id means one tensor
        self._numbers: dict[int, int] = {}
        self.autocast = False
        self.grad = True
        """Whether gradients are recorded. The tape begins where they are."""
        self.inside = 0
        """How many calls of torch's functions are running."""
        self.unseen = False
        """Whether an operation ran outside of them."""
        self.number_of(samples)

    def number_of(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return self._numbers[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in FACTS or (name == "__get__" and getattr(func.__self__, "__name__", "") in ATTRIBUTES):
            return self._called(func, args, kwargs)
        if name == "_set_grad_enabled":
            self.grad = args[0]
            return func(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs)]
        versions = [_version(tensor) for tensor in given]
        step = Step(func, self._taken(args), self._taken(kwargs), grad=self.grad)
        result = self._called(func, args, kwargs)
        step.writes = [
            self.number_of(t) for t, version in zip(given, versions, strict=True) if _version(t) != version
        ]
        step.results = [(path, self.number_of(tensor)) for path, tensor in _paths(result)]
        self.autocast |= any(torch.is_autocast_enabled(self.tensors[n].device.type) for _, n in step.results)
        self.steps.append(step)
        return result

    def _called(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.inside += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.inside -= 1

    def _taken(self, value: Any) -> Any:
        """The arguments with a `Value` for each tensor."""
        return (
            Value(self.number_of(value))
            if isinstance(value, Tensor)
            else mapped_arguments(value, self._taken)
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def storage_of(tensor: Tensor) -> int:
    """A number that tensors with the same memory have in common; a negative number for a tensor without memory."""
    try:
        return tensor.untyped_storage()._cdata if tensor.numel() else -id(tensor)
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)


def _paths(value: Any, path: list | None = None) -> Iterator[tuple[list, Tensor]]:
    """The tensors in the result of a function, with the keys that lead to them."""
    if isinstance(value, Tensor):
        yield path or [], value
    for key, entry in entries_of(value):
        yield from _paths(entry, [*(path or []), key])


def mapped_arguments(value: Any, function: Callable[[Any], Any]) -> Any:
    """The containers that functions of torch take, with `function` applied to their entries."""
    if isinstance(value, slice):
        return slice(*map(function, (value.start, value.stop, value.step)))
    if isinstance(value, (tuple, list)):
        entries = [function(entry) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    if isinstance(value, dict):
        return {key: function(entry) for key, entry in value.items()}
    return value


def values_in(template: Any) -> Iterator[Value]:
    if isinstance(template, Value):
        yield template
    elif isinstance(template, slice):
        yield from values_in((template.start, template.stop, template.step))
    elif isinstance(template, (tuple, list, dict)):
        for entry in template.values() if isinstance(template, dict) else template:
            yield from values_in(entry)
