"""A chain: Linear layers with pointwise activations between them, and residual sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order of ActivationKind in csrc/ops.h: the kernels receive the index.
ACTIVATIONS = (
    "identity",
    "relu",
    "leaky_relu",
    "elu",
    "silu",
    "gelu",
    "gelu_tanh",
    "tanh",
    "sigmoid",
    "softplus",
    "sin",
)
CHAIN_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Activation:
    """A pointwise nonlinearity by name.

    alpha: negative slope of leaky_relu, alpha of elu, beta of softplus. beta: threshold of softplus.
    Raises ValueError for a name that is not in ACTIVATIONS.
    """

    name: str
    alpha: float = 0.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"name: expected one of {', '.join(ACTIVATIONS)}, got {self.name!r}")

    def __call__(self, z: Tensor) -> Tensor:
        """Applies the activation to z, of any shape and floating dtype, by torch.nn.functional."""
        if self.name == "identity":
            return z
        if self.name == "leaky_relu":
            return F.leaky_relu(z, self.alpha)
        if self.name == "elu":
            return F.elu(z, self.alpha)
        if self.name == "softplus":
            return F.softplus(z, self.alpha, self.beta)
        if self.name == "gelu_tanh":
            return F.gelu(z, approximate="tanh")
        plain: dict[str, Callable[[Tensor], Tensor]] = {
            "relu": F.relu,
            "silu": F.silu,
            "gelu": F.gelu,
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
            "sin": torch.sin,
        }
        return plain[self.name](z)


IDENTITY = Activation("identity")


@dataclass(frozen=True, eq=False)
class Chain:
    """Linear maps with pointwise activations between: a_n(W_n ... a_1(W_1 a_0(x) + b_1) ... + b_n).

    weights: (out, in) each, detached unless a graph was asked for. They share memory with the model's weights, so they follow
        the model's training.
    biases: (out,) or None, one per weight.
    activations: len(weights) + 1, the identity where the network has no activation.
    flattens: whether the network flattens its samples before the first weight.
    skips: pairs (into, source) of value numbers: the earlier value `source` is added to the later value `into`, as in residual
        blocks. Each value has at most one source. Value 2 n is the input of activation n, value 2 n + 1 its output, both with
        their skips added. If activation n is the identity, only value 2 n has a number.

    Raises:
        TypeError: weights or biases have several dtypes or devices, or a dtype that is not in CHAIN_DTYPES.
        ValueError: the numbers of weights, biases and activations, the shapes, or the skips do not fit together.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activations: tuple[Activation, ...]
    flattens: bool = False
    skips: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights: expected one or more, got none")
        first = self.weights[0]
        if first.dtype not in CHAIN_DTYPES:
            raise TypeError(f"weights[0]: expected one of {CHAIN_DTYPES}, got {first.dtype}")
        if first.dim() != 2:
            raise ValueError(f"weights[0]: expected (out, in), got shape {tuple(first.shape)}")
        widths = check_layers(first.shape[1], first.dtype, first.device, self.weights, self.biases)
        if len(self.activations) != len(widths):
            raise ValueError(
                f"activations: expected {len(widths)} for {len(self.weights)} weights, got {len(self.activations)}"
            )
        for into, source in self.skips:
            if (
                not 0 <= source < into < 2 * len(widths)
                or any(v % 2 and self.activations[v // 2] == IDENTITY for v in (into, source))
                or [v for v, _ in self.skips].count(into) > 1
            ):
                raise ValueError(f"skips: {into, source} is no earlier value for a later one, once")
            if widths[into // 2] != widths[source // 2]:
                raise ValueError(
                    f"skips: {into, source} adds a value of width {widths[source // 2]} to one of width "
                    f"{widths[into // 2]}"
                )

    def detached(self) -> Chain:
        """The chain without the graph of its tensors. They share memory with this chain's."""
        biases = tuple(None if b is None else b.detach() for b in self.biases)
        return replace(self, weights=tuple(w.detach() for w in self.weights), biases=biases)

    def __call__(self, x: Tensor) -> Tensor:
        """The chain in plain torch: x (B, D) or (B, *in), flattened to D = weights[0].shape[1] -> (B, K).

        Raises ValueError if a sample does not have D elements.
        """
        return self.values(x)[-1]

    def values(self, x: Tensor) -> list[Tensor]:
        """All values of the chain, numbered as in `skips`."""
        width = self.weights[0].shape[1]
        if x.ndim < 2 or math.prod(x.shape[1:]) != width:
            raise ValueError(f"x: expected samples of {width} elements, got shape {tuple(x.shape)}")
        return values_of(self, x.reshape(len(x), width), F.linear)


def values_of(
    chain: Any, z: Tensor, linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> list[Tensor]:
    """All values of a chain, or of a stack of chains, on flattened samples, numbered as in `Chain.skips`."""
    skips = dict(chain.skips)
    values: list[Tensor] = []
    for n, activation in enumerate(chain.activations):
        z = linear(z, chain.weights[n - 1], chain.biases[n - 1]) if n else z
        for into in (2 * n, 2 * n + 1):
            z = activation(z) if into % 2 else z
            z = z + values[skips[into]] if into in skips else z
            values.append(z)
    return values


def check_layers(
    inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> list[int]:
    """Checks the Linear layers of a chain on samples (N, inputs), and returns all widths.

    Raises TypeError for another dtype or device, ValueError for a wrong number or shape.
    """
    if len(biases) != len(weights):
        raise ValueError(
            f"biases: expected {len(weights)}, a tensor or None for each weight, got {len(biases)}"
        )
    widths = [inputs]
    for n, (w, b) in enumerate(zip(weights, biases)):
        for kind, tensor in (("weights", w), ("biases", b)):
            if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
                raise TypeError(
                    f"{kind}[{n}]: expected {dtype} on {device}, got {tensor.dtype} on {tensor.device}"
                )
        if w.dim() != 2 or w.shape[1] != widths[n] or w.numel() == 0:
            raise ValueError(f"weights[{n}]: expected (out, {widths[n]}), got shape {tuple(w.shape)}")
        widths.append(w.shape[0])
        if b is not None and b.shape != (w.shape[0],):
            raise ValueError(f"biases[{n}]: expected ({w.shape[0]},), got shape {tuple(b.shape)}")
    return widths
