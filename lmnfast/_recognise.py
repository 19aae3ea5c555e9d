"""Recognises a network that is a chain of Linear layers and activations. The user's model is not changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ._chain import CHAIN_DTYPES, IDENTITY, Activation, Chain
from ._tracing import GRADIENT, OFF, Call, Tracer, uncompiled
from ._undisturbed import evaluating, hooked
from ._vocabulary import (
    ADDITIONS,
    FLATTEN,
    FUNCTIONS,
    MODULES,
    TENSOR_METHODS,
    Linear,
    Step,
    class_of,
    is_known,
    is_parametrised,
    is_plain,
)


class NotAChain(Exception):
    """The reason why a module is no chain of Linear maps and activations, in a few words."""


def recognise(f: Any, differentiated: bool = False) -> Chain | None:
    """The chain of Linear maps and activations that an nn.Module is in eval mode, or None.

    differentiated: also None if autograd has another derivative for f than the chain has: f turns gradients off, or has a
    backward or backward hooks of its own.

    Returns None for anything else, for modules with hooks, and in case of doubt. This function sees no samples, so it does
    not see branches on the input's type or shape: compare chain(x) with f(x) on samples before use. Computed weights
    (parametrisations, a frozen batch norm folded into its neighbour) have their present values.
    """
    try:
        return chain_or_reason(f, None, differentiated)
    except NotAChain:
        return None


def chain_or_reason(
    f: Any,
    put_back: Callable[[], None] | None = None,
    differentiated: bool = False,
) -> Chain:
    """:func:`recognise`, but raises NotAChain with the reason in place of None.

    put_back: undoes the changes that a trace of f's forward makes, for a caller that is inside `evaluating` already. None: the
    caller is not. differentiated: as in `recognise`.
    """
    with torch.no_grad():
        return chain_with_graph(f, put_back, differentiated).detached()


def chain_with_graph(
    f: Any,
    put_back: Callable[[], None] | None = None,
    differentiated: bool = True,
) -> Chain:
    """:func:`chain_or_reason`, but the chain's tensors are f's own parameters, or have a graph to these if they are computed.

    There is no graph if gradients are off.
    """
    graph = torch.is_grad_enabled()
    bare = bare_module(f)
    if differentiated and any(hooked(part, backward=True) for part in f.modules()):
        raise NotAChain("its backward runs hooks")
    f = bare
    parts = _in_order(f)
    if parts is not None and not any(map(is_parametrised, parts)):
        return _chain_of([_read_module(part) for part in parts])  # runs no code of the model
    with inside(f, put_back), torch.set_grad_enabled(graph):
        try:
            if isinstance(f, fx.GraphModule) and is_plain(f):
                return _chain_of(_read_graph(f.graph, f, differentiated))
            if parts is not None:
                return _chain_of([_read_module(part) for part in parts])
            root = Call(f)
            return _chain_of(_read_graph(Tracer().trace(root), root, differentiated))
        except NotAChain:
            raise
        except (
            Exception
        ) as error:  # the user's forward ran on proxies: any error means that it cannot be read
            raise NotAChain(f"torch.fx cannot trace its forward ({type(error).__name__}: {error})") from error


def bare_module(f: Any) -> nn.Module:
    """The module f without the wrappers of torch.compile and of data-parallel training. Raises NotAChain if f is no module."""
    if not isinstance(f, nn.Module):
        raise NotAChain(f"{getattr(f, '__name__', type(f).__name__)!r} is no nn.Module")
    f = uncompiled(f)
    if isinstance(f, (nn.DataParallel, nn.parallel.DistributedDataParallel)) and not hooked(f):
        return f.module
    return f


def inside(f: nn.Module, put_back: Callable[[], None] | None) -> AbstractContextManager[Any]:
    """A context for a trace of f. put_back: as in `chain_or_reason`."""
    return evaluating(f) if put_back is None else _afterwards(put_back)


@contextmanager
def _afterwards(call: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    finally:
        call()


def _in_order(f: nn.Module) -> list[nn.Module] | None:
    """The parts of nested nn.Sequential containers, in order; None if f has anything else. Faster than a trace."""
    if type(f) is not nn.Sequential:
        return [f] if is_known(f) else None
    if not is_plain(f):
        return None
    parts: list[nn.Module] = []
    for part in f:
        inner = _in_order(part)
        if inner is None:
            return None
        parts += inner
    return parts


def _read_graph(graph: fx.Graph, root: nn.Module, differentiated: bool) -> list[Step]:
    """The steps of a graph whose nodes each work on the result of the node before, and may add an earlier result.

    Raises NotAChain for any other graph, and if `differentiated` for one that autograd differentiates in another way.
    """
    # The number of steps that lead to each result. Overwritten results are removed.
    results: dict[fx.Node, int] = {}
    steps: list[Step] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if differentiated and (GRADIENT in node.meta or node.target == "detach"):
            raise NotAChain(f"it {node.meta.get(GRADIENT, OFF)}")
        if node.op == "placeholder" and not results:
            results[node] = 0
            continue
        if node.op == "output":
            if _steps_to(node.args[0], results) != len(steps):
                raise NotAChain("its output is not the last result alone")
            return steps
        if node.op != "call_module" and node.target in ADDITIONS:
            step: Step = _read_sum(node, root, results, len(steps))
        else:
            before = _steps_to(_input(node), results)
            if before is None:
                raise NotAChain(f"{_described(node, root)} does not work on the result before it alone")
            step = _read_step(node, root)
            if step == IDENTITY or (step == FLATTEN and any(isinstance(s, tuple) for s in steps[:before])):
                results[node] = before
                continue
            if before != len(steps):
                raise NotAChain(f"{_described(node, root)} does not work on the result before it alone")
        if _in_place(node, root):
            overwritten = {results.get(operand) for operand in node.all_input_nodes}
            results = {n: number for n, number in results.items() if number not in overwritten}
        steps.append(step)
        results[node] = len(steps)
    raise NotAChain("it has no output")


@dataclass(frozen=True)
class Skip:
    """Adds the result of the first `source` steps."""

    source: int


def _steps_to(value: Any, results: dict[fx.Node, int]) -> int | None:
    return results.get(value) if isinstance(value, fx.Node) else None


def _read_sum(node: fx.Node, root: nn.Module, results: dict[fx.Node, int], last: int) -> Skip:
    operands = [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)]
    known = [steps for operand in operands if (steps := _steps_to(operand, results)) is not None]
    if len(known) != 2 or len(operands) != 2 or node.kwargs.keys() - {"input", "other"}:
        raise NotAChain(f"{_described(node, root)} has other operands than two results of the chain")
    if max(known) != last or min(known) == last:
        raise NotAChain(f"{_described(node, root)} does not add an earlier result to the last one")
    return Skip(min(known))


def _in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a call may overwrite its input."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "_")
    return name.endswith("_") or name == "iadd" or any(a is True for a in (*node.args, *node.kwargs.values()))


def _described(node: fx.Node, root: nn.Module) -> str:
    """Describes a node in an error message."""
    if node.op == "call_module":
        name = str(node.target).removeprefix("model.")
        return f"{type(root.get_submodule(str(node.target))).__name__} {name!r}"
    return f"{getattr(node.target, '__name__', node.target)}()"


def _chain_of(steps: list[Step]) -> Chain:
    """Joins steps into a chain."""
    building = _ChainBuilder({step.source for step in steps if isinstance(step, Skip)})
    for step in steps:
        building.add(step)
    return building.chain()


class _ChainBuilder:
    """A chain under construction, from the steps read so far.

    sources: numbers of steps whose results are added to later results.
    """

    def __init__(self, sources: set[int]) -> None:
        self.sources = sources
        self.weights: list[Tensor] = []
        self.biases: list[Tensor | None] = []
        self.activations = [IDENTITY]
        self.flattens = False
        self.scale: Affine | None = None  # a batch norm that waits for the Linear after it
        self.skips: dict[int, int] = {}
        self.values: list[int | None] = [0]
        """For each number of steps, the number of the chain's value after them. None: the result is not, or no longer, a value
        of the chain."""

    @property
    def last(self) -> int:
        """The number of the last value."""
        return 2 * len(self.weights) + (self.activations[-1] != IDENTITY)

    def add(self, step: Step) -> None:
        if isinstance(step, Affine):
            self._add_affine(step)
        elif isinstance(step, tuple):
            self._add_linear(*step)
        elif isinstance(step, Skip):
            self._add_skip(step)
        elif step == FLATTEN:
            self._add_flatten()
        elif step != IDENTITY:
            self._add_activation(step)
        self.values.append(None if self.scale is not None else self.last)

    def _add_affine(self, step: Affine) -> None:
        number = len(self.values) - 1  # of steps before this one
        follows_linear = self.weights and self.last % 2 == 0 and self.scale is None
        if follows_linear and self.last not in self.skips and number not in self.sources:
            self.weights[-1], self.biases[-1] = step.after(self.weights[-1], self.biases[-1])
            self._overwrite_last()
        elif self.scale is None:
            self.scale = step
        else:
            raise NotAChain("two batch norms in a row")

    def _add_linear(self, weight: Tensor, bias: Tensor | None) -> None:
        if self.scale is not None:
            weight, bias = self.scale.before(weight, bias)
        self.weights.append(weight)
        self.biases.append(bias)
        self.activations.append(IDENTITY)
        self.scale = None

    def _add_skip(self, step: Skip) -> None:
        source = self.values[step.source]
        if source is None or source == self.last or self.scale is not None or self.last in self.skips:
            raise NotAChain("a sum of more, or of other values, than a chain has")
        self.skips[self.last] = source
        self._overwrite_last()

    def _add_flatten(self) -> None:
        if not self.weights:  # values from before are samples of another shape
            self.flattens = True
            self.values = [None] * len(self.values)

    def _add_activation(self, step: Activation) -> None:
        if self.scale is not None:
            raise NotAChain(f"{step.name} after a batch norm that no Linear precedes")
        if self.activations[-1] != IDENTITY:
            raise NotAChain(f"{self.activations[-1].name} and {step.name} in a row")
        self.activations[-1] = step

    def _overwrite_last(self) -> None:
        """Records that the last value has changed: earlier results with its number are no values any more."""
        self.values = [None if earlier == self.last else earlier for earlier in self.values]

    def chain(self) -> Chain:
        if self.scale is not None:
            raise NotAChain("a batch norm that neither follows a Linear nor precedes one")
        return _checked_chain(self.weights, self.biases, self.activations, self.flattens, self.skips)


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _read_module(module: nn.Module, name: str = "") -> Step:
    kind = class_of(module)
    said = f"{kind.__name__} {name!r}" if name else kind.__name__
    if not is_plain(module):
        raise NotAChain(f"{said} has hooks, or a forward of its own")
    if kind is nn.Linear:
        return module.weight, module.bias
    if kind is nn.BatchNorm1d:
        if module.running_mean is None:
            raise NotAChain(f"{said} keeps no running statistics")
        return _frozen_batch_norm(module)
    step = MODULES[type(module)](module) if type(module) in MODULES else None
    if step is None:
        raise NotAChain(f"{said} is neither a Linear nor a pointwise activation that the kernels know")
    return step


def _read_step(node: fx.Node, root: nn.Module) -> Step:
    if node.op == "call_module":
        return _read_module(root.get_submodule(str(node.target)), str(node.target).removeprefix("model."))
    if node.op == "call_function" and node.target is F.linear:

        def attributes(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any]:
            return _attribute(weight, root), None if bias is None else _attribute(bias, root)

        return attributes(*node.args, **node.kwargs)
    table = FUNCTIONS if node.op == "call_function" else TENSOR_METHODS
    step = table[node.target](*node.args, **node.kwargs) if node.target in table else None
    if step is None:
        raise NotAChain(
            f"{_described(node, root)} is neither a Linear nor a pointwise activation that the kernels know"
        )
    return step


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> scale x + shift, unit by unit, in float64."""

    scale: Tensor
    shift: Tensor

    def after(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """One Linear for a Linear followed by this map."""
        shift = self.shift if bias is None else self.shift + self.scale * bias
        return (self.scale[:, None] * weight).to(weight.dtype), shift.to(weight.dtype)

    def before(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """One Linear for this map followed by a Linear."""
        shift = weight.double() @ self.shift
        shift = shift if bias is None else shift + bias
        return (weight * self.scale).to(weight.dtype), shift.to(weight.dtype)


def _frozen_batch_norm(module: Any) -> Affine:
    """The affine map of a BatchNorm1d in eval mode, parametrised or not."""
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight
    shift = -module.running_mean * scale
    return Affine(scale, shift if module.bias is None else shift + module.bias)


def _attribute(node: fx.Node, root: nn.Module) -> Tensor:
    if node.op != "get_attr":
        raise NotAChain("a Linear whose weight is computed in the forward")
    value: Any = root
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _checked_chain(
    weights: list[Tensor],
    biases: list[Tensor | None],
    activations: list[Activation],
    flattens: bool,
    skips: dict[int, int],
) -> Chain:
    """The chain. Raises NotAChain unless all tensors are plain and dense, have one dtype and device, and fit together."""
    tensors = weights + [b for b in biases if b is not None]
    if not weights:
        raise NotAChain("it has no Linear")
    if any(type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided for t in tensors):
        raise NotAChain("a weight that is no plain dense tensor")
    kinds = {(t.dtype, t.device) for t in tensors}
    if len(kinds) != 1 or tensors[0].dtype not in CHAIN_DTYPES:
        said = sorted(f"{dtype} on {device}" for dtype, device in kinds)
        raise NotAChain(f"weights are {' and '.join(said)}")
    try:
        return Chain(tuple(weights), tuple(biases), tuple(activations), flattens, tuple(skips.items()))
    except ValueError:
        shapes = [w.shape for w in weights]
        if (
            any(len(shape) != 2 for shape in shapes)
            or any(b is not None and b.shape != shape[:1] for shape, b in zip(shapes, biases))
            or any(shape[0] != after[1] for shape, after in itertools.pairwise(shapes))
        ):
            raise NotAChain("shapes of weights that do not fit together") from None
        widths = [shapes[0][1], *(shape[0] for shape in shapes)]
        if any(widths[into // 2] != widths[source // 2] for into, source in skips.items()):
            raise NotAChain("a sum of results of different widths") from None
        raise
