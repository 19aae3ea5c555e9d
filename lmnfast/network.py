"""Take a network apart: the tail after a layer, and whether that tail is a chain of Linear and activations.

Nothing here changes the user's model: see `evaluating`.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# The order is that of the enum in csrc/activation.h: the kernels get the index.
ACTIVATIONS = (
    "identity",
    "relu",
    "leaky_relu",
    "elu",
    "silu",
    "gelu",
    "gelu_tanh",
    "tanh",
    "sigmoid",
    "softplus",
    "sin",
)

# Entries of an attribute up to which it is compared from one measurement to the next: a few hundred microseconds.
LARGE = 1000
PLAIN = {type(None), bool, int, float, complex, str, bytes}

Forward = Callable[[nn.Module, Any], Any] | None  # runs the model on inputs
Stacked = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # parameters and buffers of several networks
Output = str | int | Callable[[Any], Any] | None  # selects a tensor of what the model returns

CHAIN_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Activation:
    """A pointwise nonlinearity by name.

    alpha: negative slope of leaky_relu, alpha of elu, beta of softplus. beta: threshold of softplus.
    Raises ValueError for a name that is not in ACTIVATIONS.
    """

    name: str
    alpha: float = 0.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"name: expected one of {', '.join(ACTIVATIONS)}, got {self.name!r}")

    def __call__(self, z: Tensor) -> Tensor:
        """The activation of z, any shape and floating dtype, by torch.nn.functional."""
        if self.name == "identity":
            return z
        if self.name == "leaky_relu":
            return F.leaky_relu(z, self.alpha)
        if self.name == "elu":
            return F.elu(z, self.alpha)
        if self.name == "softplus":
            return F.softplus(z, self.alpha, self.beta)
        if self.name == "gelu_tanh":
            return F.gelu(z, approximate="tanh")
        plain = {
            "relu": F.relu,
            "silu": F.silu,
            "gelu": F.gelu,
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
            "sin": torch.sin,
        }
        return plain[self.name](z)


IDENTITY = Activation("identity")


@dataclass(frozen=True, eq=False)
class Chain:
    """Linear maps with pointwise activations between: a_n(W_n ... a_1(W_1 a_0(x) + b_1) ... + b_n).

    weights: (out, in) each, detached; they share memory with the model's, so they follow its training.
    biases: (out,) or None, one per weight. activations: len(weights) + 1, identity where there is none.
    flattens: whether the network flattens its samples before the first weight.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activations: tuple[Activation, ...]
    flattens: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The chain in plain torch: x (B, D) or (B, *in), flattened to D = weights[0].shape[1] -> (B, K).

        Raises ValueError when a sample has not D elements.
        """
        width = self.weights[0].shape[1]
        if x.ndim < 2 or math.prod(x.shape[1:]) != width:
            raise ValueError(f"x: expected samples of {width} elements, got shape {tuple(x.shape)}")
        x = self.activations[0](x.reshape(len(x), width))
        for weight, bias, activation in zip(self.weights, self.biases, self.activations[1:]):
            x = activation(F.linear(x, weight, bias))
        return x


@contextmanager
def evaluating(*modules: Any) -> Iterator[None]:
    """Eval mode without gradients, for as long as the context lasts; afterwards, also after an error, all is
    as it was.

    Restored: every submodule's own training flag, its attributes and buffers (a forward pass may set or count
    something), torch's random state on the CPU and CUDA, the grad mode. Flags are set directly, not by
    train(): some modules rewrite their weights there. Modules compiled in place run uncompiled: a hook would
    make them compile again. Arguments that are no nn.Module are ignored.
    """
    parts = [part for module in modules if isinstance(module, nn.Module) for part in module.modules()]
    flags = [(part, part.training) for part in parts]
    attributes = [
        (names, dict(names))
        for part in parts
        for names in (vars(part), part._parameters, part._buffers, part._modules)
        if isinstance(names, dict)
    ]  # a scripted module's are not
    with torch.random.fork_rng(_cuda_devices()), torch.no_grad():
        buffers = [
            (b, b._version, b.clone())
            for part in parts
            for b in part._buffers.values()
            if b is not None and not b.is_inference()
        ]
        try:
            for part in parts:
                part.training = False
                if getattr(part, "_compiled_call_impl", None) is not None:  # set by part.compile()
                    part._compiled_call_impl = None
            yield
        finally:
            for part, flag in flags:
                part.training = flag
            for now, before in attributes:
                for name in now.keys() - before.keys():
                    del now[name]
                now.update(before)
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


def networks_in(stacked: Stacked) -> int:
    """How many networks; ValueError for none, or numbers that differ."""
    counts = {len(value) for values in stacked for value in values.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"stacked: expected parameters of one or more networks, got stacks of {sorted(counts)}"
        )
    return counts.pop()


@contextmanager
def loaded(f: nn.Module, stacked: Stacked, number: int) -> Iterator[None]:
    """f with the parameters and buffers of one of several networks, for as long as the context lasts.

    stacked: as torch.func.stack_module_state returns them, (B, ...) each, by the names in f, or in the model that f was
        cut from. number: from 0 to B - 1.
    Raises ValueError for a parameter or buffer that is missing, or has another shape than f's.
    """
    values = {**stacked[0], **stacked[1]}
    names: dict[int, str] = {}  # the first of those that share a tensor
    whole = getattr(f, "whole", (f,))[0]
    for name, tensor in (*whole.named_parameters(), *whole.named_buffers()):
        names[id(tensor)] = name if name in values else name.removeprefix("model.")
    with evaluating(f):
        for part in f.modules():
            for own in (part._parameters, part._buffers):
                for key, tensor in own.items():
                    if tensor is None:
                        continue
                    value = values.get(names[id(tensor)])
                    if value is None or value.shape[1:] != tensor.shape:
                        got = "nothing of that name" if value is None else f"shape {tuple(value.shape)}"
                        expected = ", ".join(("networks", *map(str, tensor.shape)))
                        raise ValueError(f"stacked: {names[id(tensor)]!r}: expected ({expected}), got {got}")
                    own[key] = value[number].detach()
        yield


def _cuda_devices() -> list[int]:
    """CUDA devices whose random state may be in use: none before CUDA is first touched."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


