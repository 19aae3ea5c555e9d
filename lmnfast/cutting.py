"""The sub-network after a layer, and its samples. Nothing here changes the user's model: see `state.evaluating`."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from .nested import at_path, entries_of, mapped, path_to_tensor, replaced, tensors_in
from .network import (
    ADDITIONS,
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
    check_made,
    is_plain,
    loaded,
    networks_in,
    same_output,
    wrapped_as,
)
from .state import alone, evaluating, hooked, keeps_nothing, refuse_sharded, torchs_own

# Entries of an attribute up to which it is compared from one measurement to the next: a few hundred microseconds.
LARGE = 1000
MOST_NAMES = 20  # of layers in an error message
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
# Of the functions that the kernels know, those that draw no random numbers whatever their arguments.
COMPUTING = {F.linear, *ADDITIONS} | {f for f in FUNCTIONS if "dropout" not in f.__name__}
AFFINE_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


@alone()
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
    layer: a name in model.named_modules(), called once per forward pass; "name@k" is its k-th call, from 0 on. What
        torch.compile, DataParallel and checkpoint_wrapper put into names may be left out ("0" for "module.0").
        Where it returns a tuple, dict or dataclass (LSTM, transformer blocks), the first floating-point tensor there.
    inputs: (N, ...), any dtype; or a tuple or a dict of tensors passed as arguments. Those that have not N
        rows as the first has are taken to be the same for every sample; so are those with N rows where only that gives
        the model's output (a mask of tokens by tokens).
    forward: called as forward(model, inputs) in place of model(inputs), for models that take something else;
        inputs then are whatever it takes, tensors somewhere in tuples, lists and dicts.
    output: what of the model's output counts, where that is no tensor or not all of it matters: a key or an
        attribute, an index, or a function of it.
    stacked: parameters and buffers of B networks like the model, as torch.func.stack_module_state returns them:
        samples are then theirs, (B, N, ...), and the tail is to be measured with the same `stacked`.
    Returns (tail, samples): a module, and the layer's output (N, ...), detached. Where torch.fx cannot
    isolate what follows the layer, the tail is the model with that output replaced by a forward hook.

    Raises ValueError for a layer that does not exist, is not called exactly once, does not give one row per
    input, or around which the output depends on the inputs by another way, for a model whose output has not one row per
    input, that is on several devices or on meta, or has lazy parameters still without values;
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
    part, number = _find(model, layer)
    call = Call(_called(model, forward), inputs, forward, output)
    try:
        tail: nn.Module = _traced_tail(call, part, number, path)
        if _reproduces(tail, seen, result):
            return tail, seen
    except Exception:  # not traced, or along a branch that the samples do not take
        pass
    replacing, ways = _hook_tail(call, part, number, path, inputs, seen, result)
    if replacing is None:
        raise ValueError(_said_of_ways(model, layer, inputs, forward, output, ways))
    return replacing, seen


@alone()
def run_to(
    model: nn.Module, layer: str, inputs: Any, forward: Forward = None, output: Output = None
) -> tuple[Tensor, Tensor]:
    """The layer's output and the model's for `inputs`, all checked as `cut` does; never waits for a device."""
    return _run_to(model, layer, inputs, forward, output)[:2]


@alone()
def why_not_traced(
    model: nn.Module, layer: str, inputs: Any, forward: Forward, output: Output
) -> tuple[nn.Module | None, str]:
    """The tail by torch.fx, not compared with the model; or None, and why there is none."""
    part, number = _find(model, layer)
    check_made(model, "model")
    path = [] if inputs is None else _run_to(model, layer, inputs, forward, output)[2]
    try:
        return _traced_tail(Call(_called(model, forward), inputs, forward, output), part, number, path), ""
    except Exception as error:  # of the user's forward, on proxies
        return None, f"torch.fx cannot trace the model ({type(error).__name__}: {str(error).splitlines()[0]})"


def match_layers(model: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the model's layers that match, in the model's order for each pattern: "blocks.?" is each of ten blocks.

    patterns: names as in `cut`, or shell patterns (fnmatch) of whole names, in which * also stands for dots: "blocks.*"
        also matches the parts of each block.
    Raises ValueError for a pattern that nothing matches, with the names that come close.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    short, full = _layers(model)
    found: dict[str, None] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layer: expected a name, got {type(pattern).__name__}")
        if not any(c in pattern for c in "*?["):
            _find(model, pattern)
            found[pattern] = None
            continue
        for names in (short, full):
            matching = [
                n for n in names if fnmatch.fnmatchcase(n, pattern) and "parametrizations" not in n.split(".")
            ]
            if matching:
                break
        else:
            raise ValueError(f"layer: nothing matches {pattern!r}; {_close(pattern, list(short))}")
        found.update(dict.fromkeys(matching))
    return tuple(found)


def _close(wanted: str, names: list[str]) -> str:
    """Names that come close, or the first ones; for a reader."""
    if not names:
        return "the model has no layers"
    close = difflib.get_close_matches(wanted, names, 5, 0.5)
    if len(names) <= MOST_NAMES:
        return f"it has {', '.join(dict.fromkeys(close + names))}"
    close = close or names[:MOST_NAMES]
    return f"it has {', '.join(close)} and {len(names) - len(close)} more"


def _called(model: nn.Module, forward: Forward) -> nn.Module:
    """The module to call in place of a wrapper, which would compile again at each hook, or talk to other processes.

    Where the user calls it, only what torch.compile wrapped, which has the wrapper's attributes; and none with hooks.
    """
    while (name := wrapped_as(model)) and not hooked(model) and (forward is None or name == "_orig_mod"):
        model = getattr(model, name)
    return model


def _layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The model's parts by their names without what wrappers put in (0 for module.0), and by those with it."""
    full = dict(model.named_modules(remove_duplicate=False))
    names: dict[str, str] = {}
    short: dict[str, nn.Module] = {}
    for name, part in full.items():
        above, _, last = name.rpartition(".")
        if name and wrapped_as(full[above]) == last:
            names[name] = names[above]
        else:
            names[name] = f"{names[above]}.{last}".removeprefix(".") if name else ""
        short.setdefault(names[name], part)  # of a wrapper and its part the wrapper: it is what is called
    del short[""], full[""]
    return short, full


