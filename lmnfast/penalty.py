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
from ._differentiable import check_differentiable, mean_curvature_with_graph, with_graph
from ._entropy import complexity_with_graph
from ._layers import find_layer, means_inputs
from ._layout import layout_of, plain_layout
from ._nested import tensors_in
from ._pairs import check_generator, checked_pairs, draw_pairs
from ._python_state import python_state
from ._recognise import NotAChain, chain_with_graph
from ._run_to import Cutting, run_again, start_of
from ._schedule import Every, Schedule
from ._settings import Settings
from ._threads import alone
from ._tracing import Forward, Output
from .cutting import cut_at


class Penalty:
    """A measure of a model, times a weight, to be added to the loss: ``loss = loss + penalty(inputs)``.

    It pulls the network behind a layer towards one linear map on the inputs, or with a negative weight away from it. The
    gradient reaches the parameters on both sides of the layer. Scaling or shifting an output changes no measure, so the penalty
    is not paid by small outputs; a `stabiliser` above 0 gives that up. The model is measured in eval mode, as by
    :func:`lmnfast.measure`, and left as it was: its mode, its buffers, and the random states unless pairs are drawn. A weight
    that is so large that nothing is learned is the user's choice: begin with one for which the penalty is a tenth of the loss.

    The cost is that of about four measurements, with N (N - 1) / 2 paths for N inputs: pass a part of the batch, or draw
    `pairs`. A chain of Linear and pointwise activations behind the layer is differentiated by a fused kernel, and needs no
    memory for the paths. Any other network runs again in the backward pass, on tiles within the budget. The cut is kept from
    call to call, and made again where the model has changed, where the inputs have another shape, and at every call if they are
    several tensors.

    Under autocast the penalty is computed in the dtype of the model's weights. With `GradScaler`, scale the sum of loss and
    penalty. With DistributedDataParallel each process has the penalty of its own inputs, and its gradients are averaged as
    those of the loss are: put both in one backward pass, after a forward pass of the wrapped model. A parameter that the
    penalty uses and the loss does not is an error there with ``find_unused_parameters=True``. Sharded parameters (FSDP,
    DeepSpeed ZeRO stage 3) are refused.

    Args:
        model: any module. It is kept, and not changed.
        layer: the name of a layer, as in :func:`lmnfast.cut`; "" or None: from the inputs on.
        of: "pooled_curvature" or "curvature", 0 for a linear map, as :func:`lmnfast.curvature` with pooled True or False;
            "lmn", from 1 to N; or "complexity_bits", its logarithm. The last two need an eigenproblem of the N x N matrix.
        weight: what the measure is multiplied by. The attribute may be set between calls, as by a schedule.
        pairs: the number of pairs that each call draws anew, for a curvature. None: all pairs.
        every: the steps at which it is measured, as in :class:`lmnfast.Probe`; on others it is 0. Calls are counted from 0 in
            the attribute `step`; set it when a training resumes.
        points, rule, stabiliser, budget: as in :func:`lmnfast.connectivity`.
        generator: of the draws, on the CPU. None: torch's default generator, whose state then changes.
        until, forward, output, batch_dim: as in :func:`lmnfast.cut`.

    Attributes:
        value: the last measured value without its weight, a 0-dim float64 tensor without a graph; None before the first.

    Raises:
        ValueError: an unknown layer, `of`, `until` or rule; pairs with a measure of the whole matrix; a weight that is not
            finite; points, budget, stabiliser or `every` out of range.
        TypeError: model is no module; weight, generator or points of a wrong type.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> penalty = lmnfast.Penalty(model, "0", weight=0.01)
        >>> inputs, targets = torch.randn(32, 8), torch.randn(32, 3)
        >>> loss = (model(inputs) - targets).square().mean() + penalty(inputs)
        >>> loss.backward()
        >>> 0 < float(penalty.value) < 1
        True
    """

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
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if of not in PENALTIES:
            raise ValueError(f"of: expected one of {', '.join(PENALTIES)}, got {of!r}")
        if pairs is not None and "curvature" not in of:
            raise ValueError(f"pairs: expected None, as {of} needs the matrix of all pairs, got {pairs!r}")
        self._how = Cutting(forward, output, until, batch_dim=batch_dim)
        self._how.check(model)
        if not means_inputs(model, layer or ""):
            find_layer(model, layer or "")
        check_generator(generator)
        self._settings = Settings("path", points, rule, budget, stabiliser, of == "pooled_curvature")
        self._schedule, self._generator, self._pairs = Schedule(every), generator, pairs
        self.model, self.layer, self.of = model, layer or "", of
        self.weight = _checked_weight(weight)
        self.step = 0
        self.value: Tensor | None = None
        self._kept: _Cut | None = None

    def __repr__(self) -> str:
        return f"Penalty(layer={self.layer!r}, of={self.of!r}, weight={self.weight}, step={self.step})"

    def __getstate__(self) -> dict[str, Any]:
        """A copy, deep or by pickle, is a penalty of the copied model, and cuts it anew."""
        return {**vars(self), "_kept": None}

    def __call__(self, inputs: Any) -> Tensor:
        """The penalty on a batch of inputs.

        Args:
            inputs: as in :func:`lmnfast.cut`, two samples or more.

        Returns:
            0-dim, ``weight`` times the measure, with a graph to the model's parameters, and to the inputs if they require grad;
            float32, or float64 for a model in float64. At a step that is not due it is 0 without a graph.

        Raises:
            TypeError, ValueError: as `cut` and :func:`lmnfast.connectivity`; fewer samples than `pairs` need.
            RuntimeError: gradients are off; or nothing behind the layer and in front of it requires grad.
        """
        step = self.step
        self.step += 1
        device = next((t.device for t in tensors_in(inputs)), torch.device("cpu"))
        if not self._schedule.due(step):
            return torch.zeros((), device=device)
        check_differentiable(self._settings)
        with alone(), torch.autocast(device.type, enabled=False):
            value = self._measured(inputs)
        self.value = value.detach()
        return (self.weight * value).to(self._dtype)

    def _measured(self, inputs: Any) -> Tensor:
        state = [_shapes(inputs), python_state(self.model, None)]
        if self._kept is not None and self._kept.state == state:
            with suppress(Exception):  # this cut may be outdated; only an error with a new one counts
                return self._of_cut(self._kept, inputs)
        self._kept = None
        cut = _Cut(state, self.model, self.layer, inputs, self._how)
        value = self._of_cut(cut, inputs)
        if len(list(tensors_in(inputs))) == 1:  # otherwise the tail has the values of the others
            self._kept = cut
        return value

    def _of_cut(self, cut: _Cut, inputs: Any) -> Tensor:
        samples, output = run_again(cut.start, inputs)
        drawn = checked_pairs(self._pairs, len(samples))
        pairs = None if drawn is None else draw_pairs(len(samples), drawn, self._generator)
        self._dtype = torch.promote_types(output.dtype, torch.float32)
        known: dict[str, Any] = {"known": cut.chain, "expected": output.detach()}
        if "curvature" in self.of:
            return mean_curvature_with_graph(cut.tail, samples, self._settings, pairs=pairs, **known)
        entries = with_graph(cut.tail, samples, self._settings, **known).entries
        bits = complexity_with_graph(entries, "absolute")
        return bits if self.of == "complexity_bits" else torch.exp2(bits)