# Tracing ---------------------------------------------------------------------------------------------------


def _uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped."""
    return getattr(model, "_orig_mod", model)


def _hooked(module: nn.Module) -> bool:
    everywhere = torch.nn.modules.module
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
    )


class _Call(nn.Module):
    """Calls the model as a user does, and selects the output. Tracing this, and not the model, makes the model's
    default arguments, its own hooks and constants met on the way no special cases."""

    def __init__(self, model: nn.Module, inputs: Any = None, forward: Forward = None, output: Output = None):
        super().__init__()
        self.model = model
        self.run = forward
        self.output = output
        self.names = list(inputs) if isinstance(inputs, Mapping) else None
        self.count = len(inputs) if isinstance(inputs, (tuple, list)) else None

    def forward(self, inputs: Any) -> Any:
        if self.run is not None:
            result = self.run(self.model, inputs)
        elif self.names is not None:
            result = self.model(**{name: inputs[name] for name in self.names})
        elif self.count is not None:
            result = self.model(*[inputs[i] for i in range(self.count)])
        else:
            result = self.model(inputs)
        return _selected(result, self.output)


def _selected(result: Any, output: Output) -> Any:
    if output is None:
        return result
    if callable(output):
        return output(result)
    try:
        named = isinstance(output, str) and not isinstance(result, Mapping)
        return getattr(result, output) if named else result[output]
    except (KeyError, IndexError, AttributeError, TypeError):
        raise ValueError(f"output: no {output!r} in what the model returns, {_contents(result)}") from None


def _contents(value: Any) -> str:
    """A container, for a reader."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {kind} of {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {kind} of {len(value)}"
    return f"a {kind}"


