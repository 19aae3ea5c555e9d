"""Which route a measurement takes, and why."""

from typing import Any

import torch
from torch import Tensor, nn

from ._affine import affine_start
from ._chain import Chain
from ._layers import match_layers
from ._recognise import NotAChain, chain_or_reason
from ._tracing import Forward, Output
from ._undisturbed import evaluating
from .cutting import cut, why_not_traced
from .evaluation import (
    Checks,
    bytes_of,
    checked_samples,
    has_kernel_of,
    has_kernels,
    rows_again,
    rows_between,
    tile_bytes,
    tile_pairs,
)
from .quadrature import path_nodes


def explain(
    model: nn.Module, layer: str, inputs: Any = None, *, forward: Forward = None, output: Output = None
) -> None:
    """Prints which route a measurement from a layer on takes, and why.

    Args:
        model, layer, inputs, forward, output: as in :func:`lmnfast.cut`; the layer may be a pattern, as in `match_layers`.
            Without inputs nothing is run: what only samples show (a branch on their shape, a layer called twice) is left
            open, and the model is taken to have one argument.

    Raises:
        As :func:`lmnfast.cut`.
    """
    for name in match_layers(model, layer):
        print(f"{name}:")
        for line in _route(model, name, inputs, forward, output):
            print(f"  {line}")


def _route(model: nn.Module, layer: str, inputs: Any, forward: Forward, output: Output) -> list[str]:
    tail, reason = why_not_traced(model, layer, inputs, forward, output)
    if inputs is None:
        if tail is None:
            return [f"generic: a forward hook replaces the layer's output, as {reason}"]
        return [_of_tail(tail, None)]
    measured, samples = cut(model, layer, inputs, forward=forward, output=output)
    lines = [
        f"{len(samples)} samples of shape {tuple(samples.shape[1:])}, {samples.dtype} on {samples.device}"
    ]
    if isinstance(measured, torch.fx.GraphModule):
        lines.append(_of_tail(measured, samples))
    else:
        reason = reason or "what torch.fx traced has other outputs on the samples"
        lines.append(f"generic: a forward hook replaces the layer's output, as {reason}")
    if lines[-1].startswith("generic"):
        lines.append(_tiles(measured, samples))
    return lines


def _tiles(tail: nn.Module, samples: Tensor) -> str:
    """How many points a tile has by default."""
    x, interior = checked_samples(tail, samples), len(path_nodes("uniform", 21)[0]) - 2
    with evaluating(tail):
        _, allocated = bytes_of(tail, x, rows_again(len(x))[-1])
    tile = tile_bytes(None, x.device)
    pairs = min(tile_pairs(tile, len(x), allocated, interior), max(1, len(x) * (len(x) - 1) // 2))
    return (
        f"tiles of {pairs} paths of 21 points, {pairs * interior + len(rows_between(len(x)))} points a call, "
        f"in {tile / 2**20:.0f} MiB"
    )


def _of_tail(tail: nn.Module, samples: Tensor | None) -> str:
    generic = "generic: the layers after it are called on tiles of path points, as"
    try:
        chain = chain_or_reason(tail)
    except NotAChain as reason:
        hoisted = (
            "" if affine_start(tail) is None else "; the affine maps they begin with run on the samples alone"
        )
        return f"{generic} {reason}{hoisted}"
    if samples is not None:
        if not has_kernels(samples):
            return f"{generic} there is no kernel for {samples.device}"
        if not has_kernel_of(chain, samples):
            return f"{generic} samples of shape {tuple(samples.shape[1:])} are no vectors, and nothing flattens them"
        with evaluating(tail):
            if not Checks(False).reproduces(chain, samples, tail(samples).flatten(1)):
                return f"{generic} the chain of Linear and activations that they look like has other outputs"
    jacobians = "; Jacobians by automatic differentiation, as of any network with sums" if chain.skips else ""
    return f"fused kernel: {_said(chain)}{jacobians}"


def _said(chain: Chain) -> str:
    """Widths, the activations between, and + for what an earlier result is added to: 100 -> 31 silu -> 100 +."""
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
