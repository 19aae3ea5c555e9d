"""The network behind a layer as a graph of torch's functions, written down while the model runs.

torch.fx runs a model's code on proxies, and fails where the code looks at shapes or at Python objects of its own. A tape runs
the model on tensors, on two and on three samples, and writes down each call of a function of torch. A number in the arguments
that differs between the two runs follows the number of rows. Python code between the calls is left out, so the tail costs what
its functions cost. The tape refuses a model whose Python code depends on values of the samples.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ._recorded import UnequalRows, row_dimension
from ._tape import (
    DIFFERENT,
    FACTORIES,
    ROWS,
    SHAPED_BY_VALUES,
    SIZED,
    NotTaped,
    Rows,
    Step,
    Tape,
    Value,
    mapped_arguments,
    storage_of,
    values_in,
)
from ._tracing import TapedGraph, module_of

OPERATORS: dict[str, Callable[..., Any]] = {
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "matmul": operator.matmul,
    "add_": operator.iadd,
}


def _why_refused(step: Step, tensors: list[Tensor]) -> str:
    """What a call on values of the network does that a graph cannot repeat; empty if there is nothing."""
    name = getattr(step.function, "__name__", str(step.function))
    if name == "__set__":
        return "sets an attribute of a tensor"
    if not step.results and not step.writes:
        return "" if name == "type" else f"reads values of the network ({name})"
    given = [tensors[value.number] for value in values_in((step.args, step.kwargs))]
    if any(tensor.layout != torch.strided for tensor in given):
        return f"computes with sparse tensors ({name})"
    if _is_shaped_by_values(name, step, given):
        return f"has shapes that follow values of the network ({name})"
    return ""


def _is_shaped_by_values(name: str, step: Step, given: list[Tensor]) -> bool:
    """Whether the result of a call has sizes that are no plain numbers in its arguments. given: the tensors among these."""
    if name in SIZED:
        return any(not tensor.is_floating_point() for tensor in given[1:])
    if name in FACTORIES or name in SHAPED_BY_VALUES:
        return bool(given)
    if name == "__getitem__":
        masks = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
        return masks or any(True for _ in values_in(_slices(step.args[1])))
    if name == "one_hot":
        return len(step.args) + len(step.kwargs) == 1
    return (name == "where" and len(given) == 1) or (name == "repeat_interleave" and len(given) > 1)


def _slices(index: Any) -> list[slice]:
    """The slices in an index."""
    return [
        entry
        for entry in (index if isinstance(index, (tuple, list)) else [index])
        if isinstance(entry, slice)
    ]


def merged(one: Any, two: Any) -> Any:
    """An argument of both runs. Raises NotTaped if the runs differ in more than the number of rows."""
    if type(one) is not type(two):
        raise NotTaped(DIFFERENT)
    if isinstance(one, (tuple, list, dict, slice)):
        if isinstance(one, slice):
            one, two = (one.start, one.stop, one.step), (two.start, two.stop, two.step)
            return slice(*merged(one, two))
        if len(one) != len(two) or (isinstance(one, dict) and list(one) != list(two)):
            raise NotTaped(DIFFERENT)
        if isinstance(one, dict):
            return {key: merged(value, two[key]) for key, value in one.items()}
        entries = [merged(a, b) for a, b in zip(one, two, strict=True)]
        return entries if isinstance(one, list) else tuple(entries)
    if one is two or one == two or (one != one and two != two):
        return one
    if type(one) is int:
        return Rows(two - one, one - ROWS[0] * (two - one))
    raise NotTaped(f"the model runs differently on two samples and on three, with {one!r} and {two!r}")


def merged_steps(one: Tape, two: Tape) -> list[Step]:
    if len(one.steps) != len(two.steps):
        raise NotTaped(DIFFERENT)
    steps = []
    for a, b in zip(one.steps, two.steps, strict=True):
        same = (a.function is b.function or a.function == b.function) and (a.results, a.writes) == (
            b.results,
            b.writes,
        )
        if not same:
            raise NotTaped(DIFFERENT)
        steps.append(
            Step(a.function, merged(a.args, b.args), merged(a.kwargs, b.kwargs), a.results, a.writes, a.grad)
        )
    return steps


def _same_but_for_values(one: Tape, two: Tape) -> bool:
    """Whether two runs on as many samples make the same calls, with the same arguments and the same shapes."""
    calls = [[(s.function, s.args, s.kwargs, s.results, s.writes) for s in tape.steps] for tape in (one, two)]
    shapes = [[tensor.shape for tensor in tape.tensors] for tape in (one, two)]
    return calls[0] == calls[1] and shapes[0] == shapes[1]


def taped_tail(
    tapes: Sequence[Tape],
    outputs: Sequence[Tensor],
    constants: dict[str, Tensor],
    inputs: Sequence[Sequence[Tensor]],
) -> fx.GraphModule:
    """The tail that two tapes show.

    Args:
        tapes, outputs: of runs on `ROWS` samples, and of one on as many other points as in the second.
        constants: parameters and buffers by name.
        inputs: for both runs the tensors in the model's inputs, in order. All their rows are equal.

    Raises NotTaped.
    """
    return _Tail(tapes, outputs, constants, inputs).graph_module()


class _Tail:
    def __init__(
        self,
        tapes: Sequence[Tape],
        outputs: Sequence[Tensor],
        constants: dict[str, Tensor],
        inputs: Sequence[Sequence[Tensor]],
    ) -> None:
        self.tapes = tapes
        self.one, self.two = tapes[:2]
        self.steps = merged_steps(self.one, self.two)
        if not _same_but_for_values(tapes[1], tapes[2]):
            raise NotTaped("the model runs differently on other samples, or has shapes that follow values")
        numbers = {tape.number_of(output) for tape, output in zip(tapes, outputs, strict=True)}
        if len(numbers) != 1:
            raise NotTaped(DIFFERENT)
        self.output = numbers.pop()
        self.storages = [storage_of(tensor) for tensor in self.one.tensors]
        self.sources = self._sources()
        self.names = {id(tensor): name for name, tensor in constants.items()}
        self.inputs = {id(tensor): n for n, tensor in enumerate(inputs[0])}
        self.moved = self._behind({0})
        self._check()
        self.needed = self._needed()
        # Values that are made for all rows. Of others one row is made, and repeated.
        self.full = self._behind(self.moved | self._with_unequal_rows())

    def _sources(self) -> set[int]:
        """The values that no call has made, beside the samples."""
        sources, made = set(), {0}
        for step in self.steps:
            sources |= step.taken - made
            made |= {number for _, number in step.results}
        return sources

    def _behind(self, first: set[int]) -> set[int]:
        """These values and all that depend on them, also through memory."""
        behind, storages, size = set(first), {self.storages[0]}, 0
        while size != len(behind) + len(storages):
            size = len(behind) + len(storages)
            for step in self.steps:
                results = {number for _, number in step.results}
                if step.taken & behind or any(self.storages[n] in storages for n in step.taken | results):
                    behind |= results
                    storages |= {self.storages[n] for n in step.writes}
        if any(self.storages[number] in storages for number in self.sources):
            raise NotTaped("the model writes into a tensor that outlives a call")
        return behind

    def _with_unequal_rows(self) -> set[int]:
        """Values that number the rows, for example."""
        unequal = set()
        for number in {number for step in self.needed for _, number in step.results} - self.moved:
            try:
                self._row_dimension(number)
            except NotTaped:
                unequal.add(number)
        return unequal

    def _check(self) -> None:
        if any(tape.autocast for tape in self.tapes):
            raise NotTaped("the model runs in autocast")
        if any(tape.unseen for tape in self.tapes) or any(
            self._is_unknown(number) for number in self.sources
        ):
            raise NotTaped("a part of the model computes in other ways than by functions of torch")
        trained = {number for number in self.sources if id(self.one.tensors[number]) in self.names}
        changing = self._behind(self.moved | trained)
        for step in self.steps:
            if step.taken & changing and (why := _why_refused(step, self.one.tensors)):
                raise NotTaped(f"the model {why}")
            results = {number for _, number in step.results}
            if self.moved & results and not (
                step.grad and all(map(_is_differentiated, (self.one.tensors[n] for n in results)))
            ):
                raise NotTaped("the model turns gradients off, or has a backward of its own")
        if self.output not in self.moved:
            raise NotTaped("the output does not depend on the layer")

    def _is_unknown(self, number: int) -> bool:
        """Whether a value comes from nowhere: no call has made it, it is no input, and the model does not keep it."""
        tensor = self.one.tensors[number]
        kept = tensor is self.two.tensors[number]
        return not (kept or id(tensor) in self.names or id(tensor) in self.inputs)

    def _needed(self) -> list[Step]:
        """The calls that the output needs, in order."""
        needed, storages, size = {self.output}, {self.storages[self.output]}, 0
        while size != len(needed):
            size = len(needed)
            for step in reversed(self.steps):
                if self._serves(step, needed, storages):
                    needed |= step.taken
                    storages |= {self.storages[number] for number in step.taken}
        return [step for step in self.steps if self._serves(step, needed, storages)]

    def _serves(self, step: Step, needed: set[int], storages: set[int]) -> bool:
        return any(number in needed for _, number in step.results) or any(
            self.storages[number] in storages for number in step.writes
        )

    def graph_module(self) -> fx.GraphModule:
        """Emits the calls."""
        self.graph = fx.Graph()
        self.root: dict[str, Tensor] = {}
        self.nodes: dict[int, fx.Node] = {0: self.graph.placeholder("samples")}
        self.rows = self.graph.call_method("size", (self.nodes[0], 0))
        for step in self.needed:
            full = bool(self.full & {*step.taken, *step.writes, *(number for _, number in step.results)})
            args = self._emitted(step.args, full)
            kwargs = {key: self._emitted(value, full) for key, value in step.kwargs.items()}
            node = _call(self.graph, step.function, args, kwargs)
            for path, number in step.results:
                result = node
                for key in path:
                    result = self.graph.call_function(operator.getitem, (result, key))
                self.nodes[number] = result
        self.graph.output(self.nodes[self.output])
        if not self.rows.users:
            self.graph.erase_node(self.rows)
        return module_of(self.root, self.graph, TapedGraph)

    def _emitted(self, value: Any, full: bool) -> Any:
        """An argument in the graph. full: of a call for all rows."""
        if isinstance(value, Rows):
            if not full:
                return value.each + value.more
            product = self.rows
            if value.each != 1:
                product = self.graph.call_function(operator.mul, (self.rows, value.each))
            return self.graph.call_function(operator.add, (product, value.more)) if value.more else product
        if not isinstance(value, Value):
            return mapped_arguments(value, lambda entry: self._emitted(entry, full))
        if value.number not in self.nodes:
            self.nodes[value.number] = self._source(value.number)
        node = self.nodes[value.number]
        return self._repeated(value.number, node) if full and value.number not in self.full else node

    def _source(self, number: int) -> fx.Node:
        """A tensor that no call has made."""
        tensor = self.one.tensors[number]
        if id(tensor) in self.names:
            name = self.names[id(tensor)]
        elif id(tensor) in self.inputs:
            name = f"input_{self.inputs[id(tensor)]}"
            if (found := self._row_dimension(number)) is not None:
                tensor = tensor.narrow(found[0], 0, found[1])
            tensor = tensor.clone()
        else:  # the model keeps it, see `_is_unknown`
            name = f"constant_{number}"
        self.root[name] = tensor
        with self.graph.inserting_after(self.rows):
            return self.graph.get_attr(name)

    def _row_dimension(self, number: int) -> tuple[int, int] | None:
        """As `row_dimension`, of a value in the first two runs. Raises NotTaped if its rows are not equal."""
        try:
            return row_dimension(self.one.tensors[number], self.two.tensors[number], ROWS)
        except UnequalRows:
            raise NotTaped(DIFFERENT) from None

    def _repeated(self, number: int, node: fx.Node) -> fx.Node:
        found = self._row_dimension(number)
        if found is None:
            return node
        dimension, length = found
        size: list[Any] = [1 if length > 1 else -1] * self.one.tensors[number].dim()
        size[dimension] = self.rows
        return self.graph.call_method("repeat" if length > 1 else "expand", (node, *size))


def _call(graph: fx.Graph, function: Any, args: tuple, kwargs: dict[str, Any]) -> fx.Node:
    """A call in the graph, as torch.fx would trace it."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return graph.call_function(getattr, (args[0], function.__self__.__name__))
    if name in OPERATORS and len(args) in (2, 3) and not kwargs and _is_method(function, name):
        return graph.call_function(OPERATORS[name], args)
    of_tensor = getattr(function, "__qualname__", "").startswith(("Tensor.", "TensorBase."))
    if _is_method(function, name) or of_tensor:
        return graph.call_method(name, args, kwargs)
    if not isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        home = fx.node._get_qualified_name(function).rpartition(".")[0]
        if getattr(sys.modules.get(home, torch), name, None) is not function:
            raise NotTaped(f"the model calls {name}, which has no name of its own")
    return graph.call_function(function, args, kwargs)


def _is_differentiated(tensor: Tensor) -> bool:
    """Whether a result was not made under inference mode or by an autograd.Function, whose calls a tape does not see."""
    return not (
        tensor.is_inference() or isinstance(tensor.grad_fn, torch.autograd.function.BackwardCFunction)
    )


def _is_method(function: Any, name: str) -> bool:
    return getattr(Tensor, name, None) == function