class _Tracer(fx.Tracer):
    """Keeps whole, beside torch's own modules: the layer to cut at, and every module with hooks, which would
    else be run on proxies."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return module is self.layer or _hooked(module) or super().is_leaf_module(module, qualified_name)


# Recognising a chain ---------------------------------------------------------------------------------------


FLATTEN = "flatten"
Linear = tuple[Tensor, Tensor | None]  # weight and bias
Step = Any  # of a chain: Linear, Affine, Activation or FLATTEN


def _named(name: str):
    return lambda input, inplace=False: Activation(name)


def _leaky_relu(input, negative_slope=0.01, inplace=False):
    return Activation("leaky_relu", float(negative_slope))


def _elu(input, alpha=1.0, inplace=False):
    return Activation("elu", float(alpha))


def _gelu(input, approximate="none"):
    return {"none": Activation("gelu"), "tanh": Activation("gelu_tanh")}.get(approximate)


def _softplus(input, beta=1, threshold=20):
    return Activation("softplus", float(beta), float(threshold))


def _dropout(training_default: bool):
    def read(input, p=0.5, training=training_default, inplace=False):
        return IDENTITY if training is False or p == 0 else None

    return read


def _flatten(start_default: int):
    def read(input, start_dim=start_default, end_dim=-1):
        return FLATTEN if (start_dim, end_dim) == (1, -1) else None

    return read


def _unchanged(input):
    return IDENTITY


# Each reads the arguments of a call, by the called function's own signature, into an activation (identity for
# what leaves a sample as it is) or FLATTEN, or None for what has no place in a chain.
FUNCTIONS = {
    F.relu: _named("relu"),
    F.relu_: _named("relu"),
    torch.relu: _named("relu"),
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu,
    F.elu: _elu,
    F.elu_: _elu,
    F.silu: _named("silu"),
    F.gelu: _gelu,
    torch.tanh: _named("tanh"),
    torch.tanh_: _named("tanh"),
    torch.sigmoid: _named("sigmoid"),
    torch.sigmoid_: _named("sigmoid"),
    F.softplus: _softplus,
    torch.sin: _named("sin"),
    torch.sin_: _named("sin"),
    F.dropout: _dropout(True),
    F.dropout1d: _dropout(True),
    F.dropout2d: _dropout(True),
    F.dropout3d: _dropout(True),
    F.alpha_dropout: _dropout(False),
    F.feature_alpha_dropout: _dropout(False),
    torch.flatten: _flatten(0),
}
METHODS = {
    **{name + suffix: _named(name) for name in ("relu", "tanh", "sigmoid", "sin") for suffix in ("", "_")},
    "flatten": _flatten(0),
    "contiguous": _unchanged,
    "clone": _unchanged,
}
MODULES = {
    nn.ReLU: lambda m: Activation("relu"),
    nn.LeakyReLU: lambda m: _leaky_relu(None, m.negative_slope),
    nn.ELU: lambda m: _elu(None, m.alpha),
    nn.SiLU: lambda m: Activation("silu"),
    nn.GELU: lambda m: _gelu(None, m.approximate),
    nn.Tanh: lambda m: Activation("tanh"),
    nn.Sigmoid: lambda m: Activation("sigmoid"),
    nn.Softplus: lambda m: _softplus(None, m.beta, m.threshold),
    nn.Flatten: lambda m: _flatten(1)(None, m.start_dim, m.end_dim),
    **{
        kind: _unchanged
        for kind in (
            nn.Identity,
            nn.Dropout,
            nn.Dropout1d,
            nn.Dropout2d,
            nn.Dropout3d,
            nn.AlphaDropout,
            nn.FeatureAlphaDropout,
        )
    },
}


class NotAChain(Exception):
    """Why a module is no chain of Linear maps and activations, in a few words."""


def recognise(f: Any) -> Chain | None:
    """The chain of Linear maps and activations that an nn.Module is in eval mode, or None.

    None for anything else, for what cannot be told for sure, and where hooks are involved. No sample is seen
    here, and branches on the input's type or shape are not: compare chain(x) with f(x) on samples before use.
    Weights that are computed (parametrisations, a frozen batch norm folded into its neighbour) are as they are now.
    """
    try:
        return chain_or_reason(f)
    except NotAChain:
        return None


def chain_or_reason(f: Any) -> Chain:
    """:func:`recognise`; raises NotAChain with the reason where there is none."""
    if not isinstance(f, nn.Module):
        raise NotAChain(f"{getattr(f, '__name__', type(f).__name__)!r} is no nn.Module")
    f = _uncompiled(f)
    with evaluating(f):
        try:
            if isinstance(f, fx.GraphModule) and _plain(f):
                return _chain_of(_read_graph(f.graph, f))
            if (parts := _in_order(f)) is not None:
                return _chain_of([_read_module(part) for part in parts])
            root = _Call(f)
            return _chain_of(_read_graph(_Tracer().trace(root), root))
        except NotAChain:
            raise
        except (
            Exception
        ) as error:  # the user's forward ran on proxies: any error means that it cannot be read
            raise NotAChain(f"torch.fx cannot trace its forward ({type(error).__name__}: {error})") from error


def _in_order(f: nn.Module) -> list[nn.Module] | None:
    """The parts of nested nn.Sequential, where there is nothing else: what tracing them would find, at once."""
    if type(f) is not nn.Sequential:
        return [f] if _known(f) else None
    if not _plain(f):
        return None
    parts: list[nn.Module] = []
    for part in f:
        inner = _in_order(part)
        if inner is None:
            return None
        parts += inner
    return parts


def _read_graph(graph: fx.Graph, root: nn.Module) -> list[Step]:
    """The steps of a graph in which each node works on the result of the one before and on nothing else."""
    current = None
    steps: list[Step] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "placeholder" and current is None:
            current = node
            continue
        if node.op == "output":
            if node.args[0] is not current:
                raise NotAChain("its output is not the last result alone")
            return steps
        if _input(node) is not current:
            raise NotAChain(f"{_said(node, root)} does not work on the result before it alone")
        steps.append(_read_step(node, root))
        current = node
    raise NotAChain("it has no output")


def _said(node: fx.Node, root: nn.Module) -> str:
    """A node, for a reader."""
    if node.op == "call_module":
        name = str(node.target).removeprefix("model.")
        return f"{type(root.get_submodule(str(node.target))).__name__} {name!r}"
    return f"{getattr(node.target, '__name__', node.target)}()"


def _chain_of(steps: list[Step]) -> Chain:
    """Steps in a row as a chain."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    activations = [IDENTITY]
    flattens = False
    scale: Affine | None = None  # waits for the Linear after it
    for step in steps:
        if isinstance(step, Affine):
            if weights and activations[-1] == IDENTITY and scale is None:
                weights[-1], biases[-1] = step.after(weights[-1], biases[-1])
            elif scale is None:
                scale = step
            else:
                raise NotAChain("two batch norms in a row")
        elif isinstance(step, tuple):
            weight, bias = step if scale is None else scale.before(*step)
            weights.append(weight)
            biases.append(bias)
            activations.append(IDENTITY)
            scale = None
        elif step == FLATTEN:
            flattens = flattens or not weights
        elif step != IDENTITY:
            if scale is not None:
                raise NotAChain(f"{step.name} after a batch norm that no Linear precedes")
            if activations[-1] != IDENTITY:
                raise NotAChain(f"{activations[-1].name} and {step.name} in a row")
            activations[-1] = step
    if scale is not None:
        raise NotAChain("a batch norm that neither follows a Linear nor precedes one")
    return _checked_chain(weights, biases, activations, flattens)


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _plain(module: nn.Module) -> bool:
    """Whether calling the module means just its class's forward."""
    return not _hooked(module) and "forward" not in vars(module)


