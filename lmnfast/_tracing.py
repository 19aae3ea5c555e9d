"""Traces a model with torch.fx, and cuts a traced graph in two."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ._nested import contents
from ._threads import alone, uninterrupted
from ._undisturbed import hooked, keeps_nothing
from ._vocabulary import ADDITIONS, FUNCTIONS, TENSOR_METHODS

Forward = Callable[[nn.Module, Any], Any] | None  # runs the model on inputs
Output = str | int | Callable[[Any], Any] | None  # selects a tensor in the model's result


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside a wrapper of torch.compile; any other module itself."""
    return getattr(model, "_orig_mod", model)


def wrapped_as(part: nn.Module) -> str | None:
    """The name of the wrapped part, if `part` is a wrapper of torch.compile, DataParallel or checkpoint_wrapper."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        if name in part._modules:
            return name
    return "module" if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None


class Call(nn.Module):
    """Calls the model as a user does, and selects the output.

    A trace of this module, instead of the model, needs no special cases for the model's default arguments, hooks and constants.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any = None,
        forward: Forward = None,
        output: Output = None,
        dimension: int = 0,
    ):
        super().__init__()
        self.model = model
        self.run = forward
        self.output = output
        self.dimension = dimension  # of the samples in the selected output, where they are moved to the front
        self.names = list(inputs) if isinstance(inputs, Mapping) else None
        self.count = len(inputs) if isinstance(inputs, (tuple, list)) else None
        if forward is None and not callable(output):
            keeps_nothing(self)

    def forward(self, inputs: Any) -> Any:
        if self.run is not None:
            result = self.run(self.model, inputs)
        elif self.names is not None:
            result = self.model(**{name: inputs[name] for name in self.names})
        elif self.count is not None:
            result = self.model(*[inputs[i] for i in range(self.count)])
        else:
            result = self.model(inputs)
        selected = _selected(result, self.output)
        return selected.movedim(self.dimension, 0) if self.dimension else selected


def _selected(result: Any, output: Output) -> Any:
    if output is None:
        return result
    if callable(output):
        return output(result)
    try:
        if isinstance(output, str) and not isinstance(result, Mapping):
            return getattr(result, output)
        return result[output]
    except (KeyError, IndexError, AttributeError, TypeError):
        raise ValueError(f"output: no {output!r} in what the model returns, {contents(result)}") from None


class OnThread:
    """True on one thread, false on all others."""

    def __init__(self, thread: int) -> None:
        self.thread = thread

    def __bool__(self) -> bool:
        return threading.get_ident() == self.thread


class Tracer(fx.Tracer):
    """An fx.Tracer that does not trace into the layer to cut at, nor into modules with hooks.

    Otherwise the hooks would run on proxies. fx.Tracer replaces nn.Module.__call__ and __getattr__ for the whole process, and
    sets a flag under which compiled functions refuse to run. Here both apply on the tracing thread alone, so that other threads
    can run their models meanwhile.
    """

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.here = OnThread(threading.get_ident())

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        # Two traces at once would undo each other's replacements, and an interrupted trace would leave its replacements.
        with alone(), uninterrupted():
            return super().trace(root, concrete_args)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        if hasattr(fx._symbolic_trace, "_is_fx_tracing_flag"):  # trace() has set it and resets it
            fx._symbolic_trace._is_fx_tracing_flag = self.here  # type: ignore[assignment]  # it acts as a bool
        return super().create_args_for_root(root_fn, is_module, concrete_args)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return super().call_module(m, forward, args, kwargs) if self.here else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self.here else attr_val

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return module is self.layer or hooked(module) or super().is_leaf_module(module, qualified_name)


# The functions known to the kernels that never draw random numbers, whatever their arguments.
COMPUTING = {F.linear, *ADDITIONS} | {f for f in FUNCTIONS if "dropout" not in f.__name__}


def graph_after(graph: fx.Graph, root: nn.Module, start: list[fx.Node], dimension: int = 0) -> fx.GraphModule:
    """The part of a graph behind the nodes `start`. The samples take the place of each of these nodes.

    dimension: along which these nodes have the samples.
    """
    tail = fx.Graph()
    # The samples are cloned, as the tail may work in place.
    samples = tail.call_method("clone", (tail.placeholder("samples"),))
    if dimension:
        samples = tail.call_method("contiguous", (tail.call_method("movedim", (samples, 0, dimension)),))
    copies = dict.fromkeys(start, samples)
    fixed = set()  # nodes that depend on parameters alone

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = tail.node_copy(node, copied)
            copies[node].type = None  # a textual annotation, whose module pickle cannot find
        return copies[node]

    for node in graph.nodes:
        if node.op == "placeholder" or node in copies:
            continue
        before = node.all_input_nodes
        if all(n in fixed for n in before):
            fixed.add(node)
        elif all(n in fixed or n in copies for n in before):
            copied(node)
    if not any(node.op == "output" for node in tail.nodes):
        raise ValueError("the output depends on more than the layer's output")
    for node in reversed(tail.nodes):
        if not node.users and _pure(node):  # for example a loss beside the output
            tail.erase_node(node)
    result = fx.GraphModule(root, tail)
    if all(map(only_computes, tail.nodes)):
        keeps_nothing(result)
    return result


def only_computes(node: fx.Node) -> bool:
    """Whether a step of a graph always gives the same result and changes nothing but earlier results of the graph.

    True for every module: `evaluating` checks modules itself.
    """
    if "out" in node.kwargs:
        return False
    if node.op == "get_attr":  # nothing works in place on a parameter
        return all(user.target in (F.linear, operator.add, torch.add) for user in node.users)
    if node.op == "call_function":
        return node.target in COMPUTING
    return node.target in TENSOR_METHODS or node.target in ADDITIONS if node.op == "call_method" else True


def _pure(node: fx.Node) -> bool:
    """Whether a call only returns a result. Judged by PyTorch's names of functions that work in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "_")
    in_place = (
        name.endswith("_") or name.startswith(("i", "setitem")) or node.kwargs.keys() & {"inplace", "out"}
    )
    return not in_place