def _find(model: nn.Module, layer: str) -> tuple[nn.Module, int | None]:
    """The module of that name, and which of its calls is meant; None for its only one."""
    if not isinstance(layer, str):
        raise TypeError(f"layer: expected a name, got {type(layer).__name__}")
    short, full = _layers(model)
    layers = {**short, **full}
    if layer in layers:
        return layers[layer], None
    name, _, call = layer.rpartition("@")
    if name in layers and call.isdecimal():
        return layers[name], int(call)
    raise ValueError(f"layer: {layer!r} is not in the model; {_close(layer, list(short))}")


def _run_to(
    model: nn.Module, layer: str, inputs: Any, forward: Forward, output: Output
) -> tuple[Tensor, Tensor, list]:
    """As run_to, and where in the layer's output its tensor is."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    refuse_sharded(model)
    rows = _rows(inputs, forward)
    part, call = _find(model, layer)
    run = Call(_called(model, forward), inputs, forward, output)
    _check_devices(run.model)
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

    try:
        result = _on_copies(run, inputs, part, record)
    except Exception as error:
        _check_fit(run.model, inputs, forward, error)
        raise
    if calls == 0 or (call is None and calls > 1):
        if calls:
            why = f"; which call? name one, from {layer + '@0'!r} to {layer + f'@{calls - 1}'!r}"
        else:
            why = _why_never_called(model, layer, part, run, inputs)
        raise ValueError(f"layer: {layer!r} was called {calls} times in one forward pass; expected once{why}")
    if call is not None and calls <= call:
        raise ValueError(
            f"layer: {layer!r} is its call {call}, from 0 on, but there are {calls} in a forward pass"
        )
    samples, path = seen[0]
    if isinstance(samples, Tensor) and torch._C._functorch.is_batchedtensor(samples):
        raise ValueError(
            f"layer: {layer!r} is called under torch.vmap, one sample at a time; expected a layer that is called on the "
            "whole batch; torch.vmap around a part of the model is measured by cutting before it or behind it"
        )
    _check_floating(f"layer: the output of {layer!r}", samples)
    _check_floating(
        "model: its output", result, "; output= selects the tensor in it" if output is None else ""
    )
    _check_rows(f"layer: the output of {layer!r}", samples, rows, inputs, forward, model)
    _check_rows("model: its output", result, rows, inputs, forward, model)
    return samples, result, path


def _on_copies(run: Call, inputs: Any, part: nn.Module | None = None, hook: Callable | None = None) -> Any:
    """The output on copies of the inputs; the hook is called behind the part."""
    with evaluating(run):  # which the hook would have keep the state of torch's own modules
        # A scripted module's own method only raises.
        handle = None if part is None else nn.Module.register_forward_hook(part, hook)
        try:
            result = run(mapped(inputs, lambda tensor: tensor.detach().clone()))
            # It may be a tensor of the model's, which is put back, or overwritten by the next call.
            return result.clone() if isinstance(result, Tensor) else result
        finally:
            if handle is not None:
                handle.remove()


def _check_rows(what: str, value: Tensor, rows: int, inputs: Any, forward: Forward, model: nn.Module) -> None:
    """Raises ValueError where a tensor has not one row per sample, the first dimension, with what may help."""
    if value.shape[:1] == (rows,):
        return
    shape, of_model = tuple(value.shape), what.startswith("model")
    hint = ""
    if rows in shape:
        hint = ", along the first dimension: set batch_first=True in its recurrent or attention layers"
        hint += f", or output=lambda y: y.transpose(0, {shape.index(rows)})" if of_model else ""
    elif of_model and shape and shape[0] % rows == 0:
        hint = f", as by output=lambda y: y.unflatten(0, (-1, {shape[0] // rows}))"
    else:
        (first, _), *others = _named_inputs(model, inputs, forward)
        if shape and any(other.shape[:1] == shape[:1] for _, other in others):
            hint = f"; {first} comes first and has {rows}: name first one that has a row per sample"
    raise ValueError(f"{what} has shape {shape} for {rows} inputs; expected one row per input{hint}")


class _Uses(TorchFunctionMode):
    """Whether any of some tensors is an argument of a torch function."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.tensors = {id(tensor) for tensor in tensors}
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= any(id(tensor) in self.tensors for tensor in tensors_in((args, kwargs or {})))
        return func(*args, **(kwargs or {}))