def _known(module: nn.Module) -> bool:
    return _kind(module) in (nn.Linear, nn.BatchNorm1d) or type(module) in MODULES


def _kind(module: nn.Module) -> type[nn.Module]:
    """The module's class; of a parametrised one that before."""
    return type(module).__bases__[0] if nn.utils.parametrize.is_parametrized(module) else type(module)


def _read_module(module: nn.Module, name: str = "") -> Step:
    said = f"{_kind(module).__name__} {name!r}" if name else _kind(module).__name__
    if not _plain(module):
        raise NotAChain(f"{said} has hooks, or a forward of its own")
    if _kind(module) is nn.Linear:
        return module.weight, module.bias
    if _kind(module) is nn.BatchNorm1d:
        if module.running_mean is None:
            raise NotAChain(f"{said} keeps no running statistics")
        return _frozen_batch_norm(module)
    step = MODULES[type(module)](module) if type(module) in MODULES else None
    if step is None:
        raise NotAChain(f"{said} is neither a Linear nor a pointwise activation that the kernels know")
    return step


def _read_step(node: fx.Node, root: nn.Module) -> Step:
    if node.op == "call_module":
        return _read_module(root.get_submodule(node.target), str(node.target).removeprefix("model."))
    if node.op == "call_function" and node.target is F.linear:

        def attributes(input, weight, bias=None):
            return _attribute(weight, root), None if bias is None else _attribute(bias, root)

        return attributes(*node.args, **node.kwargs)
    table = FUNCTIONS if node.op == "call_function" else METHODS
    step = table[node.target](*node.args, **node.kwargs) if node.target in table else None
    if step is None:
        raise NotAChain(
            f"{_said(node, root)} is neither a Linear nor a pointwise activation that the kernels know"
        )
    return step


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> scale x + shift, unit by unit, in float64."""

    scale: Tensor
    shift: Tensor

    def after(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """The Linear whose outputs this works on, and this, as one."""
        shift = self.shift if bias is None else self.shift + self.scale * bias.detach()
        return (self.scale[:, None] * weight.detach()).to(weight.dtype), shift.to(weight.dtype)

    def before(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """This, and the Linear that works on its outputs, as one."""
        shift = weight.detach().double() @ self.shift
        shift = shift if bias is None else shift + bias.detach()
        return (weight.detach() * self.scale).to(weight.dtype), shift.to(weight.dtype)


def _frozen_batch_norm(module: nn.BatchNorm1d) -> Affine:
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach()
    shift = -module.running_mean * scale
    return Affine(scale, shift if module.bias is None else shift + module.bias.detach())


def _attribute(node: fx.Node, root: nn.Module) -> Tensor:
    if node.op != "get_attr":
        raise NotAChain("a Linear whose weight is computed in the forward")
    value = root
    for name in node.target.split("."):
        value = getattr(value, name)
    return value


def _checked_chain(
    weights: list[Tensor], biases: list[Tensor | None], activations: list[Activation], flattens: bool
) -> Chain:
    """The chain, if all of it is plain dense matrices of one dtype and device that fit together."""
    tensors = weights + [b for b in biases if b is not None]
    if not weights:
        raise NotAChain("it has no Linear")
    if any(type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided for t in tensors):
        raise NotAChain("a weight that is no plain dense tensor")
    kinds = {f"{t.dtype} on {t.device}" for t in tensors}
    if len(kinds) != 1 or tensors[0].dtype not in CHAIN_DTYPES:
        raise NotAChain(f"weights are {' and '.join(sorted(kinds))}")
    if (
        any(w.ndim != 2 for w in weights)
        or any(b is not None and b.shape != w.shape[:1] for w, b in zip(weights, biases))
        or any(w.shape[0] != after.shape[1] for w, after in zip(weights, weights[1:]))
    ):
        raise NotAChain("shapes of weights that do not fit together")
    return Chain(
        tuple(w.detach() for w in weights),
        tuple(b if b is None else b.detach() for b in biases),
        tuple(activations),
        flattens,
    )


# Cutting ---------------------------------------------------------------------------------------------------


def cut(
    model: nn.Module,
    layer: str,
    inputs: Any,
    *,
    forward: Forward = None,
    output: Output = None,
    stacked: Stacked | None = None,
) -> tuple[nn.Module, Tensor]:
    """The sub-network from a layer's output on, and that output for `inputs`: tail(samples) == model(inputs).

    model: measured in eval mode, left as it was. The tail shares its parameters, so it follows its training;
        Python values and branches in its forward are as at the moment of the cut.
    layer: a name in model.named_modules(), called once per forward pass; "name@k" is its k-th call, from 0 on.
        Where it returns a tuple, dict or dataclass (LSTM, transformer blocks), the first floating-point tensor there.
    inputs: (N, ...), any dtype; or a tuple or a dict of tensors passed as arguments. Those that have not N
        rows as the first has are taken to be the same for every sample.
    forward: called as forward(model, inputs) in place of model(inputs), for models that take something else;
        inputs then are whatever it takes, tensors somewhere in tuples, lists and dicts.
    output: what of the model's output counts, where that is no tensor or not all of it matters: a key or an
        attribute, an index, or a function of it.
    stacked: parameters and buffers of B networks like the model, as torch.func.stack_module_state returns them:
        samples are then theirs, (B, N, ...), and the tail is to be measured with the same `stacked`.
    Returns (tail, samples): a module, and the layer's output (N, ...), detached. Where torch.fx cannot
    isolate what follows the layer, the tail is the model with that output replaced by a forward hook.

    Raises ValueError for a layer that does not exist, is not called exactly once, does not give one row per
    input, or around which the output depends on the inputs by another way, for a model on several devices or on meta;
    TypeError where model, inputs, the layer's output or the model's are no (floating)
    tensors, or inputs do not fit the model's forward.
    """
    if stacked is not None:
        samples = []
        for number in range(networks_in(stacked)):
            with loaded(model, stacked, number):
                tail, own = cut(model, layer, inputs, forward=forward, output=output)
            samples.append(own)
        tail, _ = cut(model, layer, inputs, forward=forward, output=output)
        tail.whole = (model,)  # whose names `stacked` has, where modules share a tensor
        return tail, torch.stack(samples)
    seen, result, path = _run_to(model, layer, inputs, forward, output)
    model = _uncompiled(model)
    part, call = _find(model, layer)
    try:
        tail: nn.Module = _traced_tail(_Call(model, inputs, forward, output), part, call, path)
        if _reproduces(tail, seen, result):
            return tail, seen
    except Exception:  # not traced, or along a branch that the samples do not take
        pass
    tail = _HookTail(_Call(model, inputs, forward, output), part, call or 0, path, inputs)
    if not _reproduces(tail, seen, result):
        raise ValueError(
            f"layer: the model's output depends on the inputs also by another way than through "
            f"{layer!r} (a skip connection around it, say); expected a layer that all of it "
            f"passes through"
        )
    return tail, seen


def run_to(
    model: nn.Module, layer: str, inputs: Any, forward: Forward = None, output: Output = None
) -> tuple[Tensor, Tensor]:
    """The layer's output and the model's for `inputs`, all checked as `cut` does; never waits for a device."""
    return _run_to(model, layer, inputs, forward, output)[:2]


def why_not_traced(
    model: nn.Module, layer: str, inputs: Any, forward: Forward, output: Output
) -> tuple[nn.Module | None, str]:
    """The tail by torch.fx, not compared with the model; or None, and why there is none."""
    path = [] if inputs is None else _run_to(model, layer, inputs, forward, output)[2]
    part, number = _find(model, layer)
    try:
        return _traced_tail(_Call(_uncompiled(model), inputs, forward, output), part, number, path), ""
    except Exception as error:  # of the user's forward, on proxies
        return None, f"torch.fx cannot trace the model ({type(error).__name__}: {str(error).splitlines()[0]})"


def match_layers(model: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the model's layers that match, in the model's order for each pattern: "blocks.*.mlp" is one of each block.

    patterns: names as in `cut`, or shell patterns (fnmatch) of whole names, in which * also stands for dots.
    Raises ValueError for a pattern that nothing matches, with the names that come close.
    """
    names = [name for name, _ in _uncompiled(model).named_modules(remove_duplicate=False) if name]
    found: dict[str, None] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layer: expected a name, got {type(pattern).__name__}")
        if not any(c in pattern for c in "*?["):
            _find(model, pattern)
            found[pattern] = None
            continue
        matching = [
            n for n in names if fnmatch.fnmatchcase(n, pattern) and "parametrizations" not in n.split(".")
        ]
        if not matching:
            raise ValueError(f"layer: nothing matches {pattern!r}; {_close(pattern, names)}")
        found.update(dict.fromkeys(matching))
    return tuple(found)