class _Cut:
    """A cut that is kept from step to step, for as long as `state` stays the same."""

    def __init__(self, state: list[Any], model: nn.Module, layer: str, inputs: Any, how: Cutting) -> None:
        self.state = state
        self.tail, _ = cut_at(model, layer, inputs, how)
        known = replace(how, batch_dim=layout_of(self.tail) or plain_layout(inputs))
        # Without the tensors of this call.
        self.start = replace(start_of(model, layer, inputs, known), inputs=None, samples=NONE, output=NONE)
        self.chain: Chain | None = None
        with suppress(NotAChain), torch.enable_grad():
            chain = chain_with_graph(self.tail)
            if all(isinstance(t, nn.Parameter) for t in (*chain.weights, *chain.biases) if t is not None):
                self.chain = chain  # its tensors follow the training; computed ones would not


NONE = torch.empty(0, device="cpu")


def _shapes(inputs: Any) -> list[Any]:
    return [(t.shape, t.dtype, t.device) for t in tensors_in(inputs)]


def _checked_weight(weight: Any) -> float:
    if isinstance(weight, (bool, str)) or not hasattr(weight, "__float__"):
        raise TypeError(f"weight: expected a number, got {weight!r}")
    if not math.isfinite(float(weight)):
        raise ValueError(f"weight: expected a finite number, got {weight!r}")
    return float(weight)
