"""Code shared by the writers and the callbacks."""

from __future__ import annotations

import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._nested import mapped, tensors_in
from .._observables import Chosen
from .._schedule import Every, Schedule
from .._settings import Settings, completed
from .._undisturbed import sharding_of
from ..cutting import chosen
from ..probe import Probe, Writer

# Values of the column precision that are a dtype of about 3 digits or less.
LOW_PRECISION = ("bfloat16", "float16")

# Arguments of a Probe that change no number of a row, or that `Plan.identity` records in another way (inputs).
NOT_IDENTITY = ("model", "inputs", "every", "budget", "compile", "writers", "group")


def key(layer: str, before: int = 0, name: str = "lmn") -> str:
    """The name under which a number of a layer is logged.

    Args:
        layer: the layer's name.
        before: number of earlier callbacks that log the same layer to the same place.
        name: "lmn", or the observable's name.
    """
    return f"{name}-{before + 1}/{layer}" if before else f"{name}/{layer}"


def numbers(row: dict[str, Any], observables: Iterable[str]) -> dict[str, float]:
    """The numbers of a row that are logged: its LMN, and these observables; not those without a value."""
    found = {name: row.get(name) for name in ("lmn", *observables)}
    return {name: value for name, value in found.items() if value is not None and not math.isnan(value)}


def refuse_sharded(model: nn.Module, strategy: str | None = None) -> None:
    """Raises ValueError if no process has the whole model: a single process cannot gather the weights of a layer.

    Args:
        model: the model in training.
        strategy: the trainer's name of the sharding method, if it is known before the model shows it.
    """
    if (strategy := strategy or sharding_of(model)) is not None:
        raise ValueError(
            f"strategy: expected one that keeps the whole model in each process (one device, DDP), got "
            f"{strategy}, which shards it; measure saved checkpoints instead"
        )


def new_state() -> dict[str, Any]:
    """The `state_of` of a callback that has seen no step."""
    return {"step": None, "rows": []}


class Plan:
    """The checked arguments of a callback's `Probe`, before the model exists.

    Args:
        inputs: as in `Probe`.
        layers: as in `Probe`.
        every: as in `Probe`, in optimizer steps.
        settings: the other arguments of `Probe`.

    Raises:
        TypeError: `Probe` has no such argument; points is not an integer, or the stabiliser is not a number.
        ValueError: every < 1 or without a step; an unknown method, rule or observable; points, budget or stabiliser out of
            range, or a stabiliser with method "jacobian"; not exactly one of layers and blocks is given.
    """

    def __init__(
        self, inputs: Any, layers: str | Sequence[str] | None, every: Every, settings: dict[str, Any]
    ) -> None:
        chosen(layers, settings.get("blocks"), ("layers", "blocks"))
        bound = inspect.signature(Probe).bind(None, inputs, layers, every=every, **settings)
        self.schedule = Schedule(every)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name not in NOT_IDENTITY}
        measuring = ("method", "points", "rule", "budget", "stabiliser")
        checked = Settings(*(bound.arguments[name] for name in measuring))
        self.observables = Chosen(given.pop("observables")).names
        later = {"observables": self.observables, "stabiliser": checked.stabiliser}
        del given["stabiliser"]
        # Rows without these are known by what they were before there were any.
        given |= {name: value for name, value in later.items() if value}
        for name in ("layers", "blocks"):
            given[name] = [given[name]] if isinstance(given[name], str) else given[name]
        self.identity = {name: _plain(value) for name, value in given.items()} | {"inputs": _digest(inputs)}
        """Identifies the rows of this plan among those of other callbacks: the measured layers, inputs and settings, as plain
        values."""
        self._inputs = inputs
        self._layers = layers
        self._every = every
        self._settings = dict(settings)
        self._writers: tuple[Writer, ...] = tuple(self._settings.pop("writers", ()))

    def probe(
        self,
        model: nn.Module,
        prepare: Callable[[Tensor], Tensor],
        step: int,
        state: dict[str, Any],
        log: Callable[[int, dict[str, dict[str, float]]], None],
    ) -> Probe:
        """The probe of a training that begins, or continues, after this many steps.

        Args:
            model: the model in training.
            prepare: brings a tensor of the inputs to the model's device and dtype.
            step: number of optimizer steps so far.
            state: from `state_of` or `new_state`. A state with a later step belongs to another training, and is dropped.
            log: receives each step and its `numbers` by layer, in order.
        """
        last, rows = state["step"], state["rows"]
        if last is None or last > step:
            last, rows = step - 1, []
        logged = _StepWriter(log)
        probe = Probe(
            model,
            mapped(self._inputs, prepare),
            self._layers,
            every=self._every,
            writers=(*self._writers, logged),
            **self._settings,
        )
        logged.layers = len(probe.layers)
        if step > 0 or rows:
            probe.load_state_dict({"next_step": last + 1, "rows": rows})
        return probe


