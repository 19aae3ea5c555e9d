"""Traces a model with torch.fx, and cuts a traced graph in two."""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ._nested import at_path, contents, mapped, path_to_tensor
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


class Reached(BaseException):
    """Ends a forward pass behind a layer. `except Exception` in the model's code does not stop it."""

    def __init__(self, end: End | None = None, result: Any = None) -> None:
        super().__init__()
        self.end = end
        self.result = result


@dataclass
class End:
    """The call of a module behind which a forward pass ends."""

    part: nn.Module
    number: int
    """Of the call, from 0 on."""
    path: list | None = None
    """Keys to the tensor in the result of the call; None before the first pass, which finds them."""
    before: int = 0
    """How many calls return before the layer does with which the tail begins."""
    calls: int = 0
    """How many calls have returned in the pass that runs now."""
    tracing: bool = False
    """Whether `Tracer` counts the calls. A hook would keep it from tracing into the module."""
    is_counting: bool = False
    """Whether a pass goes on behind the call, so that `calls` becomes the number of all calls."""
    result: Any = None
    """Of the call, in a pass that is counting."""

    def returned(self, result: Any) -> None:
        self.calls += 1
        if self.calls == self.number + 1:
            if not self.is_counting:
                raise Reached(self, result)
            self.result = mapped(result, torch.Tensor.clone)  # later parts may work in place

    @contextmanager
    def counted(self) -> Iterator[None]:
        """In this context the calls are counted, and the last one ends the pass."""
        self.calls, self.result = 0, None
        if self.tracing:
            yield
            return
        # A scripted module's own method only raises.
        handle = nn.Module.register_forward_hook(
            self.part, lambda module, args, result: self.returned(result)
        )
        try:
            yield
        finally:
            handle.remove()


class Call(nn.Module):
    """Calls the model as a user does, and selects the output.

    A trace of this module, instead of the model, needs no special cases for the model's default arguments, hooks and constants.

    end: behind which call the model's forward ends; its result is the output. path: keys to the tensor in the output, if
    `output` selects none. dimension: of the samples in that tensor, where they are moved to the front.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any = None,
        forward: Forward = None,
        output: Output = None,
        end: End | None = None,
        path: list | None = None,
        dimension: int = 0,
    ):
        super().__init__()
        self.model = model
        self.run = forward
        self.output = output
        self.end = end
        self.path = path
        self.dimension = dimension
        self.names = list(inputs) if isinstance(inputs, Mapping) else None
        self.count = len(inputs) if isinstance(inputs, (tuple, list)) else None
        if forward is None and not callable(output):
            keeps_nothing(self)

    def forward(self, inputs: Any) -> Any:
        if self.end is None:
            return self.selected(self._result(inputs), self.path)
        end, result = self.end, None
        try:
            with end.counted():
                self._result(inputs)
        except Reached as reached:
            if reached.end is not end:
                raise
            result = reached.result
        except Exception:  # the model may fail behind the call
            if not end.is_counting or end.calls <= end.number:
                raise
        if end.calls <= end.number:
            raise NeverReached("the model does not make the call at which its forward is to end")
        result = end.result if end.is_counting else result
        if end.path is None and not end.tracing:
            end.path = path_to_tensor(result)
        return self.selected(result, end.path)

    def _result(self, inputs: Any) -> Any:
        if self.run is not None:
            return self.run(self.model, inputs)
        if self.names is not None:
            return self.model(**{name: inputs[name] for name in self.names})
        if self.count is not None:
            return self.model(*[inputs[i] for i in range(self.count)])
        return self.model(inputs)

    def selected(self, result: Any, path: list | None) -> Any:
        """The part of a result that counts. path: keys to it, if `output` selects none."""
        part = _selected(result, self.output) if self.output is not None else at_path(result, path or [])
        return part.movedim(self.dimension, 0) if self.dimension else part


class NeverReached(ValueError):
    """A forward pass has not come to its `End`."""


def _selected(result: Any, output: Output) -> Any:
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


GRADIENT = "gradient"  # what is known of a node's derivative, in its meta
OFF = "turns gradients off"
OWN = "has a backward of its own"
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def _gradient_now() -> str | None:
    """OFF or OWN for a call made now, if autograd would not differentiate it; None if it would."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return None
    frame = sys._getframe()
    while (
        frame is not None and frame.f_code is not _APPLY
    ):  # the forward of an autograd.Function has them off, too
        frame = frame.f_back  # type: ignore[assignment]
    return OFF if frame is None else OWN


