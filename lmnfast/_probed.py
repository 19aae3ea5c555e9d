"""What a probe keeps: tails with their chains, measurements not solved yet, numbers that are still on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ._chain import Chain
from ._enqueue import Enqueued
from ._layout import layout_of
from ._observables import Values
from ._observed import Observation, Spectrum
from ._recognise import recognise


class Writer(Protocol):
    """Receives a probe's rows; see `lmnfast.integrations.writers`.

    A writer may also have `resume()`, see `Probe.load_state_dict`, and `expect(names)`: the observables that rows will have.
    """

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Tail:
    """A tail, and the chain that it is for a method. Valid as long as `python_state` stays the same."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.layout = module, layout_of(module)
        chain = recognise(module, method != "path")
        if chain is None:
            self._chain = None
            return
        parameters = {p.data_ptr(): p for p in module.parameters()}
        values = [value for value in (*chain.weights, *chain.biases) if value is not None]
        sources = [parameters.get(value.data_ptr()) for value in values]
        # Computed weights (parametrisations, a frozen batch norm) do not follow the training. The chain is then recognised
        # at every measurement.
        follows = all(p is not None and p.shape == v.shape for p, v in zip(sources, values, strict=True))
        self._chain = chain if follows else None
        self._pairs = [(p, value) for p, value in zip(sources, values, strict=True) if p is not None]

    def chain(self) -> Chain | None:
        """The chain, if its weights still are the parameters' values; None: the chain must be recognised again."""
        if self._chain is None or any(
            p.data_ptr() != value.data_ptr() or p.shape != value.shape or p.stride() != value.stride()
            for p, value in self._pairs
        ):
            return None
        return self._chain


class NumberOnDevice:
    """The present value of a number on a CUDA device. Only `read` waits for it."""

    def __init__(self, value: Tensor, stream: torch.cuda.Stream) -> None:
        # The training may overwrite the tensor, as a CUDA graph does at every replay.
        self._value = value.detach().clone()
        self._stream = stream
        self._ready = torch.cuda.Event(blocking=True)
        self._ready.record(torch.cuda.current_stream(value.device))

    def read(self) -> Any:
        self._ready.synchronize()
        with torch.cuda.stream(self._stream):
            return self._value.item()


@dataclass(frozen=True, eq=False)
class Pending:
    """A measurement whose connectivity is enqueued, with the values of the observables that are of its step."""

    enqueued: Enqueued
    done: torch.cuda.Event | None
    """On CUDA: the event that the connectivity is done."""
    values: Values
    samples: Tensor
    """A cut gives copies, which the training does not overwrite."""
    network: nn.Module
    model: nn.Module

    def observe_now(self, number: Callable[[Any], Any]) -> None:
        """Computes what belongs to the step. number: takes a number from the training."""
        chosen = self.values.chosen
        if self.done is not None and any({"connectivity", "pooled"} & set(o.reads) for o in chosen.at_step):
            self.done.synchronize()
            self.enqueued.check()
        self.values.observe(chosen.at_step, self._observation(None))

        def kept(value: Any) -> Any:
            value = number(value)
            return value.read if isinstance(value, NumberOnDevice) else value

        self.values.convert(kept)

    def observe_later(self, spectrum: Spectrum | None) -> dict[str, float]:
        """Computes the rest, once the connectivity is checked. Returns all values by name."""
        self.values.observe(self.values.chosen.later, self._observation(spectrum))
        return self.values.numbers()

    def _observation(self, spectrum: Spectrum | None) -> Observation:
        enqueued = self.enqueued
        return Observation(enqueued.L, enqueued.pooled, spectrum, self.samples, self.network, self.model)
