"""Activations and normalisations that are spelled out in elementary operations, recognised by their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._block import Norm
from ._chain import ACTIVATIONS, Activation

# The largest difference from a kernel's activation, as a part of the larger of input and result. In float32 half a unit of the
# last place of a number near 1: a model's constants are rounded by as much when it multiplies by them, so sqrt(2 / pi) with 8
# digits passes, and with 5 digits (a difference of 1e-6) does not. In float64 64 units, which spelled forms lose.
TOLERANCES = {torch.float32: 2.0**-24, torch.float64: 2.0**-46}
# In the largest element of a row. A normalisation in another form loses some 1e-15; an epsilon or a divisor elsewhere, as
# d - 1 for d, shows far above.
NORM_TOLERANCE = 1e-11


@dataclass(frozen=True, eq=False)
class Expression:
    """call(*operands); without a call a variable.

    operands: expressions, numbers, and tensors, which are parameters. Equal only to itself.
    """

    call: Callable[..., Tensor] | None = None
    operands: tuple[Any, ...] = ()


def evaluated(expression: Expression, values: dict[Expression, Any]) -> Any:
    """The value of an expression. values: of the variables; those of all parts are added.

    Raises KeyError for another variable.
    """
    if expression not in values:
        if expression.call is None:
            raise KeyError("a variable without a value")
        operands = [evaluated(o, values) if isinstance(o, Expression) else o for o in expression.operands]
        values[expression] = expression.call(*operands)
    return values[expression]


def parts_of(expression: Expression) -> list[Expression]:
    """The expression and all that it is made of, each once."""
    seen: dict[Expression, None] = {}
    waiting = [expression]
    while waiting:
        part = waiting.pop()
        if part not in seen:
            seen[part] = None
            waiting += [operand for operand in part.operands if isinstance(operand, Expression)]
    return list(seen)


def activation_of(
    hidden: Expression, maps: Sequence[Expression], dtype: torch.dtype
) -> tuple[Activation, int] | None:
    """The activation a with hidden = a(maps[0]), or the activation a and n with hidden = a(maps[n]) * maps[1 - n].

    hidden is compared with each activation that the kernels know, in float64, at some 3000 points from -1e38 to 1e38, most in
    [-30, 30]. A spelled form that overflows there, as log(1 + exp(z)), is another function in float32 as well, and is refused.

    Args:
        hidden: made of pointwise operations on the variables `maps`, one or two.
        dtype: of the model, a key of TOLERANCES.

    Returns None if there is none.
    """
    z = _points()
    tolerance = TOLERANCES[dtype]
    columns = [z, z[torch.arange(len(z)) * 1009 % len(z)]][
        : len(maps)
    ]  # a permutation: pairs of all signs and sizes
    got = evaluated(hidden, dict(zip(maps, columns)))
    if not isinstance(got, Tensor) or got.shape != z.shape:
        return None
    for activation in _candidates(hidden):
        for n, column in enumerate(columns):
            value = activation(column)
            # 1e-15: a sum of numbers near 1 that is 0 at 0, as 1 - exp(z), is rounded by as much.
            bound = tolerance * torch.maximum(column.abs(), value.abs()) + 1e-15
            if len(columns) == 2:
                value, bound = value * columns[1 - n], bound * columns[1 - n].abs()
            if bool(((got - value).abs() <= bound).all()):
                return activation, n
    return None


def _points() -> Tensor:
    """Points of the real line, an odd number."""
    dense = torch.linspace(-30, 30, 2001, dtype=torch.float64, device="cpu")
    near = torch.logspace(-8, 0, 300, dtype=torch.float64, device="cpu")
    far = torch.logspace(1.5, 38, 147, dtype=torch.float64, device="cpu")
    return torch.cat([dense, near, -near, far, -far])


def _candidates(hidden: Expression) -> Iterator[Activation]:
    """The activations that occur in an expression, with their parameters, and all that have none."""
    found = {part.call for part in parts_of(hidden) if isinstance(part.call, Activation)}
    yield from found
    for name in ACTIVATIONS:
        if name not in ("leaky_relu", "elu", "softplus") and Activation(name) not in found:
            yield Activation(name)
    yield Activation("softplus", 1.0, 20.0)
    yield Activation("elu", 1.0)


def affine_parts(expression: Expression) -> tuple[Expression, Tensor | None, Tensor | None]:
    """(e, scale, shift) with expression = e * scale + shift. scale, shift: parameters; None if they are not there."""
    expression, shift = _without("add", expression)
    expression, scale = _without("mul", expression)
    return expression, scale, shift


def _without(name: str, expression: Expression) -> tuple[Expression, Tensor | None]:
    """The one operand of a sum or product, and the other, a parameter; or the expression itself, and None."""
    if getattr(expression.call, "__name__", "") == name and len(expression.operands) == 2:
        for one, other in (expression.operands, expression.operands[::-1]):
            if isinstance(one, Expression) and isinstance(other, Tensor):
                return one, other
    return expression, None


def norm_of(expression: Expression, x: Expression, width: Expression, inputs: int) -> Norm | None:
    """The normalisation of x (N, inputs), without scale and shift, that an expression is; None if it is none.

    Its epsilon is measured where the variance is far below it. The expression is then compared with the normalisation in
    float64 on rows of 15 magnitudes and both signs, whose mean is twice their deviation.

    Args:
        expression: made of pointwise operations and of sums over the last dimension.
        x, width: its variables, the samples and the number `inputs`.
    """
    rows = _rows(inputs)
    got = evaluated(expression, {x: rows, width: inputs})
    if not isinstance(got, Tensor) or got.shape != rows.shape:
        return None
    first = got[0]
    centers = bool(first.mean().abs() <= 1e-9 * first.abs().max())
    row = rows[0] - rows[0].mean() if centers else rows[0]
    ratio, square = float(first @ row / (row @ row)), float(row @ row) / inputs
    if not (math.isfinite(ratio) and ratio > 0):
        return None
    norm = Norm(centers, _written(1 / ratio**2 - square, square, expression))
    expected = norm(rows)
    close = (got - expected).abs() <= NORM_TOLERANCE * expected.abs().amax(-1, keepdim=True)
    return norm if bool(close.all()) else None


def _rows(inputs: int) -> Tensor:
    magnitudes = 10.0 ** torch.arange(-8, 7, dtype=torch.float64, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    values = torch.randn(len(magnitudes), inputs, generator=generator, dtype=torch.float64, device="cpu")
    rows = magnitudes[:, None] * values
    return torch.cat([rows + 2 * magnitudes[:, None], rows - 2 * magnitudes[:, None]])


def _written(measured: float, square: float, expression: Expression) -> float:
    """A measured epsilon as it is written in the expression, if it is. square: to which it was added."""
    if abs(measured) < 1e-12 * square:
        return 0.0
    numbers = [n for part in parts_of(expression) for n in part.operands if type(n) in (int, float)]
    return next((float(n) for n in numbers if math.isclose(n, measured, rel_tol=1e-9)), measured)
