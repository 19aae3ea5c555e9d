"""What the writers and the callbacks share."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .._layers import match_layers
from .._nested import mapped, tensors_in
from .._undisturbed import sharding_of
from ..probe import Probe, Writer

NOT_IDENTITY = ("model", "inputs", "every", "budget", "writers")  # they change no number of a row


def required(names: str | tuple[str, ...], extra: str) -> ModuleType:
    """The first of these modules that is installed.

    Args:
        names: one or several.
        extra: of lmnfast, that installs it.

    Raises:
        ImportError: none is installed; says how to get it. A module that is there and fails to import raises its own
            error.
    """
    names = (names,) if isinstance(names, str) else names
    for name in names:
        package = name.partition(".")[0]
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # torch.utils.tensorboard is there also without tensorboard, which it then does not find.
            if error.name is None or error.name.partition(".")[0] not in {package, extra}:
                raise
    raise ImportError(f"{names[0]}: not installed; pip install lmnfast[{extra}]")


def key(layer: str, before: int = 0) -> str:
    """The name a layer's LMN is logged under.

    Args:
        layer: its name.
        before: how many others that log to the same place measure the layer as well.
    """
    return f"lmn-{before + 1}/{layer}" if before else f"lmn/{layer}"


def refuse_sharded(model: nn.Module, strategy: str | None = None) -> None:
    """Raises ValueError where no process has the whole model: one process alone cannot gather the weights of a layer.

    Args:
        model: of the training.
        strategy: the trainer's name for how it shards, where that is known before the model shows it.
    """
    if (strategy := strategy or sharding_of(model)) is not None:
        raise ValueError(
            f"strategy: expected one that keeps the whole model in each process (one device, DDP), got "
            f"{strategy}, which shards it; measure saved checkpoints instead"
        )


def new_state() -> dict[str, Any]:
    """The `state_of` a callback that has seen no step."""
    return {"step": None, "rows": []}


class Plan:
    """What a callback measures: the arguments of a `Probe` before there is a model, checked.

    Args:
        inputs: as in `Probe`.
        layers: as in `Probe`.
        every: as in `Probe`, in optimizer steps.
        settings: the other arguments of `Probe`.

    Raises:
        TypeError: `Probe` has no such argument.
        ValueError: every < 1.
    """

    def __init__(
        self, inputs: Any, layers: str | Sequence[str], every: int, settings: dict[str, Any]
    ) -> None:
        bound = inspect.signature(Probe).bind(None, inputs, layers, every=every, **settings)
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name not in NOT_IDENTITY}
        given["layers"] = [layers] if isinstance(layers, str) else list(layers)
        self.identity = {name: _plain(value) for name, value in given.items()} | {"inputs": _digest(inputs)}
        """What tells the rows of this plan from those of others: what is measured, and how; plain values."""
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
        log: Callable[[int, dict[str, float]], None],
    ) -> Probe:
        """The probe of a training that begins, or goes on, after this many steps.

        Args:
            model: of the training.
            prepare: brings a tensor of the inputs to the model's device and dtype.
            step: how many optimizer steps there were.
            state: of `state_of` or `new_state`. One with a later step is of another training, and dropped.
            log: gets the LMN by layer of each step, in order.
        """
        last, rows = state["step"], state["rows"]
        if last is None or last > step:
            last, rows = step - 1, []
        logged = _StepWriter(len(match_layers(model, self._layers)), log)
        probe = Probe(
            model,
            mapped(self._inputs, prepare),
            self._layers,
            every=self._every,
            writers=(*self._writers, logged),
            **self._settings,
        )
        if step > 0 or rows:
            probe.load_state_dict({"next_step": last + 1, "rows": rows})
        return probe


def state_of(probe: Probe) -> dict[str, Any]:
    """What a training that is resumed needs to know: the last step seen, and the rows; plain values."""
    state = probe.state_dict()
    return {"step": state["next_step"] - 1, "rows": state["rows"]}


class _StepWriter:
    """A writer that logs the layers of a step together."""

    def __init__(self, layers: int, log: Callable[[int, dict[str, float]], None]) -> None:
        self._layers = layers
        self._log = log
        self._step = -1
        self._values: dict[str, float] = {}

    def write(self, row: dict[str, Any]) -> None:
        if row["step"] != self._step:
            self.close()
        self._step = row["step"]
        self._values[row["layer"]] = row["lmn"]
        if len(self._values) == self._layers:
            self.close()

    def close(self) -> None:
        """Logs what has come of a step, where not all of it has: another layer's row failed."""
        if self._values:
            values, self._values = self._values, {}
            self._log(self._step, values)


def names(probe: Probe, probes: Iterable[Probe | None]) -> dict[str, str]:
    """What each layer's LMN is logged under, by layer.

    Args:
        probe: of one callback.
        probes: of all callbacks that log to the same place, in their order; None for one that does not measure.
    """
    before: list[str] = []
    for other in probes:
        if other is probe:
            break
        before += other.layers if other is not None else []
    return {layer: key(layer, before.count(layer)) for layer in probe.layers}


def _plain(value: Any) -> Any:
    """A setting as a value that is equal from process to process: a function by its name."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _digest(inputs: Any) -> str:
    """Of the values, shapes and dtypes of all tensors in the inputs."""
    found = hashlib.sha256()
    for tensor in tensors_in(inputs):
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode())
        if tensor.layout == torch.strided:
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