def _close(wanted: str, names: list[str]) -> str:
    close = difflib.get_close_matches(wanted, names, 5, 0.5) or names[:20]
    more = ", ..." if len(close) < len(names) else ""
    return f"it has {', '.join(close)}{more}" if names else "the model has no layers"


def _find(model: nn.Module, layer: str) -> tuple[nn.Module, int | None]:
    """The module of that name, and which of its calls is meant; None for its only one."""
    if not isinstance(layer, str):
        raise TypeError(f"layer: expected a name, got {type(layer).__name__}")
    layers = dict(_uncompiled(model).named_modules(remove_duplicate=False))
    del layers[""]
    if layer in layers:
        return layers[layer], None
    name, _, call = layer.rpartition("@")
    if name in layers and call.isdecimal():
        return layers[name], int(call)
    raise ValueError(f"layer: {layer!r} is not in the model; {_close(layer, list(layers))}")


def _run_to(
    model: nn.Module, layer: str, inputs: Any, forward: Forward, output: Output
) -> tuple[Tensor, Tensor, list]:
    """As run_to, and where in the layer's output its tensor is."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    rows = _rows(inputs, forward)
    model = _uncompiled(model)
    part, call = _find(model, layer)
    _check_fit(model, inputs, forward)
    seen: list[Any] = []
    calls = 0

    def record(module: nn.Module, args: Any, result: Any) -> None:
        nonlocal calls
        calls += 1
        if call is None or calls == call + 1:
            path = _path_to_tensor(result)
            tensor = None if path is None else _at(result, path)
            # What follows may work in place.
            seen.append((tensor.clone() if isinstance(tensor, Tensor) else result, path))

    handle = part.register_forward_hook(record)
    try:
        with evaluating(model):
            copies = _mapped(inputs, lambda tensor: tensor.detach().clone())
            result = _Call(model, inputs, forward, output)(copies)
    finally:
        handle.remove()
    if call is None and calls != 1:
        which = (
            f"; which call? name one, from {layer + '@0'!r} to {layer + f'@{calls - 1}'!r}" if calls else ""
        )
        raise ValueError(
            f"layer: {layer!r} was called {calls} times in one forward pass; expected once{which}"
        )
    if call is not None and calls <= call:
        raise ValueError(
            f"layer: {layer!r} is its call {call}, from 0 on, but there are {calls} in a forward pass"
        )
    samples, path = seen[0]
    _check_floating(f"layer: the output of {layer!r}", samples)
    _check_floating(
        "model: its output", result, "; output= selects the tensor in it" if output is None else ""
    )
    if samples.shape[:1] != (rows,):
        raise ValueError(
            f"layer: the output of {layer!r} has shape {tuple(samples.shape)} for "
            f"{rows} inputs; expected one row per input"
        )
    return samples, result, path


def _rows(inputs: Any, forward: Forward) -> int:
    """How many samples the inputs are."""
    tensors = list(_tensors(inputs))
    plain = isinstance(inputs, (Tensor, Mapping)) or (
        isinstance(inputs, (tuple, list)) and all(isinstance(i, Tensor) for i in inputs)
    )
    if not tensors or (forward is None and not plain):
        got = type(inputs).__name__
        if isinstance(inputs, (tuple, list)):
            got = ", ".join(type(i).__name__ for i in inputs) or "nothing"
        gather = ""
        if not isinstance(inputs, (tuple, list, Mapping)) and hasattr(inputs, "__iter__"):
            gather = "; gather the samples first, for instance torch.cat([x for x, labels in loader])"
        raise TypeError(f"inputs: expected a tensor, or a tuple or a dict of tensors, got {got}{gather}")
    if tensors[0].ndim == 0 or len(tensors[0]) == 0:
        raise ValueError(f"inputs: expected at least one sample, got shape {tuple(tensors[0].shape)}")
    return len(tensors[0])


def _check_fit(model: nn.Module, inputs: Any, forward: Forward) -> None:
    """Raises where model and inputs cannot be run together, which torch would say at its own length."""
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(parameter.device, name)
    if any(device.type == "meta" for device in devices):
        name = next(name for device, name in devices.items() if device.type == "meta")
        raise ValueError(
            f"model: its parameter {name!r} is on meta, where tensors have no values; load its weights"
        )
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"model: its parameters are on several devices ({where}); expected one")
    if forward is not None:
        return
    for tensor in _tensors(inputs):
        if devices and tensor.device not in devices:
            raise ValueError(
                f"inputs: on {tensor.device}, but the model is on {next(iter(devices))}; move one of them"
            )
    if isinstance(inputs, Tensor):
        return
    try:
        fits = inspect.signature(model.forward).bind
    except (TypeError, ValueError):  # a scripted one has none
        return
    try:
        fits(**inputs) if isinstance(inputs, Mapping) else fits(*inputs)
    except TypeError as error:
        raise TypeError(
            f"inputs: do not fit the arguments of the model's forward ({error}); expected those alone, without labels; "
            "forward= runs a model that is called otherwise"
        ) from None


def _check_floating(what: str, value: Any, hint: str = "") -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{what} is {got}; expected a floating-point tensor{hint}")


# Tensors in tuples, lists, dicts and dataclasses -----------------------------------------------------------


def _entries(value: Any) -> list[tuple[Any, Any]]:
    """A container's keys and values; nothing of what is none."""
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return list(value.items())
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return []


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for _, entry in _entries(value):
        yield from _tensors(entry)


