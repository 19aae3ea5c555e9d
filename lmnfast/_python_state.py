"""The state of a model that a cut turns into constants, to be compared with the model's later state."""

from __future__ import annotations

from collections import OrderedDict
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ._undisturbed import torchs_own

# An attribute with more entries is not compared. Up to this size the comparison takes a few hundred microseconds.
LARGE = 1000
PLAIN = {type(None), bool, int, float, complex, str, bytes}
CONTAINERS = {dict, OrderedDict, list, tuple, set, frozenset}


def python_state(model: nn.Module, inputs: Any) -> list:
    """The state that a cut turns into constants, to be compared by ==.

    It includes the model's modules, forwards, hooks, tensors and their dtypes, its attributes, the inputs, and changes in torch
    itself. It leaves out training flags, which a tail does not read, and values of parameters, which a tail follows. Other
    tensors in modules with the user's own forward count with their version, that is, how often they were changed: torch.fx
    makes a constant of anything computed from these tensors alone.

    Attributes are followed two levels deep. Deeper objects count by their identity alone.
    """
    state = [_frozen(inputs, 1, False), torchs_own()]
    for part in model.modules():
        traced = not type(part).__module__.startswith("torch.nn")  # fx.Tracer's own rule
        attributes = [(name, _frozen(v, 2, traced)) for name, v in vars(part).items() if name != "training"]
        state.append((_Same(part), _Same(getattr(type(part), "forward", None)), attributes))
    return state


class _Same:
    """Equal only if it holds the same object. It keeps the object alive, so that the object's id is not used again."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]  # states are compared, never keys


def _frozen(value: Any, levels: int, versions: bool) -> Any:
    if type(value) in PLAIN:
        return type(value), value
    if type(value) in CONTAINERS and not value:  # as most attributes of a module
        return type(value)
    if isinstance(value, Tensor):
        versions = versions and not isinstance(value, nn.Parameter)
        version = (float("nan") if value.is_inference() else value._version) if versions else 0
        return _Same(value), value.dtype, value.device, value.shape, version
    if isinstance(value, (list, tuple, set, frozenset)):
        entries = list(value)
    elif isinstance(value, dict):
        entries = [entry for pair in value.items() for entry in pair]
    else:
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict) or isinstance(value, (nn.Module, ModuleType)):
            return _Same(value)
        entries = [entry for pair in attributes.items() for entry in pair]
    if levels == 0:
        return _Same(value)
    if len(entries) > LARGE:
        return float("nan")  # equal to nothing: comparing would cost more than tracing anew
    return _Same(value), [_frozen(entry, levels - 1, versions) for entry in entries]
