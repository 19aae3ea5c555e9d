"""The modules, functions and methods of torch that a chain may consist of, and a reader for each."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._chain import IDENTITY, Activation
from ._undisturbed import FORWARDS, hooked

FLATTEN = "flatten"
Linear = tuple[Tensor, Tensor | None]  # weight and bias
Step = Any  # of a chain: Linear, Affine, Activation, Skip or FLATTEN


def _activation_named(name: str) -> Callable[..., Activation]:
    return lambda input, inplace=False: Activation(name)


def _leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    return Activation("leaky_relu", float(negative_slope))


def _elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Activation:
    return Activation("elu", float(alpha))


def _gelu(input: Any, approximate: str = "none") -> Activation | None:
    return {"none": Activation("gelu"), "tanh": Activation("gelu_tanh")}.get(approximate)


def _softplus(input: Any, beta: float = 1, threshold: float = 20) -> Activation:
    return Activation("softplus", float(beta), float(threshold))


def _dropout(training_default: bool) -> Callable[..., Activation | None]:
    def read(
        input: Any, p: float = 0.5, training: bool = training_default, inplace: bool = False
    ) -> Activation | None:
        return IDENTITY if training is False or p == 0 else None

    return read


def _flatten(start_default: int) -> Callable[..., str | None]:
    def read(input: Any, start_dim: int = start_default, end_dim: int = -1) -> str | None:
        return FLATTEN if (start_dim, end_dim) == (1, -1) else None

    return read


def _unchanged(input: Any) -> Activation:
    return IDENTITY


# Each reader has the signature of the called function. It turns the arguments of a call into an activation (the identity if
# the call leaves samples as they are) or FLATTEN. It returns None if the call has no place in a chain.
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.relu: _activation_named("relu"),
    F.relu_: _activation_named("relu"),
    torch.relu: _activation_named("relu"),
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu,
    F.elu: _elu,
    F.elu_: _elu,
    F.silu: _activation_named("silu"),
    F.gelu: _gelu,
    torch.tanh: _activation_named("tanh"),
    torch.tanh_: _activation_named("tanh"),
    torch.sigmoid: _activation_named("sigmoid"),
    torch.sigmoid_: _activation_named("sigmoid"),
    F.softplus: _softplus,
    torch.sin: _activation_named("sin"),
    torch.sin_: _activation_named("sin"),
    F.dropout: _dropout(True),
    F.dropout1d: _dropout(True),
    F.dropout2d: _dropout(True),
    F.dropout3d: _dropout(True),
    F.alpha_dropout: _dropout(False),
    F.feature_alpha_dropout: _dropout(False),
    torch.flatten: _flatten(0),
}
TENSOR_METHODS: dict[Any, Callable[..., Any]] = {
    **{
        name + suffix: _activation_named(name)
        for name in ("relu", "tanh", "sigmoid", "sin")
        for suffix in ("", "_")
    },
    "flatten": _flatten(0),
    "contiguous": _unchanged,
    "clone": _unchanged,
    "detach": _unchanged,  # in value; see `recognise`
}
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
MODULES: dict[type[nn.Module], Callable[[Any], Any]] = {
    nn.ReLU: lambda m: Activation("relu"),
    nn.LeakyReLU: lambda m: _leaky_relu(None, m.negative_slope),
    nn.ELU: lambda m: _elu(None, m.alpha),
    nn.SiLU: lambda m: Activation("silu"),
    nn.GELU: lambda m: _gelu(None, m.approximate),
    nn.Tanh: lambda m: Activation("tanh"),
    nn.Sigmoid: lambda m: Activation("sigmoid"),
    nn.Softplus: lambda m: _softplus(None, m.beta, m.threshold),
    nn.Flatten: lambda m: _flatten(1)(None, m.start_dim, m.end_dim),
    nn.Identity: _unchanged,
    nn.Dropout: _unchanged,
    nn.Dropout1d: _unchanged,
    nn.Dropout2d: _unchanged,
    nn.Dropout3d: _unchanged,
    nn.AlphaDropout: _unchanged,
    nn.FeatureAlphaDropout: _unchanged,
}

_READ: tuple[Any, ...] = (F.linear, F.batch_norm, F.conv1d, F.conv2d, F.conv3d, *FUNCTIONS)
# torch's functions at the time of import, like `FORWARDS`.
FUNCTIONALS: dict[str, Any] = {
    f.__name__: f for f in _READ if hasattr(F, f.__name__) and getattr(F, f.__name__) is f
}


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward and nothing else; for torch's classes, torch's own forward."""
    if hooked(module) or "forward" in vars(module):
        return False
    kind = class_of(module)
    if kind not in FORWARDS:
        return True
    return kind.forward is FORWARDS[kind] and FUNCTIONALS.items() <= vars(F).items()


def is_known(module: nn.Module) -> bool:
    return type(module) in MODULES or class_of(module) in (nn.Linear, nn.BatchNorm1d)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class; for a parametrised module, its class before the parametrisation."""
    return type(module).__bases__[0] if is_parametrised(module) else type(module)


def is_parametrised(module: nn.Module) -> bool:
    """As torch.nn.utils.parametrize.is_parametrized, in a tenth of the time: there the missing attribute costs a search."""
    parts = module._modules  # no dict in a scripted module
    if "parametrizations" not in parts:
        return False
    return isinstance(parts["parametrizations"], nn.ModuleDict) and len(parts["parametrizations"]) > 0
