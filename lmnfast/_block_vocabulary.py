"""The functions and methods of torch, beside those of a chain, that a block may be made of."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

# Pointwise operations, by the names of torch's functions and methods. Those that write into their first operand have the same
# names with "_".
POINTWISE: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "neg": operator.neg,
    "rsub": lambda a, b: b - a,
    "rdiv": lambda a, b: b / a,
    "rpow": lambda a, b: b**a,
    **{
        name: getattr(torch, name)
        for name in ("square", "sqrt", "rsqrt", "reciprocal", "abs", "exp", "expm1")
    },
    **{name: getattr(torch, name) for name in ("log", "log1p", "erf", "cos", "maximum", "minimum")},
    **{name: getattr(torch, name) for name in ("clamp", "clamp_min", "clamp_max")},
}

# Other names of operations. A tape writes down operators by the names of Tensor's methods.
SAME = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "__radd__": "add",
    "__rmul__": "mul",
    "__rsub__": "rsub",
    "__rdiv__": "rdiv",
    "__rtruediv__": "rdiv",
    "__truediv__": "div",
    "__pow__": "pow",
    "__rpow__": "rpow",
    "__neg__": "neg",
    "__imul__": "mul_",
    "__isub__": "sub_",
    "__itruediv__": "div_",
    "__matmul__": "matmul",
    "mm": "matmul",
    "reshape": "view",
    "transpose": "t",
    "contiguous": "same",
    "clone": "same",
    "type": "to",
    "type_as": "to",
}

# The number that leaves the other operand as it is.
NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}

# Those whose result may share the memory of their first operand.
VIEWS = {
    *("chunk", "split", "getitem", "view", "reshape", "flatten"),
    *("contiguous", "to", "type", "type_as", "float", "double"),
}

_OF_OPERATOR = ("add", "sub", "mul", "pow", "neg", "matmul", "getitem", "floordiv")
_OF_TORCH = ("mean", "sum", "var", "chunk", "split", "addmm", "matmul", "t", "flatten")
_OF_FUNCTIONAL = ("linear", "layer_norm", "rms_norm", "glu")

# torch's functions at the time of import, so that a replacement by another library is not taken for them.
NAMES: dict[Any, str] = {
    **{getattr(operator, name): name for name in _OF_OPERATOR},
    **{getattr(operator, f"i{name}"): f"{name}_" for name in ("add", "sub", "mul", "pow")},
    **{getattr(torch, name): name for name in (*POINTWISE, *SAME, *_OF_TORCH) if hasattr(torch, name)},
    **{getattr(F, name): name for name in _OF_FUNCTIONAL},
    operator.truediv: "div",
    operator.itruediv: "div_",
    getattr: "getattr",
}


def are_torchs() -> bool:
    """Whether modules that normalise or gate call the functions of the import."""
    return all(NAMES.get(getattr(F, name)) == name for name in _OF_FUNCTIONAL)
