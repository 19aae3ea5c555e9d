"""The network behind a layer of a model that torch.fx cannot trace: the model with the layer's output replaced by a hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ._inputs import named_inputs
from ._nested import at_path, everywhere, mapped, replaced, substituted, tensors_in
from ._recorded import Recording, repeated
from ._run_to import Start, behind, run_on_copies, start_of
from ._samples import same_output
from ._tape import ROWS, Tape
from ._taped import taped_tail
from ._tracing import Call, Forward, Output
from ._undisturbed import evaluating, measurement_of


def reproduces_output(tail: nn.Module, samples: Tensor, output: Tensor) -> bool:
    """Whether tail(samples) is the model's output."""
    with evaluating(tail):
        return bool(same_output(tail(samples), output))


# What a tail replays during a measurement: results whose rows share memory; results with memory for each row, as some models
# write into them or reshape them; nothing, and then all modules run.
Replays = Literal["views", "copies"] | None
REPLAYS: tuple[Replays, ...] = ("views", "copies", None)


class HookTail(nn.Module):
    """The model with one layer's output replaced. Its inputs are copies of the first sample.

    During a measurement the modules before the layer do not run: they return what they returned for the first sample, see
    `_recorded`. Otherwise they run for each row.

    call, layer, number, path: as in `hook_tail`. Without a layer an entry of the inputs is replaced. inputs: of the model.
    has_rows: for each tensor of the inputs, whether it has a row per sample. The tail then repeats the first row. Other
        tensors are the same for every sample.
    in_place: write into the layer's output, so that tensors which share memory with it change too.
    """

    def __init__(
        self,
        call: Call,
        layer: nn.Module | None,
        number: int,
        path: list,
        inputs: Any,
        has_rows: Sequence[bool],
        in_place: bool = False,
    ) -> None:
        super().__init__()
        self.model = call.model
        self.call = (call,)  # in tuples: the modules must not be registered a second time
        self.layer = (layer,)
        self.number = number
        self.path = path
        self.has_rows = has_rows
        self.in_place = in_place
        self.replays: Replays = None if in_place or layer is None else "views"
        self.recording = Recording()
        self.why = ""
        """Why the tail is no graph, in words that can follow "as"."""
        self.places = [] if layer is not None else everywhere(inputs, path)
        rows = iter(has_rows)
        self.first = mapped(inputs, lambda i: (i[:1] if next(rows) else i).detach().clone())

    def cost(self) -> str:
        """Says in words what runs for each path point."""
        if self.replays is None:
            return "the whole model runs for each path point"
        return "the parts before the layer run once in a measurement"

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) in place of the layer's output -> the model's output."""
        measured = measurement_of(self)
        layer = self.layer[0]
        if measured is None or self.replays is None or layer is None:
            return self._run(x, self.number, self._inputs(len(x), copies=True))
        self.recording.begin(measured, self._pass, self.model, layer, self.number)
        copies = self.replays == "copies"
        with self.recording.replayed(len(x), copies):
            return self._run(x, self.recording.calls_of_layer - 1, self._inputs(len(x), copies))

    def _run(self, x: Tensor, number: int, inputs: Any) -> Tensor:
        """Calls the model. number: which call of the layer gets x as its result."""
        layer, call, calls = self.layer[0], self.call[0], 0
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
        has_rows = iter(self.has_rows)
        return mapped(self.first, lambda i: repeated(i, 0 if next(has_rows) else None, rows, copies))

    def _pass(self, rows: int) -> None:
        """Runs the model on copies of the first sample."""
        self.call[0](self._inputs(rows, copies=True))


def taped(tail: HookTail, samples: Tensor) -> fx.GraphModule:
    """The tail as a graph of torch's functions. Raises `NotTaped`; and the model's errors."""
    tapes, outputs, inputs = [], [], []
    with evaluating(tail, changed=True) as kept, torch.compiler.set_stance("force_eager"):
        for rows in ROWS:
            kept.put_back()
            x, given = samples[torch.arange(rows) % len(samples)], tail._inputs(rows, copies=True)
            with Tape(x) as tape:
                outputs.append(tail._run(x, tail.number, given))
            tapes.append(tape)
            inputs.append(list(tensors_in(given)))
        constants = dict([*tail.named_parameters(), *tail.named_buffers()])
        return taped_tail(tapes, outputs, constants, inputs)


def hook_tail(start: Start) -> tuple[HookTail | None, list[int]]:
    """The tail by a forward hook; or None, and the numbers of the inputs that reach the output on a way around the layer.

    If the tail on the repeated first row does not give the model's output, there are two possible reasons. The layer's output
    may share memory with an earlier result. Or an input that is the same for all samples (a mask of tokens by tokens) has by
    chance as many rows as there are samples.
    """
    call, layer, number, path, inputs = start.call, start.layer, start.number or 0, start.path, start.inputs
    samples, output = start.samples, start.output
    tensors = list(tensors_in(inputs))
    per_sample = [bool(i.ndim and len(i) == len(samples)) for i in tensors]

    def tail(has_rows: Sequence[bool], in_place: bool = False) -> HookTail:
        return HookTail(call, layer, number, path, inputs, has_rows, in_place)

    def fits(candidate: HookTail) -> bool:
        try:
            return _settle(candidate, samples, output)
        except Exception:  # the model may fail on inputs that it normally never receives
            return False

    plain, failure = tail(per_sample), None
    try:
        if _settle(plain, samples, output):
            return plain, []
    except Exception as error:
        if sum(per_sample) < 2:
            raise
        failure = error
    if failure is None and layer is not None and _is_fresh(call, layer, number, path, inputs):
        aliasing = tail(per_sample, True)
        if fits(aliasing):
            return aliasing, []
    others = [i for i, own in enumerate(per_sample) if own and not (plain.places and plain.places[i])]
    ways = [i for i in others if not fits(tail([j == i for j in range(len(tensors))]))]
    shared = tail([own and i not in ways for i, own in enumerate(per_sample)])
    if ways and takes_any_rows(shared, samples, output):
        return shared, []
    if failure is not None and not ways:
        raise failure
    return None, ways


def _settle(tail: HookTail, samples: Tensor, output: Tensor) -> bool:
    """Whether a tail gives the model's output. Chooses what it replays: as much as gives that output."""
    for replays in REPLAYS[REPLAYS.index(tail.replays) :]:
        tail.replays = replays
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
    try:
        with evaluating(tail):
            again = tail(torch.cat([samples.flip(0), samples])).clone()
        expected = torch.cat([output.flip(0), output])
        return again.shape == expected.shape and bool(
            (again - expected).abs().max() <= 1e-3 * expected.abs().max()
        )
    except Exception:  # the model does not accept the larger batch
        return False


