"""The network behind a layer of a model that torch.fx cannot trace: the model with the layer's output replaced by a hook."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ._inputs import named_inputs
from ._layout import Layout
from ._nested import at_path, everywhere, mapped, replaced, substituted, tensors_in
from ._recorded import Recording, repeated
from ._run_to import Cutting, Start, behind, run_on_copies, start_of
from ._samples import same_output
from ._tape import ROWS, Tape, Unseen
from ._taped import taped_tail
from ._tracing import Call
from ._undisturbed import evaluating, measurement_of, without_fast_path


def reproduces_output(tail: nn.Module, samples: Tensor, output: Tensor) -> bool:
    """Whether tail(samples) is the model's output."""
    with evaluating(tail):
        return bool(same_output(tail(samples), output))


# More rows than code for small batches is likely to pad or split to, and no multiple of a power of 2.
MANY_ROWS = 67

# What a tail replays during a measurement: results whose rows share memory; results with memory for each row, as some models
# write into them or reshape them; nothing, and then all modules run.
Replays = Literal["views", "copies"] | None
REPLAYS: tuple[Replays, ...] = ("views", "copies", None)


class HookTail(nn.Module):
    """The model with one layer's output replaced. Its inputs are copies of the first sample.

    During a measurement the modules before the layer do not run: they return what they returned for the first sample, see
    `_recorded`. Otherwise they run for each row.

    call, layer, number, path: as in `hook_tail`. Without a layer an entry of the inputs is replaced. inputs: of the model.
    layout: where the samples lie. The tail repeats the first row of the inputs that have one per sample.
    in_place: write into the layer's output, so that tensors which share memory with it change too.
    """

    def __init__(
        self,
        call: Call,
        layer: nn.Module | None,
        number: int,
        path: list,
        inputs: Any,
        layout: Layout,
        in_place: bool = False,
    ) -> None:
        super().__init__()
        self.model = call.model
        self.call = (call,)  # in tuples: the modules must not be registered a second time
        self.layer = (layer,)
        self.number = number
        self.path = path
        self.layout = layout
        self.in_place = in_place
        self.replays: Replays = None if in_place or layer is None else "views"
        self.recording = Recording()
        self.why = ""
        """Why the tail is no graph, in words that can follow "as"."""
        self.places = [] if layer is not None else everywhere(inputs, path)
        rows = iter(layout.inputs)
        self.first = mapped(inputs, lambda i: _first_row(i, next(rows)).detach().clone())

    def cost(self) -> str:
        """Says in words what runs for each path point."""
        if self.replays is None:
            return "the whole model runs for each path point"
        return "the parts before the layer run once in a measurement"

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) in place of the layer's output -> the model's output."""
        measured = None if torch.compiler.is_compiling() else measurement_of(self)
        layer = self.layer[0]
        if measured is None or measured.trained or self.replays is None or layer is None:
            with without_fast_path():
                return self._run(x, self.number, self._inputs(len(x), copies=True))
        self.recording.begin(measured, self._pass, self.model, layer, self.number)
        copies = self.replays == "copies"
        with self.recording.replayed(len(x), copies):
            return self._run(x, self.recording.calls_of_layer - 1, self._inputs(len(x), copies))

    def _run(self, x: Tensor, number: int, inputs: Any) -> Tensor:
        """Calls the model. number: which call of the layer gets x as its result."""
        layer, call, calls = self.layer[0], self.call[0], 0
        if self.layout.layer:
            x = x.movedim(0, self.layout.layer).contiguous()
        if layer is None:
            return call(substituted(inputs, self.places, x.clone()))

        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != number + 1:
                return None
            if call.end is not None:
                call.end.calls = call.end.before  # modules that are replayed do not call their parts
            if not self.in_place:
                with (
                    torch.inference_mode(False),
                    torch.enable_grad(),
                ):  # the tail begins here, whatever is around the layer
                    return replaced(output, self.path, x.clone())
            own = at_path(output, self.path)
            if own.shape != x.shape or own.dtype != x.dtype:
                raise ValueError(
                    f"x: expected {tuple(own.shape)} of {own.dtype}, as an earlier result shares the layer's memory, got "
                    f"{tuple(x.shape)} of {x.dtype}"
                )
            own.copy_(x)
            return None

        # A scripted module's own method only raises.
        handle = nn.Module.register_forward_hook(layer, replace)
        try:
            return call(inputs)
        finally:
            handle.remove()

    def _inputs(self, rows: int, copies: bool) -> Any:
        dimensions = iter(self.layout.inputs)
        return mapped(self.first, lambda i: repeated(i, next(dimensions), rows, copies))

    def _pass(self, rows: int) -> None:
        """Runs the model on copies of the first sample."""
        self.call[0](self._inputs(rows, copies=True))


def _first_row(tensor: Tensor, dimension: int | None) -> Tensor:
    return tensor if dimension is None else tensor.narrow(dimension, 0, 1)


def taped(tail: HookTail, samples: Tensor) -> fx.GraphModule:
    """The tail as a graph of torch's functions. Raises `NotTaped`; and the model's errors."""
    between = torch.lerp(samples, samples.roll(1, 0), 0.5)
    tapes, outputs, inputs = [], [], []
    with (
        evaluating(tail, changed=True) as kept,
        torch.compiler.set_stance("force_eager"),
        torch.enable_grad(),  # shows where the model turns gradients off
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # torch's, of values that are read with a gradient
        # The last run, on other points, shows whether shapes follow values.
        for rows, points in ((ROWS[0], samples), (ROWS[1], samples), (ROWS[1], between)):
            kept.put_back()
            x = points[torch.arange(rows) % len(points)].requires_grad_()
            given = tail._inputs(rows, copies=True)
            with Tape(x) as tape, Unseen(tape):
                outputs.append(tail._run(x, tail.number, given))
            tapes.append(tape)
            inputs.append(list(tensors_in(given)))
        constants = dict([*tail.named_parameters(), *tail.named_buffers()])
        return taped_tail(tapes, outputs, constants, inputs)


def hook_tail(start: Start) -> tuple[HookTail | None, list[int]]:
    """The tail by a forward hook; or None, and the numbers of the inputs that reach the output on a way around the layer.

    If the tail on the repeated first row does not give the model's output, there are three possible reasons. The layer's output
    may share memory with an earlier result. An input that is the same for all samples (a mask of tokens by tokens) may by
    chance have as many rows as there are samples. Or an input has its samples along another dimension (a recurrent state).
    """
    call, layer, number, path, inputs = start.call, start.layer, start.number or 0, start.path, start.inputs
    layout, samples, output = start.layout, start.samples, start.output
    own = [n for n, dimension in enumerate(layout.inputs) if dimension is not None]

    def tail(layout: Layout, in_place: bool = False) -> HookTail:
        return HookTail(call, layer, number, path, inputs, layout, in_place)

    def fits(candidate: HookTail) -> bool:
        try:
            return _settle(candidate, samples, output)
        except Exception:  # the model may fail on inputs that it normally never receives
            return False

    stated = tail(layout.with_states(inputs))
    if stated.layout != layout and fits(stated) and takes_any_rows(stated, samples, output):
        return stated, []
    plain, failure = tail(layout), None
    try:
        if _settle(plain, samples, output):
            return plain, []
    except Exception as error:
        if len(own) < 2:
            raise
        failure = error
    if failure is None and layer is not None and _is_fresh(call, layer, number, path, inputs):
        aliasing = tail(layout, True)
        if fits(aliasing):
            return aliasing, []
    others = [n for n in own if not (plain.places and plain.places[n])]
    ways = [n for n in others if not fits(tail(layout.with_rows([n])))]
    shared = tail(layout.with_rows([n for n in own if n not in ways]))
    if ways and takes_any_rows(shared, samples, output):
        return shared, []
    if failure is not None and not ways:
        raise failure
    return None, ways


def _settle(tail: HookTail, samples: Tensor, output: Tensor) -> bool:
    """Whether a tail gives the model's output. Chooses what it replays: as much as gives that output."""
    for replays in REPLAYS[REPLAYS.index(tail.replays) :]:
        tail.replays, tail.recording = replays, Recording()
        try:
            if reproduces_output(tail, samples, output):
                return True
        except Exception:
            if replays is None:
                raise
    return False


