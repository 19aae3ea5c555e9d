"""The definitions in numpy, and what a rounding of every operation costs. Of lmnfast only Lobatto's nodes are used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from fuzz_cases import MOST, Array, Case
from numpy.typing import NDArray

from lmnfast.quadrature import path_nodes

SIGMAS = 6  # standard deviations of a rounding that are allowed: 2 of 10^9 are more than that


def _sigmoid(z: Array) -> Array:
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, small) / (1 + small)


def _erfc(z: Array) -> Array:
    """The complementary error function to all digits of z's dtype, relative also where it is small."""
    if z.dtype == np.float64:
        return torch.special.erfc(torch.from_numpy(np.ascontiguousarray(z))).numpy()
    one = z.dtype.type(1)
    pi = np.arctan(one) * 4
    near = np.clip(z, -1, 1)  # erf's Taylor series
    term, series = near.copy(), near.copy()
    for n in range(1, 30):
        term = -term * near * near / n
        series = series + term / (2 * n + 1)
    far = np.maximum(np.abs(z), 1)  # the trapezoidal rule, step h: Matta and Reichel, Math. Comp. 25 (1971)
    h = one * 2 / 5
    total = 1 / (2 * far * far)
    for n in range(1, 19):
        total = total + np.exp(-((n * h) ** 2)) / ((n * h) ** 2 + far * far)
    tail = 2 * h * far * np.exp(-far * far) / pi * total
    tail = tail + np.where(far < 7, 2 / (1 - np.exp(2 * pi * np.minimum(far, 7) / h)), 0)
    return np.where(np.abs(z) < 1, 1 - 2 / np.sqrt(pi) * series, np.where(z > 0, tail, 2 - tail))


def _gelu(z: Array) -> tuple[Array, Array]:
    pi = np.arctan(z.dtype.type(1)) * 4
    share = _erfc(-z / np.sqrt(z.dtype.type(2))) / 2
    return z * share, share + z * np.exp(-z * z / 2) / np.sqrt(2 * pi)


def _gelu_tanh(z: Array) -> tuple[Array, Array]:
    one = z.dtype.type(1)
    root, cubic = np.sqrt(one / np.arctan(one) / 2), one * 44715 / 10**6  # sqrt(2 / pi)
    inner = np.clip(z, -100, 100)
    share, rest = (_sigmoid(sign * 2 * root * (inner + cubic * inner**3)) for sign in (1, -1))
    return z * share, share + 2 * root * inner * (1 + 3 * cubic * inner**2) * share * rest


def _softplus(z: Array, beta: float, threshold: float) -> tuple[Array, Array]:
    linear, inner = beta * z > threshold, np.minimum(beta * z, threshold)
    return np.where(linear, z, np.log1p(np.exp(inner)) / beta), np.where(linear, 1, _sigmoid(inner))


def _elu(z: Array, alpha: float) -> tuple[Array, Array]:
    low = np.minimum(z, 0)
    return np.where(z > 0, z, alpha * np.expm1(low)), np.where(z > 0, 1, alpha * np.exp(low))


def _silu(z: Array) -> tuple[Array, Array]:
    s = _sigmoid(z)
    return z * s, s + z * s * _sigmoid(-z)


def activate(activation: tuple[str, float, float], z: Array) -> tuple[Array, Array]:
    """Value and slope of an activation."""
    name, alpha, beta = activation
    match name:
        case "relu":
            return np.maximum(z, 0), np.where(z > 0, z.dtype.type(1), 0)
        case "leaky_relu":
            return np.where(z > 0, z, alpha * z), np.where(z > 0, z.dtype.type(1), alpha)
        case "elu":
            return _elu(z, alpha)
        case "softplus":
            return _softplus(z, alpha, beta)
        case "silu":
            return _silu(z)
        case "gelu":
            return _gelu(z)
        case "gelu_tanh":
            return _gelu_tanh(z)
        case "tanh":
            return np.tanh(z), 1 / np.cosh(np.clip(z, -300, 300)) ** 2
        case "sigmoid":
            return _sigmoid(z), _sigmoid(z) * _sigmoid(-z)
        case "sin":
            return np.sin(z), np.cos(z)
    return z, np.ones_like(z)