def state_of(probe: Probe) -> dict[str, Any]:
    """The state that a resumed training needs: the last step seen, and the rows, as plain values."""
    state = probe.state_dict()
    return {"step": state["next_step"] - 1, "rows": state["rows"]}


def kept_state(state: dict[str, Any]) -> dict[str, Any]:
    """A result of `state_of`, maybe of a version without the column stabiliser: its rows have stabiliser 0."""
    return {**state, "rows": [completed(row) for row in state["rows"]]}


class _StepWriter:
    """A writer that logs the layers of a step together."""

    def __init__(self, log: Callable[[int, dict[str, dict[str, float]]], None]) -> None:
        self.layers = 0
        """How many layers a step has. Known once the probe is made, before it measures."""
        self._log = log
        self._step = -1
        self._low = ""
        self._observables: tuple[str, ...] = ()
        self._values: dict[str, dict[str, float]] = {}

    def expect(self, observables: tuple[str, ...]) -> None:
        self._observables = observables

    def write(self, row: dict[str, Any]) -> None:
        if row["step"] != self._step:
            self.close()
        if row["precision"] in LOW_PRECISION and row["precision"] != self._low:
            self._low = row["precision"]
            warnings.warn(
                f"layer {row['layer']!r}: measured in {self._low}, as the model computes; its rounding counts as curvature, "
                "and LMN may be far too large. Measure float32 copies of checkpoints (model.float()), as docs/number.md says",
                stacklevel=2,
            )
        self._step = row["step"]
        self._values[row["layer"]] = numbers(row, self._observables)
        if len(self._values) == self.layers:
            self.close()

    def close(self) -> None:
        """Logs the rows of an incomplete step. A step is incomplete if the row of another layer failed."""
        values, self._values = self._values, {}
        if any(values.values()):
            self._log(self._step, values)


def named(
    by_layer: dict[str, dict[str, float]], probe: Probe, probes: Iterable[Probe | None]
) -> dict[str, float]:
    """The numbers of a step by the names under which they are logged.

    Args:
        by_layer: the `numbers` of each layer.
        probe: the probe of one callback.
        probes: the probes of all callbacks that log to the same place, in order; None for a callback that does not measure.
    """
    before: list[str] = []
    for other in probes:
        if other is probe:
            break
        before += other.layers if other is not None else []
    return {
        key(layer, before.count(layer), name): value
        for layer, found in by_layer.items()
        for name, value in found.items()
    }


def of_last_step(rows: Sequence[dict[str, Any]], observables: Iterable[str]) -> dict[str, dict[str, float]]:
    """The `numbers` by layer of the last step of these rows."""
    observables = tuple(observables)
    return {row["layer"]: numbers(row, observables) for row in rows if row["step"] == rows[-1]["step"]}


def _plain(value: Any) -> Any:
    """A setting as a value that is the same in every process; a function becomes its name."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _digest(inputs: Any) -> str:
    """A digest of the values, shapes and dtypes of all tensors in the inputs."""
    found = hashlib.sha256()
    for tensor in tensors_in(inputs):
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode())
        if tensor.layout == torch.strided:
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
