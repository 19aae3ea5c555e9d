"""Runs a model, and returns the output of a layer and of the model, both checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ._inputs import check_devices, check_fit, check_floating, check_inputs, check_rows, named_inputs
from ._layers import called_model, find_layer
from ._layout import Layout, check_batch_dim, find_layout, plain_layout
from ._nested import at_path, mapped, path_to_tensor, tensors_in
from ._threads import alone
from ._tracing import Call, Forward, Output
from ._undisturbed import evaluating, refuse_sharded


@dataclass(frozen=True)
class Observed:
    """What a forward pass has shown. Samples and output have the samples along their first dimension."""

    samples: Tensor
    """The layer's output."""
    output: Tensor
    """The model's."""
    path: list
    """The keys that lead to the samples in what the layer returns."""
    layout: Layout


@alone()
def run_to(
    model: nn.Module,
    layer: str,
    inputs: Any,
    forward: Forward = None,
    output: Output = None,
    batch_dim: int | Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """The layer's output and the model's for `inputs`, checked as in `cut`.

    batch_dim: as in `cut`, or the layout, if it is known. With a known or plain layout it never waits for a device.
    """
    seen = run_to_path(model, layer, inputs, forward, output, batch_dim)
    return seen.samples, seen.output


def run_to_path(
    model: nn.Module,
    layer: str,
    inputs: Any,
    forward: Forward,
    output: Output,
    batch_dim: int | Layout | None = None,
) -> Observed:
    """As run_to, with everything that the forward pass has shown."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    refuse_sharded(model)
    if not isinstance(batch_dim, Layout):
        check_batch_dim(batch_dim)
    check_inputs(inputs, forward)
    part, call = find_layer(model, layer)
    run = Call(called_model(model, forward), inputs, forward, output)
    check_devices(run.model)
    try:
        seen, result = _captured(run, inputs, part, call)
    except Exception as error:
        check_fit(run.model, inputs, forward, error)
        raise
    calls = len(seen)
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
    samples, path = seen[call or 0]
    if isinstance(samples, Tensor) and torch._C._functorch.is_batchedtensor(samples):
        raise ValueError(
            f"layer: {layer!r} is called under torch.vmap, one sample at a time; expected a layer that is called on the "
            "whole batch; torch.vmap around a part of the model is measured by cutting before it or behind it"
        )
    check_floating(f"layer: the output of {layer!r}", samples)
    check_floating(
        "model: its output", result, "; output= selects the tensor in it" if output is None else ""
    )

    def again(inputs: Any) -> tuple[Any, Any]:
        seen, result = _captured(run, inputs, part, call)
        return seen[call or 0][0], result

    layout = _layout(layer, samples, result, run, inputs, again, batch_dim)
    return Observed(
        _rows_first(samples, layout.layer), _rows_first(result, layout.output), path or [], layout
    )


def _captured(
    run: Call, inputs: Any, part: nn.Module, call: int | None
) -> tuple[list[tuple[Any, list | None]], Any]:
    """For each call of a part its first floating-point tensor and the path to it, else its result; and the model's output.

    call: the only call that matters; None: every call.
    """
    seen: list[tuple[Any, list | None]] = []

    def record(module: nn.Module, args: Any, result: Any) -> None:
        if call is not None and call != len(seen):
            seen.append((None, None))
            return
        path = path_to_tensor(result)
        tensor = None if path is None else at_path(result, path)
        # Later layers may work in place on this tensor.
        seen.append((tensor.clone() if isinstance(tensor, Tensor) else result, path))

    result = run_on_copies(run, inputs, part, record)
    return seen, result


def _layout(
    layer: str,
    samples: Tensor,
    result: Tensor,
    run: Call,
    inputs: Any,
    again: Callable[[Any], tuple[Any, Any]],
    batch_dim: int | Layout | None,
) -> Layout:
    """Where the samples lie: the known layout, the plain one where shapes allow it, else the one found by calls of the model.

    Raises ValueError if there is none.
    """
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
    check_rows(f"layer: the output of {layer!r}", samples, rows, named, why)
    check_rows("model: its output", result, rows, named, why)
    return plain


def _rows_first(value: Tensor, dimension: int) -> Tensor:
    return value.movedim(dimension, 0).contiguous() if dimension else value


def run_on_copies(
    run: Call, inputs: Any, part: nn.Module | None = None, hook: Callable[..., Any] = lambda *_: None
) -> Any:
    """The model's output on copies of the inputs. The hook is called after the part."""
    # `evaluating` comes first: with a hook in place, it would save the state of torch's own modules as well.
    with evaluating(run):
        # A scripted module's own method only raises.
        handle = None if part is None else nn.Module.register_forward_hook(part, hook)
        try:
            result = run(mapped(inputs, lambda tensor: tensor.detach().clone()))
            # The result may be a tensor of the model, which is put back, or overwritten by the next call.
            return result.clone() if isinstance(result, Tensor) else result
        finally:
            if handle is not None:
                handle.remove()


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
