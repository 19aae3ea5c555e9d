"""A measure of a model as a term of its loss."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ._chain import Chain
from ._choices import PENALTIES
from ._differentiable import check_differentiable, mean_curvature, with_graph
from ._layout import layout_of, plain_layout
from ._nested import tensors_in
from ._pairs import check_generator, checked_pairs, draw_pairs
from ._python_state import python_state
from ._recognise import NotAChain, chain_with_graph
from ._run_to import Cutting, run_to
from ._schedule import Every, Schedule
from ._settings import Settings
from ._spectral_gradient import complexity
from ._threads import alone
from ._tracing import Forward, Output
from .cutting import cut_at


class Penalty:
    """A measure of a model, times a weight, to be added to the loss."""

    def __init__(
        self,
        model: nn.Module,
        layer: str | None = None,
        *,
        of: str = "pooled_curvature",
        weight: float = 1.0,
        pairs: SupportsIndex | None = None,
        every: Every = 1,
        points: int = 7,
        rule: str = "lobatto",
        stabiliser: float = 0.0,
        budget: int | None = None,
        generator: torch.Generator | None = None,
        until: str | None = None,
        forward: Forward = None,
        output: Output = None,
        batch_dim: int | None = None,
    ) -> None:
        if of not in PENALTIES:
            raise ValueError(f"of: expected one of {', '.join(PENALTIES)}, got {of!r}")
        if pairs is not None and "curvature" not in of:
            raise ValueError(f"pairs: expected None, as {of} needs the matrix of all pairs, got {pairs!r}")
        self._how = Cutting(forward, output, until, batch_dim=batch_dim)
        self._how.check(model)
        check_generator(generator)
        self._settings = Settings("path", points, rule, budget, stabiliser, of == "pooled_curvature")
        self._schedule, self._generator, self._pairs = Schedule(every), generator, pairs
        self.model, self.layer, self.of = model, layer or "", of
        self.weight = _checked_weight(weight)
        self.step = 0
        self.value: Tensor | None = None
        self._kept: _Cut | None = None

    def __call__(self, inputs: Any) -> Tensor:
        step = self.step
        self.step += 1
        device = next((t.device for t in tensors_in(inputs)), torch.device("cpu"))
        if not self._schedule.due(step):
            return torch.zeros((), device=device)
        check_differentiable(self._settings)
        with alone(), torch.autocast(device.type, enabled=False):
            value = self._measured(inputs)
        self.value = value.detach()
        return (self.weight * value).to(torch.promote_types(self._dtype, torch.float32))

    def _measured(self, inputs: Any) -> Tensor:
        state = [_shapes(inputs), python_state(self.model, None)]
        if self._kept is not None and self._kept.state == state:
            with suppress(Exception):  # this cut may be outdated; only an error with a new one counts
                return self._of_cut(self._kept, inputs)
        tail, _ = cut_at(self.model, self.layer, inputs, self._how)
        self._kept = None
        cut = _Cut(state, tail)
        value = self._of_cut(cut, inputs)
        if len(list(tensors_in(inputs))) == 1:  # otherwise the tail has the values of the others
            self._kept = cut
        return value

    def _of_cut(self, cut: _Cut, inputs: Any) -> Tensor:
        layout = layout_of(cut.tail) or plain_layout(inputs)
        how = replace(self._how, batch_dim=layout, graph=True)
        samples, output = run_to(self.model, self.layer, inputs, how)
        drawn = checked_pairs(self._pairs, len(samples))
        pairs = None if drawn is None else draw_pairs(len(samples), drawn, self._generator)
        found = with_graph(
            cut.tail, samples, self._settings, pairs=pairs, known=cut.chain(), expected=output.detach()
        )
        self._dtype = found.entries.dtype
        if "curvature" in self.of:
            return mean_curvature(found.entries)
        bits = complexity(found.entries, "absolute")
        return bits if self.of == "complexity_bits" else torch.exp2(bits)


class _Cut:
    """A cut that is kept from step to step."""

    def __init__(self, state: list[Any], tail: nn.Module) -> None:
        self.state, self.tail = state, tail
        self._chain: Chain | None = None
        with suppress(NotAChain), torch.enable_grad():
            chain = chain_with_graph(tail)
            if all(isinstance(t, nn.Parameter) for t in (*chain.weights, *chain.biases) if t is not None):
                self._chain = chain  # its tensors follow the training; computed ones would not

    def chain(self) -> Chain | None:
        return self._chain


def _shapes(inputs: Any) -> list[Any]:
    return [(t.shape, t.dtype, t.device) for t in tensors_in(inputs)]


def _checked_weight(weight: Any) -> float:
    if isinstance(weight, (bool, str)) or not hasattr(weight, "__float__"):
        raise TypeError(f"weight: expected a number, got {weight!r}")
    if not math.isfinite(float(weight)):
        raise ValueError(f"weight: expected a finite number, got {weight!r}")
    return float(weight)
