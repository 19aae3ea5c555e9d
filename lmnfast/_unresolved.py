"""Measures unresolved pairs in float64: pairs whose entry of a connectivity matrix the samples' dtype cannot resolve.

A kernel marks a pair as UNRESOLVED in two cases. Rounding could determine its r2, because an output hardly varies against the
terms that it is computed from, or leaves the range of the dtype. Or the two samples are close to each other and some output is
constant to rounding. In float64 f is evaluated on the path itself, without a chord, so that a dead unit is exactly dead.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ._whole import Seen, Whole
from .reference import CONSTANT_ULPS, hermite_path, pooled_r2_of_outputs, r2_of_outputs

UNRESOLVED = -1.0  # kUnresolved in csrc/statistics.h

# Samples are close if no coordinate differs by more than this share of the largest; kCloseSamples in csrc/statistics.h.
CLOSE = 2.0**-10

# An output that varies by less than this many epsilons is unresolved; kResolvedUlps32, kResolvedUlps64 in csrc/statistics.h.
RESOLVED_ULPS = {torch.float32: 2.0**8, torch.float64: 2.0**24}
# The range of var(t) var(y) in which squares keep their digits; kLeastTotal32, kLargestTotal32 and so on in csrc/statistics.h.
TOTALS = {torch.float32: (1e-24, 1e30), torch.float64: (1e-280, 1e290)}
LEAST_ROUNDING = 2.0**-6  # kLeastRounding in csrc/statistics.h

# Larger numbers stand for infinity in masks. Outputs are not computed from them.
LARGE = 1e6
_DOUBLE_EPSILON = torch.finfo(torch.float64).eps


# What torch functions take and return beside tensors and containers.
ATOMS = {type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size, slice}


@dataclass(frozen=True)
class Values:
    """f in float64."""

    at: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """From points (B, *in) float64 to f's outputs there (B, K), and to the magnitude up to which an output is nothing but
    rounding (B, K), or None if that is not known. Both are float64."""
    along: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]] | None = None
    """The same from points and steps (B, *in); the second of the three results is f's derivative along the steps (B, K).
    None: autograd computes it."""
    rounds_as_ends: bool = False
    """Whether an output's rounding anywhere on a path may be as large as at the path's ends."""


def are_close(first: Tensor, second: Tensor) -> Tensor:
    """Whether samples are close to each other. Each (pairs, *in) -> (pairs,) bool."""
    first, second = first.flatten(1), second.flatten(1)
    largest = torch.maximum(first.abs().amax(1), second.abs().amax(1))
    return (second - first).abs().amax(1) <= CLOSE * largest


@dataclass(frozen=True, eq=False)
class Entries:
    """A connectivity matrix in which a kernel has left unresolved pairs."""

    L: Tensor
    """(N, N), with UNRESOLVED for each unresolved pair."""
    pooled: Tensor | None
    """As L, r2 pooled over the outputs; None if it is not asked for."""
    counts: Tensor
    """(2,) int64: the number of constant outputs over the resolved pairs, and the number of unresolved pairs."""
    stabiliser: float = 0.0

    def unresolved(self, most: int) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Where the unresolved pairs are, and their samples, at most `most` at a time."""
        for first, second in _unresolved_pairs(self.L, most):
            yield (first, second), first, second

    def write(self, at: Any, r2: Tensor, pooled: Tensor | None) -> None:
        (first, second), rows = at, ((self.L, r2), (self.pooled, pooled))
        for matrix, values in rows:
            if matrix is not None and values is not None:
                matrix[first, second] = matrix[second, first] = values


@dataclass(frozen=True, eq=False, kw_only=True)
class ListEntries(Entries):
    """The entries of a list of pairs. L and pooled are (pairs,)."""

    first: Tensor
    """(pairs,) int64, the samples at t = 0."""
    second: Tensor

    def unresolved(self, most: int) -> Iterator[tuple[Any, Tensor, Tensor]]:
        for pair in (self.L == UNRESOLVED).nonzero()[:, 0].split(most):
            yield pair, self.first[pair], self.second[pair]

    def write(self, at: Any, r2: Tensor, pooled: Tensor | None) -> None:
        self.L[at] = r2
        if self.pooled is not None and pooled is not None:
            self.pooled[at] = pooled


