"""Recognises a network that is a block: a normalisation, a hidden layer with or without a gate, a Linear, a residual sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._block import Block, Norm
from ._read_block import OUTPUT, SUM, LinearMap, Reader, Rows
from ._recognise import NotAChain, bare_module, inside
from ._spelled import TOLERANCES, Expression, activation_of, affine_parts, norm_of, parts_of
from ._tracing import Call, Tracer
from ._undisturbed import FORWARDS
from ._vocabulary import class_of, is_plain


def block_or_reason(f: Any, put_back: Callable[[], None] | None = None) -> Block:
    """The block that an nn.Module is in eval mode, on samples (N, d) or (N, T, d); d is block.first.shape[1].

    Read from the graph of f are: the Linear maps (also a product with a weight, and parts of one Linear by chunk, split or a
    slice), views, and sums with x. What lies between may be spelled out in any pointwise operations; it is recognised by its
    values, see `activation_of` and `norm_of`. f may flatten the result at the end: then f(x) = block(x).flatten(1).

    This function sees no samples: compare block(x) with f(x) on samples before use. A graph of a tape holds for the number of
    tokens that it was made with; on others f fails, and the block does not.

    The block is made anew at each call. Its tensors share memory with the model's, but those that the forward computes, as
    the scale 1 + weight of a normalisation, and parametrised ones; they have their present values.

    Args:
        put_back: as in `chain_or_reason`.

    Raises NotAChain, with the reason, for anything else, for modules with hooks, and in case of doubt.
    """
    f = bare_module(f)
    with inside(f, put_back):
        try:
            graph, root = _graph_of(f)
            reader = Reader(root)
            return _joined(reader, reader.result(graph))
        except NotAChain:
            raise
        except Exception as error:  # a call in a form that the readers do not know
            first = next(iter(str(error).splitlines()), "")
            raise NotAChain(f"its graph cannot be read ({type(error).__name__}: {first})") from error


def _graph_of(f: nn.Module) -> tuple[fx.Graph, nn.Module]:
    if isinstance(f, fx.GraphModule) and is_plain(f):
        return f.graph, f
    parts = _in_order(f)
    if parts is not None:
        graph = fx.Graph()
        node = graph.placeholder("samples")
        for name in parts:
            node = graph.call_module(name, (node,))
        graph.output(node)
        return graph, f
    root = Call(f)
    try:
        return _Tracer().trace(root), root
    except NotAChain:
        raise
    except Exception as error:  # the user's forward ran on proxies: any error means that it cannot be read
        first = next(iter(str(error).splitlines()), "")
        raise NotAChain(f"torch.fx cannot trace its forward ({type(error).__name__}: {first})") from error


class _Tracer(Tracer):
    """Refuses what no node of a graph shows: autocast around a part of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.before = _autocasts()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _autocasts() != self.before:
            raise NotAChain("its forward turns autocast on or off")
        return super().create_node(*args, **kwargs)


def _autocasts() -> list[bool]:
    return [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]


def _in_order(f: nn.Module, path: str = "") -> list[str] | None:
    """The names of torch's own modules in nested nn.Sequential containers, in order. None if f has anything else.

    Takes 0.1 ms, and a trace 3 ms.
    """
    if type(f) is not nn.Sequential:
        return [path] if path and class_of(f) in FORWARDS else None
    if not is_plain(f):
        return None
    names: list[str] = []
    for name, part in f._modules.items():  # with a module that stands twice
        inner = _in_order(part, f"{path}.{name}" if path else name)
        if inner is None:
            return None
        names += inner
    return names


def _joined(reader: Reader, result: Rows) -> Block:
    """The block of which a graph has this result."""
    last = reader.maps.get(result.expression)
    if result.level < OUTPUT or last is None:
        raise NotAChain("its output is no Linear of a hidden layer")
    firsts = [part for part in parts_of(last.source) if part in reader.maps]
    if len(firsts) not in (1, 2):
        raise NotAChain(f"a hidden layer of {len(firsts)} Linear maps; expected 1, or 2 with a gate")
    sources = {reader.maps[first].source for first in firsts}
    if len(sources) != 1:
        raise NotAChain("the Linear maps of the hidden layer have different inputs")
    dtype = _checked_dtype(reader, [*(reader.maps[first] for first in firsts), last])
    inputs = reader.maps[firsts[0]].weight.shape[1]
    if reader.widths - {inputs} or (result.level == SUM and last.weight.shape[0] != inputs):
        raise NotAChain("widths that do not fit together")
    found = activation_of(last.source, firsts, dtype)
    if found is None:
        raise NotAChain("the hidden layer is no activation that the kernels know, with or without a gate")
    activation, n = found
    first = reader.maps[firsts[n]]
    gate = reader.maps[firsts[1 - n]] if len(firsts) == 2 else None
    return Block(
        first=first.weight.detach(),
        first_bias=_detached(first.bias),
        activation=activation,
        last=last.weight.detach(),
        last_bias=_detached(last.bias),
        norm=_norm(reader, sources.pop(), inputs, dtype, last.weight.device),
        gate=None if gate is None else gate.weight.detach(),
        gate_bias=None if gate is None else _detached(gate.bias),
        adds_input=result.level == SUM,
    )


def _checked_dtype(reader: Reader, maps: list[LinearMap]) -> torch.dtype:
    """The dtype of all weights. Raises NotAChain unless they are plain and dense, have one dtype and device, and fit."""
    tensors = [t for made in maps for t in (made.weight, made.bias) if t is not None]
    if not all(map(_is_plain, tensors)):
        raise NotAChain("a weight that is no plain dense tensor")
    kinds = {(t.dtype, t.device) for t in tensors}
    dtype = tensors[0].dtype
    if len(kinds) != 1 or dtype not in TOLERANCES:
        raise NotAChain(f"weights are {' and '.join(sorted(f'{d} on {device}' for d, device in kinds))}")
    if reader.dtypes - {dtype}:
        raise NotAChain(f"its forward converts to {min(map(str, reader.dtypes - {dtype}))}")
    *firsts, last = maps
    shapes = {made.weight.shape for made in firsts} | {(last.weight.shape[1], firsts[0].weight.shape[1])}
    biases = all(made.bias is None or made.bias.shape == made.weight.shape[:1] for made in maps)
    if len(shapes) != 1 or not biases or any(t.numel() == 0 for t in tensors):
        raise NotAChain("shapes of weights that do not fit together")
    return dtype


def _norm(
    reader: Reader, source: Expression, inputs: int, dtype: torch.dtype, device: torch.device
) -> Norm | None:
    if source is reader.x:
        return None
    core, scale, shift = affine_parts(source)
    for tensor in (scale, shift):
        kind = None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, _is_plain(tensor))
        if kind not in (None, ((inputs,), dtype, device, True)):
            raise NotAChain("a normalisation with a scale or shift of another shape or dtype")
    found: Norm | None = None
    if core in reader.norms:
        found = reader.norms[core](dtype)
    elif not any(part in reader.norms or _has_parameters(part) for part in parts_of(core)):
        found = norm_of(core, reader.x, reader.width, inputs)
    if found is None:
        raise NotAChain("what precedes the first Linear is no LayerNorm or RMSNorm over the last dimension")
    return replace(found, scale=_detached(scale), shift=_detached(shift))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def _has_parameters(expression: Expression) -> bool:
    return any(isinstance(operand, Tensor) for operand in expression.operands)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