def other_ways(
    model: nn.Module,
    layer: str,
    inputs: Any,
    forward: Forward,
    output: Output,
    ways: list[int],
    until: str | None = None,
) -> str:
    """The error message for an output that depends on the inputs on ways around the layer, with advice."""
    named = named_inputs(model, inputs, forward)
    rows = len(next(tensors_in(inputs)))
    varying = [i for i, (_, t) in enumerate(named) if t.ndim and len(t) == rows and bool((t != t[:1]).any())]
    of = "the model's output" if until is None else f"the output of {until!r}"
    said = f"layer: {of} depends on the inputs also by another way than through {layer!r}"
    expected = "expected a layer that all of it passes through"
    if len(varying) > 1:
        names = " and ".join(named[i][0] for i in ways or varying)
        return (
            f"{said}: by {names}, not the same for all samples; {expected}, or one value of it for all samples (of a padding "
            "mask: samples of equal length, or one mask, repeated)"
        )
    said += f" (a skip connection around it, say); {expected}"
    if (around := _measurable_around(model, layer, inputs, forward, output, until)) is not None:
        said += f", as {around!r} is"
    until_hint = "" if until is not None else ", and until= ends a map before the skip connection joins it"
    return f"{said}; block={layer!r} measures that part alone{until_hint}"


def other_arguments(start: Start, named: list[tuple[str, Tensor]], ways: list[int], what: str) -> str:
    """The error message for an output that depends on more than the samples among the inputs or arguments.

    named: the tensors in them. ways: the numbers of those that matter. what: how the message begins.
    """
    samples = at_path(start.inputs, start.path)
    rows = len(start.samples)
    varying = [
        n for n, (_, t) in enumerate(named)
        if t is not samples and t.ndim and len(t) == rows and bool((t != t[:1]).any())
    ]  # fmt: skip
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


def _measurable_around(
    model: nn.Module, layer: str, inputs: Any, forward: Forward, output: Output, until: str | None
) -> str | None:
    """The innermost part of the model that contains the layer and can be cut at; None if no part can."""
    name = layer.partition("@")[0]
    while name := name.rpartition(".")[0]:
        try:
            if hook_tail(start_of(model, name, inputs, forward, output, until))[0] is not None:
                return name
        except Exception:  # for example, the part is never called itself
            continue
    return None
