"""A penalty on the network behind the paper's layer, beside the loss of the task."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config

LAYER = "hidden_1"  # the paper measures at this layer
# Added to the seed, because equal seeds would draw the split and the penalty's samples from the same numbers.
OTHER_NUMBERS = 1_000_000_007


class WeightedPenalty:
    """A function of the step that adds the gradient of a config's penalty to the ``grad`` of every parameter.

    Args:
        model: as make_model returns it. Its parameters have a ``grad``.
        inputs: (samples, 2) int64, those that the run is trained on.
        config: of the run, settled, with a penalty.
    """

    def __init__(self, model: nn.Sequential, inputs: Tensor, config: Config) -> None:
        assert config.penalty is not None and config.penalty_weight is not None
        assert config.penalty_samples is not None
        self.inputs, self.count, self.every = inputs, config.penalty_samples, config.penalty_every
        self.weight = config.penalty_weight * self.every
        self.generator = torch.Generator().manual_seed(config.seed + OTHER_NUMBERS)
        self.of = _measure(config.penalty, model)
        self._value: Tensor | None = None

    def _draw(self) -> Tensor:
        chosen = torch.randperm(len(self.inputs), generator=self.generator)[: self.count]
        return self.inputs[chosen.to(self.inputs.device)]

    def __call__(self, step: int) -> None:
        """Adds the gradient, if this update has one. step: the number of the update, from 1 on."""
        if step % self.every:
            return
        value = self.of(self._draw())
        if value.requires_grad:  # a map without activations has no curvature that could change
            (self.weight * value).backward()
        self._value = value.detach()

    @property
    def value(self) -> Tensor:
        """The penalty without its weight, as it was in the last update that had one, 0-dim float64. Before the first of these:
        of the present network, on a draw of its own."""
        if self._value is None:
            self._value = self.of(self._draw()).detach()
        return self._value.double()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` continues from."""
        return {"generator": self.generator.get_state(), "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues behind the update after which `state_dict` was called.

        Raises:
            Exception: the content is not that of `state_dict`.
        """
        self.generator.set_state(state["generator"].cpu())
        self._value = state["value"]
        if self._value.shape != ():
            raise ValueError(f"expected one number as the penalty's value, got {self._value!r}")


def _measure(penalty: str, model: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """The penalty without a weight, as a function of the tokens of samples."""
    if penalty == "jacobian_norm":
        return lambda inputs: jacobian_norm(model, inputs)
    from .._recognise import chain_with_graph
    from .._settings import Settings
    from ..penalty import measure_with_graph

    # As lmnfast.Penalty, which cuts any model; of this one the parts are known.
    behind = [name for name, _ in model.named_children()].index(LAYER) + 1
    before, tail = model[:behind], model[behind:]
    chain = chain_with_graph(tail)
    settings = Settings(points=7, rule="lobatto", pooled=penalty == "pooled_curvature")

    def measure(inputs: Tensor) -> Tensor:
        return measure_with_graph(penalty, tail, before(inputs), settings, known=chain)

    return measure


def jacobian_norm(model: nn.Sequential, inputs: Tensor) -> Tensor:
    """The mean over samples of the squared Frobenius norm of the Jacobian of the map from "hidden_1" to the logits.

    With the weights W_1, ..., W_m of this map and the slopes s_1, ..., s_m-1 of its activations at a sample, the Jacobian is
    ``W_m diag(s_m-1) ... diag(s_1) W_1``. Its Gram matrix ``J J^T`` is built from the first layer on, and of the last product
    only the trace is computed: ``s^T ((W_m^T W_m) * G) s`` with the Gram matrix G in front of the last activation. G is
    common to all samples in the paper's network, so a call costs as much as two layers.

    Args:
        model: as make_model returns it.
        inputs: (samples, 2) int64.

    Returns:
        0-dim, of the model's dtype, with a graph to the parameters.
    """
    names = [name for name, _ in model.named_children()]
    behind = names.index(LAYER) + 1
    activation = model.get_submodule(LAYER)
    first, *later = (module for module in list(model)[behind:] if isinstance(module, nn.Linear))
    z = first(model[:behind](inputs))
    gram = first.weight @ first.weight.T  # (units, units), behind a second activation (samples, units, units)
    for layer in later:
        slopes = slopes_of(activation, z)
        if layer is later[-1]:
            inner = (layer.weight.T @ layer.weight) * gram
            return ((slopes[:, None] @ inner).squeeze(1) * slopes).sum() / len(inputs)
        gram = layer.weight @ (slopes[:, :, None] * gram * slopes[:, None]) @ layer.weight.T
        z = layer(activation(z))
    return gram.trace()


def slopes_of(activation: nn.Module, z: Tensor) -> Tensor:
    """The derivative of an activation of the tasks' networks at z."""
    if isinstance(activation, nn.ReLU):
        return (z > 0).to(z)
    s = z.sigmoid()
    return s * (1 + z * (1 - s))