def resolve(
    values: Values,
    x: Tensor,
    entries: Entries,
    nodes: Tensor,
    weights: Tensor,
    *,
    points: int,
    midpoint: bool | None = None,
    inputs: Tensor | None = None,
    noise: Tensor | None = None,
) -> None:
    """Replaces unresolved entries in place, and completes the counts. Waits for a CUDA device.

    Args:
        values: f in float64.
        x: (N, *in), the samples.
        entries: with the unresolved pairs. The second of their counts becomes 0.
        nodes, weights: (nodes,) float64, on the CPU.
        points: the largest number of points in one call of f.
        midpoint: None: r2 of f itself. A bool: r2 of f's Hermite polynomials, with or without the midpoint.
        inputs: (N, *), the tensor that x was computed from. Equal inputs are the same sample, whatever rounding did to x.
        noise: (N, K), the difference of outputs between two calls of f on the same sample. None: 0.

    The machine epsilon of L's dtype determines which outputs are constant. For close samples the epsilon of float64 does, as
    the samples' own rounding is no property of f.
    """
    counts, dtype, stabiliser = entries.counts, entries.L.dtype, entries.stabiliser
    if int(counts[1]) == 0:
        return
    inputs = x if inputs is None else inputs
    on_device = nodes.to(x.device)
    for at, first, second in entries.unresolved(max(1, points // len(nodes))):
        entry = torch.ones(len(first), dtype=dtype, device=x.device)
        if stabiliser:  # between samples that only agree, the outputs are constant
            equal = _equal(inputs, first, second)
            entry[_agree(x[first], x[second]) & ~equal] = 0.0
        pool = None if entries.pooled is None else entry.clone()
        others, y, rounding = outputs_on_paths(
            values, x, first, second, on_device, dtype, inputs, midpoint=midpoint, noise=noise
        )
        if len(others):
            r2, constant = r2_of_outputs(y, nodes, weights, rounding, stabiliser=stabiliser)
            entry[others] = r2.mean(1).clamp(0, 1).to(dtype)  # rounding may exceed 1
            if pool is not None:
                pooled = pooled_r2_of_outputs(y, nodes, weights, rounding, stabiliser=stabiliser)
                pool[others] = pooled.clamp(0, 1).to(dtype)
            counts[0] += constant.sum()
        entries.write(at, entry, pool)
    counts[1] = 0


def outputs_on_paths(
    values: Values,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    nodes: Tensor,
    dtype: torch.dtype,
    inputs: Tensor,
    *,
    midpoint: bool | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs in float64 along the paths of some pairs.

    Args:
        values, x, inputs, midpoint, noise: as in `resolve`.
        first, second: (pairs,) int64.
        nodes: (nodes,) float64, on x's device.
        dtype: of the connectivity.

    Returns:
        The places of the pairs of different samples; the outputs on their paths (places, nodes, K), 0 for an output that is
        nothing but rounding; and the rounding of each output (places, K), as `r2_of_outputs` takes it.
    """
    same = _equal(inputs, first, second) | _agree(x[first], x[second])
    others = (~same).nonzero()[:, 0]  # waits once on CUDA
    if len(others) == 0:
        return others, x.new_empty(0), x.new_empty(0)
    first, second = first[others], second[others]
    samples = x[first].double(), x[second].double()
    y, least = _path(values, *samples, nodes, midpoint, dtype)
    ends = torch.maximum(y[:, 0].abs(), y[:, -1].abs())
    close = are_close(*samples)[:, None]
    rounding = ends * torch.where(close, _DOUBLE_EPSILON, torch.finfo(dtype).eps)
    # If the terms of an output cancel, their rounding remains. Between close samples this rounding may be the largest part.
    if least is not None:
        rounding = torch.where(close, torch.maximum(rounding, least), rounding)
    if noise is not None:
        rounding = torch.maximum(rounding, torch.maximum(noise[first], noise[second]))
    return others, y, rounding


def _equal(inputs: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Whether two samples are the same one. (pairs,) bool."""
    return (inputs[first] == inputs[second]).flatten(1).all(1)


def _agree(first: Tensor, second: Tensor) -> Tensor:
    """Whether samples agree to float64 rounding in every coordinate. f is straight on such a short path.

    Each (pairs, *in) -> (pairs,) bool.
    """
    first, second = first.double().flatten(1), second.double().flatten(1)
    return ((second - first).abs() <= 16 * _DOUBLE_EPSILON * torch.maximum(first.abs(), second.abs())).all(1)


def _unresolved_pairs(L: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The unresolved pairs i < j, at most `most` at a time."""
    # Each block of rows waits once on CUDA. If all pairs are unresolved, their indices take 24 bytes per pair.
    rows = max(1, 2**24 // len(L))
    for begin in range(0, len(L), rows):
        first, second = (L[begin : begin + rows] == UNRESOLVED).triu_(begin + 1).nonzero(as_tuple=True)
        first = first + begin
        for start in range(0, len(first), most):
            yield first[start : start + most], second[start : start + most]


def _without_rounding(y: Tensor, least: Tensor | None) -> Tensor:
    """The outputs, with 0 for those that are nothing but rounding: a dead output is then exactly dead."""
    return y if least is None else torch.where(y.abs() <= least, 0.0, y)


def _between(first: Tensor, second: Tensor, t: Tensor | float) -> Tensor:
    """Points between samples. torch.lerp is not used, as it rounds the last numbers of each thread's share differently."""
    t = torch.as_tensor(t, dtype=first.dtype, device=first.device)
    step = second - first
    return torch.where(t < 0.5, first + t * step, second - (1 - t) * step)


def _without_dead(
    values: Values, first: Tensor, second: Tensor, ends: list[Tensor], slopes: list[Tensor]
) -> list[Tensor]:
    """Slopes at both ends, with 0 for dead outputs: exactly 0 at both ends and the midpoint, and slopes as small as rounding.

    PyTorch's GELU far below zero is an example. It is exactly 0, but its derivative is about 1e-34.
    """
    size = torch.stack([y.abs().amax(1) for y in ends]).amax(0).clamp(min=1.0)[:, None]
    slight = torch.stack([(y == 0) & (s.abs() <= _DOUBLE_EPSILON * size) for y, s in zip(ends, slopes)]).all(
        0
    )
    if slight.any():
        slight &= values.at(_between(first, second, 0.5))[0] == 0
    return [torch.where(slight, 0.0, s) for s in slopes]


def _path(
    values: Values,
    first: Tensor,
    second: Tensor,
    nodes: Tensor,
    midpoint: bool | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """f, or its polynomials, at every node (pairs, nodes, K), and the rounding at the ends (pairs, K) or None.

    The rounding is the magnitude up to which an output is nothing but rounding; None if it is not known. dtype: of L.
    """
    if midpoint is None:
        t = nodes.reshape(-1, *[1] * (first.dim() - 1))
        y, least = values.at(_between(first[:, None], second[:, None], t).flatten(0, 1))
        y = y.unflatten(0, (len(first), len(nodes)))
        if least is None:
            return y, None
        least = least.unflatten(0, (len(first), len(nodes)))
        at_ends = least[:, [0, -1]].amax(1)
        if values.rounds_as_ends:  # only between the ends: the ends are the samples themselves
            least[:, 1:-1] = torch.maximum(least[:, 1:-1], at_ends[:, None])
        return _without_rounding(y, least), at_ends
    step = second - first
    leasts: list[Tensor | None] = []
    if values.along is not None:
        y, slope, least = values.along(torch.cat([first, second]), torch.cat([step, step]))
        ends, slopes = list(y.chunk(2)), list(slope.chunk(2))
        leasts = [None, None] if least is None else list(least.chunk(2))
    else:
        ends, slopes = [], []

        def at(z: Tensor) -> Tensor:
            y, least = values.at(z)
            leasts.append(None if least is None else least.detach())
            return y

        for sample in (first, second):
            # jvp differentiates backwards twice. torch's forward mode is not used: it warns about its own use of torch.jit.
            y, slope = torch.autograd.functional.jvp(at, sample, step)
            ends.append(y)
            slopes.append(slope)
    # At the ends a dead output is exactly dead, and the slopes do not cancel as the values do.
    half = _without_rounding(*values.at(_between(first, second, 0.5))) if midpoint else None
    if dtype != torch.float64:
        slopes = _without_dead(values, first, second, ends, slopes)
    at_ends = None if leasts[0] is None or leasts[1] is None else torch.maximum(leasts[0], leasts[1])
    return hermite_path(ends[0], ends[1], slopes[0], slopes[1], half, nodes), at_ends


class InDouble(TorchFunctionMode):
    """Runs every torch call on floating-point tensors in float64, whatever the dtype of a module's weights."""

    def __init__(self) -> None:
        super().__init__()
        self._parameters: dict[int, tuple[Tensor, Tensor]] = {}  # a network is called many times
        self._others: dict[int, tuple[Tensor, Tensor]] = {}  # written in place and read again within one call
        # The largest magnitude of all results, not counting values above LARGE. None: not recorded.
        self.largest: float | None = None

    def begin_anew(self) -> None:
        """Forgets the values that a call of the network has written into tensors that outlive the call."""
        self._others.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return self._wide(args[0])
        args, kwargs = self._all_wide(args), self._all_wide(kwargs) if kwargs else {}
        # New tensors are widened too. Otherwise later writes would go to a copy.
        result = self._all_wide(func(*args, **kwargs))
        if self.largest is not None and isinstance(result, Tensor) and result.dtype == torch.float64:
            with torch._C.DisableTorchFunction():
                self.largest = max(self.largest, _largest(result.detach()))
        return result

    def _all_wide(self, value: Any) -> Any:
        """`_wide` of everything in a container."""
        kind = type(value)  # tree_map takes a third of a call's time
        if kind is tuple or kind is list:
            return kind([self._all_wide(entry) for entry in value])
        if kind is dict:
            return {key: self._all_wide(entry) for key, entry in value.items()}
        if kind in ATOMS or isinstance(value, Tensor):
            return self._wide(value)
        return tree_map(self._wide, value)

    def _wide(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64 if value.is_floating_point else value
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return value
        kept = self._parameters if isinstance(value, nn.Parameter) else self._others
        if id(value) not in kept:
            kept[id(value)] = value, value.double()
        return kept[id(value)][1]


def _largest(values: Tensor) -> float:
    """The largest magnitude up to LARGE, without NaN."""
    if not values.numel():
        return 0.0
    low, high = torch.stack(torch.aminmax(values)).tolist()
    if -low <= LARGE and high <= LARGE:
        return max(-low, high)
    size = values.abs()  # a mask is among them, or NaN
    return float(torch.where(size <= LARGE, size, 0.0).max())


class Widened:
    """Evaluates f in float64, if f can be evaluated there.

    f: (B, *in) -> (B, *out), made for x's dtype. x: (N, *in), the samples. ends: (N, K), f(x).
    whole: all samples, if x is a part of them. kind: of f, among the functions that are called on them.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        x: Tensor,
        ends: Tensor,
        whole: Whole | None = None,
        kind: str = "outputs",
    ) -> None:
        self._f, self._x, self._ends, self._whole, self._kind = f, x, ends, whole, kind
        self._wide: Callable[[Tensor], Tensor] | None = None
        self._problem, self._largest = "autocast is on", 0.0
        self.errors: Tensor | None = None
        """(N, K), a quarter of each output's rounding error, in machine epsilons of this tensor's dtype: that of the outputs,
        at least float32. None: not known."""
        if x.dtype == torch.float64 or torch.is_autocast_enabled(x.device.type):
            return
        mode = InDouble()
        mode.largest = 0.0
        ways: list[Callable[[Tensor], Tensor]] = [partial(_by_mode, mode, f)]
        if isinstance(module := getattr(f, "f", f), nn.Module):
            ways.append(_by_copy(module))  # a mode has no effect on a scripted module
        tolerance = max(1e-3, 8 * torch.finfo(ends.dtype).eps)
        largest = ends.abs().amax(0)
        for number, way in enumerate(ways):
            try:
                difference = (way(x.double()).flatten(1) - ends).abs()
            except Exception as error:  # the user's code may fail on a dtype that it was not written for
                if number == 0:
                    self._problem = next(iter(f"{type(error).__name__}: {error}".splitlines()))
                continue
            # Small outputs may be computed from large numbers, as a loss from logits.
            self._largest = mode.largest or self._largest
            rounding = 16 * torch.finfo(ends.dtype).eps * self._largest
            allowed = torch.clamp(tolerance * largest, min=rounding) + 1e-30
            mode.largest = None
            if difference.dtype == torch.float64 and not bool((difference > allowed).any()):
                self._wide = way  # another check finds a NaN
                break
            self._problem = "its outputs are others there"
        if self._wide is not None and x.dtype == torch.float32:
            dtype = torch.promote_types(ends.dtype, torch.float32)  # a network in float32 may end in float64
            self.errors = (difference.nan_to_num() / (4 * torch.finfo(dtype).eps)).to(dtype)

    @cached_property
    def rounding(self) -> Tensor | None:
        """The rounding of the outputs, (2, K), as `torch.ops.lmnfast.path_r2` takes it."""
        if self.seen.errors is None:
            return None
        least = self.seen.errors / CONSTANT_ULPS
        return torch.stack([self.seen.errors, torch.where(self.seen.zeros_are_exact, -least, least)])

    @cached_property
    def seen(self) -> Seen:
        """What the samples show of f's rounding: all samples, if these are a part of them."""
        if self._whole is not None and len(self._whole.samples) > len(self._x):
            f = self._f
            return self._whole.seen(
                self._kind, lambda part: Widened(f, part, f(part).flatten(1)).seen, self._x
            )
        largest, errors = self._ends.abs().amax(0), self.errors
        if errors is None:
            return Seen(largest, None, torch.ones_like(largest, dtype=torch.bool))
        # Behind a ReLU, an output that is 0 is 0 in float64, too.
        return Seen(largest, errors.amax(0), ((self._ends != 0) | (errors == 0)).all(0))

    @cached_property
    def is_exact(self) -> bool:
        """Whether f can be evaluated in float64, for samples of a narrower dtype."""
        return self._wide is not None and not self._ends_in_float32()

    def values(self) -> Values:
        """f in float64. Warns if f must be evaluated in x's dtype instead."""
        if self._x.dtype == torch.float64:
            return Values(lambda points: (self._f(points).flatten(1), None))
        if (wide := self._wide) is not None and self.is_exact:
            return Values(lambda points: (wide(points).flatten(1), None))
        warnings.warn(
            f"f: cannot be evaluated in float64 ({self._problem}); entries between samples that agree to rounding, and of "
            f"outputs that hardly vary, carry the rounding of {self._ends.dtype}",
            stacklevel=2,
        )
        return Values(lambda points: (self._f(points.to(self._x.dtype)).flatten(1).double(), None))

    def noise(self) -> Tensor | None:
        """The noise of float64 outputs, (N, K), as `resolve` takes it; None for other dtypes.

        The rounding of a product depends on its place in the batch, so a constant output varies from point to point. Against
        the rounding of float32 this is negligible.
        """
        if self._x.dtype != torch.float64:
            return None
        copies = -(-64 // len(self._x))
        again = self._f(self._x.repeat(copies, *[1] * (self._x.dim() - 1))).flatten(1)
        return (again.unflatten(0, (copies, -1)) - self._ends).abs().amax(0)

    def _ends_in_float32(self) -> bool:
        """Whether f converts its outputs to float32: all outputs are float32 numbers, also at points between samples."""
        assert self._wide is not None
        x = self._x.double()
        y = self._wide(torch.lerp(x, x.roll(1, 0), 0.3))
        # If y is far smaller than the terms behind it, float64 has no more digits of y than float32.
        telling = y[y.abs() > self._largest * (4 * _DOUBLE_EPSILON / torch.finfo(torch.float32).eps)]
        converted = bool((telling == telling.float()).all()) and not bool((telling == telling.round()).all())
        if converted:
            self._problem = "it converts its outputs to float32"
        return converted


def in_double(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f on the samples x, in float64. Raises the errors of f."""
    return _by_mode(InDouble(), f, x.double()).flatten(1)


def _by_mode(mode: InDouble, f: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    mode.begin_anew()
    # Compiled functions run uncompiled: their compiler would see another dtype and compile again. Where there are none, the
    # compiler is not loaded, which takes two seconds.
    compiled = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), mode:
        return f(points)


def _by_copy(module: nn.Module) -> Callable[[Tensor], Tensor]:
    made: list[nn.Module] = []

    def evaluate(points: Tensor) -> Tensor:
        if not made:
            made.append(copy.deepcopy(module).double())
        return made[0](points)

    return evaluate
