"""Take a network apart: the tail after a layer, and whether that tail is a chain of Linear and activations.

Nothing here changes the user's model: see `evaluating`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """Calls the model as a user does. Tracing this, and not the model, makes the model's default arguments,
    its own hooks and constants met on the way no special cases."""

    def __init__(self, model: nn.Module, arguments: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments

    def forward(self, inputs):
        if self.arguments is None:
            return self.model(inputs)
        return self.model(*[inputs[i] for i in range(self.arguments)])


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
Linear = tuple[Tensor, Tensor | None]


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


def recognise(f: Any) -> Chain | None:
    """The chain of Linear maps and activations that an nn.Module is in eval mode, or None.

    None for anything else, for what cannot be told for sure, and where hooks are involved. No sample is seen
    here, and branches on the input's type or shape are not: compare chain(x) with f(x) on samples before use.
    """
    if not isinstance(f, nn.Module):
        return None
    f = _uncompiled(f)
    with evaluating(f):
        try:
            if isinstance(f, fx.GraphModule) and _plain(f):
                return _read_chain(f.graph, f)
            if (parts := _in_order(f)) is not None:
                return _chain_of([_read_module(part) for part in parts])
            root = _Call(f)
            return _read_chain(_Tracer().trace(root), root)
        except Exception:  # the user's forward ran on proxies: any error means that it cannot be read
            return None


def _in_order(f: nn.Module) -> list[nn.Module] | None:
    """The parts of nested nn.Sequential, where there is nothing else: what tracing them would find, at once."""
    if type(f) is not nn.Sequential:
        return [f] if type(f) is nn.Linear or type(f) in MODULES else None
    if not _plain(f):
        return None
    parts: list[nn.Module] = []
    for part in f:
        inner = _in_order(part)
        if inner is None:
            return None
        parts += inner
    return parts


def _read_chain(graph: fx.Graph, root: nn.Module) -> Chain | None:
    """The chain, if each node of the graph works on the result of the one before and on nothing else."""
    current = None
    steps: list[Linear | Activation | str | None] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "placeholder" and current is None:
            current = node
            continue
        if node.op == "output":
            return _chain_of(steps) if node.args[0] is current else None
        steps.append(_read_step(node, root) if _input(node) is current else None)
        if steps[-1] is None:
            return None
        current = node
    return None


def _chain_of(steps: list[Linear | Activation | str | None]) -> Chain | None:
    """Steps in a row as a chain; None where one of them has no place in it."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    activations = [IDENTITY]
    flattens = False
    for step in steps:
        if step is None:
            return None
        if isinstance(step, tuple):
            weights.append(step[0])
            biases.append(step[1])
            activations.append(IDENTITY)
        elif step == FLATTEN:
            flattens = flattens or not weights
        elif step != IDENTITY:
            if activations[-1] != IDENTITY:
                return None
            activations[-1] = step
    return _checked_chain(weights, biases, activations, flattens)


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _plain(module: nn.Module) -> bool:
    """Whether calling the module means just its class's forward."""
    return not _hooked(module) and "forward" not in vars(module)


def _read_module(module: nn.Module) -> Linear | Activation | str | None:
    if not _plain(module):
        return None
    if type(module) is nn.Linear:
        return module.weight, module.bias
    return MODULES[type(module)](module) if type(module) in MODULES else None


def _read_step(node: fx.Node, root: nn.Module) -> Linear | Activation | str | None:
    """Linear as weight and bias, an activation, or FLATTEN; None for what has no place in a chain."""
    if node.op == "call_module":
        return _read_module(root.get_submodule(node.target))
    if node.op == "call_function" and node.target is F.linear:

        def attributes(input, weight, bias=None):
            return _attribute(weight, root), None if bias is None else _attribute(bias, root)

        return attributes(*node.args, **node.kwargs)
    table = FUNCTIONS if node.op == "call_function" else METHODS
    return table[node.target](*node.args, **node.kwargs) if node.target in table else None


def _attribute(node: fx.Node, root: nn.Module) -> Tensor:
    if node.op != "get_attr":
        raise ValueError("a weight that is computed")
    value = root
    for name in node.target.split("."):
        value = getattr(value, name)
    return value


def _checked_chain(weights, biases, activations, flattens) -> Chain | None:
    """The chain, if all of it is plain dense matrices of one dtype and device that fit together."""
    tensors = weights + [b for b in biases if b is not None]
    if (
        not weights
        or any(type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided for t in tensors)
        or len({(t.dtype, t.device) for t in tensors}) != 1
        or tensors[0].dtype not in CHAIN_DTYPES
        or any(w.ndim != 2 for w in weights)
        or any(b is not None and b.shape != w.shape[:1] for w, b in zip(weights, biases))
        or any(w.shape[0] != after.shape[1] for w, after in zip(weights, weights[1:]))
    ):
        return None
    return Chain(
        tuple(w.detach() for w in weights),
        tuple(b if b is None else b.detach() for b in biases),
        tuple(activations),
        flattens,
    )


# Cutting ---------------------------------------------------------------------------------------------------


