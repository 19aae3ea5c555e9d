"""Cuts a model: gives the network behind a layer, and its samples. The model is not changed, see `_undisturbed.evaluating`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._compiled import compiled
from ._hook_tail import hook_tail, other_arguments, other_ways, reproduces_output, takes_any_rows, taped
from ._inputs import named_inputs
from ._layers import called_model, find_layer, means_inputs
from ._layout import LAYOUT, Layout
from ._nested import everywhere, mapped, substituted, tensors_in
from ._run_to import Cutting, Start, end_of, named_arguments, run_to, start_of
from ._samples import check_made
from ._stacked import WHOLE, Stacked, loaded, networks_in
from ._tape import NotTaped
from ._threads import alone
from ._tracing import Call, Forward, Output, Tracer, graph_after
from ._undisturbed import evaluating


@alone()
def cut(
    model: nn.Module,
    layer: str | None = None,
    inputs: Any = None,
    *,
    until: str | None = None,
    block: str | None = None,
    forward: Forward = None,
    output: Output = None,
    stacked: Stacked | None = None,
    batch_dim: int | None = None,
    compile: bool = False,
) -> tuple[nn.Module, Tensor]:
    """The network behind a layer, and the layer's output: ``tail(samples) == model(inputs)``.

    Args:
        model: any module. It runs in eval mode and is left as it was. The tail shares the model's parameters, so the tail
            follows the model's training. Python values and branches in the model's forward stay as at the moment of the cut.
        layer: a name in model.named_modules() that is called once per forward pass; "name@k" is its k-th call, from 0 on. The
            parts of names that torch.compile, DataParallel and checkpoint_wrapper add may be left out ("0" for "module.0"). If
            the layer returns a tuple, dict or dataclass (LSTM, transformer blocks), its first floating-point tensor is taken.
            "" or "inputs": the first tensor of the inputs, which is then floating-point. The tail is the whole model.
        inputs: (N, ...), any dtype; or a tuple or a dict of tensors, passed as arguments. The first tensor must have N rows. A
            tensor without N rows is the same for every sample. A tensor with N rows belongs to the samples, unless only the
            other reading gives the model's output (a mask of tokens by tokens).
        until: the name of a later layer, as `layer`: the tail then ends with its output, ``tail(samples)`` is what that layer
            returns. Nothing behind it runs. Of a tuple, dict or dataclass the first floating-point tensor is taken.
        block: in place of `layer`: the name of a module that is measured alone, also if skip connections go around it. The
            samples are its first floating-point argument with N rows, in the model's forward pass on the inputs. The tail is
            this module, and returns its first floating-point result with N rows. All other arguments stay as they are. Of a
            tensor with N rows among them the first row counts, if the others change nothing in the output.
        forward: called as forward(model, inputs) in place of model(inputs), for models that are called in another way. inputs
            may then be any tuples, lists and dicts that contain tensors.
        output: selects the part of the model's output that counts, if the output is no tensor or not all of it matters: a key,
            an attribute, an index, or a function of the output. With `until` or `block` it selects in what that layer returns.
        stacked: parameters and buffers of B networks with the model's structure, as torch.func.stack_module_state returns them.
            The samples are then (B, N, ...). Measure the tail with the same `stacked`.
        batch_dim: the dimension along which the samples lie, if it is not the first: 1 for `nn.LSTM` and the transformer layers
            of torch.nn as they are by default. It holds for the inputs, the layer's output and the model's output; in those
            where it does not, as in an output (N, classes), calls on some of the samples show the dimension. None: the first
            dimension, or, if the layer's output or the model's output has no row per sample there, the one that such calls
            show for samples along the first or second dimension of the inputs. A block's samples lie along the first.
        compile: compile the tail by torch.compile, once for any number of path points. This takes seconds, in this call. A tail
            that a kernel measures, a chain or a block, stays as it is. Derivatives are not compiled.

    Returns:
        (tail, samples): a module, and the layer's output (N, ...), detached. Samples lie along the first dimension of both, and
            of the tail's output, also where they do not in the model. If torch.fx cannot isolate the part of the model behind
            the layer, the tail is a graph of the torch functions that the model calls, or the model with a forward hook that
            replaces the layer's output.

    Raises:
        ValueError: the layer does not exist, is not called exactly once, or does not give one row per input; the output also
            depends on the inputs on a way around the layer; the model's output does not have one row per input, or no samples
            along batch_dim; the model is on several devices or on meta, or has lazy parameters without values; `until` is not
            behind the layer; the output of the block depends on another of its arguments that differs between samples; not
            exactly one of layer and block is given, or until or batch_dim with block; compile with stacked, or with a tail that
            is no graph.
        TypeError: the model is no module; inputs, the layer's output or the model's output are no (floating-point) tensors;
            inputs do not fit the model's forward; or the block has no floating-point argument with N rows.
        RuntimeError: torch.compile does not work here, or not for this tail.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> x = torch.randn(20, 8)
        >>> tail, samples = lmnfast.cut(model, "0", x)
        >>> samples.shape
        torch.Size([20, 16])
        >>> torch.allclose(tail(samples), model(x))
        True
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
        >>> tokens = torch.randn(20, 5, 8)
        >>> tail, samples = lmnfast.cut(encoder, "layers.0", tokens, until="layers.1")
        >>> torch.allclose(tail(samples), encoder(tokens), atol=1e-6)
        True
        >>> tail, samples = lmnfast.cut(encoder, block="layers.1.linear2", inputs=tokens)
        >>> samples.shape, tail(samples).shape
        (torch.Size([20, 5, 16]), torch.Size([20, 5, 8]))
    """
    name = chosen(layer, block)
    how = Cutting(forward, output, until, block is not None, batch_dim, compile)
    how.check(model)
    if stacked is not None and compile:
        raise ValueError(
            "compile: expected without stacked, whose networks have other parameters than the tail"
        )
    if stacked is None:
        return cut_at(model, name, inputs, how)
    found = []
    for number in range(networks_in(stacked)):
        with loaded(model, stacked, number):
            found.append(run_to(model, name, inputs, how))
    tail, _ = cut_at(model, name, inputs, how)
    setattr(tail, WHOLE, (model,))  # if modules share a tensor, `stacked` has the model's names
    if block is not None:
        _check_arguments(tail, block, stacked, found)
    return tail, torch.stack([samples for samples, _ in found])


@alone()
def cut_at(model: nn.Module, name: str, inputs: Any, how: Cutting) -> tuple[nn.Module, Tensor]:
    """As `cut`, at the layer or block of that name."""
    start = start_of(model, name, inputs, how)
    tail = _tail(start, model, name, inputs, how)
    if not start.layout.is_plain:
        setattr(tail, LAYOUT, start.layout)
    return compiled(tail, start.samples, name) if how.compile else tail, start.samples


def _tail(start: Start, model: nn.Module, name: str, inputs: Any, how: Cutting) -> nn.Module:
    samples, result = start.samples, start.output
    try:
        traced = _traced_tail(start)
        if reproduces_output(traced, samples, result) and _takes_any_inputs(traced, start):
            return traced
    except Exception:  # not traced, or along a branch that the samples do not take
        pass
    try:
        replacing, ways = hook_tail(start)
    except Exception as error:
        if not how.block:
            raise
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(
            f"block: {name!r} fails when it is called alone with the arguments that it has in the model; expected a module "
            f"that uses nothing else which the model sets before ({said})"
        ) from error
    if replacing is None:
        if start.layer is not None:
            raise ValueError(other_ways(model, name, inputs, how, ways, start.layout))
        if how.block:
            named, what = named_arguments(start.call.model, start.inputs), f"block: the output of {name!r}"
        else:
            named = named_inputs(model, inputs, how.forward)
            what = "layer: the model's output" if how.until is None else f"layer: the output of {how.until!r}"
        raise ValueError(other_arguments(start, named, ways, what))
    try:
        graph = taped(replacing, samples)
        if reproduces_output(graph, samples, result) and takes_any_rows(graph, samples, result):
            return graph
        replacing.why = "a graph of its calls has other outputs on the samples"
    except NotTaped as error:
        replacing.why = str(error)
    except Exception as error:  # the user's forward may fail on two or three samples
        replacing.why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
    return replacing


def chosen(layer: Any, block: Any, names: tuple[str, str] = ("layer", "block")) -> Any:
    """The one of two arguments that is given; the other is None. Raises ValueError for both or none."""
    if (layer is None) == (block is None):
        got = "neither" if layer is None else "both"
        raise ValueError(f"{names[0]}: expected either {names[0]} or {names[1]}, got {got}")
    return block if layer is None else layer


def _check_arguments(
    tail: nn.Module, block: str, stacked: Stacked, found: list[tuple[Tensor, Tensor]]
) -> None:
    """Raises ValueError if one of the networks gives the block other arguments than the model does."""
    for number, (samples, output) in enumerate(found):
        with loaded(tail, stacked, number):
            same = reproduces_output(tail, samples, output)
        if not same:
            raise ValueError(
                f"stacked: network {number} gives the block {block!r} other arguments, beside its samples, than the model "
                "does; cut each network"
            )


@alone()
def why_not_traced(model: nn.Module, name: str, inputs: Any, how: Cutting) -> tuple[nn.Module | None, str]:
    """The tail by torch.fx, not compared with the model; or None, and the reason why torch.fx gives no tail."""
    check_made(model, "model")
    start = start_of(model, name, inputs, how) if inputs is not None else _guessed(model, name, how)
    try:
        return _traced_tail(start), ""
    except Exception as error:  # the user's forward may fail on proxies
        return None, f"torch.fx cannot trace the model ({type(error).__name__}: {str(error).splitlines()[0]})"


def _guessed(model: nn.Module, name: str, how: Cutting) -> Start:
    """Where a tail begins, for a model that has not run. Assumes one argument, and one tensor as each layer's output."""
    if how.block or means_inputs(model, name):
        part, number = None, None
        model = find_layer(model, name, "block")[0] if how.block else model
    else:
        part, number = find_layer(model, name)
    end = None if how.until is None else end_of(model, name, how.until)
    call = Call(called_model(model, how.forward), None, None if how.block else how.forward, how.output, end)
    unknown = torch.empty(0)
    return Start(call, unknown, part, number, [], unknown, unknown, Layout(()))