@dataclass
class Rounded:
    """Numbers, and the standard deviation of what they are off when every operation is rounded to units u.

    A rounding is at most u of its result, u / sqrt(3) in the root mean square. A sum of n terms s in random order has partial
    sums whose squares add up to about n / 3 z^2 + n / 6 sum s^2, z the whole sum, and each of these is rounded; so is each
    product. Errors of different units and operations add up as independent ones do.
    """

    value: Array
    error: NDArray[np.float64]

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(
            self.value + other.value, self.error + other.error
        )  # a skip and its block share errors

    def product(self, w: Array, u: float, smallest: float) -> Rounded:
        value, n = self.value @ w.T.astype(self.value.dtype), w.shape[1]
        of_terms = self.error**2 + (n / 18 + 1 / 3) * (u * self.value.astype(float)) ** 2
        of_sum = n / 9 * (u * value.astype(float)) ** 2 + n * smallest**2
        return Rounded(value, np.sqrt(of_terms @ (w**2).T + of_sum))


def outputs(
    case: Case, x: Rounded, u: float, slope: Rounded | None = None, chords: int = 0
) -> tuple[Rounded, Rounded | None]:
    """The network's outputs without a last bias that can be dropped, and their slopes along `slope`.

    x, slope: (rows, D). chords: so many rows each are a path, whose pre-activations are sums of a chord and a residual.
    """
    smallest = float(np.finfo(case.dtype).tiny)  # a kernel may flush what is below
    values: list[tuple[Rounded, Rounded | None]] = []
    z, s = x, slope
    for n, activation in enumerate(case.activations):
        if n:
            w, b = case.weights[n - 1], case.biases[n - 1]
            z, s = z.product(w, u, smallest), None if s is None else s.product(w, u, smallest)
            if b is not None and not (n == len(case.weights) and case.droppable):
                z = Rounded(z.value + b, z.error + u * np.abs(z.value + b).astype(float))
        if chords and activation[0] != "identity":
            ends = np.abs(z.value.reshape(-1, chords, z.value.shape[1])[:, [0, -1]]).max(1).astype(float)
            z = Rounded(z.value, np.hypot(z.error, u * np.repeat(ends, chords, 0)))
        for into in (2 * n, 2 * n + 1):
            if into % 2 and activation[0] != "identity":
                z, s = _activated(activation, z, s, u, smallest)
            if into in case.skips:
                other, other_s = values[case.skips[into]]
                z = z + other
                z.error += u * np.abs(z.value).astype(float)
                s = None if s is None or other_s is None else s + other_s
            values.append((z, s))
    return z, s


def _activated(
    activation: tuple[str, float, float], z: Rounded, s: Rounded | None, u: float, smallest: float
) -> tuple[Rounded, Rounded | None]:
    value, slope = activate(activation, z.value)
    around = [activate(activation, z.value.astype(float) + sign * z.error) for sign in (1, -1)]
    own = 0 if activation[0] == "relu" else 4 * u  # a few roundings of a transcendental function
    plain, plain_slope = (v.astype(float) for v in activate(activation, z.value.astype(float)))
    error = np.maximum(*(np.abs(v - plain) for v, _ in around)) + own * np.abs(plain) + smallest * (own > 0)
    if s is None:
        return Rounded(value, error), None
    # The slopes of SiLU and GELU are sums of two terms, the first of which is value / z.
    terms = np.abs(plain_slope) + 2 * np.abs(plain / np.where(z.value == 0, 1, z.value).astype(float)) * (
        activation[0] in ("silu", "gelu", "gelu_tanh")
    )
    slope_error = np.maximum(*(np.abs(g - plain_slope) for _, g in around)) + own * terms
    along = np.hypot(plain_slope * s.error, slope_error * np.abs(s.value).astype(float))
    return Rounded(value, error), Rounded(slope * s.value, along)


@dataclass
class Judged:
    """Of every pair: the least and the largest entry that is right, and what roundings may add to either."""

    low: Array
    high: Array
    floor: Array
    dead: Array
    """Whether every output is 0 at every node."""

    @staticmethod
    def joined(parts: list[Judged]) -> Judged:
        return Judged(
            *(np.concatenate([getattr(p, name) for p in parts]) for name in ("low", "high", "floor", "dead"))
        )


