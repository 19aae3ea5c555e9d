"""A measure of a model as a term of its loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ._chain import Chain
from ._checks import OtherModel
from ._choices import PENALTIES
from ._differentiable import check_differentiable, mean_curvature_with_graph, with_graph
from ._entropy import complexity_with_graph
from ._layers import find_layer, means_inputs
from ._layout import layout_of, plain_layout
from ._nested import tensors_in
from ._pairs import check_generator, checked_count, checked_pairs, draw_pairs
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

    The cost is that of three to five measurements, with N (N - 1) / 2 paths for N inputs: pass a part of the batch, or draw
    `pairs`. A chain of Linear and pointwise activations behind the layer is differentiated by a fused kernel, and needs no
    memory for the paths. Any other network runs again in the backward pass, on tiles within the budget. The cut is kept from
    call to call, and made again where the model has changed, where the inputs have another shape, and at every call if they are
    several tensors.

    Between the call and the backward pass the model must not change. A forward pass of the loss that updates the model, as one
    in training mode updates the running statistics of BatchNorm, comes before the call.

    Under autocast the penalty is computed in the dtype of the model's weights, and so needs inputs of this dtype. With
    `GradScaler`, scale the sum of loss and penalty. With DistributedDataParallel each process has the penalty of its own
    inputs, and its gradients are averaged as those of the loss are: put both in one backward pass, after a forward pass of the
    wrapped model. A parameter that the penalty uses and the loss does not is an error there with
    ``find_unused_parameters=True``. Sharded parameters (FSDP, DeepSpeed ZeRO stage 3) are refused.

    Args:
        model: any module. It is kept, and not changed.
        layer: the name of a layer, as in :func:`lmnfast.cut`; "" or None: from the inputs on.
        of: "pooled_curvature" or "curvature", 0 for a linear map, as :func:`lmnfast.curvature` with pooled True or False;
            "lmn", from 1 to N; or "complexity_bits", its logarithm. The last two need an eigenproblem of the N x N matrix.
        weight: what the measure is multiplied by, a number without a graph. The attribute may be set between calls, as by a
            schedule.
        pairs: the number of pairs that each call draws anew, for a curvature. None: all pairs.
        every: the steps at which it is measured, as in :class:`lmnfast.Probe`; on others it is 0. Calls are counted from 0 in
            the attribute `step`, those that fail are not; set it when a training resumes.
        points, rule, stabiliser, budget: as in :func:`lmnfast.connectivity`.
        generator: of the draws, on the CPU. None: torch's default generator, whose state then changes.
        until, forward, output, batch_dim: as in :func:`lmnfast.cut`.

    Attributes:
        value: the last measured value without its weight, a 0-dim float64 tensor without a graph; None before the first.

    Raises:
        ValueError: an unknown layer, `of`, `until` or rule; pairs with a measure of the whole matrix, or fewer than 2; a weight
            that is not finite, also when it is set; points, budget, stabiliser or `every` out of range.
        TypeError: model is no module; weight, pairs, generator or points of a wrong type; a weight that requires grad.

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
        count = checked_count(pairs)
        if count is not None and count < 2:
            raise ValueError(f"pairs: expected 2 or more, or None for all, got {count}")
        self._how = Cutting(forward, output, until, batch_dim=batch_dim)
        self._how.check(model)
        if not means_inputs(model, layer or ""):
            find_layer(model, layer or "")
        check_generator(generator)
        self._settings = Settings("path", points, rule, budget, stabiliser, of == "pooled_curvature")
        self._schedule, self._generator, self._pairs = Schedule(every), generator, count
        self.model, self.layer, self.of = model, layer or "", of
        self.weight = weight
        self.step = 0
        self.value: Tensor | None = None
        self._kept: _Cut | None = None

    @property
    def weight(self) -> float:
        """What the measure is multiplied by. Setting it raises the errors of the argument."""
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        self._weight = _checked_weight(weight)

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
            TypeError, ValueError: as `cut` and :func:`lmnfast.connectivity`; fewer samples than `pairs` need; inputs of another
                dtype than the model's weights.
            RuntimeError: gradients are off; or nothing behind the layer and in front of it requires grad.
        """
        device = next((t.device for t in tensors_in(inputs)), torch.device("cpu"))
        if self._schedule.due(self.step):
            check_differentiable(self._settings)
            with alone(), torch.autocast(device.type, enabled=False):
                value = self._measured(inputs)
            self.value = value.detach()
            result = (self.weight * value).to(self._dtype)
        else:
            result = torch.zeros((), device=device)
        self.step += 1
        return result

    def _measured(self, inputs: Any) -> Tensor:
        state = [_shapes(inputs), python_state(self.model, None)]
        kept, self._kept = self._kept, None
        try:
            if kept is not None and kept.state == state and (found := _run_kept(kept, inputs)) is not None:
                with suppress(OtherModel):  # the cut is outdated
                    value = self._of_cut(kept, *found)
                    self._kept = kept
                    return value
            cut = _Cut(state, self.model, self.layer, inputs, self._how)
            value = self._of_cut(cut, *run_again(cut.start, inputs))
        except RuntimeError as error:
            _check_dtypes(self.model, inputs, error)
            raise
        if len(list(tensors_in(inputs))) == 1:  # otherwise the tail has the values of the others
            self._kept = cut
        return value

    def _of_cut(self, cut: _Cut, samples: Tensor, output: Tensor) -> Tensor:
        drawn = checked_pairs(self._pairs, len(samples))
        pairs = None if drawn is None else draw_pairs(len(samples), drawn, self._generator)
        self._dtype = torch.promote_types(output.dtype, torch.float32)
        return measure_with_graph(
            self.of, cut.tail, samples, self._settings, pairs=pairs, known=cut.chain, expected=output.detach()
        )


