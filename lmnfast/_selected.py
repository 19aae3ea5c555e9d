"""Computes of a transformer's last layers only the token that counts: an index behind token-wise steps moves in front of them.

The outputs are the same to rounding, as each step gives every token what it gives it alone.
"""

from __future__ import annotations

import operator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ._tracing import QuietGraph, TapedGraph, erase_unused, may_write, module_of
from ._vocabulary import is_plain

# Steps that give every token of (B, T, C) what they give it alone, if their other arguments have no tokens.
FUNCTIONS = {
    *(F.linear, F.layer_norm, F.gelu, F.silu, F.relu, F.dropout, torch.tanh, torch.sigmoid, torch.relu),
    *(torch.pow, torch.rsqrt, torch.sqrt, torch.add, torch.mul, torch.sub),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
}
METHODS = {
    "to",
    "float",
    "double",
    "pow",
    "contiguous",
    "clone",
    "tanh",
    "sigmoid",
    "relu",
    "rsqrt",
    "detach",
}
MODULES = (nn.Linear, nn.LayerNorm, nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Dropout, nn.Identity)
PRODUCTS = (F.linear, torch.addmm, nn.Linear)  # what makes the move worth its while

_made: WeakKeyDictionary[fx.GraphModule, tuple[ref[fx.Graph], fx.GraphModule | None]] = WeakKeyDictionary()


def selected(f: Any, x: Tensor) -> fx.GraphModule | None:
    """A graph with the outputs of f, in which its last index stands further in front; None if there is no such graph.

    x: (N, *in), samples. The graph is made once for an f, and made again when a parameter or a part of f is another object.
    """
    if not isinstance(f, fx.GraphModule) or not is_plain(f):
        return None
    graph, made = _made.get(f, (None, None))
    if graph is None or graph() is not f.graph or (made is not None and not _shares(made, f)):
        try:
            made = _Moved(f, x).graph_module()
        except Exception:  # a graph that fails on a few samples is not moved
            made = None
        _made[f] = ref(f.graph), made  # a graph keeps its module
    return made


def _shares(made: fx.GraphModule, f: fx.GraphModule) -> bool:
    """Whether parameters, buffers and parts of both are the same objects."""
    targets = {str(node.target) for node in made.graph.nodes if node.op in ("get_attr", "call_module")}
    try:
        return all(operator.attrgetter(name)(made) is operator.attrgetter(name)(f) for name in targets)
    except AttributeError:
        return False