def _with(value: Any, changes: dict[Any, Any]) -> Any:
    """A copy of a container with some entries replaced."""
    if isinstance(value, tuple):
        entries = [changes.get(key, entry) for key, entry in enumerate(value)]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    result = copy.copy(value)
    for key, entry in changes.items():
        if isinstance(value, (list, Mapping)):
            result[key] = entry
        else:
            object.__setattr__(result, key, entry)
    return result


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same containers with every tensor replaced by a function of it."""
    if isinstance(value, Tensor):
        return function(value)
    entries = _entries(value)
    return _with(value, {key: _mapped(entry, function) for key, entry in entries}) if entries else value


def _path_to_tensor(value: Any) -> list | None:
    """Keys that lead to the first floating-point tensor; [] where the value is one, None where there is none."""
    if isinstance(value, Tensor):
        return [] if value.is_floating_point() else None
    for key, entry in _entries(value):
        path = _path_to_tensor(entry)
        if path is not None:
            return [key, *path]
    return None


def _at(value: Any, path: list) -> Any:
    for key in path:
        value = value[key] if isinstance(value, (tuple, list, Mapping)) else getattr(value, key)
    return value


def _replaced(value: Any, path: list, tensor: Tensor) -> Any:
    """The value with another tensor at the end of the path."""
    if not path:
        return tensor
    return _with(value, {path[0]: _replaced(_at(value, path[:1]), path[1:], tensor)})


# Tails -----------------------------------------------------------------------------------------------------


def _reproduces(tail: nn.Module, samples: Tensor, output: Tensor) -> bool:
    """Whether tail(samples) is the model's output."""
    with evaluating(tail):
        again = tail(samples)
    return bool(same_output(again, output))


