"""Runs a model, and returns the output of a layer and of the model, both checked."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ._inputs import check_devices, check_fit, check_floating, check_inputs, check_rows, named_inputs
from ._layers import called_model, find_layer, means_inputs
from ._layout import Layout, check_batch_dim, find_layout, plain_layout
from ._nested import at_path, mapped, path_to_tensor, tensors_in
from ._threads import alone
from ._tracing import Call, End, Forward, NeverReached, Output
from ._undisturbed import PLAIN, evaluating, refuse_sharded


@dataclass(frozen=True)
class Cutting:
    """How a model is cut: the arguments that `cut`, `explain`, `Probe` and `measure_checkpoints` have in common."""

    forward: Forward = None
    output: Output = None
    until: str | None = None
    block: bool = False
    """Whether the name is that of a block in place of a layer."""
    batch_dim: int | Layout | None = None
    """As in `cut`; or the layout, if it is known. Then a run never waits for a device."""
    compile: bool = False
    graph: bool = False
    """Whether the samples and the output keep their graph; not for a block."""

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for arguments that a block does not take, and for an `until` that is wrong for every layer."""
        if self.block and self.batch_dim:
            raise ValueError(
                f"batch_dim: expected with a layer alone, got {self.batch_dim} with block, whose samples lie along the first "
                "dimension"
            )
        if self.block and self.until is not None:
            raise ValueError("until: expected with a layer alone, as a block ends where its module ends")
        if self.until is not None and isinstance(model, nn.Module):
            find_layer(model, self.until, "until")


@dataclass(frozen=True)
class Start:
    """A forward pass, and the tensor in it with which a tail begins.

    Samples and output have the samples along their first dimension, also where the model has not.
    """

    call: Call
    """Gives the output for the inputs."""
    inputs: Any
    layer: nn.Module | None
    """The module whose output the tail takes; None: it takes an entry of the inputs."""
    number: int | None
    """Of the layer's call; None for the only one."""
    path: list
    """Keys to the tensor in the layer's output, or in the inputs."""
    samples: Tensor
    output: Tensor
    layout: Layout
    """Where the samples lie in the inputs, and in what the layer and the model return."""


@alone()
def run_to(model: nn.Module, name: str, inputs: Any, how: Cutting) -> tuple[Tensor, Tensor]:
    """The layer's output and the model's for `inputs`, checked as in `cut`; of a block its argument and its output."""
    start = start_of(model, name, inputs, how)
    return start.samples, start.output


def run_again(start: Start, inputs: Any) -> tuple[Tensor, Tensor]:
    """As `run_to` of other inputs of the same shapes, with the graphs, and without the checks that need no values.

    The model must be as it was: see `python_state`.
    """
    layout, seen = start.layout, list[tuple[Any, list | None]]()
    if start.layer is None:
        samples, result = at_path(inputs, start.path), run_on_copies(start.call, inputs, graph=True)
    else:
        result = _captured(start.call, inputs, start.layer, start.number, seen, graph=True)
        if start.number is None and len(seen) != 1:
            raise ValueError(f"layer: was called {len(seen)} times in one forward pass; expected once")
        samples = _rows_first(seen[start.number or 0][0], layout.layer)
    return samples, result  # the call moves the rows of its result


def start_of(model: nn.Module, name: str, inputs: Any, how: Cutting) -> Start:
    """Runs the model once, or more often to find where the samples lie. Raises the errors of `cut` on the way."""
    return (_start_of_block if how.block else _start_of_layer)(model, name, inputs, how)


