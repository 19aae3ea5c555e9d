"""Records what a model's modules return before a layer, so that a tail need not run these modules for each path point.

A module that returns before the layer is called cannot depend on the layer's output. A tail calls such modules on copies of one
sample, so their results have equal rows in every batch. Two passes, on one and on two copies of the sample, show which
dimension of a result has the rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._nested import entries_of, mapped, tensors_in
from ._tracing import Reached
from ._undisturbed import PLAIN, Kept, hooked

# Equal rows may have other rounding in a batch of other size, up to this share of a value.
ROUNDING = 1e-3


@dataclass
class Visit:
    """One call of a module in a forward pass, and the calls inside it."""

    module: nn.Module
    inner: list[Visit] = field(default_factory=list)
    result: Any = None
    returned: bool = False


@dataclass(frozen=True)
class Result:
    """What a call returned for one row. dimensions: for each tensor in it the dimension of the rows, None if it has none."""

    value: Any
    dimensions: tuple[int | None, ...]

    def for_rows(self, rows: int, copies: bool) -> Any:
        """The result for that many equal rows. copies: each row has memory of its own; otherwise rows may share memory."""
        dimensions = iter(self.dimensions)
        return mapped(self.value, lambda tensor: repeated(tensor, next(dimensions), rows, copies))


def repeated(tensor: Tensor, dimension: int | None, rows: int, copies: bool) -> Tensor:
    """A tensor for one row repeated for more rows, along a dimension. None: the tensor has no rows, and is copied."""
    if dimension is None or rows == 1:
        return tensor.clone()
    if tensor.shape[dimension] != 1:
        return torch.cat([tensor] * rows, dimension)
    view = tensor.expand(*tensor.shape[:dimension], rows, *tensor.shape[dimension + 1 :])
    return view.clone(memory_format=torch.contiguous_format) if copies else view


class Recording:
    """The results of a model's modules for one sample, of all calls before a call of the layer, and of that call.

    A copy, deep or by pickle, is empty: the results belong to the modules of one model.
    """

    def __init__(self) -> None:
        self._measured: Any = None
        self._dimensions: dict[nn.Module, list[tuple[int | None, ...] | None]] = {}
        self._results: dict[nn.Module, list[Result | None]] = {}
        self.calls_of_layer = 0
        """The number of calls of the layer in a replayed pass, up to the one that the tail begins with."""

    def __reduce__(self) -> tuple[type[Recording], tuple[()]]:
        return Recording, ()

    def begin(
        self, measured: Kept, run: Callable[[int], Any], model: nn.Module, layer: nn.Module, number: int
    ) -> None:
        """Records the results for a measurement. Does nothing if they are recorded for it.

        run: runs the model on copies of a sample, that many. number: which call of the layer.

        Raises ValueError if the model calls other modules for two rows than for one, or changes itself before the layer; and
        the model's errors.
        """
        if self._measured is measured:
            return
        visit = _visited(partial(run, 1), model, layer, number)
        if measured.is_changed():  # a part that is replayed would not change it
            raise ValueError("a part of the model before the layer changes the model")
        if not (self._dimensions and self._take(visit)):
            self._dimensions = {}
            self._compare(visit, _visited(partial(run, 2), model, layer, number))
            self._take(visit)
        self._measured, self.calls_of_layer = measured, len(self._results[layer])

    @property
    def replaced(self) -> int:
        """The number of calls that do not run."""
        return sum(result is not None for results in self._results.values() for result in results)

    @contextmanager
    def replayed(self, rows: int, copies: bool) -> Iterator[None]:
        """In this context the recorded calls return their results, for that many rows, and do not run."""
        with ExitStack() as stack:
            for module, results in self._results.items():
                if any(results):
                    stack.enter_context(_replaying(module, results, rows, copies))
            yield

    def _compare(self, one: Visit, two: Visit) -> None:
        """Finds which calls may be replaced, and the dimensions of the rows in their results."""
        if [visit.module for visit in one.inner] != [visit.module for visit in two.inner]:
            raise ValueError("the model calls other modules for two rows than for one")
        for first, second in zip(one.inner, two.inner, strict=True):
            dimensions = _row_dimensions(first, second)
            self._dimensions.setdefault(first.module, []).append(dimensions)
            if dimensions is None:  # the calls inside it may be replaced
                self._compare(first, second)

    def _take(self, visit: Visit) -> bool:
        """Takes the results of a pass. Returns whether the pass has the calls that were compared."""
        expected = {module: deque(dimensions) for module, dimensions in self._dimensions.items()}
        self._results = {}

        def take(visit: Visit) -> bool:
            for call in visit.inner:
                if not expected.get(call.module):
                    return False
                dimensions = expected[call.module].popleft()
                if dimensions is not None and len(dimensions) != len(list(tensors_in(call.result))):
                    return False
                result = None if dimensions is None else Result(call.result, dimensions)
                self._results.setdefault(call.module, []).append(result)
                if dimensions is None and not take(call):
                    return False
            return True

        return take(visit) and not any(expected.values())


def _visited(run: Callable[[], Any], model: nn.Module, layer: nn.Module, number: int) -> Visit:
    """Runs the model up to the layer's call, and returns a visit that contains all calls."""
    whole = Visit(model)
    around, calls = [whole], 0

    def enter(module: nn.Module, args: Any) -> None:
        visit = Visit(module)
        around[-1].inner.append(visit)
        around.append(visit)

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        nonlocal calls
        while around[-1].module is not module:  # the model has caught an error of that part
            around.pop()
        visit = around.pop()
        visit.result, visit.returned = mapped(result, Tensor.clone), True  # later parts may work in place
        calls += module is layer
        if module is layer and calls == number + 1:
            raise Reached

    with ExitStack() as stack:
        for part in model.modules():
            # A scripted module's own methods only raise.
            stack.callback(nn.Module.register_forward_pre_hook(part, enter).remove)
            stack.callback(nn.Module.register_forward_hook(part, leave).remove)
        try:
            run()
        except Reached:
            return whole
    raise ValueError("the model does not call the layer")


