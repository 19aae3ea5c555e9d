"""What the writers and the callbacks share."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .._nested import mapped, tensors_in
from .._undisturbed import sharding_of
from ..probe import Probe, Writer

NOT_IDENTITY = ("model", "inputs", "every", "budget", "writers")  # what changes no number of a row


def required(names: str | tuple[str, ...], extra: str) -> ModuleType:
    """The first of these modules that is installed; ImportError saying how to get it where none is.

    A module that is there and fails to import raises its own error.
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

    before: how many others that log to the same place measure the layer as well.
    """
    return f"lmn-{before + 1}/{layer}" if before else f"lmn/{layer}"


def refuse_sharded(model: nn.Module, strategy: str | None = None) -> None:
    """ValueError where no process has the whole model: each layer's weights are then gathered by collectives,
    which one process alone cannot run.

    strategy: what the trainer calls it, where it is known to shard before the model shows it.
    """
    if (strategy := strategy or sharding_of(model)) is not None:
        raise ValueError(
            f"strategy: expected one that keeps the whole model in each process (one device, DDP), got "
            f"{strategy}, which shards it; measure saved checkpoints instead"
        )


class Recorder:
    """A probe that a trainer's callback drives, over stops and resumes, by the trainer's count of optimizer
    steps.

    Measures at the first step seen of every `every`: a step itself where the count goes up by one, the next
    one seen where several optimizers move it on by more.
    """

    def __init__(
        self, inputs: Any, layers: str | Sequence[str], every: int, settings: dict[str, Any]
    ) -> None:
        # An unknown name fails here, and not when the training starts.
        bound = inspect.signature(Probe).bind(None, inputs, layers, every=every, **settings)
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name not in NOT_IDENTITY}
        given["layers"] = [layers] if isinstance(layers, str) else list(layers)
        self.identity = {name: _plain(value) for name, value in given.items()} | {"inputs": _digest(inputs)}
        """What tells this one's rows from those of others: what is measured, and how; plain values."""
        self.inputs = inputs
        self.layers = layers
        self.every = every
        self._settings = dict(settings)
        self._writers: tuple[Writer, ...] = tuple(self._settings.pop("writers", ()))
        self._probe: Probe | None = None
        self._before: list[dict[str, Any]] = []  # rows of the run that this one resumes
        self._step: int | None = None  # the last one seen

    def start(self, model: nn.Module, prepare: Callable[[Tensor], Tensor], step: int) -> None:
        """Builds the probe, and measures if the step is one to be measured and was not, before the stop.

        A step before the last one seen begins a new run. prepare: brings a tensor of the inputs to the model's device
        and dtype.
        """
        if self._step is None or self._step > step:
            self.load_state_dict({"step": step - 1, "rows": []})
        if step > 0:  # a training that goes on
            for writer in self._writers:
                if hasattr(writer, "resume"):
                    writer.resume()
        self._before = self.history
        self._probe = Probe(model, mapped(self.inputs, prepare), self.layers, every=1, **self._settings)
        self.measure(step)

    def names(self, recorders: Iterable[Recorder]) -> dict[str, str]:
        """What each layer's LMN is logged under, by layer, where these recorders, in this order, log to one place."""
        layers = self._probe.layers if self._probe else []
        before: list[str] = []
        for recorder in recorders:
            if recorder is self:
                break
            before += recorder._probe.layers if recorder._probe else []
        return {layer: key(layer, before.count(layer)) for layer in layers}

    def measure(self, step: int) -> None:
        """Call once per optimizer step; more calls do nothing. Raises RuntimeError where `Probe` raises."""
        due = step // self.every > self._step // self.every
        self._step = step
        if due:
            try:
                self._probe(step)
            except Exception as error:
                layers = ", ".join(self._probe.layers)
                raise RuntimeError(f"LMN at step {step}, layers {layers}: {error}") from error

    def new_steps(self, wait: bool = False) -> Iterator[tuple[int, dict[str, float]]]:
        """What to log, in order: steps whose rows have become ready since the last call, with each layer's LMN.

        wait: for those still pending, too. Raises as `Probe.new_rows`, after the rows before.
        """
        while self._probe is not None and (rows := self._probe.new_rows(wait)):
            steps: dict[int, dict[str, float]] = {}
            for row in rows:
                for writer in self._writers:
                    writer.write(row)
                steps.setdefault(row["step"], {})[row["layer"]] = row["lmn"]
            yield from steps.items()

    def close(self) -> None:
        if self._probe is None:
            return
        try:
            self._probe.close()
        finally:
            for writer in self._writers:
                writer.close()

    @property
    def history(self) -> list[dict[str, Any]]:
        """As `Probe.history`, from before the last stop on."""
        return [dict(row) for row in self._before] + (self._probe.history if self._probe else [])

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint or JSON; waits for pending rows."""
        return {"step": self._step, "rows": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step, self._before, self._probe = state["step"], state["rows"], None


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
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]