def cut(model: nn.Module, layer: str, inputs: Tensor | tuple[Tensor, ...]) -> tuple[nn.Module, Tensor]:
    """The sub-network from a layer's output on, and that output for `inputs`: tail(samples) == model(inputs).

    model: measured in eval mode, left as it was. The tail shares its parameters, so it follows its training;
        Python values and branches in its forward are as at the moment of the cut.
    layer: a name in model.named_modules(), called once per forward pass.
    inputs: (N, ...), any dtype, or a tuple of tensors passed as positional arguments; those that have not N
        rows as the first has are taken to be the same for every sample.
    Returns (tail, samples): a module, and the layer's output (N, ...), detached. Where torch.fx cannot
    isolate what follows the layer, the tail is the model with that output replaced by a forward hook.

    Raises ValueError for a layer that does not exist, is not called exactly once, does not give one row per
    input, or around which the output depends on the inputs by another way; TypeError where model, inputs, the
    layer's output or the model's are no (floating) tensors.
    """
    samples, output = run_to(model, layer, inputs)
    model, arguments = _uncompiled(model), _arguments(inputs)
    part = model.get_submodule(layer)
    tail = _traced_tail(model, part, len(arguments) if isinstance(inputs, (tuple, list)) else None)
    if tail is not None:
        try:
            if _reproduces(tail, samples, output):
                return tail, samples
        except Exception:  # traced along a branch that the samples do not take
            pass
    tail = _HookTail(model, part, arguments)
    if not _reproduces(tail, samples, output):
        raise ValueError(
            f"layer: the model's output depends on the inputs also by another way than through "
            f"{layer!r} (a skip connection around it, say); expected a layer that all of it "
            f"passes through"
        )
    return tail, samples


def run_to(model: nn.Module, layer: str, inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The layer's output and the model's for `inputs`, all checked as `cut` does; never waits for a device."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    arguments = _arguments(inputs)
    model = _uncompiled(model)
    layers = dict(model.named_modules(remove_duplicate=False))
    del layers[""]
    if not isinstance(layer, str):
        raise TypeError(f"layer: expected a name, got {type(layer).__name__}")
    if layer not in layers:
        raise ValueError(f"layer: {layer!r} is not in the model; it has {', '.join(layers) or 'no layers'}")
    return _run(model, layers[layer], layer, arguments)


def _arguments(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not arguments or not all(isinstance(i, Tensor) for i in arguments):
        got = ", ".join(type(i).__name__ for i in arguments) or "nothing"
        raise TypeError(f"inputs: expected a tensor or a tuple of tensors, got {got}")
    if arguments[0].ndim == 0 or len(arguments[0]) == 0:
        raise ValueError(f"inputs: expected at least one sample, got shape {tuple(arguments[0].shape)}")
    return arguments


def _run(model: nn.Module, layer: nn.Module, name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The layer's output and the model's, checked."""
    seen = []

    def record(module, args, output):
        # What follows may work in place.
        seen.append(output.clone() if isinstance(output, Tensor) else output)

    handle = layer.register_forward_hook(record)
    try:
        with evaluating(model):
            output = model(*[i.detach().clone() for i in inputs])
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(f"layer: {name!r} was called {len(seen)} times in one forward pass; expected once")
    _check_floating(f"layer: the output of {name!r}", seen[0])
    _check_floating("model: its output", output)
    if seen[0].shape[:1] != inputs[0].shape[:1]:
        raise ValueError(
            f"layer: the output of {name!r} has shape {tuple(seen[0].shape)} for "
            f"{len(inputs[0])} inputs; expected one row per input"
        )
    return seen[0], output


def _check_floating(what: str, value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{what} is {got}; expected a floating-point tensor")


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


def _traced_tail(model: nn.Module, layer: nn.Module, arguments: int | None) -> fx.GraphModule | None:
    """What follows the layer as a GraphModule of its own, or None where tracing cannot separate it."""
    root = _Call(model, arguments)
    try:
        with evaluating(model):
            graph = _Tracer(layer).trace(root)
    except Exception:  # the user's forward ran on proxies: any error means that it cannot be traced
        return None
    cuts = [n for n in graph.nodes if n.op == "call_module" and root.get_submodule(n.target) is layer]
    if len(cuts) != 1:
        return None
    tail = fx.Graph()
    # Cloned, as what follows may work in place.
    copies = {cuts[0]: tail.call_method("clone", (tail.placeholder("samples"),))}
    fixed = set()  # nodes that depend on parameters only

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = tail.node_copy(node, copy)
        return copies[node]

    for node in graph.nodes:
        if node.op == "placeholder" or node in copies:
            continue
        before = node.all_input_nodes
        if all(n in fixed for n in before):
            fixed.add(node)
        elif all(n in fixed or n in copies for n in before):
            copy(node)
    if not any(node.op == "output" for node in tail.nodes):
        return None
    return fx.GraphModule(root, tail)


# Keeping a cut ---------------------------------------------------------------------------------------------


def python_state(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> list:
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

    def __init__(self, model: nn.Module, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.model = model
        self.layer = (layer,)  # in a tuple, as it is registered under the model already
        batch = len(inputs[0])
        self.first = [(i[:1] if i.ndim and len(i) == batch else i).detach().clone() for i in inputs]
        self.batched = [bool(i.ndim and len(i) == batch) for i in inputs]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) in place of the layer's output -> the model's output."""
        inputs = [
            (i.expand(len(x), *i.shape[1:]) if batched else i).clone()
            for i, batched in zip(self.first, self.batched)
        ]
        handle = self.layer[0].register_forward_hook(lambda *_: x.clone())
        try:
            return self.model(*inputs)
        finally:
            handle.remove()
