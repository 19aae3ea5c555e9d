"""``lmnfast::block_coefficients``: the hidden layer of a transformer's block along paths, as coefficients of polynomials."""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, reference
from .._chain import ACTIVATIONS, Activation
from .._native import plain
from ._checks import KERNEL_DTYPES, MOST_COEFFICIENTS, check_array, check_indices, check_tensor


class Normalisation(NamedTuple):
    """What normalises the samples: LayerNorm or RMSNorm."""

    own: Tensor
    """(samples,) float64, each sample's variance or mean square."""
    cross: Tensor
    """(rows,) float64, the covariance, or mean product, of the two samples of a row."""
    epsilon: float


def block_coefficients(
    z: Tensor,
    first: Tensor,
    second: Tensor,
    activation: Activation,
    nodes: Tensor,
    polynomials: Tensor,
    *,
    gated: bool = False,
    normalisation: Normalisation | None = None,
    shift: Tensor | None = None,
    begin: int = 0,
    end: int | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`lmnfast.reference.block_coefficients` without temporaries; float32 or float64, on the CPU or on CUDA.

    The residual of the hidden layer from its chord is zero at both ends. Its coefficients in polynomials that are orthonormal
    under the path's rule give the statistics of a Linear behind the layer: the variance is the sum of the squared coefficients.
    The coefficients of a smooth layer fall fast with the degree, so a Linear need only be applied to the first few of them.

    A normalisation of the samples divides pre-activations by a root of a quadratic in t, so that the Linear before the layer
    is applied to the samples alone.

    Args:
        z: (samples, units), the layer's pre-activations at the samples, before they are divided by the normalisation's root;
            with a gate (samples, 2 * units), the gate's units last. float32 or float64.
        first, second: (rows,) int64, the samples at t = 0 and t = 1.
        activation: of the hidden layer, in front of the gate's product.
        nodes: (nodes,) float64, 0 first and 1 last, at most 66; on any device.
        polynomials: (degrees, nodes) float64, at most 64 degrees: the weight of each node times the polynomial's value there.
        gated: whether the layer is ``activation(a) * g``.
        normalisation: None: there is none.
        shift: (units,) or (2 * units,) of z's dtype, added to the pre-activations; None: 0.
        begin, end: the degrees (rows of `polynomials`) whose coefficients are returned. end None: all from begin on.
        scale: a power of two in the range of z's dtype that brings hidden values to the order of 1. Squares for the energy are
            of scaled values.

    Returns:
        Coefficients (end - begin, rows, units) of z's dtype; and the energy (rows, degrees) float64: the sums over units of the
        squared, scaled coefficients, for all degrees.

    Raises:
        TypeError: dtypes or devices differ, or are none of these.
        ValueError: shapes do not fit; a begin, end or scale out of range; on the CPU also an index of no sample.
        RuntimeError: the CUDA kernels do not run on that device.

    Source:
        docs/mathematics.md, "A block of a transformer".

    Example:
        >>> nodes, weights = lmnfast.quadrature.path_nodes("uniform", 3)
        >>> z, i, j = torch.tensor([[-1.0], [1.0]]), torch.tensor([0]), torch.tensor([1])
        >>> constant = weights[None]  # the polynomial 1: the coefficient is the mean of the residual
        >>> relu = lmnfast.ops.Activation("relu")
        >>> lmnfast.ops.block_coefficients(z, i, j, relu, nodes, constant)[0]  # 0, 0, 1 minus 0, 0.5, 1
        tensor([[[-0.1667]]])
    """
    own, cross, epsilon = (None, None, 0.0) if normalisation is None else normalisation
    return torch.ops.lmnfast.block_coefficients(
        z,
        first,
        second,
        ACTIVATIONS.index(activation.name),
        [activation.alpha, activation.beta],
        nodes,
        polynomials,
        gated,
        shift,
        own,
        cross,
        epsilon,
        begin,
        polynomials.shape[0] if end is None else end,
        scale,
    )


torch.library.define(
    "lmnfast::block_coefficients",
    "(Tensor z, Tensor first, Tensor second, int activation, float[] parameters, Tensor nodes, Tensor polynomials, "
    "bool gated, Tensor? shift, Tensor? own, Tensor? cross, float epsilon, int begin, int end, float scale) "
    "-> (Tensor, Tensor)",
)


class _Arguments(NamedTuple):
    """The arguments of the registered op."""

    z: Tensor
    first: Tensor
    second: Tensor
    activation: int
    parameters: list[float]
    nodes: Tensor
    polynomials: Tensor
    gated: bool
    shift: Tensor | None
    own: Tensor | None
    cross: Tensor | None
    epsilon: float
    begin: int
    end: int
    scale: float

    @property
    def units(self) -> int:
        return self.z.shape[1] // (2 if self.gated else 1)


@torch.library.impl("lmnfast::block_coefficients", "default")
def _block_coefficients(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = _Arguments(*arguments)
    _check(given)
    if _native.by_reference(given.z):
        with torch.no_grad():
            return _plain(given)
    z, first, second = map(plain, (given.z, given.first, given.second))
    shift, own, cross = (None if t is None else plain(t) for t in (given.shift, given.own, given.cross))
    t, rule = (plain(values[..., 1:-1].to(z.device)) for values in (given.nodes, given.polynomials))
    coefficients = _native.empty(z, given.end - given.begin, len(first), given.units)
    energy = z.new_empty(len(first), len(rule), dtype=torch.float64)
    call = _native._C.BlockCoefficients(
        z.dtype == torch.float64,
        *map(_native.address, (z, shift, own, cross, first, second, t, rule)),
        given.epsilon,
        given.scale,
        len(z),
        len(first),
        given.units,
        len(t),
        len(rule),
        given.begin,
        given.end,
        given.gated,
        given.activation,
        *given.parameters,
    )
    return _native.run(call, coefficients, energy), energy


@torch.library.register_fake("lmnfast::block_coefficients")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = _Arguments(*arguments)
    _check(given, fake=True)
    rows = given.first.shape[0]
    return (
        given.z.new_empty(given.end - given.begin, rows, given.units),
        given.z.new_empty(rows, given.polynomials.shape[0], dtype=torch.float64),
    )


# Hidden values, at all nodes of some rows, that the reference computes at a time. It makes a few tensors of that size.
REFERENCE_VALUES = 2**20


def _plain(given: _Arguments) -> tuple[Tensor, Tensor]:
    """The op by its reference in float64, some rows at a time."""
    on, activation = given.z.device, Activation(ACTIVATIONS[given.activation], *given.parameters)
    z, shift = given.z.double(), None if given.shift is None else given.shift.double()
    nodes, polynomials = given.nodes.to(on), given.polynomials.to(on)
    most = max(1, REFERENCE_VALUES // (len(nodes) * given.z.shape[1]))
    parts = []
    for rows in torch.arange(len(given.first), device=on).split(most):
        norm = None
        if given.own is not None and given.cross is not None:
            norm = given.own, given.cross[rows], given.epsilon
        coefficients, energy = reference.block_coefficients(
            z,
            given.first[rows],
            given.second[rows],
            partial(_native.pointwise, activation),  # equal arguments have equal values
            nodes,
            polynomials,
            gated=given.gated,
            normalisation=norm,
            shift=shift,
            scale=given.scale,
        )
        parts.append((coefficients[given.begin : given.end].to(given.z.dtype), energy))
    return torch.cat([each for each, _ in parts], 1), torch.cat([each for _, each in parts])


def _check(given: _Arguments, fake: bool = False) -> None:
    z, first = given.z, given.first
    on = z.device
    check_tensor("z", z, KERNEL_DTYPES, on)
    if z.dim() != 2 or z.shape[1] == 0 or (given.gated and z.shape[1] % 2):
        units = "2 * units" if given.gated else "units"
        raise ValueError(f"z: expected (samples, {units}), got shape {tuple(z.shape)}")
    _check_rule(given.nodes, given.polynomials, given.begin, given.end, fake)
    if not 0 <= given.activation < len(ACTIVATIONS):
        raise ValueError(
            f"activation: expected a code from 0 to {len(ACTIVATIONS) - 1}, got {given.activation}"
        )
    if len(given.parameters) != 2:
        raise ValueError(f"parameters: expected 2 numbers, got {len(given.parameters)}")
    if not all(map(math.isfinite, given.parameters)):
        raise ValueError(f"parameters: expected finite numbers, got {given.parameters}")
    least, most = torch.finfo(z.dtype).smallest_normal / 4, torch.finfo(z.dtype).max
    if not least <= given.scale <= most:  # the kernels take it in z's dtype
        raise ValueError(
            f"scale: expected a number from {least:.1e} to {most:.1e} for {z.dtype}, got {given.scale}"
        )
    if (given.own is None) != (given.cross is None):
        raise ValueError("own, cross: expected both or neither")
    check_array("shift", given.shift, z.shape[1:], z.dtype, on)
    check_array("own", given.own, z.shape[:1], torch.float64, on)
    if first.dim() != 1:
        raise ValueError(f"first: expected (rows,), got shape {tuple(first.shape)}")
    check_array("cross", given.cross, first.shape, torch.float64, on)
    for name, tensor in (("first", first), ("second", given.second)):
        check_array(name, tensor, first.shape, torch.int64, on)
        check_indices(name, tensor, z.shape[0], fake=fake)


def _check_rule(nodes: Tensor, polynomials: Tensor, begin: int, end: int, fake: bool) -> None:
    check_tensor("nodes", nodes, (torch.float64,), nodes.device)
    check_tensor("polynomials", polynomials, (torch.float64,), nodes.device)
    if nodes.dim() != 1 or not 3 <= nodes.shape[0] <= MOST_COEFFICIENTS + 2:
        raise ValueError(
            f"nodes: expected (nodes,), 3 to {MOST_COEFFICIENTS + 2}, got shape {tuple(nodes.shape)}"
        )
    # Values on a card are not looked at, because that would wait for it.
    if not fake and nodes.device.type == "cpu" and (float(nodes[0]), float(nodes[-1])) != (0.0, 1.0):
        raise ValueError(f"nodes: expected 0 first and 1 last, got {float(nodes[0])} and {float(nodes[-1])}")
    degrees = polynomials.shape[0] if polynomials.dim() == 2 else 0
    if not 1 <= degrees <= MOST_COEFFICIENTS or polynomials.shape[1] != nodes.shape[0]:
        raise ValueError(
            f"polynomials: expected (degrees, {nodes.shape[0]}), 1 to {MOST_COEFFICIENTS} degrees, "
            f"got shape {tuple(polynomials.shape)}"
        )
    if not 0 <= begin <= end <= degrees:
        raise ValueError(f"begin, end: expected 0 <= begin <= end <= {degrees}, got {begin} and {end}")