def _start_of_layer(model: nn.Module, layer: str, inputs: Any, how: Cutting) -> Start:
    forward, output, until, batch_dim = how.forward, how.output, how.until, how.batch_dim
    _check_model(model)
    if not isinstance(batch_dim, Layout):
        check_batch_dim(batch_dim)
    check_inputs(inputs, forward)
    from_inputs = means_inputs(model, layer)
    part, call = (None, None) if from_inputs else find_layer(model, layer)
    end = None if until is None else end_of(model, layer, until)
    run = Call(called_model(model, forward), inputs, forward, output, end)
    check_devices(run.model)
    if end is not None:  # in a first pass, of which nothing is known
        end.is_counting = not isinstance(batch_dim, Layout)
    seen: list[tuple[Any, list | None]] = []
    try:
        result = _captured(run, inputs, part, call, seen, how.graph)
    except NeverReached:
        if isinstance(batch_dim, Layout):  # says why
            return start_of(model, layer, inputs, replace(how, batch_dim=batch_dim.inputs[0] or None))
        result = None
    except Exception as error:
        if end is not None and end.calls:
            _check_end(model, layer, until, end, run, inputs)
        check_fit(run.model, inputs, forward, error)
        raise
    if end is not None and end.is_counting:
        if from_inputs or seen:
            _check_end(model, layer, until, end, run, inputs)
        end.is_counting, end.result = False, None
    path: list | None
    if from_inputs:
        samples, path = _in_inputs(model, layer, inputs, how.graph)
    else:
        _check_calls(model, layer, len(seen), run, inputs)
        samples, path = seen[call or 0]
    _check_whole_batch(f"layer: {layer!r}", samples)
    check_floating(f"layer: the output of {layer!r}", samples)
    what = "model: its output" if until is None else f"until: the output of {until!r}"
    check_floating(what, result, "; output= selects the tensor in it" if output is None else "")

    def again(inputs: Any) -> tuple[Any, Any]:
        seen: list[tuple[Any, list | None]] = []
        result = _captured(run, inputs, part, call, seen)
        return at_path(inputs, path or []) if from_inputs else seen[call or 0][0], result

    layout = _layout(
        (f"layer: the output of {layer!r}", samples), (what, result), run, inputs, again, batch_dim
    )
    run.dimension = layout.output
    samples, result = _rows_first(samples, layout.layer), _rows_first(result, layout.output)
    return Start(run, inputs, part, call, path or [], samples, result, layout)


def _captured(
    run: Call,
    inputs: Any,
    part: nn.Module | None,
    call: int | None,
    seen: list[tuple[Any, list | None]],
    graph: bool = False,
) -> Any:
    """The model's output. Adds to `seen`, for each call of a part, its first floating-point tensor and the path to it.

    If there is none, the result of the part and None. call: the only call that matters; None: every call. graph: whether all
    these keep their graph.
    """

    def record(module: nn.Module, args: Any, result: Any) -> None:
        if call is not None and call != len(seen):
            seen.append((None, None))
            return
        path = path_to_tensor(result)
        tensor = None if path is None else at_path(result, path)
        # Later layers may work in place on this tensor.
        seen.append((tensor.clone() if isinstance(tensor, Tensor) else result, path))
        if run.end is not None and len(seen) == (call or 0) + 1:
            run.end.before = run.end.calls

    return run_on_copies(run, inputs, *([] if part is None else [behind(part, record)]), graph=graph)


def _layout(
    layer: tuple[str, Tensor],
    output: tuple[str, Tensor],
    run: Call,
    inputs: Any,
    again: Callable[[Any], tuple[Any, Any]],
    batch_dim: int | Layout | None,
) -> Layout:
    """Where the samples lie: the known layout, the plain one where shapes allow it, else the one found by calls of the model.

    layer, output: what the layer and the model return, each with the words for it in a message.

    Raises ValueError if there is none.
    """
    samples, result = layer[1], output[1]
    plain = batch_dim if isinstance(batch_dim, Layout) else plain_layout(inputs)
    rows = plain.rows_of(inputs)
    shapes = [(value.shape, d) for value, d in ((samples, plain.layer), (result, plain.output))]
    fits = all(len(shape) > d and shape[d] == rows for shape, d in shapes)
    if fits and (not batch_dim or isinstance(batch_dim, Layout)):
        return plain
    asked = None if isinstance(batch_dim, Layout) else batch_dim
    found, why = find_layout(again, inputs, samples, result, asked)
    if found is not None:
        return found
    if asked:
        raise ValueError(f"batch_dim: expected a dimension along which the samples lie, got {asked}: {why}")
    named = named_inputs(run.model, inputs, run.run)
    for what, value in (layer, output):
        check_rows(what, value, rows, named, why)
    return plain


def _rows_first(value: Tensor, dimension: int) -> Tensor:
    return value.movedim(dimension, 0).contiguous() if dimension else value


def _check_whole_batch(what: str, samples: Any) -> None:
    if isinstance(samples, Tensor) and torch._C._functorch.is_batchedtensor(samples):
        raise ValueError(
            f"{what} is called under torch.vmap, one sample at a time; expected a layer that is called on the "
            "whole batch; torch.vmap around a part of the model is measured by cutting before it or behind it"
        )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    refuse_sharded(model)