def _row_dimensions(one: Visit, two: Visit) -> tuple[int | None, ...] | None:
    """For each tensor in the result of a call the dimension of the rows. None: the call has to run."""
    module = one.module
    if not (one.returned and two.returned) or isinstance(module, torch.jit.ScriptModule):
        return None
    if any(map(hooked, module.modules())):
        return None
    tensors, others = list(tensors_in(one.result)), list(tensors_in(two.result))
    if not _alike(one.result, two.result) or not tensors or len(tensors) != len(others):
        return None
    try:
        found = [row_dimension(a, b, (1, 2)) for a, b in zip(tensors, others, strict=True)]
    except UnequalRows:
        return None
    return tuple(None if rows is None else rows[0] for rows in found)


def _alike(one: Any, two: Any) -> bool:
    """Whether two results are the same but for the values of tensors, and hold nothing that a call may change."""
    if type(one) is not type(two):
        return False
    if isinstance(one, Tensor):
        return True
    entries, others = entries_of(one), entries_of(two)
    if not entries:
        return type(one) in PLAIN and one == two
    return [key for key, _ in entries] == [key for key, _ in others] and all(
        _alike(a, b) for (_, a), (_, b) in zip(entries, others, strict=True)
    )


class UnequalRows(Exception):
    """A tensor of two passes differs in more than the number of equal rows."""


def row_dimension(one: Tensor, two: Tensor, rows: tuple[int, int]) -> tuple[int, int] | None:
    """The dimension of the rows of a tensor in two passes, and its length for one row; None if the tensor has no rows.

    rows: the number of rows in each pass, all equal. Raises UnequalRows if the tensor does not follow them.
    """
    if one.layout != torch.strided or one.dtype != two.dtype or one.dim() != two.dim():
        raise UnequalRows
    longer = [d for d, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
    if not longer:
        if not _equal(one, two):
            raise UnequalRows
        return None
    dimension, length = longer[0], (two.shape[longer[0]] - one.shape[longer[0]]) // (rows[1] - rows[0])
    lengths = one.shape[dimension], two.shape[dimension]
    if len(longer) > 1 or lengths != (rows[0] * length, rows[1] * length):
        raise UnequalRows
    row = one.narrow(dimension, 0, length)
    if not all(
        _equal(tensor, torch.cat([row] * n, dimension)) for tensor, n in zip((one, two), rows, strict=True)
    ):
        raise UnequalRows
    return dimension, length


def _equal(one: Tensor, two: Tensor) -> bool:
    """Up to the rounding of another batch size."""
    wide = torch.complex128 if one.is_complex() else torch.float64
    return torch.allclose(one.to(wide), two.to(wide), ROUNDING, 1e-6, equal_nan=True)


@contextmanager
def _replaying(module: nn.Module, results: list[Result | None], rows: int, copies: bool) -> Iterator[None]:
    """In this context the first calls of a module return recorded results."""
    own, before = module.forward, vars(module).get("forward")
    remaining = iter(results)

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = next(remaining, None)
        return own(*args, **kwargs) if result is None else result.for_rows(rows, copies)

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before
