"""A block: a normalisation, one hidden layer of Linear maps with an activation, gated or not, a Linear, and a residual sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._chain import IDENTITY, Activation, Chain


@dataclass(frozen=True, eq=False)
class Norm:
    """LayerNorm (`centers`) or RMSNorm over the last dimension.

    scale, shift: (inputs,) or None, detached. epsilon: added to the variance, or to the mean square, under the root.
    """

    centers: bool
    epsilon: float
    scale: Tensor | None = None
    shift: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Normalises x (..., inputs)."""
        if self.centers:
            return F.layer_norm(x, x.shape[-1:], self.scale, self.shift, self.epsilon)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)
        y = y if self.scale is None else y * self.scale
        return y if self.shift is None else y + self.shift


@dataclass(frozen=True, eq=False)
class Block:
    """x -> last(activation(first(norm(x)))) [* gate(norm(x)) before last] [+ x], over the last dimension of x.

    first, gate: (units, inputs). last: (outputs, units). Biases: (units,) or (outputs,). All detached; they share memory with
    the model's parameters where the model has them in this form, so they follow the model's training.
    gate: None for a block without a gate. With a gate the hidden layer is activation(first(n)) * gate(n), n = norm(x).
    norm: None for a block without a normalisation.
    adds_input: whether x itself, before the normalisation, is added to the result. Needs outputs == inputs.
    """

    first: Tensor
    first_bias: Tensor | None
    activation: Activation
    last: Tensor
    last_bias: Tensor | None
    norm: Norm | None = None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    adds_input: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The block in plain torch: x (..., inputs) -> (..., outputs)."""
        y = F.linear(self.hidden(x), self.last, self.last_bias)
        return x + y if self.adds_input else y

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden layer: x (..., inputs) -> (..., units)."""
        n = x if self.norm is None else self.norm(x)
        hidden = self.activation(F.linear(n, self.first, self.first_bias))
        return hidden if self.gate is None else hidden * F.linear(n, self.gate, self.gate_bias)


# Without kinks: the coefficients of a hidden layer fall fast with the degree.
SMOOTH = ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus", "sin")

# With fewer units or outputs the fused kernel is faster, whose product runs at every node. Time as a block over time in the
# fused kernel, GELU and SiLU, on one core of an AMD EPYC with AVX2: 512 units and outputs 0.75, with first weights three times
# as large 1.25, ten times 1.2 to 1.5; 1024 and 768 0.6, 0.9, 1.2; 512 and 256 0.95, 1.2, 1.7; 128 and 128 1.5, 2.9 for three
# times; 16 and 300 3 for three times.
WIDE = 512


def wide_block(chain: Chain) -> Block | None:
    """The block that a chain is, if it has one smooth hidden layer, and so many units and outputs that a block is faster."""
    if (
        len(chain.weights) != 2
        or chain.activations[::2] != (IDENTITY, IDENTITY)
        or chain.skips not in ((), ((4, 0),))
    ):
        return None
    if chain.activations[1].name not in SMOOTH or min(chain.weights[1].shape) < WIDE:
        return None
    (first, last), (first_bias, last_bias) = chain.weights, chain.biases
    return Block(first, first_bias, chain.activations[1], last, last_bias, adds_input=bool(chain.skips))
