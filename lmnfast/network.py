"""Whether a network is a chain of Linear and activations, and how one is run without a trace.

Nothing here changes the user's model: see `state.evaluating`.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .nested import contents
from .state import FORWARDS, alone, evaluating, hooked, keeps_nothing, uninterrupted

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

Forward = Callable[[nn.Module, Any], Any] | None  # runs the model on inputs
Stacked = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # parameters and buffers of several networks
WHOLE = "_lmnfast_whole"  # of a tail to be measured with stacked parameters: the model it was cut from, in a tuple
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
    skips: (into, source) of earlier values that are added to later ones, one each, as residual blocks do. Value 2 n is
        what activation n works on, value 2 n + 1 what it gives, both with what is added to them; where it is the identity,
        2 n alone counts.

    Raises:
        TypeError: weights or biases of several dtypes or devices, or of a dtype that is not in CHAIN_DTYPES.
        ValueError: numbers of weights, biases, activations, or shapes, or skips, that do not fit together.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activations: tuple[Activation, ...]
    flattens: bool = False
    skips: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights: expected one or more, got none")
        first = self.weights[0]
        if first.dtype not in CHAIN_DTYPES:
            raise TypeError(f"weights[0]: expected one of {CHAIN_DTYPES}, got {first.dtype}")
        if first.dim() != 2:
            raise ValueError(f"weights[0]: expected (out, in), got shape {tuple(first.shape)}")
        widths = check_layers(first.shape[1], first.dtype, first.device, self.weights, self.biases)
        if len(self.activations) != len(widths):
            raise ValueError(
                f"activations: expected {len(widths)} for {len(self.weights)} weights, got {len(self.activations)}"
            )
        for into, source in self.skips:
            if (
                not 0 <= source < into < 2 * len(widths)
                or any(v % 2 and self.activations[v // 2] == IDENTITY for v in (into, source))
                or [v for v, _ in self.skips].count(into) > 1
            ):
                raise ValueError(f"skips: {into, source} is no earlier value for a later one, once")
            if widths[into // 2] != widths[source // 2]:
                raise ValueError(
                    f"skips: {into, source} adds a value of width {widths[source // 2]} to one of width "
                    f"{widths[into // 2]}"
                )

    def __call__(self, x: Tensor) -> Tensor:
        """The chain in plain torch: x (B, D) or (B, *in), flattened to D = weights[0].shape[1] -> (B, K).

        Raises ValueError when a sample has not D elements.
        """
        return self.values(x)[-1]

    def values(self, x: Tensor) -> list[Tensor]:
        """Every value of the chain, as `skips` counts them."""
        width = self.weights[0].shape[1]
        if x.ndim < 2 or math.prod(x.shape[1:]) != width:
            raise ValueError(f"x: expected samples of {width} elements, got shape {tuple(x.shape)}")
        return _values_of(self, x.reshape(len(x), width), F.linear)


@dataclass(frozen=True, eq=False)
class ChainStack:
    """Several chains of one structure: all as in `Chain`, and each tensor with one more dimension in front, of the networks."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activations: tuple[Activation, ...]
    skips: tuple[tuple[int, int], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """All chains in plain torch: x (networks, N, *in), flattened to (networks, N, D) -> (networks, N, K)."""

        def linear(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return z @ weight.mT if bias is None else torch.baddbmm(bias[:, None], z, weight.mT)

        return _values_of(self, x.flatten(2), linear)[-1]

    def of_network(self, number: int) -> Chain:
        """One of them, for samples (N, D)."""
        biases = tuple(None if b is None else b[number] for b in self.biases)
        return Chain(tuple(w[number] for w in self.weights), biases, self.activations, skips=self.skips)


def stack_of(chain: Chain, stacked: Stacked) -> ChainStack | None:
    """The chains that networks with stacked parameters are, where `chain` is the one with the first network's: as views of its
    stacks, see `loaded`. None where a tensor of the chain is none of the stacked ones, but computed from them, say."""
    stacks = {_place(value[0]): value.detach() for values in stacked for value in values.values()}

    def of(tensor: Tensor) -> Tensor | None:
        return stacks.get(_place(tensor))

    weights = tuple(map(of, chain.weights))
    biases = tuple(None if b is None else of(b) for b in chain.biases)
    found = [*weights, *(b for b, own in zip(biases, chain.biases) if own is not None)]
    if any(stack is None for stack in found):
        return None
    return ChainStack(weights, biases, chain.activations, chain.skips)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor has its values; the same for all views of the same values."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _values_of(
    chain: Chain | ChainStack, z: Tensor, linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> list[Tensor]:
    """Every value of a chain on flattened samples, as `Chain.skips` counts them."""
    skips, values = dict(chain.skips), []
    for n, activation in enumerate(chain.activations):
        z = linear(z, chain.weights[n - 1], chain.biases[n - 1]) if n else z
        for into in (2 * n, 2 * n + 1):
            z = activation(z) if into % 2 else z
            z = z + values[skips[into]] if into in skips else z
            values.append(z)
    return values


def check_layers(
    inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> list[int]:
    """Raises what does not fit in the Linear layers of a chain on samples (N, inputs); returns all widths.

    TypeError for another dtype or device, ValueError for a number or a shape.
    """
    if len(biases) != len(weights):
        raise ValueError(
            f"biases: expected {len(weights)}, a tensor or None for each weight, got {len(biases)}"
        )
    widths = [inputs]
    for n, (w, b) in enumerate(zip(weights, biases)):
        for kind, tensor in (("weights", w), ("biases", b)):
            if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
                raise TypeError(
                    f"{kind}[{n}]: expected {dtype} on {device}, got {tensor.dtype} on {tensor.device}"
                )
        if w.dim() != 2 or w.shape[1] != widths[n] or w.numel() == 0:
            raise ValueError(f"weights[{n}]: expected (out, {widths[n]}), got shape {tuple(w.shape)}")
        widths.append(w.shape[0])
        if b is not None and b.shape != (w.shape[0],):
            raise ValueError(f"biases[{n}]: expected ({w.shape[0]},), got shape {tuple(b.shape)}")
    return widths


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
    whole = getattr(f, WHOLE, (f,))[0]
    for name, tensor in (*whole.named_parameters(), *whole.named_buffers()):
        names[id(tensor)] = name if name in values else name.removeprefix("model.")
    with evaluating(f, changed=True):
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


# Tracing ---------------------------------------------------------------------------------------------------


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped."""
    return getattr(model, "_orig_mod", model)


def wrapped_as(part: nn.Module) -> str | None:
    """The name of the one part of a wrapper that only calls it: of torch.compile, DataParallel, checkpoint_wrapper."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        if name in part._modules:
            return name
    return "module" if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None


# What no measure can call ----------------------------------------------------------------------------------


def check_made(model: nn.Module, what: str) -> None:
    """Raises ValueError where lazy modules have no parameters yet, which a measure must not make."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _check_values(name, tensor, what)


def _check_values(name: str, tensor: Tensor, what: str) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"{what}: {name!r} is lazy and has no values yet; run a batch through the model first"
        )


def check_function(f: nn.Module, samples: int) -> dict[str, Tensor]:
    """Raises ValueError for a module of which can be told without a call that it is no function of single samples, or that
    has no values yet. Returns its parameters by name, from one walk over its parts."""
    parameters: dict[str, Tensor] = {}
    for name, part in f.named_modules():
        for own in (part._parameters, part._buffers):
            for key, tensor in own.items():
                if tensor is not None:
                    path = f"{name}.{key}" if name else key
                    _check_values(path, tensor, "f")
                    if own is part._parameters:
                        parameters[path] = tensor
        said = f"its part {name.removeprefix('model.')!r}" if name else "it"
        if ".quantized.dynamic." in type(part).__module__:
            raise ValueError(
                f"f: {said} is quantised dynamically: no scale is part of its state, each call takes it from all rows of "
                "the batch, so a sample's outputs depend on the other samples; expected the float network, or static quantisation"
            )
        if _exported_for(part) == samples:
            raise ValueError(
                f"f: {said} was exported by torch.export for batches of {samples} samples alone, and is to be called on other "
                "numbers of them; export it with a dynamic first dimension: "
                'torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("samples")},))'
            )
    return parameters


def _exported_for(part: nn.Module) -> int | None:
    """The first dimension of the only inputs that a program of torch.export takes; None where others are taken, too."""
    hooks = part._forward_pre_hooks
    checks = [getattr(hook, "__name__", "") for hook in hooks.values()] if hooks else []
    is_program = "_check_input_constraints_pre_hook" in checks or type(part).__name__ == "UnflattenedModule"
    if not is_program:
        return None
    for node in getattr(part, "graph", fx.Graph()).nodes:
        shape = getattr(node.meta.get("val"), "shape", ()) if node.op == "placeholder" else ()
        if len(shape):
            return shape[0] if isinstance(shape[0], int) else None
    return None


class Call(nn.Module):
    """Calls the model as a user does, and selects the output. Tracing this, and not the model, makes the model's
    default arguments, its own hooks and constants met on the way no special cases."""

    def __init__(self, model: nn.Module, inputs: Any = None, forward: Forward = None, output: Output = None):
        super().__init__()
        self.model = model
        self.run = forward
        self.output = output
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
        raise ValueError(f"output: no {output!r} in what the model returns, {contents(result)}") from None


class OnThread:
    """True on one thread, false on every other."""

    def __init__(self, thread: int) -> None:
        self.thread = thread

    def __bool__(self) -> bool:
        return threading.get_ident() == self.thread


class Tracer(fx.Tracer):
    """Keeps whole, beside torch's own modules: the layer to cut at, and every module with hooks, which would
    else be run on proxies.

    fx.Tracer replaces nn.Module.__call__ and __getattr__ for the whole process and sets a flag that compiled functions
    refuse to run under. Here both count on the tracing thread alone, so that others can run their models meanwhile.
    """

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.here = OnThread(threading.get_ident())

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        # Two traces at once would put back each other's replacements, and one that is interrupted would leave its own.
        with alone(), uninterrupted():
            return super().trace(root, concrete_args)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        if hasattr(fx._symbolic_trace, "_is_fx_tracing_flag"):  # which trace() has set, and sets back
            fx._symbolic_trace._is_fx_tracing_flag = self.here
        return super().create_args_for_root(root_fn, is_module, concrete_args)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return super().call_module(m, forward, args, kwargs) if self.here else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self.here else attr_val

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return module is self.layer or hooked(module) or super().is_leaf_module(module, qualified_name)


# Recognising a chain ---------------------------------------------------------------------------------------


FLATTEN = "flatten"
Linear = tuple[Tensor, Tensor | None]  # weight and bias
Step = Any  # of a chain: Linear, Affine, Activation, Skip or FLATTEN


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
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
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


def why_no_chain(f: Any) -> str:
    """The reason of :func:`chain_or_reason`, or that what it found has other outputs."""
    try:
        chain_or_reason(f)
    except NotAChain as reason:
        return str(reason)
    return "the chain that it looks like has other outputs"


def chain_or_reason(f: Any) -> Chain:
    """:func:`recognise`; raises NotAChain with the reason where there is none."""
    if not isinstance(f, nn.Module):
        raise NotAChain(f"{getattr(f, '__name__', type(f).__name__)!r} is no nn.Module")
    f = uncompiled(f)
    if isinstance(f, (nn.DataParallel, nn.parallel.DistributedDataParallel)) and not hooked(f):
        f = f.module
    parts = _in_order(f)
    if parts is not None and not any(map(_is_parametrised, parts)):
        return _chain_of([_read_module(part) for part in parts])  # runs no code of the model
    with evaluating(f):
        try:
            if isinstance(f, fx.GraphModule) and is_plain(f):
                return _chain_of(_read_graph(f.graph, f))
            if parts is not None:
                return _chain_of([_read_module(part) for part in parts])
            root = Call(f)
            return _chain_of(_read_graph(Tracer().trace(root), root))
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
    if not is_plain(f):
        return None
    parts: list[nn.Module] = []
    for part in f:
        inner = _in_order(part)
        if inner is None:
            return None
        parts += inner
    return parts


def _read_graph(graph: fx.Graph, root: nn.Module) -> list[Step]:
    """The steps of a graph in which each node works on the result of the one before, and on nothing else but, to be
    added, an earlier one."""
    results: dict[fx.Node, int] = {}  # how many steps lead to each, as long as no other overwrites it
    steps: list[Step] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "placeholder" and not results:
            results[node] = 0
            continue
        if node.op == "output":
            if _steps_to(node.args[0], results) != len(steps):
                raise NotAChain("its output is not the last result alone")
            return steps
        if node.op != "call_module" and node.target in ADDITIONS:
            step = _read_sum(node, root, results, len(steps))
        else:
            before = _steps_to(_input(node), results)
            step = None if before is None else _read_step(node, root)
            if step == IDENTITY or (step == FLATTEN and any(isinstance(s, tuple) for s in steps[:before])):
                results[node] = before
                continue
            if before != len(steps):
                raise NotAChain(f"{_said(node, root)} does not work on the result before it alone")
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
    known = [_steps_to(operand, results) for operand in operands]
    if len(known) != 2 or None in known or node.kwargs.keys() - {"input", "other"}:
        raise NotAChain(f"{_said(node, root)} has other operands than two results of the chain")
    if max(known) != last or min(known) == last:
        raise NotAChain(f"{_said(node, root)} does not add an earlier result to the last one")
    return Skip(min(known))


def _in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a call may overwrite what it works on."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = node.target if node.op == "call_method" else node.target.__name__
    return name.endswith("_") or name == "iadd" or any(a is True for a in (*node.args, *node.kwargs.values()))


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
    skips: dict[int, int] = {}
    sources = {step.source for step in steps if isinstance(step, Skip)}
    values: list[int | None] = [0]  # of the chain, after each number of steps; None: not one, or no more
    for number, step in enumerate(steps):
        value = 2 * len(weights) + (activations[-1] != IDENTITY)  # the last
        if isinstance(step, Affine):
            if weights and value % 2 == 0 and scale is None and value not in skips and number not in sources:
                weights[-1], biases[-1] = step.after(weights[-1], biases[-1])
                values = [None if earlier == value else earlier for earlier in values]
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
        elif isinstance(step, Skip):
            source = values[step.source]
            if source is None or source == value or scale is not None or value in skips:
                raise NotAChain("a sum of more, or of other values, than a chain has")
            skips[value] = source
            values = [None if earlier == value else earlier for earlier in values]
        elif step == FLATTEN:
            flattens = flattens or not weights
            if not weights:  # samples of another shape
                values = [None] * len(values)
        elif step != IDENTITY:
            if scale is not None:
                raise NotAChain(f"{step.name} after a batch norm that no Linear precedes")
            if activations[-1] != IDENTITY:
                raise NotAChain(f"{activations[-1].name} and {step.name} in a row")
            activations[-1] = step
        values.append(None if scale is not None else 2 * len(weights) + (activations[-1] != IDENTITY))
    if scale is not None:
        raise NotAChain("a batch norm that neither follows a Linear nor precedes one")
    return _checked_chain(weights, biases, activations, flattens, skips)


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


# As they were at import, as `FORWARDS`.
FUNCTIONALS = {
    f.__name__: f
    for f in (F.linear, F.batch_norm, F.conv1d, F.conv2d, F.conv3d, *FUNCTIONS)
    if getattr(F, f.__name__, None) is f
}


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module means just its class's forward, and for a class of torch's own, torch's."""
    if hooked(module) or "forward" in vars(module):
        return False
    kind = _kind(module)
    if kind not in FORWARDS:
        return True
    return kind.forward is FORWARDS[kind] and FUNCTIONALS.items() <= vars(F).items()


def _known(module: nn.Module) -> bool:
    return type(module) in MODULES or _kind(module) in (nn.Linear, nn.BatchNorm1d)


def _kind(module: nn.Module) -> type[nn.Module]:
    """The module's class; of a parametrised one that before."""
    return type(module).__bases__[0] if _is_parametrised(module) else type(module)


def _is_parametrised(module: nn.Module) -> bool:
    """As torch.nn.utils.parametrize says it, in a tenth of the time: an attribute that is missing costs a search."""
    parts = module._modules  # of a scripted module no dict
    if "parametrizations" not in parts:
        return False
    return isinstance(parts["parametrizations"], nn.ModuleDict) and len(parts["parametrizations"]) > 0


def _read_module(module: nn.Module, name: str = "") -> Step:
    kind = _kind(module)
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
    weights: list[Tensor],
    biases: list[Tensor | None],
    activations: list[Activation],
    flattens: bool,
    skips: dict[int, int],
) -> Chain:
    """The chain, if all of it is plain dense matrices of one dtype and device that fit together."""
    tensors = weights + [b for b in biases if b is not None]
    if not weights:
        raise NotAChain("it has no Linear")
    if any(type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided for t in tensors):
        raise NotAChain("a weight that is no plain dense tensor")
    kinds = {(t.dtype, t.device) for t in tensors}
    if len(kinds) != 1 or tensors[0].dtype not in CHAIN_DTYPES:
        said = sorted(f"{dtype} on {device}" for dtype, device in kinds)
        raise NotAChain(f"weights are {' and '.join(said)}")
    shapes = [w.shape for w in weights]
    if (
        any(len(shape) != 2 for shape in shapes)
        or any(b is not None and b.shape != shape[:1] for shape, b in zip(shapes, biases))
        or any(shape[0] != after[1] for shape, after in zip(shapes, shapes[1:]))
    ):
        raise NotAChain("shapes of weights that do not fit together")
    widths = [shapes[0][1], *(shape[0] for shape in shapes)]
    if any(widths[into // 2] != widths[source // 2] for into, source in skips.items()):
        raise NotAChain("a sum of results of different widths")
    return Chain(
        tuple(w.detach() for w in weights),
        tuple(b if b is None else b.detach() for b in biases),
        tuple(activations),
        flattens,
        tuple(skips.items()),
    )