def _is_fresh(call: Call, layer: nn.Module, number: int, path: list, inputs: Any) -> bool:
    """Whether every forward pass puts the layer's output in new memory, so that writing there has no lasting effect."""
    results: list[Any] = []
    hook = behind(layer, lambda module, args, result: results.append(result))
    run_on_copies(call, inputs, hook)
    calls = len(results)
    run_on_copies(call, inputs, hook)
    storages = [at_path(results[n + number], path).untyped_storage() for n in (0, calls)]
    return storages[0].data_ptr() != storages[1].data_ptr()


def takes_any_rows(tail: nn.Module, samples: Tensor, output: Tensor) -> bool:
    """Whether the tail gives each sample the same output in a larger batch and at another place in it."""
    rows = torch.arange(max(2 * len(samples), MANY_ROWS), device=samples.device) % len(samples)
    rows[: len(samples)] = rows[: len(samples)].flip(0)
    try:
        with evaluating(tail):
            again, expected = tail(samples[rows]).clone(), output[rows]
        return again.shape == expected.shape and bool(
            (again - expected).abs().max() <= 1e-3 * expected.abs().max()
        )
    except Exception:  # the model does not accept the larger batch
        return False


def other_ways(
    model: nn.Module,
    layer: str,
    inputs: Any,
    how: Cutting,
    ways: list[int],
    layout: Layout,
) -> str:
    """The error message for an output that depends on the inputs on ways around the layer, with advice."""
    until = how.until
    of = "the model's output" if until is None else f"the output of {until!r}"
    said = f"layer: {of} depends on the inputs also by another way than through {layer!r}"
    varying = _varying(named_inputs(model, inputs, how.forward), layout)
    around = partial(_measurable_around, model, layer, how=replace(how, batch_dim=layout.inputs[0] or None))
    alone = f"block={layer!r} measures that part alone"
    if len(varying) < 2:
        said += " (a skip connection around it, say); expected a layer that all of it passes through"
        said += _as_example(around(inputs=inputs))
        hints = [alone] * layout.is_plain
        hints += ["until= ends a map before the skip connection joins it"] * (until is None)
        return "; ".join([said, ", and ".join(hints)] if hints else [said])
    meant = {name: rows for i, (name, rows) in varying.items() if i in ways} or dict(varying.values())
    shared = {name: rows for name, rows in meant.items() if len(_largest_group([rows])) > 1}
    said += f": through {' and '.join(meant)}, not the same for all samples; expected "
    group = _largest_group(list(shared.values() or meant.values()))
    if len(shared) < len(meant):
        part = around(inputs=layout.selected(inputs, group) if shared else inputs)
        said += f"a layer that all of it passes through{_as_example(part)}{f' ({alone})' * layout.is_plain}"
        said += ", and " if shared else ", or inputs that more samples share (here no two do)"
    if shared:
        said += (
            f"one value of {' and '.join(shared)} for all samples: measure those that share it, as sequences of one length do "
            f"(the largest such group has {len(group)} of {layout.rows_of(inputs)} samples, sample {group[0]} and those equal "
            "to it), or give one value to all"
        )
    return said