def _check_calls(
    model: nn.Module, layer: str, calls: int, run: Call, inputs: Any, argument: str = "layer"
) -> None:
    """Raises ValueError if a layer has not been called once, or its call of that number has not been made."""
    part, call = find_layer(model, layer, argument)
    if calls == 0 or (call is None and calls > 1):
        if calls:
            why = f"; which call? name one, from {layer + '@0'!r} to {layer + f'@{calls - 1}'!r}"
        else:
            why = _why_never_called(model, layer, part, run, inputs)
        raise ValueError(
            f"{argument}: {layer!r} was called {calls} times in one forward pass; expected once{why}"
        )
    if call is not None and calls <= call:
        raise ValueError(
            f"{argument}: {layer!r} is its call {call}, from 0 on, but there are {calls} in a forward pass"
        )


def end_of(model: nn.Module, layer: str, until: str) -> End:
    """The call at which a map ends. Raises ValueError if it is the layer's own."""
    part, number = find_layer(model, until, "until")
    if not means_inputs(model, layer) and find_layer(model, layer) == (part, number):
        raise ValueError(f"until: {until!r} is the layer itself; expected one that runs behind it")
    return End(part, number or 0)


def _check_end(model: nn.Module, layer: str, until: str | None, end: End, run: Call, inputs: Any) -> None:
    """Raises ValueError if `until` is not called once in a pass that has counted, or returns before the layer does."""
    assert until is not None
    _check_calls(model, until, end.calls, Call(run.model, inputs, run.run), inputs, "until")
    _check_whole_batch(f"until: {until!r}", next(tensors_in(end.result), None))
    if end.before <= end.number:
        return
    part, _ = find_layer(model, layer)
    if end.part in list(part.modules())[1:]:
        raise ValueError(
            f"until: {until!r} is inside {layer!r} and returns before it; expected a layer that runs behind it"
        )
    raise ValueError(f"until: {until!r} runs before {layer!r}; expected a layer that runs behind it")


def _in_inputs(model: nn.Module, layer: str, inputs: Any, graph: bool) -> tuple[Tensor, list]:
    """The samples among the inputs, and the keys to them."""
    path = path_to_tensor(inputs, lambda tensor: True)
    first = at_path(inputs, path or [])
    if not first.is_floating_point():
        names = [
            repr(name) for name, part in model.named_modules() if isinstance(part, nn.Embedding) and name
        ]
        where = f", as {names[0]}" if names else ""
        raise TypeError(
            f"layer: {layer!r} is the model's input, of {first.dtype}; integers (tokens) cannot be interpolated: cut at the "
            f"embedding{where}, or name a floating-point input first"
        )
    return first if graph else first.detach().clone(), path or []


