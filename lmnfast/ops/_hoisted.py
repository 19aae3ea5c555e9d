"""A chain's affine beginning, applied to the samples: what is left of the chain is what the path kernels measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._chain import ACTIVATIONS, Activation, Chain
from .._stacked import ChainStack
from .._unresolved import Values


@dataclass(frozen=True, eq=False)
class Hoisted:
    """The rest of a chain after the affine maps at its beginning, and its samples: the results of these maps, in float64.

    It may hold several chains; all tensors then have one more dimension in front. In both cases the weights and biases keep the
    chain's dtype.
    """

    z: Tensor  # (N, D) float64
    weights: list[Tensor]
    biases: list[Tensor | None]
    activations: list[Activation]
    skips: list[int]
    shifts: list[Tensor | None]  # float64

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The arguments of the registered ops: z, weights, biases, activations, parameters, skips, shifts."""
        return (
            self.z.to(dtype),
            [w.to(dtype) for w in self.weights],
            [None if b is None else b.to(dtype) for b in self.biases],
            *activation_arguments(self.activations),
            self.skips,
            [None if s is None else s.to(dtype) for s in self.shifts],
        )

    def samples(self) -> Tensor:
        """z and the shifts side by side, (N, total width). Along a path these move on a straight line."""
        shifts = [s for s in self.shifts if s is not None]
        return torch.cat([self.z, *shifts], -1) if shifts else self.z

    def of_network(self, number: int) -> "Hoisted":
        """One of several networks."""
        z, weights, biases = parts_of(number, self.z, self.weights, self.biases)
        return Hoisted(
            z,
            weights,
            biases,
            self.activations,
            self.skips,
            [None if s is None else s[number] for s in self.shifts],
        )

    def values(self) -> Values:
        """The outputs at rows of `samples`, in float64."""
        weights = [w.double() for w in self.weights]
        biases = [None if b is None else b.double() for b in self.biases]
        skips = self.skips or [-1] * (2 * len(self.activations))
        shifts = self.shifts or [None] * len(skips)
        widths = [self.z.shape[1], *(s.shape[1] for s in shifts if s is not None)]
        # Whether the last activation passes on the rounding of its argument z. The rounding of z is an epsilon of the terms
        # that z is summed from, also if z and the output are small. These four activations pass it on. The other activations
        # are flat where |z| is large, or the error of their output is small where the output is small. The rounding of a sum is
        # about an epsilon times the root of the sum of its terms' squares.
        epsilon = torch.finfo(torch.float64).eps
        rounds = self.activations[-1].name in ("identity", "relu", "leaky_relu", "sin")

        def through(points: Tensor, *steps: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
            z, *moved = points.split(widths, 1)
            parts = [step.split(widths, 1) for step in steps]
            slopes, steps_moved = [part[0] for part in parts], [list(part[1:]) for part in parts]
            values: list[tuple[Tensor, list[Tensor]]] = []
            terms = z.abs()
            for n, activation in enumerate(self.activations):
                if n:
                    if rounds and n == len(weights):
                        terms = root_of_squares(z, weights[-1], biases[-1])
                    z = _native.linear(z, weights[n - 1], biases[n - 1])
                    slopes = [_native.linear(s, weights[n - 1], None) for s in slopes]
                for into in (2 * n, 2 * n + 1):
                    if into % 2 and activation.name != "identity":
                        before, z = z, _native.pointwise(activation, z)
                        slopes = [slopes_behind(activation, s, before, z) for s in slopes]
                    if skips[into] != -1:
                        earlier, slopes_there = values[skips[into]]
                        z, slopes = z + earlier, [s + e for s, e in zip(slopes, slopes_there)]
                    if shifts[into] is not None:
                        z, slopes = z + moved.pop(0), [s + m.pop(0) for s, m in zip(slopes, steps_moved)]
                    values.append((z, slopes))
            return z, slopes, 2 * epsilon * terms if rounds else None

        def at(points: Tensor) -> tuple[Tensor, Tensor | None]:
            y, _, least = through(points)
            return y, least

        def along(points: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            y, (slope,), least = through(points, steps)
            return y, slope, least

        # rounds_as_ends: if all units before an output are off, only the rounding of the path's own points is left of their
        # sum.
        return Values(at, along, rounds_as_ends=rounds)


def root_of_squares(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The root of the sum of the squares of all terms behind each output of a Linear, in float64, without overflow.

    z: (B, D). Returns (B, outputs).
    """
    largest = weight.abs().max()
    of_weight = torch.exp2(-torch.frexp(torch.where(largest > 0, largest, 1.0))[1].double())
    sizes = z.abs().amax(1, keepdim=True)
    of_rows = torch.exp2(-torch.frexp(torch.where(sizes > 0, sizes, 1.0))[1].double())
    squares = _native.linear((z * of_rows) ** 2, (weight * of_weight) ** 2, None)
    roots = squares.sqrt() / of_rows / of_weight  # both are powers of two
    return roots if bias is None else torch.hypot(roots, bias)


_aten = torch.ops.aten
# For each activation: a function from the slopes s before it, its arguments z and its values a to the slopes after it. At a
# kink the slope is PyTorch's.
_BEHIND: dict[str, Callable[[Activation], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "relu": lambda _: lambda s, z, a: _aten.threshold_backward(s, z, 0),
    "leaky_relu": lambda of: lambda s, z, a: _aten.leaky_relu_backward(s, z, of.alpha, False),
    "elu": lambda of: lambda s, z, a: _aten.elu_backward(s, of.alpha, 1, 1, False, z),
    "silu": lambda _: lambda s, z, a: _aten.silu_backward(s, z),
    "gelu": lambda _: lambda s, z, a: _aten.gelu_backward(s, z),
    "gelu_tanh": lambda _: lambda s, z, a: _aten.gelu_backward(s, z, approximate="tanh"),
    "tanh": lambda _: lambda s, z, a: _aten.tanh_backward(s, a),
    "sigmoid": lambda _: lambda s, z, a: _aten.sigmoid_backward(s, a),
    "softplus": lambda of: lambda s, z, a: _aten.softplus_backward(s, z, of.alpha, of.beta),
    "sin": lambda _: lambda s, z, a: s * z.cos(),
}


def slopes_behind(
    activation: Activation,
    slopes: Tensor,
    z: Tensor,
    values: Tensor,
    pointwise: Callable[..., Tensor] = _native.pointwise,
) -> Tensor:
    """The slopes behind an activation of those in front of it. z, values: its arguments and values."""
    if activation.name == "identity":
        return slopes
    return pointwise(_BEHIND[activation.name](activation), slopes, z, values)


def parts_of(number: int, *arguments: Any) -> list[Any]:
    """The parts of one network of arguments of several networks: tensors, lists of tensors, and None."""

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [one(each) for each in value]
        return None if value is None else value[number]

    return [one(argument) for argument in arguments]


def hoisted(
    chain: Chain | ChainStack,
    x: Tensor,
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _native.linear,
) -> Hoisted:
    """linear: the product that is applied to the samples, with float64 results."""
    linears, activations = list(zip(chain.weights, chain.biases)), list(chain.activations)
    z = x.flatten(chain.weights[0].dim() - 1)
    if chain.skips or not linears or activations[0].name != "identity":  # otherwise `linear` converts z
        z = z.double()
    if linears and activations[-1].name == "identity":
        # The last bias is left out. A constant that is added to an output does not change r2. But it would change the rounding
        # in float32, and whether the output counts as constant.
        linears[-1] = linears[-1][0], None
    skips = dict(chain.skips)
    affine = {0: z}  # by number, the values of the chain that are affine in the samples
    # Every Linear at the beginning is applied to the samples. In a residual network the sum h + W h is still affine in the
    # samples, so the first Linear of the next block can be applied to the samples too.
    while linears and activations[0].name == "identity" and (len(affine) == 1 or skips):
        weight, bias = linears.pop(0)
        activations.pop(0)
        z = linear(z, weight, bias)
        value = 2 * len(affine)
        z = z + affine[skips[value]] if value in skips else z
        affine[value] = z
    first = max(affine)  # this value, with the value that was added to it, becomes value 0
    sources = [None, *map(skips.get, range(first + 1, first + 2 * len(activations)))] if skips else []
    return Hoisted(
        z,
        [w for w, _ in linears],
        [b for _, b in linears],
        activations,
        [-1 if source is None or source in affine else source - first for source in sources],
        [None if source is None else affine.get(source) for source in sources],
    )


def activation_arguments(activations: Sequence[Activation]) -> tuple[list[int], list[float]]:
    """The arguments of the registered ops for activations: codes, and two parameters per activation."""
    codes = [ACTIVATIONS.index(a.name) for a in activations]
    return codes, [parameter for a in activations for parameter in (a.alpha, a.beta)]