def _why_never_called(model: nn.Module, layer: str, part: nn.Module, run: Call, inputs: Any) -> str:
    """Why a forward pass shows no call of a layer, and what to do."""
    layer = layer.partition("@")[0]
    names = [layer.rsplit(".", n)[0] for n in range(1, layer.count(".") + 1)]
    above = [model, *(_find(model, name)[0] for name in names)]
    if any(isinstance(whole, torch.jit.ScriptModule) for whole in above):
        return (
            "; it lies in a scripted or traced module, which calls its parts without their hooks: cut the model that "
            "torch.jit made it from"
        )
    if any(isinstance(whole, fx.GraphModule) for whole in above):
        return (
            "; it lies in a graph that calls single operations, as a program of torch.export: "
            "torch.export.unflatten(program) has the layers again"
        )
    if type(part).forward is nn.Module.forward:
        parts = ", ".join(repr(f"{layer}.{name}") for name, _ in list(part.named_children())[:2])
        return f"; it is a container that has no forward: name its parts{f', as {parts}' if parts else ''}"
    with _Uses(part.parameters()) as uses:
        _on_copies(run, inputs)
    if uses.found:
        around = layer.rpartition(".")[0]
        place = f"{around!r}, which is around it," if around else "a layer before it"
        return (
            "; its weights are used without a call (nn.MultiheadAttention so uses those of out_proj, and a call of "
            f"layer.forward runs no hook): cut at {place} or at a layer behind it"
        )
    return "; these inputs do not reach it, or its forward is called in place of the layer"