def same_output(again: Any, output: Tensor) -> bool | Tensor:
    """Whether two outputs are equal up to the rounding of the same operations in another order (the shapes are
    the same, so mostly to the bit); a 0-dim bool on their device where that takes their values."""
    if (
        not isinstance(again, Tensor)
        or again.device != output.device
        or again.shape != output.shape
        or again.dtype != output.dtype
    ):
        return False
    if output.numel() == 0:
        return True
    tolerance = 32 * torch.finfo(output.dtype).eps
    finite = output.isfinite()
    magnitude = torch.where(finite, output.abs(), 0)
    close = (again - output).abs() <= tolerance * magnitude + tolerance * magnitude.amax()
    equal = (again == output) | (again.isnan() & output.isnan())
    return torch.where(finite, close, equal).all()


def _traced_tail(call: _Call, layer: nn.Module, number: int | None, path: list) -> fx.GraphModule:
    """What follows a call of the layer as a GraphModule of its own.

    Raises whatever the user's forward raises on proxies; ValueError where the layer cannot be separated.
    """
    with evaluating(call.model):
        graph = _Tracer(layer).trace(call)
    cuts = [n for n in graph.nodes if n.op == "call_module" and call.get_submodule(n.target) is layer]
    if not cuts or (number is None and len(cuts) > 1) or (number or 0) >= len(cuts):
        raise ValueError(f"torch.fx sees {len(cuts)} calls of the layer")
    start = [cuts[number or 0]]
    for key in path:  # of a layer that returns a tuple, say, only the entry that is measured is replaced
        start = [n for last in start for n in last.users if n.target is operator.getitem and n.args[1] == key]
    tail = fx.Graph()
    # Cloned, as what follows may work in place.
    samples = tail.call_method("clone", (tail.placeholder("samples"),))
    copies = dict.fromkeys(start, samples)
    fixed = set()  # nodes that depend on parameters only

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = tail.node_copy(node, copied)
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
        if not node.users and _pure(node):  # a loss beside the output, say
            tail.erase_node(node)
    return fx.GraphModule(call, tail)