class Tracer(fx.Tracer):
    """An fx.Tracer that does not trace into the layer to cut at, nor into modules with hooks.

    Otherwise the hooks would run on proxies, and a module's own backward hooks would be lost. A graph has no regions without
    gradients and no autograd.Function, only the calls in them. The node of each has OFF or OWN in its meta, under GRADIENT.

    fx.Tracer replaces nn.Module.__call__ and __getattr__ for the whole process, and
    sets a flag under which compiled functions refuse to run. Here both apply on the tracing thread alone, so that other threads
    can run their models meanwhile.
    """

    def __init__(self, layer: nn.Module | None = None, end: End | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.end = end
        self.here = OnThread(threading.get_ident())

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        # Two traces at once would undo each other's replacements, and an interrupted trace would leave its replacements.
        # With gradients on, as otherwise a region that turns them off would not show.
        with alone(), uninterrupted(), torch.inference_mode(False), torch.enable_grad():
            if self.end is None:
                return super().trace(root, concrete_args)
            self.end.tracing = True
            try:
                return super().trace(root, concrete_args)
            finally:
                self.end.tracing = False

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        if hasattr(fx._symbolic_trace, "_is_fx_tracing_flag"):  # trace() has set it and resets it
            fx._symbolic_trace._is_fx_tracing_flag = self.here  # type: ignore[assignment]  # it acts as a bool
        return super().create_args_for_root(root_fn, is_module, concrete_args)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if node.op.startswith("call_") and (gradient := _gradient_now()):
            node.meta[GRADIENT] = gradient
        return node

    def create_arg(self, a: Any) -> Any:
        # A constant of the graph keeps no history of parameters.
        return super().create_arg(a.detach() if isinstance(a, torch.Tensor) and not a.is_leaf else a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self.here:
            return forward(*args, **kwargs)
        if isinstance(m, torch.jit.ScriptModule) and m is not self.layer:
            raise ValueError(f"a {type(m).__name__} is no module of Python")
        result = super().call_module(m, forward, args, kwargs)
        if self.end is not None and m is self.end.part:
            self.end.returned(result)
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self.here else attr_val

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if module is self.layer or hooked(module) or hooked(module, backward=True):
            return True
        return super().is_leaf_module(module, qualified_name)


# The functions known to the kernels that never draw random numbers, whatever their arguments.
COMPUTING = {F.linear, *ADDITIONS} | {f for f in FUNCTIONS if "dropout" not in f.__name__}


def graph_after(graph: fx.Graph, root: nn.Module, start: list[fx.Node], dimension: int = 0) -> fx.GraphModule:
    """The part of a graph behind the nodes `start`. The samples take the place of each of these nodes.

    dimension: along which these nodes have the samples.

    What the model makes of the samples without gradients, the tail detaches where the gradients are on again. Raises ValueError
    if the output depends on the inputs on a way around these nodes, and if a detach cannot take the place of such a region.
    """
    tail = fx.Graph()
    # The samples are cloned, as the tail may work in place.
    samples = tail.call_method("clone", (tail.placeholder("samples"),))
    if dimension:
        samples = tail.call_method("contiguous", (tail.call_method("movedim", (samples, 0, dimension)),))
    copies = dict.fromkeys(start, samples)
    fixed: set[fx.Node] = set()  # nodes that depend on parameters alone
    copied = _copier(tail, copies, {*start}, fixed)
    for node in graph.nodes:
        if node.op == "placeholder" or node in copies:
            continue
        before = node.all_input_nodes
        if all(n in fixed for n in before):
            fixed.add(node)
        elif all(n in fixed or n in copies for n in before):
            _check_gradient(node, fixed | {*start}, root)
            copied(node)
    if not any(node.op == "output" for node in tail.nodes):
        raise ValueError("the output depends on more than the layer's output")
    erase_unused(tail)  # for example a loss beside the output
    return module_of(root, tail)


def erase_unused(graph: fx.Graph, pure: Collection[fx.Node | None] = ()) -> None:
    """Removes calls whose results nothing takes, unless they may write. pure: calls of modules among them that do not."""
    for node in reversed(graph.nodes):
        if not node.users and (node in pure or _pure(node)):
            graph.erase_node(node)


def _copier(
    tail: fx.Graph, copies: dict[fx.Node, fx.Node], start: set[fx.Node], fixed: set[fx.Node]
) -> Callable[[fx.Node], fx.Node]:
    """A function that gives the copy of a node in the tail, and makes it with all that it depends on if there is none."""
    detached: dict[fx.Node, fx.Node] = {}

    def behind_region(node: fx.Node) -> fx.Node:
        if GRADIENT not in node.meta or node in start or node in fixed:
            return copied(node)
        if node not in detached:
            detached[node] = tail.call_method("detach", (copied(node),))
        return detached[node]

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copy = tail.node_copy(node, copied if GRADIENT in node.meta else behind_region)
            copy.type = None  # a textual annotation, whose module pickle cannot find
            copy.meta.pop(GRADIENT, None)
            copies[node] = copy
        return copies[node]

    return copied


def _check_gradient(node: fx.Node, fixed: set[fx.Node], root: nn.Module) -> None:
    """Raises ValueError for a call on samples that a graph with `detach` would differentiate in another way than the model.

    fixed: nodes that need no derivative.
    """
    given = [n for n in node.all_input_nodes if n not in fixed]
    if OWN in (n.meta.get(GRADIENT) for n in (node, *given)):
        raise ValueError(f"the model {OWN}")
    if any(GRADIENT in n.meta for n in (node, *given)) and may_write(node, root):
        raise ValueError(f"the model {OFF} around work in place")


def may_write(node: fx.Node, root: nn.Module) -> bool:
    """Whether a call may write into its arguments."""
    if node.op == "call_module":
        parts = root.get_submodule(str(node.target)).modules()
        return any(
            getattr(part, "inplace", False) or type(part).__module__.split(".")[0] != "torch"
            for part in parts
        )
    return not _pure(node) and node.op != "output"


class QuietGraph(fx.GraphModule):
    """A GraphModule that prints no report of errors, as some are expected."""

    def recompile(self) -> Any:
        code = super().recompile()
        type(self).__call__ = nn.Module.__call__  # type: ignore[method-assign]
        return code


class TapedGraph(QuietGraph):
    """A graph of calls that were written down outside of autocast. The model may have turned autocast off around some."""

    def recompile(self) -> Any:
        code = super().recompile()
        type(self).__call__ = _outside_autocast  # type: ignore[method-assign]
        return code


def _outside_autocast(self: nn.Module, x: torch.Tensor) -> Any:
    if not torch.compiler.is_compiling() and torch.is_autocast_enabled(x.device.type):
        raise RuntimeError(
            "f: was cut outside of torch.autocast; expected to be cut in it, as it is measured in it"
        )
    return nn.Module.__call__(self, x)


def module_of(
    root: nn.Module | dict[str, Any], graph: fx.Graph, kind: type[QuietGraph] = QuietGraph
) -> fx.GraphModule:
    """A graph as a module. root: has what the graph's nodes name."""
    result = kind(root, graph)
    if all(map(_only_computes, graph.nodes)):
        keeps_nothing(result)
    return result


def _only_computes(node: fx.Node) -> bool:
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
        name.endswith("_")
        or name.startswith(("i", "setitem"))
        or node.kwargs.get("inplace", False) is not False
        or "out" in node.kwargs
    )
    return not in_place
