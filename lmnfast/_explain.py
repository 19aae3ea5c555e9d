"""Says which route a measurement takes, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._chain import Chain
from ._checks import Checks
from ._layers import match_layers
from ._outputs import rows_again, rows_between
from ._route import Route, find_route, refuted, why_no_kernel
from ._samples import checked_samples
from ._settings import DEFAULT
from ._tiles import bytes_of, tile_bytes, tile_pairs
from ._tracing import Forward, Output
from ._undisturbed import evaluating
from .cutting import cut, why_not_traced


@dataclass(frozen=True)
class LayerRoute:
    """The route of a measurement from one layer on."""

    layer: str
    route: str
    """"fused", "hoisted" or "generic", see docs/architecture.md."""
    reason: str
    """Why the route is not "fused". For "fused": a drawing of the chain."""
    hooked: bool = False
    """Whether a forward hook replaces the layer's output, because torch.fx cannot trace the model."""
    samples: tuple[int, ...] | None = None
    """Shape of the samples, (N, *in); None without inputs."""
    dtype: str | None = None
    device: str | None = None
    tile_paths: int | None = None
    """Paths of 21 points in one tile; None for "fused"."""
    tile_points: int | None = None
    """Points in one call of the layers after this one."""
    tile_bytes: int | None = None

    def __str__(self) -> str:
        lines = [f"{self.layer}:"]
        if self.samples is not None:
            lines.append(
                f"{self.samples[0]} samples of shape {self.samples[1:]}, {self.dtype} on {self.device}"
            )
        lines.append(self._route_line())
        if self.tile_bytes is not None:
            lines.append(
                f"tiles of {self.tile_paths} paths of 21 points, {self.tile_points} points a call, "
                f"in {self.tile_bytes / 2**20:.0f} MiB"
            )
        return "\n  ".join(lines)

    def _route_line(self) -> str:
        if self.route == "fused":
            return f"fused kernel: {self.reason}"
        if self.hooked:
            return f"generic: a forward hook replaces the layer's output, as {self.reason}"
        hoisted = "; the affine maps they begin with run on the samples alone" * (self.route == "hoisted")
        return f"generic: the layers after it are called on tiles of path points, as {self.reason}{hoisted}"


@dataclass(frozen=True)
class Explanation:
    """The routes from one or more layers; ``str`` gives what :func:`explain` prints."""

    layers: tuple[LayerRoute, ...]

    def __iter__(self) -> Iterator[LayerRoute]:
        return iter(self.layers)

    def __getitem__(self, layer: str) -> LayerRoute:
        """Raises KeyError for a layer that was not explained."""
        return {each.layer: each for each in self.layers}[layer]

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The fields of each layer's `LayerRoute`, by layer, as plain values that json accepts."""
        return {
            each.layer: {**asdict(each), "samples": each.samples and list(each.samples)}
            for each in self.layers
        }


def explain(
    model: nn.Module, layer: str, inputs: Any = None, *, forward: Forward = None, output: Output = None
) -> Explanation:
    """Prints which route a measurement from a layer on takes, and why.

    Args:
        model, layer, inputs, forward, output: as in :func:`lmnfast.cut`. The layer may be a pattern, as in `match_layers`.
            Without inputs the model is not run. Facts that only samples show (a branch on their shape, a layer called twice)
            then stay unknown, and the model is assumed to have one argument.

    Returns:
        The printed facts as an object: ``explain(model, "0")["0"].route`` is "fused", "hoisted" or "generic".

    Raises:
        As :func:`lmnfast.cut`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> routes = lmnfast.explain(model, "0")
        0:
          fused kernel: 16 silu -> 3
        >>> routes["0"].route
        'fused'
    """
    explained = Explanation(
        tuple(_explained(model, name, inputs, forward, output) for name in match_layers(model, layer))
    )
    print(explained)
    return explained


def _explained(model: nn.Module, layer: str, inputs: Any, forward: Forward, output: Output) -> LayerRoute:
    traced, reason = why_not_traced(model, layer, inputs, forward, output)
    if inputs is None:
        if traced is None:
            return LayerRoute(layer, "generic", reason, hooked=True)
        return _of_route(layer, find_route(traced, None, DEFAULT.method))
    tail, samples = cut(model, layer, inputs, forward=forward, output=output)
    about: dict[str, Any] = {
        "samples": tuple(samples.shape),
        "dtype": str(samples.dtype),
        "device": str(samples.device),
    }
    if not isinstance(tail, torch.fx.GraphModule):
        reason = reason or "what torch.fx traced has other outputs on the samples"
        about |= _tiles(tail, samples)
        return LayerRoute(layer, "generic", reason, hooked=True, **about)
    route = find_route(tail, samples, DEFAULT.method)
    if route.chain is not None:
        with evaluating(tail):
            if not Checks(False).reproduces(route.chain, samples, tail(samples).flatten(1)):
                route = refuted(route, tail, DEFAULT.method)
    if route.chain is None:
        about |= _tiles(tail, samples)
    return _of_route(layer, route, **about)


def _of_route(layer: str, route: Route, **about: Any) -> LayerRoute:
    if route.chain is None:
        return LayerRoute(layer, route.kind, route.reason, **about)
    drawn = _drawn(route.chain)
    if why_no_kernel(route.chain, None, "jacobians") is not None:
        drawn += "; Jacobians by automatic differentiation, as of any network with sums"
    return LayerRoute(layer, route.kind, drawn, **about)


def _tiles(tail: nn.Module, samples: Tensor) -> dict[str, int]:
    """The default size of a tile."""
    x, interior = checked_samples(tail, samples), DEFAULT.points - 2
    with evaluating(tail):
        _, allocated = bytes_of(tail, x, rows_again(len(x))[-1])
    tile = tile_bytes(None, x.device)
    pairs = min(tile_pairs(tile, len(x), allocated, interior), max(1, len(x) * (len(x) - 1) // 2))
    points = pairs * interior + len(rows_between(len(x)))
    return {"tile_paths": pairs, "tile_points": points, "tile_bytes": tile}


def _drawn(chain: Chain) -> str:
    """Draws a chain: widths, activations, and + after a value that an earlier value is added to: 100 -> 31 silu -> 100 +."""
    parts = [str(chain.weights[0].shape[1])]
    into = dict(chain.skips)
    for n, (weight, activation) in enumerate(zip((None, *chain.weights), chain.activations, strict=True)):
        if weight is not None:
            parts.append(f"-> {len(weight)}")
        parts += ["+"] * (2 * n in into)
        if activation.name != "identity":
            parts.append(activation.name)
        parts += ["+"] * (2 * n + 1 in into)
    return " ".join(parts)