def _start_of_block(model: nn.Module, block: str, inputs: Any, how: Cutting) -> Start:
    """Runs the model once, for the arguments of one module. Raises the errors of `cut` on the way."""
    forward, output = how.forward, how.output
    _check_model(model)
    check_inputs(inputs, forward)
    rows = len(next(tensors_in(inputs)))
    part, number = find_layer(model, block, "block")
    run = Call(called_model(model, forward), inputs, forward)
    check_devices(run.model)
    taken: list[tuple[Any, Any]] = []
    results: list[Any] = []
    calls = 0

    def take(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == (number or 0) + 1:
            copies: dict[
                int, Tensor
            ] = {}  # an argument may be passed twice, as the query and the key of an attention
            taken.append(
                mapped((args, kwargs), lambda own: copies.setdefault(id(own), own.detach().clone()), _copied)
            )

    def record(module: nn.Module, args: Any, result: Any) -> None:
        if calls == (number or 0) + 1 and not results:
            results.append(mapped(result, Tensor.clone))

    # The first hook sees the arguments as the caller gives them, before the module's own hooks.
    before = partial(nn.Module.register_forward_pre_hook, part, take, prepend=True, with_kwargs=True)
    try:
        run_on_copies(run, inputs, before, behind(part, record))
    except Exception as error:
        check_fit(run.model, inputs, forward, error)
        raise
    _check_calls(model, block, calls, run, inputs, "block")

    def wanted(tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.shape[:1] == (rows,)

    given, result = taken[0], results[0]
    _check_whole_batch(f"block: {block!r}", next(tensors_in(given), None))
    path = path_to_tensor(given, wanted)
    if path is None:
        said = ", ".join(f"{name} {tuple(t.shape)} of {t.dtype}" for name, t in named_arguments(part, given))
        quantised = any(tensor.is_quantized for tensor in tensors_in(given))
        hint = "; quantised values cannot be interpolated: name a block behind the DeQuantStub" * quantised
        raise TypeError(
            f"block: {block!r} takes no floating-point tensor with a row for each of {rows} samples, but "
            f"{said or 'no tensor'}{hint}"
        )
    to_output = path_to_tensor(result, wanted)
    call = Call(called_model(part, None), given, as_called, output, path=to_output)
    result = call.selected(result, to_output)
    check_floating(
        f"block: the output of {block!r}",
        result,
        "; output= selects the tensor in it" if output is None else "",
    )
    check_rows(f"block: the output of {block!r}", result, rows, named_inputs(model, inputs, forward), "")
    return Start(call, given, None, None, path, at_path(given, path), result, plain_layout(given, rows))


def as_called(part: nn.Module, given: Any) -> Any:
    """Calls a part with recorded arguments. Objects among them, as caches, are copied: a call may change them."""
    args, kwargs = mapped(given, lambda tensor: tensor, _copied)
    return part(*args, **kwargs)


def _copied(value: Any) -> Any:
    if type(value) in PLAIN or isinstance(value, nn.Module):
        return value
    try:
        with torch._C.DisableTorchFunction():  # a tape of the part's functions is not to contain this copy
            return copy.deepcopy(value)
    except Exception:  # an object that cannot be copied; most of them hold nothing that a call changes
        return value


def named_arguments(part: nn.Module, given: Any) -> list[tuple[str, Tensor]]:
    """The tensors in the arguments (args, kwargs) of a part, in order, each with its name in the part's forward."""
    names: list[str] = []
    with suppress(TypeError, ValueError):  # a scripted module has no signature
        parameters = inspect.signature(part.forward).parameters.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    args, kwargs = given
    named = [(names[n] if n < len(names) else str(n), value) for n, value in enumerate(args)]
    return [(repr(name), tensor) for name, value in (*named, *kwargs.items()) for tensor in tensors_in(value)]


def behind(part: nn.Module, hook: Callable[..., Any]) -> Callable[[], RemovableHandle]:
    """Registers a forward hook. A scripted module's own method only raises."""
    return partial(nn.Module.register_forward_hook, part, hook)


def run_on_copies(run: Call, inputs: Any, *hooks: Callable[[], RemovableHandle], graph: bool = False) -> Any:
    """The model's output on copies of the inputs. The hooks are registered for this pass. graph: also the output's graph."""
    # `evaluating` comes first: with a hook in place, it would save the state of torch's own modules as well.
    with evaluating(run), ExitStack() as stack:
        for register in hooks:
            stack.callback(register().remove)
        stack.enter_context(torch.set_grad_enabled(graph))
        result = run(mapped(inputs, lambda tensor: tensor.clone() if graph else tensor.detach().clone()))
        # The result may be a tensor of the model, which is put back, or overwritten by the next call.
        return result.clone() if isinstance(result, Tensor) else result


class _Uses(TorchFunctionMode):
    """Records whether any of the given tensors becomes an argument of a torch function."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.tensors = {id(tensor) for tensor in tensors}
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= any(id(tensor) in self.tensors for tensor in tensors_in((args, kwargs or {})))
        return func(*args, **(kwargs or {}))


def _why_never_called(model: nn.Module, layer: str, part: nn.Module, run: Call, inputs: Any) -> str:
    """The end of an error message: why a forward pass shows no call of a layer, with advice."""
    layer = layer.partition("@")[0]
    names = [layer.rsplit(".", n)[0] for n in range(1, layer.count(".") + 1)]
    above = [model, *(find_layer(model, name)[0] for name in names)]
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
        run_on_copies(run, inputs)
    if uses.found:
        around = layer.rpartition(".")[0]
        place = f"{around!r}, which is around it," if around else "a layer before it"
        return (
            "; its weights are used without a call (nn.MultiheadAttention so uses those of out_proj, and a call of "
            f"layer.forward runs no hook): cut at {place} or at a layer behind it"
        )
    return "; these inputs do not reach it, or its forward is called in place of the layer"
