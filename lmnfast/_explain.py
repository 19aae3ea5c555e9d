"""Says which route a measurement takes, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from . import _native
from ._block import Block
from ._chain import Chain
from ._hook_tail import HookTail
from ._layers import for_layers
from ._prepare import Prepared, prepared
from ._route import Route, find_route, why_no_kernel
from ._run_to import Cutting
from ._settings import DEFAULT
from ._tiles import tile_bytes, tile_pairs, tile_points
from ._tracing import Forward, Output
from .cutting import chosen, cut_at, why_not_traced


@dataclass(frozen=True)
class LayerRoute:
    """The route of a measurement from one layer on."""

    layer: str
    route: str
    """"fused", "block", "hoisted" or "generic", see docs/architecture.md. Without the compiled core "reference" in place of
    "fused" and "block"."""
    reason: str
    """Why the route is not "fused". For "fused", "block" and "reference": a drawing of the chain or the block."""
    hooked: bool = False
    """Whether a forward hook replaces the layer's output, because no graph of the part behind the layer can be made."""
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
        if self.route == "reference":
            return f"by reference, without the compiled core, as {_native.without_core}: {self.reason}"
        if self.route == "block":
            return f"block of a transformer, its hidden layer in a kernel: {self.reason}"
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
    model: nn.Module,
    layer: str | None = None,
    inputs: Any = None,
    *,
    until: str | None = None,
    block: str | None = None,
    forward: Forward = None,
    output: Output = None,
    batch_dim: int | None = None,
) -> Explanation:
    """Prints which route a measurement from a layer on takes, and why.

    Args:
        model, layer, inputs, until, block, forward, output, batch_dim: as in :func:`lmnfast.cut`. The layer or block may be a
            pattern, as in `match_layers`. What a pattern matches and cannot be measured is left out, with a warning. Without
            inputs the model is not run. Facts that only samples show (a branch on their shape, a layer called twice) then stay
            unknown, and the model or block is assumed to have one argument.

    Returns:
        The printed facts as an object: ``explain(model, "0")["0"].route`` is "fused", "block", "hoisted" or "generic";
        without the compiled core "reference" in place of the first two.

    Raises:
        TypeError, ValueError: as :func:`lmnfast.cut`, and as :func:`lmnfast.connectivity` for samples and outputs that it
            refuses.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> routes = lmnfast.explain(model, "0")
        0:
          fused kernel: 16 silu -> 3
        >>> routes["0"].route
        'fused'
    """
    name = chosen(layer, block)
    how = Cutting(forward, output, until, block is not None, batch_dim)
    how.check(model)

    def explained(name: str) -> LayerRoute:
        return _explained(model, name, inputs, how)

    routes = for_layers(model, name, explained, "layer" if block is None else "block")
    explanation = Explanation(tuple(routes.values()))
    print(explanation)
    return explanation


def _explained(model: nn.Module, layer: str, inputs: Any, how: Cutting) -> LayerRoute:
    traced, reason = why_not_traced(model, layer, inputs, how)
    if inputs is None:
        if traced is None:
            return LayerRoute(layer, "generic", reason, hooked=True)
        return _of_route(layer, find_route(traced, None, DEFAULT.method, points=DEFAULT.points))
    tail, samples = cut_at(model, layer, inputs, how)
    about: dict[str, Any] = {
        "samples": tuple(samples.shape),
        "dtype": str(samples.dtype),
        "device": str(samples.device),
    }
    with prepared(tail, samples, DEFAULT.method, deferred=False, points=DEFAULT.points) as function:
        function.settle()
        route = function.route
        if route.chain is None and route.block is None:
            about |= _tiles(function)
    if isinstance(tail, HookTail):
        reason = reason or "what torch.fx traced has other outputs on the samples"
        reason += f", and as {tail.why}; {tail.cost()}"
        return LayerRoute(layer, "generic", reason, hooked=tail.layer[0] is not None, **about)
    return _of_route(layer, route, **about)


def _of_route(layer: str, route: Route, **about: Any) -> LayerRoute:
    kind: str = route.kind
    if not _native.HAS_CORE and kind in ("fused", "block"):
        kind = "reference"
    if route.block is not None:
        return LayerRoute(layer, kind, _drawn_block(route.block), **about)
    if route.chain is None:
        return LayerRoute(layer, kind, route.reason, **about)
    drawn = _drawn(route.chain)
    if why_no_kernel(route.chain, None, "jacobians") is not None:
        drawn += "; Jacobians by automatic differentiation, as of any network with sums"
    return LayerRoute(layer, kind, drawn, **about)


def _tiles(function: Prepared) -> dict[str, int]:
    """The default size of a tile."""
    samples, interior = len(function.x), DEFAULT.points - 2
    tile = tile_bytes(DEFAULT.budget, function.x.device)
    pairs = tile_pairs(tile, samples, function.allocated, interior)
    return {
        "tile_paths": pairs,
        "tile_points": tile_points(pairs, samples, interior),
        "tile_bytes": tile,
    }


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


def _drawn_block(block: Block) -> str:
    """Draws a block: LayerNorm 768 -> 3072 gelu -> 768 + x, or 768 -> 3072 silu * 3072 -> 768."""
    norm = "" if block.norm is None else "LayerNorm " if block.norm.centers else "RMSNorm "
    units, inputs = block.first.shape
    gate = "" if block.gate is None else f" * {units}"
    activation = "" if block.activation.name == "identity" else f" {block.activation.name}"
    return f"{norm}{inputs} -> {units}{activation}{gate} -> {len(block.last)}" + " + x" * block.adds_input
