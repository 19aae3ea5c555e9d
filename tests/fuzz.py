"""Connectivity matrices of random networks against a truth of their own.

    python tests/fuzz.py --count 10000 --seed 0 --jobs 2        a table, every failure, exit status 1 if there is one
    python tests/fuzz.py --only 1234 --show                     one case: sizes, worst pair, outputs along its path

A case is one network (`Case`), one set of samples, a method and a rule. It is measured on every instruction set, by the
fused route, and a third of the cases by the generic route too. A measured matrix has to be symmetric to the bit, with ones
on its diagonal, in [0, 1], one where the outputs are the same along all of a path, and right:

    |L - truth| <= 2 * loss + floor + 4 epsilon

- truth: the definitions in numpy, float64 for float32 cases, else long double. No code of lmnfast is used.
- loss: the largest error of the case in plain PyTorch of the case's dtype, outputs at all nodes in one batch, statistics in
  float64; of close pairs (`NEAR`) by itself.
- floor: what a rounding of every operation costs an entry, to first order. `Rounded` carries it through the network;
  `Paths` carries it on into r2. Without it, a case would fail in which PyTorch is right by luck. Of float64 paths the fused
  route rounds as their larger end does, because it adds a chord and a residual. The generic route takes slopes for the Hermite
  methods from Jacobians times x_j - x_i, which may cancel: `OF_SLOPES` more in float64.

An output is constant, r2 = 1, where its standard deviation along a path is at most 4 epsilons of its magnitude at the ends.
Within a factor of 4 either way an implementation may decide either way. The fused route knows that a constant added to an
output does not matter, so its truth has no bias in the last Linear. It also measures close pairs of float32 samples in
float64 (`NEAR`): for these pairs epsilon is that of float64, in the rule and in the floor.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context

if __name__ == "__main__":  # kernels and BLAS share the cores with the other processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lmnfast
from lmnfast import _native
from lmnfast.quadrature import path_nodes

Array = NDArray[np.floating]
METHODS = ("path", "hermite", "hermite-midpoint")
WORK = 1.5e7  # multiply-adds of a case along all paths, about: tens of milliseconds
OF_SLOPES = 1e-11
SIGMAS = 6  # standard deviations of a rounding that are allowed: 2 of 10^9 are more than that
MOST = 2_000_000  # numbers of an array of the truth

# ---- cases -------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A chain as lmnfast._chain.Chain describes it, and how it is measured. All numbers are float64, exact in `dtype`."""

    seed: int
    dtype: str
    method: str = "path"
    rule: str = "uniform"
    points: int = 21
    generic: bool = False
    weights: list[Array] = field(default_factory=list)
    biases: list[Array | None] = field(default_factory=list)
    activations: list[tuple[str, float, float]] = field(default_factory=list)
    skips: dict[int, int] = field(default_factory=dict)
    x: Array = field(default_factory=lambda: np.zeros((1, 1)))
    traits: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        widths = [self.x.shape[1], *map(len, self.weights)]
        parts = [str(widths[0])]
        for n, (name, *_) in enumerate(self.activations):
            parts += [str(widths[n])] if n else []
            parts += ["+"] if 2 * n in self.skips else []
            parts += [name] if name != "identity" else []
            parts += ["+"] if 2 * n + 1 in self.skips else []
        return (
            f"{self.dtype} {self.method} {self.rule} {self.points}, N = {len(self.x)}, {' '.join(parts)}"
            f"{'; ' + ', '.join(self.traits) if self.traits else ''}"
        )

    @property
    def droppable(self) -> bool:
        """Whether the last bias only adds a constant to the outputs."""
        return bool(self.weights) and self.activations[-1][0] == "identity" and self.biases[-1] is not None


SMOOTH = ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus", "sin")
KINKED = ("relu", "leaky_relu", "elu")


