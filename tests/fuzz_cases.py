"""Random networks and samples: one case for each seed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
METHODS = ("path", "hermite", "hermite-midpoint")
WORK = 1.5e7  # multiply-adds of a case along all paths, about: tens of milliseconds
MOST = 2_000_000  # numbers of an array of the truth


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