class Paths:
    """Outputs along paths, and what a rounding of each output costs its r2.

    y: (pairs, nodes, outputs), up to a constant for every output.
    """

    def __init__(self, y: Array, t: Array, w: Array) -> None:
        relative = y - y[:, :1]
        scale = np.abs(relative).max(1)
        self.scale = np.where(scale > 0, scale, 1)
        relative = (relative / self.scale[:, None]).astype(float)
        t, self.w = t.astype(float), w.astype(float)
        tau = t - self.w @ t
        self.v = v = self.w @ tau**2
        c, mean = (np.tensordot(s, relative, (0, 1)) for s in (self.w * tau, self.w))
        chord = relative[:, -1]
        e = relative - t[:, None] * chord[:, None]
        relative -= mean[:, None]
        q = self._sum(relative, relative)
        self.safe = np.where(q > 0, q, 1)
        self.r2 = np.where(q > 0, c**2 / (v * self.safe), 1)
        self.deviation = np.sqrt(q)
        # Of the sums over the nodes, as of any product; the sums are those of e, the residual from the chord.
        self.terms = SIGMAS * (len(t) / 9) ** 0.5
        ee = self._sum(e, e)
        dc = np.abs(chord) * v + np.sqrt(v * ee)
        squares = v * ee + v * (mean - (self.w @ t) * chord) ** 2 + (c - v * chord) ** 2
        first = 2 * np.sqrt(self.r2 / (v * self.safe)) * dc + squares / (v * self.safe)
        self.of_sums = first, dc**2 / (v * self.safe)
        relative *= -self.r2[:, None]
        relative += tau[:, None] * (c / v)[:, None]
        self.gradient = np.abs(relative, out=relative)  # of r2, but for 2 w / q

    def _sum(self, a: Array, b: Array) -> Array:
        return np.einsum("m,pmk,pmk->pk", self.w, a, b, optimize=False)

    def judged(
        self, error: Array, ends: tuple[Array, Array], u: float, truth_u: float
    ) -> tuple[Judged, dict[str, Array]]:
        """How far roundings move r2, and whether an output is constant.

        error: of y, as large. ends: (pairs, outputs) each, all of the outputs at both ends.
        """
        epsilon = 2 * u
        magnitude = (np.maximum(np.abs(ends[0]), np.abs(ends[1])) / self.scale).astype(float)
        error = error / self.scale[:, None].astype(float)
        noise = SIGMAS**2 * self._sum(error, error)
        # First order by the gradient, the nodes' errors being independent; second order at most 10 rho^2.
        weighted = self.w[:, None] * self.gradient * error
        floor = (2 * SIGMAS * np.sqrt((weighted**2).sum(1)) + 10 * noise) / self.safe
        floor += self.terms * u * self.of_sums[0] + (self.terms * u) ** 2 * self.of_sums[1]
        certain = self.deviation <= epsilon * magnitude
        possible = self.deviation <= 16 * epsilon * magnitude + truth_u / u * np.sqrt(noise)
        floor = np.where(certain, 0, np.minimum(floor, 1))
        low, high = np.where(certain, 1, self.r2), np.where(certain | possible, 1, self.r2)
        dead = ((self.deviation == 0) & (magnitude == 0)).all(-1)
        details = {"r2": self.r2, "floor": floor, "certain": certain, "possible": possible}
        details["deviation"] = self.deviation * self.scale.astype(float)
        return Judged(low.mean(-1), high.mean(-1), floor.mean(-1), dead), details


def _basis(t: Array) -> Array:
    """(nodes, 3): cubic Hermite polynomials of the chord and of both slopes."""
    return np.stack([t * t * (3 - 2 * t), t * (1 - t) ** 2, t * t * (t - 1)], 1)