def measure_with_graph(
    of: str,
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    settings: Settings,
    *,
    pairs: tuple[Tensor, Tensor] | None = None,
    known: Chain | None = None,
    expected: Tensor | None = None,
) -> Tensor:
    """The measure `of` of f on x, as in `Penalty`, 0-dim float64 with its graph. Other arguments as of `with_graph`."""
    how: dict[str, Any] = {"known": known, "expected": expected}
    if "curvature" in of:
        return mean_curvature_with_graph(f, x, settings, pairs=pairs, **how)
    bits = complexity_with_graph(with_graph(f, x, settings, **how).entries, "absolute")
    return bits if of == "complexity_bits" else torch.exp2(bits)


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

# With it torch.utils.checkpoint ends a forward pass that is repeated, as soon as it has all that it needs.
STOPPED = getattr(torch.utils.checkpoint, "_StopRecomputationError", ())


def _run_kept(cut: _Cut, inputs: Any) -> tuple[Tensor, Tensor] | None:
    """`run_again`; None if it fails, as the cut may be outdated. Only an error with a new one counts."""
    try:
        return run_again(cut.start, inputs)
    except Exception as error:
        if isinstance(error, STOPPED):
            raise
        return None


def _check_dtypes(model: nn.Module, inputs: Any, error: RuntimeError) -> None:
    """Raises TypeError if the model failed on the dtype of inputs, as it does on what autocast has made."""
    own = {p.dtype: name for name, p in reversed(list(model.named_parameters())) if p.is_floating_point()}
    for tensor in tensors_in(inputs):
        if own and tensor.is_floating_point() and tensor.dtype not in own and "type" in str(error):
            dtype, name = list(own.items())[-1]
            raise TypeError(
                f"inputs: are {tensor.dtype}, but the model's parameter {name!r} is {dtype}; the penalty is computed without "
                f"autocast, in the dtype of the weights: expected inputs.to({dtype})"
            ) from error


def _shapes(inputs: Any) -> list[Any]:
    return [(t.shape, t.dtype, t.device) for t in tensors_in(inputs)]


def _checked_weight(weight: Any) -> float:
    no_number = isinstance(weight, (bool, str)) or not hasattr(weight, "__float__")
    if no_number or getattr(weight, "ndim", 0) != 0:
        raise TypeError(f"weight: expected a number, got {weight!r}")
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise TypeError(
            "weight: expected a number, got a tensor that requires grad, which the penalty would not reach; multiply it: "
            "weight * penalty(inputs)"
        )
    if not math.isfinite(float(weight)):
        raise ValueError(f"weight: expected a finite number, got {weight!r}")
    return float(weight)