def _pure(node: fx.Node) -> bool:
    """Whether a call does nothing but return a result, by PyTorch's way of naming what works in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "_")
    in_place = (
        name.endswith("_") or name.startswith(("i", "setitem")) or node.kwargs.keys() & {"inplace", "out"}
    )
    return not in_place


# Keeping a cut ---------------------------------------------------------------------------------------------


def python_state(model: nn.Module, inputs: Any) -> list:
    """What a cut makes constants of, to be compared by ==: which modules, hooks and tensors a model has, of
    what dtypes, its attributes, and which inputs they are. Left out are training flags, which a tail does not
    read, and values of parameters, which it follows. Other tensors, where the forward is the user's, count with
    how often they were changed: what is computed of them alone is a constant to torch.fx.

    Attributes are followed two levels deep; below, an object counts by its identity alone.
    """
    state = [_frozen(inputs, 1, False)]
    for part in model.modules():
        traced = not type(part).__module__.startswith("torch.nn")  # fx.Tracer's own rule
        attributes = [(name, _frozen(v, 2, traced)) for name, v in vars(part).items() if name != "training"]
        state.append((_Same(part), attributes))
    return state


class _Same:
    """Equal to the very same object; holding it keeps its id from being used again."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _frozen(value: Any, levels: int, versions: bool) -> Any:
    if type(value) in PLAIN:
        return type(value), value
    if isinstance(value, Tensor):
        versions = versions and not isinstance(value, nn.Parameter)
        version = (float("nan") if value.is_inference() else value._version) if versions else 0
        return _Same(value), value.dtype, value.device, value.shape, version
    if isinstance(value, (list, tuple, set, frozenset)):
        entries = list(value)
    elif isinstance(value, dict):
        entries = [entry for pair in value.items() for entry in pair]
    else:
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict) or isinstance(value, (nn.Module, ModuleType)):
            return _Same(value)
        entries = [entry for pair in attributes.items() for entry in pair]
    if levels == 0:
        return _Same(value)
    if len(entries) > LARGE:
        return float("nan")  # equal to nothing: comparing would cost more than tracing anew
    return _Same(value), [_frozen(entry, levels - 1, versions) for entry in entries]


class _HookTail(nn.Module):
    """The model with one layer's output replaced. Everything before the layer is computed in vain, on the
    first input repeated."""

    def __init__(self, call: _Call, layer: nn.Module, number: int, path: list, inputs: Any) -> None:
        super().__init__()
        self.model = call.model
        self.call = (call,)  # in tuples, as they are registered under the model already
        self.layer = (layer,)
        self.number = number
        self.path = path
        batch = len(next(_tensors(inputs)))

        def of_first(tensor: Tensor) -> Tensor:
            return (tensor[:1] if tensor.ndim and len(tensor) == batch else tensor).detach().clone()

        self.first = _mapped(inputs, of_first)
        self.batched = [bool(i.ndim and len(i) == batch) for i in _tensors(inputs)]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) in place of the layer's output -> the model's output."""
        batched, calls = iter(self.batched), 0

        def repeated(tensor: Tensor) -> Tensor:
            return (tensor.expand(len(x), *tensor.shape[1:]) if next(batched) else tensor).clone()

        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            return _replaced(output, self.path, x.clone()) if calls == self.number + 1 else None

        handle = self.layer[0].register_forward_hook(replace)
        try:
            return self.call[0](_mapped(self.first, repeated))
        finally:
            handle.remove()
