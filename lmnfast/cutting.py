"""The sub-network after a layer, and its samples. Nothing here changes the user's model: see `network.evaluating`."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import operator
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .nested import at_path, mapped, path_to_tensor, replaced, tensors_in
from .network import (
    FLATTEN,
    FUNCTIONS,
    IDENTITY,
    METHODS,
    MODULES,
    WHOLE,
    Call,
    Forward,
    Output,
    Stacked,
    Tracer,
    evaluating,
    is_plain,
    loaded,
    networks_in,
    same_output,
    uncompiled,
)

# Entries of an attribute up to which it is compared from one measurement to the next: a few hundred microseconds.
LARGE = 1000
PLAIN = {type(None), bool, int, float, complex, str, bytes}
# Affine in eval mode.
AFFINE_MODULES = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(
        nn.AvgPool1d,
        nn.AvgPool2d,
        nn.AvgPool3d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveAvgPool3d,
    ),
)
AFFINE_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


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
                samples.append(run_to(model, layer, inputs, forward, output)[0])
        tail, _ = cut(model, layer, inputs, forward=forward, output=output)
        setattr(tail, WHOLE, (model,))  # whose names `stacked` has, where modules share a tensor
        return tail, torch.stack(samples)
    seen, result, path = _run_to(model, layer, inputs, forward, output)
    model = uncompiled(model)
    part, call = _find(model, layer)
    try:
        tail: nn.Module = _traced_tail(Call(model, inputs, forward, output), part, call, path)
        if _reproduces(tail, seen, result):
            return tail, seen
    except Exception:  # not traced, or along a branch that the samples do not take
        pass
    tail = _HookTail(Call(model, inputs, forward, output), part, call or 0, path, inputs)
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
        return _traced_tail(Call(uncompiled(model), inputs, forward, output), part, number, path), ""
    except Exception as error:  # of the user's forward, on proxies
        return None, f"torch.fx cannot trace the model ({type(error).__name__}: {str(error).splitlines()[0]})"


def match_layers(model: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the model's layers that match, in the model's order for each pattern: "blocks.*.mlp" is one of each block.

    patterns: names as in `cut`, or shell patterns (fnmatch) of whole names, in which * also stands for dots.
    Raises ValueError for a pattern that nothing matches, with the names that come close.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    names = [name for name, _ in uncompiled(model).named_modules(remove_duplicate=False) if name]
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
    layers = dict(uncompiled(model).named_modules(remove_duplicate=False))
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
    model = uncompiled(model)
    part, call = _find(model, layer)
    _check_fit(model, inputs, forward)
    seen: list[Any] = []
    calls = 0

    def record(module: nn.Module, args: Any, result: Any) -> None:
        nonlocal calls
        calls += 1
        if call is None or calls == call + 1:
            path = path_to_tensor(result)
            tensor = None if path is None else at_path(result, path)
            # What follows may work in place.
            seen.append((tensor.clone() if isinstance(tensor, Tensor) else result, path))

    handle = part.register_forward_hook(record)
    try:
        with evaluating(model):
            copies = mapped(inputs, lambda tensor: tensor.detach().clone())
            result = Call(model, inputs, forward, output)(copies)
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
    tensors = list(tensors_in(inputs))
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
    for tensor in tensors_in(inputs):
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


# Tails -----------------------------------------------------------------------------------------------------


def _reproduces(tail: nn.Module, samples: Tensor, output: Tensor) -> bool:
    """Whether tail(samples) is the model's output."""
    with evaluating(tail):
        again = tail(samples)
    return bool(same_output(again, output))


def _traced_tail(call: Call, layer: nn.Module, number: int | None, path: list) -> fx.GraphModule:
    """What follows a call of the layer as a GraphModule of its own.

    Raises whatever the user's forward raises on proxies; ValueError where the layer cannot be separated.
    """
    with evaluating(call.model):
        graph = Tracer(layer).trace(call)
    cuts = [n for n in graph.nodes if n.op == "call_module" and call.get_submodule(n.target) is layer]
    if not cuts or (number is None and len(cuts) > 1) or (number or 0) >= len(cuts):
        raise ValueError(f"torch.fx sees {len(cuts)} calls of the layer")
    start = [cuts[number or 0]]
    for key in path:  # of a layer that returns a tuple, say, only the entry that is measured is replaced
        start = [n for last in start for n in last.users if n.target is operator.getitem and n.args[1] == key]
    return _after(graph, call, start)


def _after(graph: fx.Graph, root: nn.Module, start: list[fx.Node]) -> fx.GraphModule:
    """What follows the nodes `start`, all of them taken for the samples."""
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
    return fx.GraphModule(root, tail)


def affine_start(f: Any) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """What a traced tail does to its samples first, as long as it is affine, and what it does then.

    An affine map commutes with the path: applied to N samples it need not be applied to all points between them.
    None where f is no traced tail, or does not begin so.
    """
    if not isinstance(f, fx.GraphModule) or not is_plain(f):
        return None
    end = start = next(node for node in f.graph.nodes if node.op == "placeholder")
    maps = 0
    while len(end.users) == 1:
        node = next(iter(end.users))
        step = _affine_step(node, end, f)
        if step is None:
            break
        maps += step
        end = node
    if not maps:
        return None
    first = fx.Graph()
    copies = {start: first.placeholder("samples")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = first.node_copy(node, copied)
        return copies[node]

    first.output(copied(end))
    return fx.GraphModule(f, first), _after(f.graph, f, [end])


def _affine_step(node: fx.Node, before: fx.Node, root: nn.Module) -> int | None:
    """1 for an affine map of the result before and of parameters alone, 0 for one that only moves values; None else."""
    if not node.args or node.args[0] is not before:
        return None
    if any(other is not before and other.op != "get_attr" for other in node.all_input_nodes):
        return None
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if not is_plain(module):
            return None
        if type(module) in AFFINE_MODULES:
            return 1 if getattr(module, "running_mean", True) is not None else None
        return 0 if type(module) in MODULES and MODULES[type(module)](module) in (IDENTITY, FLATTEN) else None
    if node.target in AFFINE_FUNCTIONS:
        return 1
    table: dict[Any, Any] = FUNCTIONS if node.op == "call_function" else METHODS
    step = table[node.target](*node.args, **node.kwargs) if node.target in table else None
    return 0 if step in (IDENTITY, FLATTEN) else None


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

    def __init__(self, call: Call, layer: nn.Module, number: int, path: list, inputs: Any) -> None:
        super().__init__()
        self.model = call.model
        self.call = (call,)  # in tuples, as they are registered under the model already
        self.layer = (layer,)
        self.number = number
        self.path = path
        batch = len(next(tensors_in(inputs)))

        def of_first(tensor: Tensor) -> Tensor:
            return (tensor[:1] if tensor.ndim and len(tensor) == batch else tensor).detach().clone()

        self.first = mapped(inputs, of_first)
        self.batched = [bool(i.ndim and len(i) == batch) for i in tensors_in(inputs)]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) in place of the layer's output -> the model's output."""
        batched, calls = iter(self.batched), 0

        def repeated(tensor: Tensor) -> Tensor:
            return (tensor.expand(len(x), *tensor.shape[1:]) if next(batched) else tensor).clone()

        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            return replaced(output, self.path, x.clone()) if calls == self.number + 1 else None

        handle = self.layer[0].register_forward_hook(replace)
        try:
            return self.call[0](mapped(self.first, repeated))
        finally:
            handle.remove()
