"""Reads a graph of torch.fx in terms of a block: Linear maps, views, sums, and expressions of what lies between."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._block import Norm
from ._block_vocabulary import NAMES, NEUTRAL, POINTWISE, SAME, VIEWS, are_torchs
from ._chain import IDENTITY, Activation
from ._recognise import NotAChain, _described
from ._rows import Layout, Size, Sizes, product, viewed
from ._spelled import Expression
from ._vocabulary import FLATTEN, FUNCTIONS, MODULES, TENSOR_METHODS, class_of, is_plain

# What the rows of a tensor are made of: the samples; results of the first Linear maps; the last Linear's result; that, and x.
INPUT, HIDDEN, OUTPUT, SUM = range(4)


@dataclass(frozen=True, eq=False)
class Rows:
    """A tensor (..., width). width: None for that of the samples, which the first Linear shows."""

    expression: Expression
    level: int
    width: int | None
    layout: Layout = Layout.OWN


@dataclass(frozen=True, eq=False)
class Parameter:
    """A tensor that does not depend on the samples. whole: whether the model has it, or a view of it."""

    tensor: Tensor
    whole: bool = True


@dataclass(frozen=True, eq=False)
class LinearMap:
    source: Expression
    weight: Tensor
    bias: Tensor | None


DTYPE = object()  # the dtype of the rows


class Reader:
    """Reads a graph, node by node.

    Rows carry what they are as an `Expression`, with a variable for each result of a Linear and each normalisation of torch's.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.x, self.width = Expression(), Expression()
        self.maps: dict[Expression, LinearMap] = {}
        self.norms: dict[Expression, Callable[[torch.dtype], Norm]] = {}
        self.widths: set[int] = set()  # numbers that stand for the width of the samples
        self.dtypes: set[torch.dtype] = set()  # to which the forward converts
        self.values: dict[fx.Node, Any] = {}
        self.memory: dict[fx.Node, fx.Node] = {}  # the first node with the same memory
        self.overwritten: set[fx.Node] = set()

    def result(self, graph: fx.Graph) -> Rows:
        """The output of a graph."""
        for node in graph.nodes:
            if node.op == "output":
                result = self._value(node.args[0])
                if not isinstance(result, Rows):
                    raise NotAChain("its output is no single tensor")
                return result
            self.memory[node] = node
            self.values[node] = self._read(node)
        raise NotAChain("it has no output")

    def _value(self, argument: Any) -> Any:
        """An argument of a call, with the values of nodes in their place."""
        if isinstance(argument, fx.Node):
            if argument in self.overwritten:
                raise NotAChain("an earlier result is used after it was overwritten")
            return self.values[argument]
        return fx.node.map_aggregate(argument, lambda a: self._value(a) if isinstance(a, fx.Node) else a)

    def _read(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if self.values and any(n.op == "placeholder" for n in self.values):
                raise NotAChain("it takes more than one argument")
            return Rows(self.x, INPUT, None)
        if node.op == "get_attr":
            tensor: Any = self.root
            for name in str(node.target).split("."):
                tensor = getattr(tensor, name)
            if not isinstance(tensor, Tensor):
                raise NotAChain(f"{node.target} is no tensor")
            return Parameter(tensor)
        args, kwargs = self._value(node.args), dict(self._value(node.kwargs))
        if node.op == "call_module":
            return self._module(node, *args, **kwargs)
        return self._called(node, (kwargs.pop("input"), *args) if "input" in kwargs else args, kwargs)

    def _called(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call of a function or a method."""
        name = NAMES.get(node.target, "") if node.op == "call_function" else str(node.target)
        if name in VIEWS:
            self.memory[node] = self.memory[node.all_input_nodes[0]]
        name = SAME.get(name, name)
        in_place = name.endswith("_") and name[:-1] in POINTWISE
        if in_place or name in POINTWISE:
            result = self._pointwise(name.removesuffix("_") if in_place else name, node, args, kwargs)
            if in_place and isinstance(args[0], Parameter):
                raise NotAChain("a parameter is overwritten")
            return self._overwriting(node, result) if in_place and isinstance(args[0], Rows) else result
        handler = getattr(self, f"on_{name}", None)
        if handler is not None:
            return handler(*args, **kwargs)
        table: dict[Any, Any] = FUNCTIONS if node.op == "call_function" else TENSOR_METHODS
        if node.target in table:
            return self._known(node, table[node.target](*args, **kwargs), args, kwargs)
        raise NotAChain(f"{_described(node, self.root)} is no part of a block")

    def _known(self, node: fx.Node, step: Any, args: tuple, kwargs: dict[str, Any]) -> Rows:
        """A call in the tables of the vocabulary. step: what it is by them."""
        rows, rest = args[0], (*args[1:], *kwargs.values())
        if step is None or not isinstance(rows, Rows) or any(isinstance(a, (Rows, Parameter)) for a in rest):
            said = " in training mode" if "dropout" in str(node.target) else ""
            raise NotAChain(f"{_described(node, self.root)}{said} is no part of a block")
        name = getattr(node.target, "__name__", str(node.target))
        in_place = name.endswith("_") or any(a is True for a in rest)
        return self._stepped(node, step, rows, in_place)

    def _stepped(self, node: fx.Node, step: Any, rows: Rows, in_place: bool) -> Rows:
        """The rows behind an activation, an identity or a flatten."""
        if step in (IDENTITY, FLATTEN):
            self.memory[node] = self.memory[node.all_input_nodes[0]]
            return rows if step == IDENTITY else self._flattened(rows)
        if rows.level != HIDDEN:
            where = "before the first" if rows.level == INPUT else "behind the last"
            raise NotAChain(f"{_described(node, self.root)} {where} Linear")
        result = replace(rows, expression=Expression(step, (rows.expression,)))
        return self._overwriting(node, result) if in_place else result

    def _overwriting(self, node: fx.Node, result: Any) -> Any:
        """The result of a call that writes into its first operand."""
        memory = self.memory[node.all_input_nodes[0]]
        self.overwritten |= {n for n, m in self.memory.items() if m is memory and n is not node}
        self.memory[node] = memory
        return result

    def _module(self, node: fx.Node, rows: Any, *more: Any) -> Rows:
        module: Any = self.root.get_submodule(str(node.target))
        kind, said = class_of(module), _described(node, self.root)
        if not is_plain(module):
            raise NotAChain(f"{said} has hooks, or a forward of its own")
        if more or not isinstance(rows, Rows):
            raise NotAChain(f"{said} has other arguments than rows")
        if kind is nn.Linear:
            return self.on_linear(rows, Parameter(module.weight), _parameter(module.bias))
        if kind in (nn.LayerNorm, nn.RMSNorm, nn.GLU) and not are_torchs():
            raise NotAChain(f"{said} calls a function that is not torch's own")
        if kind is nn.GLU:
            return self.on_glu(rows, module.dim)
        weight = _parameter(getattr(module, "weight", None))
        if kind is nn.LayerNorm:
            bias = _parameter(module.bias)
            return self.on_layer_norm(rows, module.normalized_shape, weight, bias, module.eps)
        if kind is nn.RMSNorm:
            return self.on_rms_norm(rows, module.normalized_shape, weight, module.eps)
        step = MODULES[type(module)](module) if type(module) in MODULES else None
        if step is None:
            raise NotAChain(f"{said} is no part of a block")
        return self._stepped(node, step, rows, bool(getattr(module, "inplace", False)))

    # Linear maps

    def on_linear(self, rows: Any, weight: Any, bias: Any = None) -> Rows:
        for tensor in (weight, bias):
            if tensor is not None and not (isinstance(tensor, Parameter) and tensor.whole):
                raise NotAChain("a Linear whose weight or bias is computed in the forward")
        if not isinstance(rows, Rows) or rows.level > HIDDEN:
            raise NotAChain("a Linear of other values than samples or the hidden layer")
        if weight.tensor.dim() != 2 or rows.width not in (None, weight.tensor.shape[1]):
            raise NotAChain("shapes of weights that do not fit together")
        made = LinearMap(rows.expression, weight.tensor, None if bias is None else bias.tensor)
        return self._result(made, rows.level + 1, rows.layout)

    def _result(self, made: LinearMap, level: int, layout: Layout) -> Rows:
        variable = Expression()
        self.maps[variable] = made
        return Rows(variable, level, made.weight.shape[0], layout)

    def on_addmm(self, bias: Any, rows: Any, weight: Any) -> Rows:
        return self.on_matmul(rows, weight, bias)

    def on_matmul(self, rows: Any, weight: Any, bias: Any = None) -> Rows:
        if not isinstance(weight, Parameter) or weight.tensor.dim() != 2:
            raise NotAChain("a product of other tensors than rows and a weight")
        return self.on_linear(rows, Parameter(weight.tensor.t(), weight.whole), bias)

    def _biased(self, rows: Rows, bias: Parameter) -> Rows:
        """A Linear's result, and a parameter added to it."""
        made = self.maps.get(rows.expression)
        if made is None or made.bias is not None or not bias.whole or bias.tensor.shape != (rows.width,):
            raise NotAChain("a sum of other values and a parameter than a Linear's result and its bias")
        return self._result(replace(made, bias=bias.tensor), rows.level, rows.layout)

    def on_chunk(self, rows: Any, chunks: int, dim: int = 0) -> tuple[Rows, ...]:
        if not isinstance(rows, Rows) or rows.width is None or rows.width % chunks:
            raise NotAChain("a part of other values than the first Linear's result")
        return self.on_split(rows, rows.width // chunks, dim)

    def on_split(self, rows: Any, sizes: Any, dim: int = 0) -> tuple[Rows, ...]:
        if not isinstance(rows, Rows) or rows.width is None or dim != -1:
            raise NotAChain(
                "a part of other values than the first Linear's result, or along another dimension than the last"
            )
        if isinstance(sizes, int):
            sizes = [sizes] * (rows.width // sizes)
        ends = list(accumulate(sizes))
        if ends[-1] != rows.width:
            raise NotAChain("parts of a Linear's result that are not as long as it is")
        return tuple(self._part(rows, slice(end - size, end)) for size, end in zip(sizes, ends))

    def _part(self, rows: Rows, units: slice) -> Rows:
        made = self.maps.get(rows.expression)
        if made is None or rows.level != HIDDEN:
            raise NotAChain("a part of other values than the first Linear's result")
        bias = None if made.bias is None else made.bias[units]
        return self._result(replace(made, weight=made.weight[units], bias=bias), rows.level, rows.layout)

    def on_glu(self, rows: Any, dim: int = -1) -> Rows:
        one, other = self.on_chunk(rows, 2, dim)
        gated = Expression(Activation("sigmoid"), (other.expression,))
        if one.level != HIDDEN:
            raise NotAChain("a GLU behind the last Linear")
        return replace(one, expression=Expression(operator.mul, (one.expression, gated)))

    def on_getitem(self, value: Any, index: Any) -> Any:
        if isinstance(value, tuple) and Size.LEADING in value:
            raise NotAChain("an entry of a part of a shape")
        if isinstance(value, (Sizes, tuple)):
            return value[index]
        part = index[1] if isinstance(index, tuple) and len(index) == 2 and index[0] is ... else None
        if isinstance(value, Rows) and isinstance(part, slice) and part.step in (None, 1):
            return self._part(value, part)
        raise NotAChain("an index of other values than the units of a Linear's result")

    # Normalisations

    def on_layer_norm(
        self, rows: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Rows:
        return self._normed(rows, shape, weight, bias, lambda dtype: Norm(True, _epsilon(eps)))

    def on_rms_norm(self, rows: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Rows:
        def norm(dtype: torch.dtype) -> Norm:
            return Norm(False, torch.finfo(dtype).eps if eps is None else _epsilon(eps))

        return self._normed(rows, shape, weight, None, norm)

    def _normed(
        self, rows: Any, shape: Any, weight: Any, bias: Any, norm: Callable[[torch.dtype], Norm]
    ) -> Rows:
        if not isinstance(rows, Rows) or rows.expression is not self.x:
            raise NotAChain("a normalisation of other values than the samples")
        if len(shape) != 1 or any(t is not None and not isinstance(t, Parameter) for t in (weight, bias)):
            raise NotAChain("a normalisation over more than the last dimension")
        self.widths |= {s for s in shape if s is not Size.WIDTH}
        result = Expression()
        self.norms[result] = norm
        if weight is not None:
            result = Expression(operator.mul, (result, weight.tensor))
        if bias is not None:
            result = Expression(operator.add, (result, bias.tensor))
        return replace(rows, expression=result)

    def on_mean(self, rows: Any, dim: Any = None, keepdim: bool = False) -> Rows:
        return self._reduced(rows, partial(torch.mean, dim=-1, keepdim=True), dim, keepdim)

    def on_sum(self, rows: Any, dim: Any = None, keepdim: bool = False) -> Rows:
        return self._reduced(rows, partial(torch.sum, dim=-1, keepdim=True), dim, keepdim)

    def on_var(
        self,
        rows: Any,
        dim: Any = None,
        unbiased: bool = True,
        keepdim: bool = False,
        *,
        correction: int | None = None,
    ) -> Rows:
        correction = int(unbiased) if correction is None else correction
        return self._reduced(
            rows, partial(torch.var, dim=-1, correction=correction, keepdim=True), dim, keepdim
        )

    def _reduced(self, rows: Any, call: Callable[..., Tensor], dim: Any, keepdim: bool) -> Rows:
        if not isinstance(rows, Rows) or rows.level != INPUT or rows.width is not None:
            raise NotAChain("a mean or a sum of other values than the samples")
        if dim not in (-1, (-1,), [-1]) or keepdim is not True:
            raise NotAChain("a mean or a sum over other dimensions than the last, or without keepdim")
        return replace(rows, expression=Expression(call, (rows.expression,)), width=1)

    # Pointwise operations

    def _pointwise(self, name: str, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        call, operands = POINTWISE[name], list(args)
        operands += [kwargs.pop(key) for key in ("other", "exponent") if key in kwargs]
        if kwargs and not (name == "clamp" and kwargs.keys() <= {"min", "max"}):
            raise NotAChain(f"{_described(node, self.root)} with {', '.join(kwargs)}")
        if kwargs:
            call = partial(call, **kwargs)
        rows = [o for o in operands if isinstance(o, Rows)]
        if not rows:
            return self._without_rows(name, call, operands)
        if any(not isinstance(o, (Rows, Parameter, Size, bool, int, float)) for o in operands):
            raise NotAChain(f"{_described(node, self.root)} of other values than tensors and numbers")
        if any(r.layout != rows[0].layout for r in rows):
            raise NotAChain(f"{_described(node, self.root)} of tensors of other shapes")
        if len(rows) == 1 and self._is_neutral(name, operands):
            return rows[0]
        parameters = [o for o in operands if isinstance(o, Parameter)]
        if max(r.level for r in rows) >= OUTPUT and not parameters:
            return self._residual(name, rows, len(operands))
        if parameters and rows[0].level != INPUT:
            if name != "add" or len(operands) != 2:
                raise NotAChain(f"{_described(node, self.root)} of a parameter and other values than samples")
            return self._biased(rows[0], parameters[0])
        return self._combined(call, rows, operands)

    def _is_neutral(self, name: str, operands: list[Any]) -> bool:
        """Whether an operation with a number leaves the rows as they are."""
        if name not in NEUTRAL or len(operands) != 2:
            return False
        numbers = [o for o in operands if type(o) in (int, float)]
        first = name in ("add", "mul") or isinstance(operands[0], Rows)
        return first and numbers == [NEUTRAL[name]]

    def _combined(self, call: Callable[..., Any], rows: list[Rows], operands: list[Any]) -> Rows:
        """Values of the samples, or of the hidden layer, as an expression."""
        if len({r.level for r in rows}) != 1:
            raise NotAChain("the hidden layer is joined with the samples")
        widths = {r.width for r in rows}
        if rows[0].level == HIDDEN and len(widths) != 1:
            raise NotAChain("results of Linear maps of different widths are joined")
        taken: list[Any] = []
        for operand in operands:
            if isinstance(operand, Size):
                if operand != Size.WIDTH:
                    raise NotAChain("values depend on the number of samples or tokens")
                taken.append(self.width)
            elif isinstance(operand, Rows):
                taken.append(operand.expression)
            else:
                taken.append(operand.tensor if isinstance(operand, Parameter) else operand)
        full = any(isinstance(o, Parameter) for o in operands)
        width = None if None in widths or (full and rows[0].level == INPUT) else rows[0].width
        return replace(rows[0], expression=Expression(call, tuple(taken)), width=width)

    def _residual(self, name: str, rows: list[Rows], operands: int) -> Rows:
        """The last Linear's result, with x added."""
        out = max(rows, key=lambda r: r.level)
        others = [r for r in rows if r is not out]
        if name != "add" or len(rows) != 2 or operands != 2 or out.level != OUTPUT:
            raise NotAChain("the last Linear's result is computed with, beyond one sum with x")
        if others[0].expression is not self.x:
            raise NotAChain("a sum with something other than x itself")
        return replace(out, level=SUM)

    def _without_rows(self, name: str, call: Callable[..., Any], operands: list[Any]) -> Any:
        """An operation on sizes, or on the scale or shift of a normalisation."""
        tensors = [o.tensor for o in operands if isinstance(o, Parameter)]
        if not tensors:
            if name == "add" and all(isinstance(o, (tuple, list)) for o in operands):
                return tuple(operands[0]) + tuple(operands[1])
            if name == "mul" and len(operands) == 2:
                return product(*operands)
            raise NotAChain("arithmetic with sizes")
        numbers = [o for o in operands if type(o) in (int, float)]
        if len(numbers) + len(tensors) != len(operands) or any(t.dim() != 1 for t in tensors):
            raise NotAChain("a weight that is computed in the forward")
        return Parameter(call(*(o.tensor if isinstance(o, Parameter) else o for o in operands)), False)

    # Shapes and dtypes

    def _flattened(self, rows: Rows) -> Rows:
        if rows.level < OUTPUT:
            raise NotAChain("a flatten before the last Linear")
        return replace(rows, layout=Layout.FLAT)

    def on_flatten(self, rows: Any, start_dim: int = 0, end_dim: int = -1) -> Rows:
        if not isinstance(rows, Rows) or (start_dim, end_dim) not in ((1, -1), (0, -2)):
            raise NotAChain("a flatten of other dimensions than all but the first, or but the last")
        return self._flattened(rows) if start_dim else replace(rows, layout=Layout.ROWS)

    def on_view(self, rows: Any, *sizes: Any) -> Rows:
        if not isinstance(rows, Rows):
            raise NotAChain("a view of a parameter")
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list, Sizes)):
            sizes = sizes[0].entries() if isinstance(sizes[0], Sizes) else tuple(sizes[0])
        width: Any = Size.WIDTH if rows.width is None else rows.width
        *lead, last = sizes
        if width is Size.WIDTH and type(last) is int and last > 0:
            self.widths.add(last)
            last = width
        elif last is Size.WIDTH and width is not Size.WIDTH:
            self.widths.add(width)
            last = width
        layout = viewed(tuple(lead), last, width)
        if rows.layout == Layout.FLAT:
            raise NotAChain("a view behind a flatten")
        return self._flattened(rows) if layout == Layout.FLAT else replace(rows, layout=layout)

    def on_size(self, value: Any, dim: int | None = None) -> Any:
        if isinstance(value, Parameter):
            sizes: Any = tuple(value.tensor.shape)
        elif isinstance(value, Rows):
            sizes = Sizes(value.layout, Size.WIDTH if value.width is None else value.width)
        else:
            raise NotAChain("a size of something other than a tensor is read")
        return sizes if dim is None else sizes[dim]

    def on_floordiv(self, size: Any, divisor: Any) -> int:
        if type(size) is not int or type(divisor) is not int:
            raise NotAChain("arithmetic with sizes")
        return size // divisor

    def on_getattr(self, value: Any, name: str) -> Any:
        if name == "shape":
            return self.on_size(value)
        if name == "dtype" and isinstance(value, (Rows, Parameter)):
            return value.tensor.dtype if isinstance(value, Parameter) else DTYPE
        if name in ("T", "mT") and isinstance(value, Parameter):
            return self.on_t(value)
        raise NotAChain(f"the attribute {name} of a tensor is read")

    def on_t(self, value: Any, *dims: int) -> Parameter:
        swaps = set(dims) in (set(), {0, 1}, {-2, -1})
        if not isinstance(value, Parameter) or value.tensor.dim() != 2 or not swaps:
            raise NotAChain("a transposition of other values than weights")
        return replace(value, tensor=value.tensor.t())

    def on_float(self, value: Any) -> Any:
        return self.on_to(value, torch.float32)

    def on_double(self, value: Any) -> Any:
        return self.on_to(value, torch.float64)

    def on_to(self, value: Any, dtype: Any) -> Any:
        """A conversion, which changes nothing in a model whose tensors have one dtype."""
        if isinstance(dtype, Parameter):
            dtype = dtype.tensor.dtype
        if isinstance(dtype, torch.dtype):
            self.dtypes.add(dtype)
        elif dtype is not DTYPE and not isinstance(dtype, Rows):
            raise NotAChain("a conversion to something other than a dtype")
        return self.on_same(value)

    def on_same(self, value: Any) -> Any:
        if not isinstance(value, (Rows, Parameter)):
            raise NotAChain("a copy of something other than a tensor")
        return value


def _parameter(tensor: Any) -> Parameter | None:
    return None if tensor is None else Parameter(tensor)


def _epsilon(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise NotAChain(f"a normalisation with the epsilon {value}")
    return float(value)