def truth_of(
    case: Case, first: Array, second: Array, u: float, long: bool, details: bool = False
) -> Iterator[tuple[Judged, Judged, dict]]:
    """Judgements of pairs, in parts, in order: without a last bias that can be dropped, and with it."""
    kind = np.longdouble if long else np.float64
    truth_u = float(np.finfo(kind).eps) / 2
    nodes, node_weights = rule_of(case, kind)
    points = len(nodes) if case.method == "path" else 3
    widest = max([case.x.shape[1], *map(len, case.weights)])
    most = max(1, MOST // (len(nodes) * widest))
    x = case.x.astype(kind)
    bias = case.biases[-1] if case.droppable else np.zeros(1)
    for begin in range(0, len(first), most):
        a, b = x[first[begin : begin + most]], x[second[begin : begin + most]]
        t = nodes if case.method == "path" else kind([0, 0.5, 1])
        at = np.where(  # both ends are the samples themselves, however far apart
            t[:, None] < 0.5,
            a[:, None] + t[:, None] * (b - a)[:, None],
            b[:, None] - (1 - t)[:, None] * (b - a)[:, None],
        ).reshape(len(a) * points, -1)
        rounded = (
            2 * u * np.maximum(np.abs(a), np.abs(b)).astype(float)[:, None] * ((t > 0) & (t < 1))[:, None]
        )
        at = Rounded(at, rounded.reshape(at.shape))
        step = np.repeat(b - a, points, 0)
        slope = None if case.method == "path" else Rounded(step, u * np.abs(step).astype(float))
        y, s = (
            None if r is None else Rounded(*(v.reshape(len(a), points, -1) for v in (r.value, r.error)))
            for r in outputs(case, at, u, slope)
        )
        error = y.error  # of the fused route
        if long and case.method == "path":
            error = outputs(case, at, u, chords=points)[0].error.reshape(y.error.shape)
        ends = y.value[:, 0], y.value[:, -1]
        if s is not None:
            y = polynomial(y, s, nodes, case.method == "hermite-midpoint")
        paths = Paths(y.value, nodes, node_weights)
        biased, biased_parts = paths.judged(y.error, ends, u, truth_u)
        plain, parts = paths.judged(y.error if s is not None else error, ends, u, truth_u)
        if case.droppable:
            error = np.hypot(
                y.error, u * np.maximum(*(np.abs(end + bias) for end in ends)).astype(float)[:, None]
            )
            biased, biased_parts = paths.judged(error, (ends[0] + bias, ends[1] + bias), u, truth_u)
        yield plain, biased, {"y": y.value, "plain": parts, "biased": biased_parts} if details else {}


def polynomial(y: Rounded, s: Rounded, nodes: Array, midpoint: bool) -> Rounded:
    """The cubic, or quartic, through outputs and slopes at the ends, less the output at the first."""
    known = [y.value[:, 2] - y.value[:, 0], s.value[:, 0], s.value[:, 2]]
    errors = [np.hypot(y.error[:, 0], y.error[:, 2]), s.error[:, 0], s.error[:, 2]]
    basis = _basis(nodes)
    if midpoint:
        bump = 16 * (nodes * (1 - nodes)) ** 2
        basis = np.concatenate([basis - bump[:, None] * _basis(nodes.dtype.type([0.5])), bump[:, None]], 1)
        known.append(y.value[:, 1] - y.value[:, 0])
        errors.append(np.hypot(y.error[:, 0], y.error[:, 1]))
    value = sum(column[:, None] * k[:, None] for column, k in zip(basis.T, known))
    square = sum((column.astype(float)[:, None] * e[:, None]) ** 2 for column, e in zip(basis.T, errors))
    return Rounded(value, np.sqrt(square))


def rule_of(case: Case, kind: type) -> tuple[Array, Array]:
    """Uniform nodes here; Lobatto's by lmnfast.quadrature, which has its own tests."""
    if case.rule == "uniform":
        t = np.arange(case.points).astype(kind) / (case.points - 1)
        return t, np.full(case.points, kind(1) / case.points)
    return tuple(v.numpy().astype(kind) for v in path_nodes(case.rule, case.points))


def distances(case: Case, first: Array, second: Array) -> Array:
    """How far apart two samples are at the first nonlinearity, relative to the larger one."""
    values: list[Array] = []
    z = case.x
    for n, (name, *_) in enumerate(case.activations):
        if n:
            z = z @ case.weights[n - 1].T + (0 if case.biases[n - 1] is None else case.biases[n - 1])
        z = z + values[case.skips[2 * n]] if 2 * n in case.skips else z
        values += [z, z]
        if name != "identity":
            break
    size = np.abs(z).max(1)
    apart = np.concatenate(
        [np.abs(z[first[k : k + 1000]] - z[second[k : k + 1000]]).max(1) for k in range(0, len(first), 1000)]
    )
    return apart / np.maximum(np.maximum(size[first], size[second]), np.finfo(float).tiny)