class _Moved:
    def __init__(self, f: fx.GraphModule, x: Tensor) -> None:
        self.f = f
        self.graph = fx.Graph()
        output = self.graph.graph_copy(f.graph, {})
        self.graph.output(output)
        self.last = output if isinstance(output, fx.Node) else None
        self.made: dict[fx.Node, fx.Node] = {}
        self.products = 0
        self.x = x

    def graph_module(self) -> fx.GraphModule | None:
        last = self.last
        if last is None or last.target is not operator.getitem or not isinstance(last.args[0], fx.Node):
            return None
        index = last.args[1]
        if not (
            isinstance(index, tuple) and len(index) == 2 and _is_whole(index[0]) and type(index[1]) is int
        ):
            return None
        if any(node.op.startswith("call_") and may_write(node, self.f) for node in self.graph.nodes):
            return None
        self._find_shapes()
        shape = self._shape(last.args[0])
        if len(shape) != 3 or shape[0] != self.rows or shape[1] in (1, self.rows):
            return None
        self.tokens, self.token = shape[1], index[1] % shape[1]
        self.moving = self._find_moving()
        with self.graph.inserting_before(last):
            last.args = (self._select(last.args[0]), (index[0], 0))
        if not self.products:
            return None
        erase_unused(self.graph, self.moving)
        return module_of(self.f, self.graph, TapedGraph if isinstance(self.f, TapedGraph) else QuietGraph)

    def _find_shapes(self) -> None:
        """Runs the graph on as many rows as nothing in it is likely to have."""
        self.rows = 61
        rows = self.x[torch.arange(self.rows, device=self.x.device) % len(self.x)]
        ShapeProp(fx.GraphModule(self.f, self.graph)).propagate(rows)

    def _find_moving(self) -> set[fx.Node | None]:
        """The steps of which nothing but the token is needed: token-wise ones whose results only such steps take."""
        moving: set[fx.Node | None] = {self.last}
        for node in reversed(self.graph.nodes):
            if node.users.keys() <= moving:
                product = self._flat_product(node)
                if product is not None:
                    moving |= {node, *product[1:]}
                elif self._unchanged(node) is not None or self._is_token_wise(node):
                    moving.add(node)
        return moving

    def _shape(self, node: Any) -> tuple[int, ...]:
        return tuple(getattr(node.meta.get("tensor_meta"), "shape", ())) if isinstance(node, fx.Node) else ()

    def _has_tokens(self, node: fx.Node) -> bool:
        shape = self._shape(node)
        return len(shape) == 3 and shape[:2] == (self.rows, self.tokens)

    def _select(self, node: fx.Node) -> fx.Node:
        """The value of a node (B, T, C) for the token, (B, 1, C)."""
        if node not in self.made:
            self.made[node] = self._moved(node)
        return self.made[node]

    def _moved(self, node: fx.Node) -> fx.Node:
        if node not in self.moving:
            token = slice(self.token, self.token + 1)
            return self.graph.call_function(operator.getitem, (node, (slice(None), token)))
        if (same := self._unchanged(node)) is not None:
            return self._select(same)
        if (product := self._flat_product(node)) is not None:
            before, addmm, _ = product
            flat = self.graph.call_method("reshape", (self._select(before), (-1, self._shape(before)[2])))
            result = self.graph.call_function(torch.addmm, (addmm.args[0], flat, addmm.args[2]))
            self.products += 1
            return self.graph.call_method("reshape", (result, (-1, 1, self._shape(node)[2])))
        self.products += node.target in PRODUCTS or isinstance(self._module(node), nn.Linear)
        return self.graph.node_copy(node, lambda n: self._select(n) if self._has_tokens(n) else n)

    def _unchanged(self, node: fx.Node) -> fx.Node | None:
        """The tensor that a step returns as it is: a view of the same shape, an index of everything."""
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or self._shape(before) != self._shape(node):
            return None
        if node.op == "call_method" and node.target in ("view", "reshape"):
            return before
        index = node.args[1] if node.target is operator.getitem else None
        return before if isinstance(index, tuple) and all(map(_is_whole, index)) else None

    def _flat_product(self, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
        """For y.view(B T, C) @ W + b, viewed as (B, T, C'), as of a Conv1D of GPT-2: y, the product and the first view."""
        if node.op != "call_method" or node.target not in ("view", "reshape") or not self._has_tokens(node):
            return None
        addmm = node.args[0]
        if (
            not isinstance(addmm, fx.Node)
            or addmm.target is not torch.addmm
            or len(addmm.args) != 3
            or addmm.kwargs
        ):
            return None
        bias, flat, weight = addmm.args
        if (
            not isinstance(flat, fx.Node)
            or flat.op != "call_method"
            or flat.target not in ("view", "reshape")
        ):
            return None
        before = flat.args[0]
        if not isinstance(before, fx.Node) or not self._has_tokens(before):
            return None
        if len(addmm.users) > 1 or len(flat.users) > 1:
            return None
        inner, outer = self._shape(before)[2], self._shape(node)[2]
        fits = self._shape(flat) == (self.rows * self.tokens, inner)
        fits &= self._shape(bias) == (outer,) and self._shape(weight) == (inner, outer)
        return (before, addmm, flat) if fits else None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.f.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _is_token_wise(self, node: fx.Node) -> bool:
        if not self._has_tokens(node):
            return False
        given = node.all_input_nodes
        others = [self._shape(n) for n in given if not self._has_tokens(n)]
        if node.op not in ("call_function", "call_method", "call_module") or len(others) == len(given):
            return False
        module = self._module(node)
        if module is not None:
            normalised = getattr(module, "normalized_shape", (1,))
            return type(module) in MODULES and is_plain(module) and len(normalised) == 1
        if node.target is F.linear:
            return (
                self._has_tokens(given[0])
                and all(len(shape) <= 2 for shape in others)
                and node.args[0] is given[0]
            )
        if any(len(shape) > 1 for shape in others):
            return False
        if node.target is F.layer_norm:
            return len(node.args) > 1 and len(node.args[1]) == 1  # type: ignore[arg-type]
        if node.op == "call_method" and node.target == "mean":
            return node.args[1:] == (-1,) and node.kwargs == {"keepdim": True}
        return node.target in (FUNCTIONS if node.op == "call_function" else METHODS)


def _is_whole(index: Any) -> bool:
    return (
        isinstance(index, slice)
        and index.start in (None, 0)
        and index.stop is None
        and index.step in (None, 1)
    )