def draw(seed: int) -> Case:  # noqa: C901  # one choice after the other, in the order that a seed's case depends on
    rng = np.random.default_rng(seed)

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    def log_uniform(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    def activation(name: str) -> tuple[str, float, float]:
        low, high = {"leaky_relu": (-0.2, 1.0), "elu": (0.1, 2.0), "softplus": (0.2, 4.0)}.get(
            name, (0.0, 0.0)
        )
        threshold = 20.0 if name == "softplus" else 0.0
        return name, float(np.float32(rng.uniform(low, high))), threshold

    case = Case(seed, "float64" if chance(0.3) else "float32")
    case.method = METHODS[int(rng.choice(3, p=[0.6, 0.2, 0.2]))]
    case.generic = chance(1 / 3)
    if chance(0.25):
        case.rule, case.points = "lobatto", int(rng.integers(3, 22))
    elif chance(0.2):
        case.points = int(rng.integers(3, 102))

    depth = int(rng.choice(7, p=[0.02, 0.18, 0.3, 0.2, 0.12, 0.1, 0.08]))
    residual = depth > 0 and chance(0.3)
    most = 60 if depth > 3 else 700
    widths = [int(log_uniform(1, most + 1)) for _ in range(depth + 1)]
    if residual:
        widths[:-1] = [min(widths[0], 100)] * depth
    if depth:
        widths[-1] = (
            widths[0] if residual and chance(0.5) else int(log_uniform(1, 1201 if depth < 4 else 100))
        )
    kinds = SMOOTH + KINKED
    hidden = (
        [str(rng.choice(kinds))] * (depth + 1)
        if chance(0.6)
        else [str(n) for n in rng.choice(kinds, depth + 1)]
    )
    if chance(0.2) and depth:  # a linear layer in the middle
        hidden[int(rng.integers(depth + 1))] = "identity"
    names = [*([] if chance(0.3) else ["identity"]), *hidden][: depth + 1]
    if depth and not chance(0.25):
        names[-1] = "identity"
    case.activations = [activation(n) for n in names]

    gain, bias = (
        log_uniform(0.5, 5.0),
        str(rng.choice(["default", "normal", "zero", "none"], p=[0.35, 0.3, 0.1, 0.25])),
    )
    for fan_in, out in itertools.pairwise(widths):
        case.weights.append(gain * rng.standard_normal((out, fan_in)) / fan_in**0.5)
        scale = {"default": fan_in**-0.5, "normal": 1.0}.get(bias, 0.0)
        case.biases.append(None if bias == "none" else scale * rng.uniform(-1, 1, out))
    if depth:
        layer = int(rng.integers(depth))
        if bias != "none":
            if chance(0.1):
                case.traits.append("dead units")
                case.biases[layer] -= log_uniform(1, 1e3) * (
                    rng.random(widths[layer + 1]) < rng.choice([0.5, 0.9, 1.0])
                )
            if chance(0.1):
                case.traits.append("saturated units")
                case.biases[layer] += log_uniform(5, 300) * rng.choice([-1, 0, 1], widths[layer + 1])
            if chance(0.1):
                case.traits.append("large last bias")
                case.biases[-1] += log_uniform(10, 1e6) * rng.standard_normal(widths[-1])
        if chance(0.1):
            case.traits.append("pruned")
            for w in case.weights:
                w *= rng.random(w.shape) < 0.2
        if chance(0.05):
            case.traits.append("large or small last weight")
            case.weights[-1] *= log_uniform(1e-30, 1e30)
    if residual:
        widths_of = dict(enumerate(np.repeat(widths, 2)))
        values = [v for v in range(2 * depth + 2) if v % 2 == 0 or names[v // 2] != "identity"]
        for into in values[1:]:
            fitting = [v for v in values if v < into and widths_of[v] == widths_of[into]]
            if fitting and chance(0.5):
                case.skips[into] = int(rng.choice(fitting))

    case.x = _samples(case, int(log_uniform(1, 301)), widths[0], rng, chance, log_uniform)
    stored = np.dtype(case.dtype)
    case.weights = [w.astype(stored).astype(float) for w in case.weights]
    case.biases = [None if b is None else b.astype(stored).astype(float) for b in case.biases]
    case.x = case.x.astype(stored).astype(float)
    return case


def _samples(case: Case, n: int, width: int, rng, chance, log_uniform) -> Array:
    outputs = len(case.weights[-1]) if case.weights else width
    layers = sum(w.size for w in case.weights) + 20 * sum(len(w) for w in case.weights) + 20 * width
    work = WORK if case.dtype == "float32" else WORK / 4  # long double has no vectors
    along_path = (case.points if case.method == "path" else 6) * layers + 50 * case.points * outputs
    n = max(min(n, 2), min(n, int((2 * work / along_path) ** 0.5)))
    if case.method != "path" and case.generic:  # Jacobians of every output
        case.generic = outputs * n * layers < WORK and outputs * n * width < MOST
    x = rng.standard_normal((n, width))
    if chance(0.1):
        case.traits.append("low rank")
        x = rng.standard_normal((n, rank := int(rng.integers(1, 4)))) @ rng.standard_normal((rank, width))
    x *= log_uniform(0.1, 10)
    if chance(0.06):
        case.traits.append("offset")
        x += log_uniform(10, 1e4)
    if chance(0.06):
        case.traits.append("outlier")
        x[int(rng.integers(n))] *= log_uniform(1e2, 1e22)
    if chance(0.08):
        case.traits.append("large or small samples")
        x *= log_uniform(1e-30, 1e30)
    if n > 1 and chance(0.1):
        case.traits.append("duplicates")
        x[rng.integers(n, size=1 + n // 4)] = x[int(rng.integers(n))]
    if n > 1 and chance(0.15):
        case.traits.append("near-duplicates")
        copies = rng.integers(n, size=1 + n // 4)
        x[copies] = x[int(rng.integers(n))] * (
            1 + log_uniform(1e-7, 1e-3) * rng.standard_normal((len(copies), width))
        )
    return x


# ---- truth -------------------------------------------------------------------------------------------------


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
    nodes, node_weights = _rule(case, kind)
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
            y = _polynomial(y, s, nodes, case.method == "hermite-midpoint")
        paths = Paths(y.value, nodes, node_weights)
        biased, biased_parts = paths.judged(y.error, ends, u, truth_u)
        plain, parts = paths.judged(y.error if s is not None else error, ends, u, truth_u)
        if case.droppable:
            error = np.hypot(
                y.error, u * np.maximum(*(np.abs(end + bias) for end in ends)).astype(float)[:, None]
            )
            biased, biased_parts = paths.judged(error, (ends[0] + bias, ends[1] + bias), u, truth_u)
        yield plain, biased, {"y": y.value, "plain": parts, "biased": biased_parts} if details else {}


def _polynomial(y: Rounded, s: Rounded, nodes: Array, midpoint: bool) -> Rounded:
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


def _rule(case: Case, kind: type) -> tuple[Array, Array]:
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


# ---- measured ----------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, case: Case, bias: bool = True) -> None:
        super().__init__()
        dtype = getattr(torch, case.dtype)
        self.linears = nn.ModuleList()
        for n, (w, b) in enumerate(zip(case.weights, case.biases)):
            has_bias = b is not None and (bias or n + 1 < len(case.weights) or not case.droppable)
            linear = nn.utils.skip_init(nn.Linear, w.shape[1], w.shape[0], bias=has_bias, dtype=dtype)
            linear.weight.data = torch.from_numpy(w).to(dtype)
            if has_bias:
                linear.bias.data = torch.from_numpy(b).to(dtype)
            self.linears.append(linear)
        self.activations = [self._activation(*a) for a in case.activations]
        self.skips = case.skips

    @staticmethod
    def _activation(name: str, alpha: float, beta: float) -> Callable[[Tensor], Tensor] | None:
        return {
            "identity": None,
            "relu": torch.relu,
            "leaky_relu": partial(nn.functional.leaky_relu, negative_slope=alpha),
            "elu": partial(nn.functional.elu, alpha=alpha),
            "softplus": partial(nn.functional.softplus, beta=alpha, threshold=beta),
            "silu": nn.functional.silu,
            "gelu": nn.functional.gelu,
            "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
            "sin": torch.sin,
        }[name]

    def forward(self, x: Tensor) -> Tensor:
        z, values = x, []
        for n, activation in enumerate(self.activations):
            z = self.linears[n - 1](z) if n else z
            for into in (2 * n, 2 * n + 1):
                z = activation(z) if into % 2 and activation is not None else z
                z = z + values[self.skips[into]] if into in self.skips else z
                values.append(z)
        return z


def pytorchs(
    case: Case, first: Array, second: Array, dtype: torch.dtype, biased: bool
) -> tuple[Array, Array, Array]:
    """Plain PyTorch in a dtype: entries, with the constant rule by that dtype; whether all was finite; outputs along the
    last pair's path."""
    net = Net(case, bias=False).to(dtype).requires_grad_(False)
    x = torch.from_numpy(case.x).to(dtype)
    nodes, weights = _rule(case, np.float64)
    t = torch.from_numpy(nodes).to(dtype)
    bias = torch.zeros(1, dtype=dtype)
    if case.droppable and biased:
        bias = torch.from_numpy(case.biases[-1]).to(dtype)
    widest = max([x.shape[1], *map(len, case.weights)])
    most = max(1, MOST // (len(t) * widest))
    entries, finite, y = [], [], np.zeros(0)
    for begin in range(0, len(first), most):
        a, b = x[first[begin : begin + most]], x[second[begin : begin + most]]
        if case.method == "path":
            y = (
                net(torch.lerp(a[:, None], b[:, None], t[:, None]).flatten(0, 1)).unflatten(0, (len(a), -1))
                + bias
            )
        else:
            both = torch.cat([a, b])
            value, slope = torch.func.jvp(net, (both,), (torch.cat([b - a, b - a]),))
            value = (value + bias).unflatten(0, (2, -1)).double()
            slope = slope.unflatten(0, (2, -1)).double()
            middle = (net(torch.lerp(a, b, 0.5)) + bias).double()
            data = [
                Rounded(torch.stack(v, 1).numpy(), np.zeros((len(a), 3, 1)))
                for v in ([value[0], middle, value[1]], [slope[0], slope[0], slope[1]])
            ]
            y = (
                torch.from_numpy(_polynomial(*data, nodes, case.method == "hermite-midpoint").value)
                + value[0][:, None]
            )
        entries.append(_r2(y.double().numpy(), nodes, weights, torch.finfo(dtype).eps))
        finite.append(y.isfinite().flatten(1).all(1).numpy())
        y = y.double().numpy()
    return np.concatenate(entries), np.concatenate(finite), y


def _r2(y: Array, t: Array, w: Array, epsilon: float) -> Array:
    magnitude = np.maximum(np.abs(y[:, 0]), np.abs(y[:, -1]))
    t, w = t[:, None], w[:, None]
    tau = t - (w * t).sum()
    y = y - y[:, :1]
    centred = y - (w * y).sum(1, keepdims=True)
    scale = np.abs(centred).max(1)
    safe = np.where(scale > 0, scale, 1)
    centred = centred / safe[:, None]
    q, c = (w * centred**2).sum(1), (w * tau * centred).sum(1)
    constant = np.sqrt(q) * scale <= 4 * epsilon * magnitude
    return np.where(constant, 1, c**2 / ((w * tau**2).sum() * np.where(q > 0, q, 1))).mean(-1)


class _Seen(TorchDispatchMode):
    """Notes which of lmnfast's ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lmnfast":
            self.names.add(func.name().removeprefix("lmnfast::"))
        return func(*args, **(kwargs or {}))


def measured(case: Case, generic: bool) -> tuple[Array, bool]:
    """The matrix, and whether a fused kernel gave it."""
    net = Net(case)
    seen = _Seen()
    f = (lambda z: net(z)) if generic else net
    with seen, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "f: ", UserWarning
        )  # of float32 that is mere rounding, and of offsets
        L = lmnfast.connectivity(
            f,
            torch.from_numpy(case.x).to(getattr(torch, case.dtype)),
            method=case.method,
            rule=case.rule,
            points=case.points,
        )
    return L.numpy(), bool(seen.names & {"path_connectivity", "hermite_connectivity"})


@contextmanager
def level(name: str) -> Iterator[None]:
    before = _native._C.isa()
    assert _native._C.use_isa(name), f"this build or CPU has no {name}"
    try:
        yield
    finally:
        _native._C.use_isa(before)


# ---- verdicts ----------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """One matrix of a case."""

    seed: int
    dtype: str
    route: str
    method: str
    level: str
    error: float = 0.0
    loss: float = 0.0
    wrong: int = 0
    failure: str = ""
    text: str = ""


NEAR = 2.0**-10  # closer pairs of float32 samples are measured in float64 by the fused route


@dataclass
class Bounds:
    """Of every pair: the least and the largest entry that is right, and that is allowed; NaN for these where PyTorch's outputs
    are not finite."""

    low: Array
    high: Array
    below: Array
    above: Array
    near: Array
    loss: float
    """PyTorch's largest error of pairs that are not near."""


def _outside(entries: Array, low: Array, high: Array) -> Array:
    return np.maximum(np.maximum(low - entries, entries - high), 0)


class Expected:
    """What is right for a case; every part of it is computed once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.first, self.second = np.triu_indices(len(case.x), 1)
        self.u = float(np.finfo(case.dtype).eps) / 2
        self.torch_dtype = getattr(torch, case.dtype)
        self.coincident = (case.x[self.first] == case.x[self.second]).all(1)
        with torch.no_grad():
            x = torch.from_numpy(case.x).to(self.torch_dtype)
            at_samples, moved = Net(case)(x), Net(case)(x * (1 + 16 * self.u))
            if case.dtype == "float32":
                moved = Net(case).double()(x.double())
        self.all_finite = bool(at_samples.isfinite().all())
        # Whether rounding changes outputs by a thousandth of the largest: float32's, or of float64 that of the samples.
        self.unstable = bool((moved - at_samples).abs().max() > 1e-3 * at_samples.abs().max())
        self.truth = self._truth(np.ones(len(self.first), bool), self.u, case.dtype == "float64")
        self.dead = self.truth[0].dead

    def _truth(self, these: Array, u: float, long: bool) -> tuple[Judged, Judged]:
        first, second = self.first[these], self.second[these]
        if not len(first):
            nothing = Judged(*np.zeros((3, 0)), np.zeros(0, bool))
            return nothing, nothing
        parts = list(truth_of(self.case, first, second, u, long))
        return Judged.joined([p[0] for p in parts]), Judged.joined([p[1] for p in parts])

    def bounds(self, fused: bool) -> Bounds:
        right = self.truth[0 if fused else 1]
        low, high = right.low.copy(), right.high.copy()
        if not len(self.first):
            return Bounds(low, high, low, high, low == 0, 0.0)
        entries, finite = self._pytorchs(np.ones(len(low), bool), self.torch_dtype, not fused)
        distance = distances(self.case, self.first, self.second)
        near, loss = distance < NEAR, np.where(self.coincident, 0, _outside(entries, low, high))
        # Close pairs lose far more digits than others, so they say nothing about these.
        largest = [loss[finite & these].max(initial=0) for these in (~near, near)]
        allowed = 2 * np.where(near, largest[1], largest[0]) + right.floor + 8 * self.u
        if self.case.dtype == "float64" and self.case.method != "path" and not fused:
            allowed += OF_SLOPES
        below, above = low - allowed, high + allowed
        close = (distance < 4 * NEAR) & ~self.coincident
        if self.case.dtype == "float32" and close.any():
            exact = self._truth(close, 2.0**-53, True)[0 if fused else 1]
            again, _ = self._pytorchs(close, torch.float64, not fused)
            allowed = 2 * _outside(again, exact.low, exact.high).max() + exact.floor + 8 * self.u
            sure = fused & (distance[close] < NEAR / 4)  # others may be measured in either precision
            for both, one, of in (
                (low, exact.low, np.minimum),
                (high, exact.high, np.maximum),
                (below, exact.low - allowed, np.minimum),
                (above, exact.high + allowed, np.maximum),
            ):
                both[close] = np.where(sure, one, of(both[close], one))
        below, above = np.where(finite, below, np.nan), np.where(finite, above, np.nan)
        return Bounds(low, high, below, above, near, float(largest[0]))

    def _pytorchs(self, these: Array, dtype: torch.dtype, biased: bool) -> tuple[Array, Array]:
        return pytorchs(self.case, self.first[these], self.second[these], dtype, biased)[:2]


def check(case: Case, levels: list[str]) -> list[Verdict]:
    """A verdict for every level and route."""
    with np.errstate(all="ignore"), torch.no_grad():
        expected = Expected(case)
        bounds: dict[bool, Bounds] = {}
        verdicts = []
        for name in levels:
            for generic in (False, True) if case.generic else (False,):
                verdict = Verdict(case.seed, case.dtype, "generic" if generic else "fused", case.method, name)
                verdicts.append(verdict)
                try:
                    with level(name):
                        L, fused = measured(case, generic)
                except Exception as error:
                    if (
                        isinstance(error, ValueError)
                        and "rounding decides" in str(error)
                        and expected.unstable
                    ):
                        continue
                    refused = isinstance(error, ValueError) and "NaN or Inf" in str(error)
                    fine = bounds.setdefault(not generic, expected.bounds(not generic))
                    if fine and refused and not (expected.all_finite and np.isfinite(fine.below).all()):
                        continue
                    verdict.failure = "refused" if isinstance(error, ValueError) else "raised"
                    verdict.text = str(error) if refused else traceback.format_exc(limit=-2)
                    continue
                if not generic and not fused:
                    verdict.route = "fused -> generic"
                if fused not in bounds:
                    bounds[fused] = expected.bounds(fused)
                judge(L, expected, bounds[fused], verdict)
        return verdicts


def judge(L: Array, expected: Expected, bounds: Bounds, verdict: Verdict) -> None:
    n = len(expected.case.x)
    entries = L[expected.first, expected.second].astype(float)
    verdict.loss = bounds.loss
    known = np.isfinite(bounds.below)
    wrong = known & ~((entries >= bounds.below) & (entries <= bounds.above))
    error = np.where(known & ~bounds.near, _outside(entries, bounds.low, bounds.high), 0)
    verdict.error, verdict.wrong = float(error.max(initial=0)), int(wrong.sum())
    claims = {
        "shape": L.shape == (n, n) and L.dtype == np.dtype(verdict.dtype),
        "NaN": np.isfinite(L).all(),
        "range": ((L >= 0) & (L <= 1)).all(),
        "asymmetric": (L == L.T).all(),
        "diagonal": (np.diagonal(L) == 1).all(),
        "coincident": (entries[expected.coincident] == 1).all(),
        "dead": (entries[expected.dead & known] == 1).all(),
        "error": not wrong.any(),
    }
    verdict.failure = ", ".join(claim for claim, holds in claims.items() if not holds)
    if wrong.any():
        excess = np.where(wrong, np.maximum(bounds.below - entries, entries - bounds.above), -1)
        k = int(np.nanargmax(excess))
        verdict.text = (
            f"{verdict.wrong} of {len(entries)} pairs, worst {expected.first[k]}, {expected.second[k]}: {entries[k]:.7g}, "
            f"right is {bounds.low[k]:.7g} .. {bounds.high[k]:.7g}, allowed {bounds.below[k]:.7g} .. "
            f"{bounds.above[k]:.7g}; PyTorch loses {bounds.loss:.2g}"
        )


# ---- command line ------------------------------------------------------------------------------------------


def show(case: Case, levels: list[str]) -> None:
    """Prints a case, its verdicts, and the outputs along the worst pair's path."""
    print(case)
    for w, b in zip(case.weights, case.biases):
        print(f"  weight {w.shape[1]} -> {w.shape[0]}, rms {np.sqrt((w**2).mean()):.3g}, bias", end=" ")
        print("none" if b is None else f"rms {np.sqrt((b**2).mean()):.3g}")
    print(f"  activations {case.activations}, skips {case.skips}, |x| up to {np.abs(case.x).max():.3g}")
    worst = None
    for verdict in check(case, levels):
        print(
            f"{verdict.level}, {verdict.route}: error {verdict.error:.3g}, PyTorch's {verdict.loss:.3g} {verdict.failure}"
        )
        print(f"    {verdict.text}")
        if " worst " in verdict.text:
            pair = verdict.text.split(" worst ")[1].split(":")[0].split(", ")
            worst = worst or (np.array([int(pair[0])]), np.array([int(pair[1])]))
    if worst is None:
        return
    with np.errstate(all="ignore"), torch.no_grad():
        fused_close = distances(case, *worst)[0] < NEAR and case.dtype == "float32"
        u = 2.0**-53 if fused_close else float(np.finfo(case.dtype).eps) / 2
        _, _, details = next(truth_of(case, *worst, u, case.dtype == "float64" or fused_close, details=True))
        again = pytorchs(case, *worst, getattr(torch, case.dtype), True)[2][0]
    print(
        f"relative distance {distances(case, *worst)[0]:.3g}{', measured in float64' if fused_close else ''}"
    )
    parts, y = details["plain"], details["y"][0]
    for k in np.argsort(-np.abs(1 - parts["r2"][0]))[:8]:
        state = (
            "constant" if parts["certain"][0, k] else "perhaps constant" if parts["possible"][0, k] else ""
        )
        print(
            f"output {k}: r2 {parts['r2'][0, k]:.6g}, floor {parts['floor'][0, k]:.2g}, deviation "
            f"{parts['deviation'][0, k]:.3g} {state}"
        )
        few = np.unique(np.linspace(0, len(y) - 1, 7).astype(int))
        print("    truth  ", " ".join(f"{float(v):.8g}" for v in y[few, k]))
        print("    PyTorch", " ".join(f"{v:.8g}" for v in again[few, k]))


def slice_of(seeds: list[int], levels: list[str]) -> list[Verdict]:
    torch.set_num_threads(1)
    return [verdict for seed in seeds for verdict in check(draw(seed), levels)]


def table(verdicts: list[Verdict]) -> list[str]:
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for v in verdicts:
        groups.setdefault((v.dtype, v.route, v.method, v.level), []).append(v)
    rows = [
        (
            "dtype",
            "route",
            "method",
            "level",
            "cases",
            "error: median",
            "worst",
            "to PyTorch's: median",
            "worst",
            "over",
        )
    ]
    for key, group in sorted(groups.items()):
        error = np.array([v.error for v in group])
        # A case in which PyTorch is right by luck says nothing: an epsilon is the least that it is said to lose.
        ratio = error / np.maximum([v.loss for v in group], np.finfo(key[0]).eps)
        numbers = [f"{v:.2g}" for v in (np.median(error), error.max(), np.median(ratio), ratio.max())]
        rows.append((*key, str(len(group)), *numbers, str(sum(bool(v.failure) for v in group))))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first case is a million times this one")
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument(
        "--show", action="store_true", help="print the case and the outputs along its worst path"
    )
    parser.add_argument(
        "--isa", default=",".join(_native._C.isas()), help="levels, with commas between; all of this machine"
    )
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    levels = arguments.isa.split(",")
    begin = time.monotonic()
    if arguments.show:
        show(draw(arguments.only), levels)
        return 0
    start = 1_000_000 * arguments.seed
    seeds = [arguments.only] if arguments.only is not None else list(range(start, start + arguments.count))
    slices = [(seeds[k : k + 25], levels) for k in range(0, len(seeds), 25)]
    verdicts: list[Verdict] = []
    # New interpreters: a forked one cannot use the OpenMP threads of its parent.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for done, part in enumerate(pool.map(slice_of, *zip(*slices)), 1):
            verdicts += part
            if sys.stderr.isatty():
                print(f"\r{done} of {len(slices)}", end="", file=sys.stderr)
    failures = [v for v in verdicts if v.failure]
    for v in failures:
        print(
            f"{v.failure}: python tests/fuzz.py --only {v.seed} --show --isa {v.level}  # {v.dtype} {v.route} {v.method}"
        )
        print("    " + v.text.strip().replace("\n", "\n    "))
    print(*table(verdicts), sep="\n")
    print(
        f"{len(seeds)} cases, {len(verdicts)} matrices, {len(failures)} wrong, {time.monotonic() - begin:.0f} s"
    )
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