def _rows(inputs: Any, forward: Forward) -> int:
    """How many samples the inputs are."""
    tensors = list(tensors_in(inputs))
    plain = isinstance(inputs, (Tensor, Mapping)) or (
        isinstance(inputs, (tuple, list)) and not any(entries_of(i) for i in inputs)
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


def _check_devices(model: nn.Module) -> None:
    """Raises where a model has no values, or has them in several places."""
    check_made(model, "model")
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


def _check_fit(model: nn.Module, inputs: Any, forward: Forward, error: Exception) -> None:
    """Raises where model and inputs cannot be run together and that is why they were not, which torch says at length."""
    if forward is not None:
        return
    device = next((parameter.device for parameter in model.parameters()), None)
    for tensor in tensors_in(inputs):
        if isinstance(error, RuntimeError) and device not in (None, tensor.device):
            raise ValueError(
                f"inputs: on {tensor.device}, but the model is on {device}; move one of them"
            ) from error
    if isinstance(inputs, Tensor) or not isinstance(error, TypeError):
        return
    try:
        fits = inspect.signature(model.forward).bind
    except (TypeError, ValueError):  # a scripted one has none
        return
    try:
        fits(**inputs) if isinstance(inputs, Mapping) else fits(*inputs)
    except TypeError as misfit:
        raise TypeError(
            f"inputs: do not fit the arguments of the model's forward ({misfit}); expected those alone, without labels; "
            "forward= runs a model that is called otherwise"
        ) from error


def _named_inputs(model: nn.Module, inputs: Any, forward: Forward) -> list[tuple[str, Tensor]]:
    """The tensors that the inputs are made of, in their order, each as a reader knows it."""
    names: dict[Any, str] = {}
    if forward is None and isinstance(inputs, (tuple, list)):
        with suppress(TypeError, ValueError):  # a scripted module has no signature
            names = dict(enumerate(inspect.signature(model.forward).bind(*inputs).arguments))

    def walk(value: Any, said: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield said, value
        for key, entry in entries_of(value):
            yield from walk(entry, f"{said}[{key!r}]")

    if isinstance(inputs, Tensor):
        return [("the input", inputs)]
    return [
        named
        for key, entry in entries_of(inputs)
        for named in walk(entry, f"the input {names.get(key, key)!r}")
    ]


def _check_floating(what: str, value: Any, hint: str = "") -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        if isinstance(value, Tensor) and value.is_quantized:
            hint = "; quantised values cannot be interpolated: cut behind the DeQuantStub"
        raise TypeError(f"{what} is {got}; expected a floating-point tensor{hint}")


# Tails -----------------------------------------------------------------------------------------------------


def _reproduces(tail: nn.Module, samples: Tensor, output: Tensor) -> bool:
    """Whether tail(samples) is the model's output."""
    with evaluating(tail):
        return bool(same_output(tail(samples), output))


def _traced_tail(call: Call, layer: nn.Module, number: int | None, path: list) -> fx.GraphModule:
    """What follows a call of the layer as a GraphModule of its own.

    Raises whatever the user's forward raises on proxies; ValueError where the layer cannot be separated.
    """
    with evaluating(call, changed=True):  # afterwards `call` has no longer the constants that tracing met
        return _after_layer(call, layer, number, path)


def _after_layer(call: Call, layer: nn.Module, number: int | None, path: list) -> fx.GraphModule:
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
            copies[node].type = None  # an annotation as text, of which pickle cannot tell the module
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
    result = fx.GraphModule(root, tail)
    if all(map(_only_computes, tail.nodes)):
        keeps_nothing(result)
    return result


def _only_computes(node: fx.Node) -> bool:
    """Whether a step of a graph gives the same each time and changes nothing but results before it; of a module `evaluating`
    looks itself."""
    if "out" in node.kwargs:
        return False
    if node.op == "get_attr":  # nothing works in place on a parameter
        return all(user.target in (F.linear, operator.add, torch.add) for user in node.users)
    if node.op == "call_function":
        return node.target in COMPUTING
    return node.target in METHODS or node.target in ADDITIONS if node.op == "call_method" else True


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
    if node.target is operator.getitem and _keeps_rows(node.args[1]):
        return 0
    return 0 if step in (IDENTITY, FLATTEN) else None


def _keeps_rows(index: Any) -> bool:
    """Whether an index takes the same elements of every sample: [:, -1]."""
    fixed = isinstance(index, tuple) and index[:1] == (slice(None),)
    return fixed and all(type(i) in (int, slice, type(None), type(...)) for i in index)


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
    """What a cut makes constants of, to be compared by ==: which modules, forwards, hooks and tensors a model has, of
    what dtypes, its attributes, which inputs they are, and what was changed in torch itself. Left out are training flags,
    which a tail does not read, and values of parameters, which it follows. Other tensors, where the forward is the
    user's, count with how often they were changed: what is computed of them alone is a constant to torch.fx.

    Attributes are followed two levels deep; below, an object counts by its identity alone.
    """
    state = [_frozen(inputs, 1, False), torchs_own()]
    for part in model.modules():
        traced = not type(part).__module__.startswith("torch.nn")  # fx.Tracer's own rule
        attributes = [(name, _frozen(v, 2, traced)) for name, v in vars(part).items() if name != "training"]
        state.append((_Same(part), _Same(getattr(type(part), "forward", None)), attributes))
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
    first input repeated.

    repeated: for each tensor of the inputs whether it has a row per sample, of which the first is taken; others are
        the same for every sample. in_place: writes into the layer's output, so that what shares memory with it changes too.
    """

    def __init__(
        self,
        call: Call,
        layer: nn.Module,
        number: int,
        path: list,
        inputs: Any,
        repeated: Sequence[bool],
        in_place: bool = False,
    ) -> None:
        super().__init__()
        self.model = call.model
        self.call = (call,)  # in tuples, as they are registered under the model already
        self.layer = (layer,)
        self.number = number
        self.path = path
        self.repeated = repeated
        self.in_place = in_place
        rows = iter(repeated)
        self.first = mapped(inputs, lambda i: (i[:1] if next(rows) else i).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) in place of the layer's output -> the model's output."""
        rows, calls = iter(self.repeated), 0

        def repeated(tensor: Tensor) -> Tensor:
            return (tensor.expand(len(x), *tensor.shape[1:]) if next(rows) else tensor).clone()

        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != self.number + 1:
                return None
            if not self.in_place:
                return replaced(output, self.path, x.clone())
            own = at_path(output, self.path)
            if own.shape != x.shape or own.dtype != x.dtype:
                raise ValueError(
                    f"x: expected {tuple(own.shape)} of {own.dtype}, as an earlier result shares the layer's memory, got "
                    f"{tuple(x.shape)} of {x.dtype}"
                )
            own.copy_(x)
            return None

        handle = nn.Module.register_forward_hook(self.layer[0], replace)  # a scripted one's own only raises
        try:
            return self.call[0](mapped(self.first, repeated))
        finally:
            handle.remove()


def _hook_tail(
    call: Call, layer: nn.Module, number: int | None, path: list, inputs: Any, samples: Tensor, output: Tensor
) -> tuple[_HookTail | None, list[int]]:
    """The tail by a forward hook; or None, and the numbers of the inputs that matter by another way than the layer.

    Where the first row of the inputs in place of all does not give the model's output, there may be memory that the
    layer's output shares with an earlier result, or an input that has by chance as many rows as there are samples and
    is the same for all: a mask of tokens by tokens.
    """
    tensors = list(tensors_in(inputs))
    per_sample = [bool(i.ndim and len(i) == len(samples)) for i in tensors]

    def tail(repeated: Sequence[bool], in_place: bool = False) -> _HookTail:
        return _HookTail(call, layer, number or 0, path, inputs, repeated, in_place)

    def fits(candidate: _HookTail) -> bool:
        try:
            return _reproduces(candidate, samples, output)
        except Exception:  # of the model, on inputs that it never gets
            return False

    plain, failure = tail(per_sample), None
    try:
        if _reproduces(plain, samples, output):
            return plain, []
    except Exception as error:
        if sum(per_sample) < 2:
            raise
        failure = error
    if failure is None and _is_fresh(call, layer, number or 0, path, inputs):
        aliasing = tail(per_sample, True)
        if fits(aliasing):
            return aliasing, []
    ways = [
        i for i, own in enumerate(per_sample) if own and not fits(tail([j == i for j in range(len(tensors))]))
    ]
    shared = tail([own and i not in ways for i, own in enumerate(per_sample)])
    if ways and _takes_any_rows(shared, samples, output):
        return shared, []
    if failure is not None and not ways:
        raise failure
    return None, ways


def _is_fresh(call: Call, layer: nn.Module, number: int, path: list, inputs: Any) -> bool:
    """Whether every forward pass has new memory for the layer's output: to write there changes nothing that lasts."""
    results: list[Any] = []
    handle = nn.Module.register_forward_hook(layer, lambda module, args, result: results.append(result))
    try:
        _on_copies(call, inputs)
        calls = len(results)
        _on_copies(call, inputs)
    finally:
        handle.remove()
    storages = [at_path(results[n + number], path).untyped_storage() for n in (0, calls)]
    return storages[0].data_ptr() != storages[1].data_ptr()


def _takes_any_rows(tail: nn.Module, samples: Tensor, output: Tensor) -> bool:
    """Whether the tail gives each sample its output also in a larger batch, and at another place of it."""
    try:
        with evaluating(tail):
            again = tail(torch.cat([samples.flip(0), samples])).clone()
        expected = torch.cat([output.flip(0), output])
        return again.shape == expected.shape and bool(
            (again - expected).abs().max() <= 1e-3 * expected.abs().max()
        )
    except Exception:  # of the model: it does not take them
        return False


def _said_of_ways(
    model: nn.Module, layer: str, inputs: Any, forward: Forward, output: Output, ways: list[int]
) -> str:
    """That the output depends on the inputs by other ways than through the layer, and what to do."""
    named = _named_inputs(model, inputs, forward)
    rows = len(next(tensors_in(inputs)))
    varying = [i for i, (_, t) in enumerate(named) if t.ndim and len(t) == rows and bool((t != t[:1]).any())]
    said = f"layer: the model's output depends on the inputs also by another way than through {layer!r}"
    expected = "expected a layer that all of it passes through"
    if len(varying) > 1:
        names = " and ".join(named[i][0] for i in ways or varying)
        return (
            f"{said}: by {names}, not the same for all samples; {expected}, or one value of it for all samples (of a padding "
            "mask: samples of equal length, or one mask, repeated)"
        )
    said += f" (a skip connection around it, say); {expected}"
    around = _measurable_around(model, layer, inputs, forward, output)
    if around is None:
        return said
    said += f", as {around!r} is"
    above, _, last = around.rpartition(".")
    if not above or not last.isdecimal():
        return said
    blocks = len(list(_find(model, above)[0].children()))
    patterns = " and ".join(repr(f"{above}.{'?' * n}") for n in range(1, len(str(blocks - 1)) + 1))
    return f"{said} (all such blocks, without their parts: {patterns})"


def _measurable_around(
    model: nn.Module, layer: str, inputs: Any, forward: Forward, output: Output
) -> str | None:
    """The innermost part of the model around a layer that can be cut at, if there is one."""
    name = layer.partition("@")[0]
    while name := name.rpartition(".")[0]:
        try:
            samples, result, path = _run_to(model, name, inputs, forward, output)
            part, number = _find(model, name)
            call = Call(_called(model, forward), inputs, forward, output)
            if _hook_tail(call, part, number, path, inputs, samples, result)[0] is not None:
                return name
        except Exception:  # it is not called itself, say
            continue
    return None
