"""Cuts a model: gives the network behind a layer, and its samples. The model is not changed, see `_undisturbed.evaluating`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._hook_tail import hook_tail, other_ways, reproduces_output, takes_any_rows, taped
from ._layers import called_model, find_layer
from ._layout import LAYOUT
from ._run_to import Observed, run_to, run_to_path
from ._samples import check_made
from ._stacked import WHOLE, Stacked, loaded, networks_in
from ._threads import alone
from ._tracing import Call, Forward, Output, Tracer, graph_after
from ._undisturbed import evaluating


@alone()
def cut(
    model: nn.Module,
    layer: str,
    inputs: Any,
    *,
    forward: Forward = None,
    output: Output = None,
    stacked: Stacked | None = None,
    batch_dim: int | None = None,
) -> tuple[nn.Module, Tensor]:
    """The network behind a layer, and the layer's output: ``tail(samples) == model(inputs)``.

    Args:
        model: any module. It runs in eval mode and is left as it was. The tail shares the model's parameters, so the tail
            follows the model's training. Python values and branches in the model's forward stay as at the moment of the cut.
        layer: a name in model.named_modules() that is called once per forward pass; "name@k" is its k-th call, from 0 on. The
            parts of names that torch.compile, DataParallel and checkpoint_wrapper add may be left out ("0" for "module.0"). If
            the layer returns a tuple, dict or dataclass (LSTM, transformer blocks), its first floating-point tensor is taken.
        inputs: (N, ...), any dtype; or a tuple or a dict of tensors, passed as arguments. The first tensor must have N rows. A
            tensor without N rows is the same for every sample. A tensor with N rows belongs to the samples, unless only the
            other reading gives the model's output (a mask of tokens by tokens).
        forward: called as forward(model, inputs) in place of model(inputs), for models that are called in another way. inputs
            may then be any tuples, lists and dicts that contain tensors.
        output: selects the part of the model's output that counts, if the output is no tensor or not all of it matters: a key,
            an attribute, an index, or a function of the output.
        stacked: parameters and buffers of B networks with the model's structure, as torch.func.stack_module_state returns them.
            The samples are then (B, N, ...). Measure the tail with the same `stacked`.
        batch_dim: the dimension along which the samples lie, if it is not the first: 1 for `nn.LSTM` and the transformer layers
            of torch.nn as they are by default. It holds for the inputs, the layer's output and the model's output; in those
            where it does not, as in an output (N, classes), calls on some of the samples show the dimension. None: the first
            dimension, or, if the layer's output or the model's output has no row per sample there, the one that such calls
            show for samples along the first or second dimension of the inputs.

    Returns:
        (tail, samples): a module, and the layer's output (N, ...), detached. Samples lie along the first dimension of both, and
            of the tail's output, also where they do not in the model. If torch.fx cannot isolate the part of the model behind
            the layer, the tail is a graph of the torch functions that the model calls, or the model with a forward hook that
            replaces the layer's output.

    Raises:
        ValueError: the layer does not exist, is not called exactly once, or does not give one row per input; the output also
            depends on the inputs on a way around the layer; the model's output does not have one row per input, or no samples
            along batch_dim; the model is on several devices or on meta, or has lazy parameters without values.
        TypeError: the model is no module; inputs, the layer's output or the model's output are no (floating-point) tensors; or
            inputs do not fit the model's forward.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> x = torch.randn(20, 8)
        >>> tail, samples = lmnfast.cut(model, "0", x)
        >>> samples.shape
        torch.Size([20, 16])
        >>> torch.allclose(tail(samples), model(x))
        True
    """
    if stacked is not None:
        samples = []
        for number in range(networks_in(stacked)):
            with loaded(model, stacked, number):
                samples.append(run_to(model, layer, inputs, forward, output, batch_dim)[0])
        tail, _ = cut(model, layer, inputs, forward=forward, output=output, batch_dim=batch_dim)
        setattr(tail, WHOLE, (model,))  # if modules share a tensor, `stacked` has the model's names
        return tail, torch.stack(samples)
    seen = run_to_path(model, layer, inputs, forward, output, batch_dim)
    part, call_number = find_layer(model, layer)
    call = Call(called_model(model, forward), inputs, forward, output, seen.layout.output)
    found = _tail(call, part, call_number, inputs, seen)
    if isinstance(found, list):
        raise ValueError(other_ways(model, layer, inputs, forward, output, found, seen.layout))
    if not seen.layout.is_plain:
        setattr(found, LAYOUT, seen.layout)
    return found, seen.samples


def _tail(
    call: Call, part: nn.Module, number: int | None, inputs: Any, seen: Observed
) -> nn.Module | list[int]:
    """The tail; or the numbers of the inputs that reach the output on a way around the layer."""
    samples, result = seen.samples, seen.output
    try:
        traced = _traced_tail(call, part, number, seen)
        if reproduces_output(traced, samples, result):
            return traced
    except Exception:  # not traced, or along a branch that the samples do not take
        pass
    replacing, ways = hook_tail(call, part, number, inputs, seen)
    if replacing is None:
        return ways
    try:
        graph = taped(replacing, samples)
        if reproduces_output(graph, samples, result) and takes_any_rows(graph, samples, result):
            return graph
    except (
        Exception
    ):  # the model's Python code depends on values, or runs differently for other numbers of rows
        pass
    return replacing


@alone()
def why_not_traced(
    model: nn.Module,
    layer: str,
    inputs: Any,
    forward: Forward,
    output: Output,
    batch_dim: int | None,
) -> tuple[nn.Module | None, str]:
    """The tail by torch.fx, not compared with the model; or None, and the reason why torch.fx gives no tail."""
    part, number = find_layer(model, layer)
    check_made(model, "model")
    seen = None if inputs is None else run_to_path(model, layer, inputs, forward, output, batch_dim)
    call = Call(
        called_model(model, forward), inputs, forward, output, 0 if seen is None else seen.layout.output
    )
    try:
        return _traced_tail(call, part, number, seen), ""
    except Exception as error:  # the user's forward may fail on proxies
        return None, f"torch.fx cannot trace the model ({type(error).__name__}: {str(error).splitlines()[0]})"


def _traced_tail(call: Call, layer: nn.Module, number: int | None, seen: Observed | None) -> fx.GraphModule:
    """The part of the model behind a call of the layer, as a GraphModule.

    Raises the errors of the user's forward on proxies, and ValueError if the layer cannot be separated.
    """
    with evaluating(call, changed=True):  # removes the constants that tracing adds to `call`
        return _after_layer(call, layer, number, seen)


def _after_layer(call: Call, layer: nn.Module, number: int | None, seen: Observed | None) -> fx.GraphModule:
    graph = Tracer(layer).trace(call)
    cuts = [n for n in graph.nodes if n.op == "call_module" and call.get_submodule(n.target) is layer]
    if not cuts or (number is None and len(cuts) > 1) or (number or 0) >= len(cuts):
        raise ValueError(f"torch.fx sees {len(cuts)} calls of the layer")
    start = [cuts[number or 0]]
    for key in [] if seen is None else seen.path:  # of a layer's tuple only the measured entry is replaced
        start = [n for last in start for n in last.users if n.target is operator.getitem and n.args[1] == key]
    return graph_after(graph, call, start, 0 if seen is None else seen.layout.layer)