class _FromInput(nn.Module):
    """A call with one entry of its inputs replaced."""

    def __init__(self, call: Call, inputs: Any, path: list) -> None:
        super().__init__()
        self.call = call
        self.places = everywhere(inputs, path)
        self.inputs = (mapped(inputs, lambda tensor: tensor.detach().clone()),)

    def forward(self, samples: Tensor) -> Tensor:
        # Not by a call: `Reached` leaves the calls that torch.fx counts, and ends in this one's forward.
        return self.call.forward(substituted(self.inputs[0], self.places, samples))


def _traced_tail(start: Start) -> fx.GraphModule:
    """The part of the model behind a call of the layer, as a GraphModule.

    Raises the errors of the user's forward on proxies, and ValueError if the layer cannot be separated.
    """
    root = start.call if start.layer is not None else _FromInput(start.call, start.inputs, start.path)
    with evaluating(root, changed=True):  # removes the constants that tracing adds to `root`
        return _after_layer(root, start)


def _after_layer(root: nn.Module, start: Start) -> fx.GraphModule:
    graph = Tracer(start.layer, start.call.end).trace(root)
    if start.layer is None:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        return graph_after(graph, root, inputs, start.layout.layer)
    cuts = [n for n in graph.nodes if n.op == "call_module" and root.get_submodule(n.target) is start.layer]
    if not cuts or (start.number is None and len(cuts) > 1) or (start.number or 0) >= len(cuts):
        raise ValueError(f"torch.fx sees {len(cuts)} calls of the layer")
    first = [cuts[start.number or 0]]
    for key in start.path:  # if the layer returns a tuple, for example, only the measured entry is replaced
        first = [n for last in first for n in last.users if n.target is operator.getitem and n.args[1] == key]
    return graph_after(graph, root, first, start.layout.layer)


def _takes_any_inputs(tail: nn.Module, start: Start) -> bool:
    """Whether a traced tail from an input on takes any number of rows: other inputs may be in it with their N rows."""
    others = [] if start.layer is not None else list(tensors_in(start.inputs))[1:]
    return not others or takes_any_rows(tail, start.samples, start.output)