def _as_example(part: str | None) -> str:
    return "" if part is None else f", as {part!r} is"


def _varying(named: list[tuple[str, Tensor]], layout: Layout) -> dict[int, tuple[str, Tensor]]:
    """The inputs that differ between samples, by number: the name and (N, values)."""
    found = {}
    for number, ((name, tensor), dimension) in enumerate(zip(named, layout.inputs, strict=True)):
        if dimension is not None:
            rows = tensor.detach().movedim(dimension, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]
            if bool((rows != rows[:1]).any()):
                # torch.unique takes no half precision and no complex numbers.
                rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
                found[number] = name, rows.double() if rows.is_floating_point() else rows
    return found


def _largest_group(values: list[Tensor]) -> Tensor:
    """The most samples that have the same values, by their numbers. values: each (N, values)."""
    kinds = torch.stack([torch.unique(rows, dim=0, return_inverse=True)[1] for rows in values], 1)
    _, group, sizes = torch.unique(kinds, dim=0, return_inverse=True, return_counts=True)
    return (group == sizes.argmax()).nonzero().flatten()


def other_arguments(start: Start, named: list[tuple[str, Tensor]], ways: list[int], what: str) -> str:
    """The error message for an output that depends on more than the samples among the inputs or arguments.

    named: the tensors in them. ways: the numbers of those that matter. what: how the message begins.
    """
    samples = at_path(start.inputs, start.path)
    varying = [n for n in _varying(named, start.layout) if named[n][1] is not samples]
    names = " and ".join(dict.fromkeys(named[n][0] for n in ways or varying))
    if not names:
        return (
            f"{what} is not the same in a second call with the same values; expected a function of them alone (it may be "
            "random, or use what the model sets before, as autocast or an attribute)"
        )
    return (
        f"{what} depends also on {names}, not the same for all samples; expected one value of it for all samples (of a padding "
        "mask: samples of equal length, or one mask, repeated)"
    )


def _measurable_around(model: nn.Module, layer: str, inputs: Any, how: Cutting) -> str | None:
    """The innermost part of the model that contains the layer and can be cut at; None if no part can."""
    name = layer.partition("@")[0]
    while name := name.rpartition(".")[0]:
        try:
            if hook_tail(start_of(model, name, inputs, how))[0] is not None:
                return name
        except Exception:  # for example, the part is never called itself
            continue
    return None
