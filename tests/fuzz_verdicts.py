"""What lmnfast and plain PyTorch make of a case, and whether that is right."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from fuzz_cases import MOST, Array, Case
from fuzz_truth import Judged, Rounded, distances, polynomial, rule_of, truth_of
from torch import Tensor, nn

import lmnfast
from lmnfast import _native

OF_SLOPES = 1e-11
NEAR = 2.0**-10  # closer pairs of float32 samples are measured in float64 by the fused route


class Net(nn.Module):
    def __init__(self, case: Case, bias: bool = True) -> None:
        super().__init__()
        dtype = getattr(torch, case.dtype)
        self.linears = nn.ModuleList()
        for n, (w, b) in enumerate(zip(case.weights, case.biases)):
            has_bias = b is not None and (bias or n + 1 < len(case.weights) or not case.droppable)
            linear = nn.Linear(w.shape[1], w.shape[0], has_bias, dtype=dtype)
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
    nodes, weights = rule_of(case, np.float64)
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
                torch.from_numpy(polynomial(*data, nodes, case.method == "hermite-midpoint").value)
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


FUSED = {_native._C.PathConnectivity, _native._C.HermiteConnectivity}


@contextmanager
def _seen() -> Iterator[set[type]]:
    """The kernels that run meanwhile. A dispatch mode of torch would see their ops too, but slow down every call of torch."""
    kernels: set[type] = set()
    run = _native.run

    def seeing(call: Any, *arguments: Any, **keywords: Any) -> Tensor:
        kernels.add(type(call))
        return run(call, *arguments, **keywords)

    with mock.patch.object(_native, "run", seeing):
        yield kernels


def measured(case: Case, generic: bool) -> tuple[Array, bool]:
    """The matrix, and whether a fused kernel gave it."""
    net = Net(case)
    f = (lambda z: net(z)) if generic else net
    with _seen() as kernels, warnings.catch_warnings():
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
    return L.numpy(), bool(kernels & FUSED)


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


def outside(entries: Array, low: Array, high: Array) -> Array:
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
        near, loss = distance < NEAR, np.where(self.coincident, 0, outside(entries, low, high))
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
            allowed = 2 * outside(again, exact.low, exact.high).max() + exact.floor + 8 * self.u
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
    error = np.where(known & ~bounds.near, outside(entries, bounds.low, bounds.high), 0)
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
