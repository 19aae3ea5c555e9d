"""Tensors in tuples, lists, dicts and dataclasses, as models take and return them."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

NAMED = 4  # names listed in an error message: enough to show a pattern, few enough for one line


def entries_of(value: Any) -> list[tuple[Any, Any]]:
    """The keys and values of a container; [] for any other value."""
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return list(value.items())
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return []


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for _, entry in entries_of(value):
        yield from tensors_in(entry)


def _with(value: Any, changes: dict[Any, Any]) -> Any:
    """A copy of a container with some entries replaced."""
    if isinstance(value, tuple):
        entries = [changes.get(key, entry) for key, entry in enumerate(value)]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    result = copy.copy(value)
    for key, entry in changes.items():
        if isinstance(value, (list, Mapping)):
            result[key] = entry
        else:
            object.__setattr__(result, key, entry)
    return result


def mapped(
    value: Any, function: Callable[[Tensor], Any], others: Callable[[Any], Any] = lambda other: other
) -> Any:
    """The same containers with `function` applied to every tensor, and `others` to everything else in them."""
    if isinstance(value, Tensor):
        return function(value)
    entries = entries_of(value)
    if not entries:
        return others(value)
    return _with(value, {key: mapped(entry, function, others) for key, entry in entries})


def path_to_tensor(value: Any, wanted: Callable[[Tensor], bool] = Tensor.is_floating_point) -> list | None:
    """Keys that lead to the first wanted tensor; [] if the value itself is one, None if there is none."""
    if isinstance(value, Tensor):
        return [] if wanted(value) else None
    for key, entry in entries_of(value):
        path = path_to_tensor(entry, wanted)
        if path is not None:
            return [key, *path]
    return None


def at_path(value: Any, path: list) -> Any:
    """The entry to which the keys lead. The value may be a proxy of torch.fx."""
    for key in path:
        is_attribute = isinstance(key, str) and not isinstance(value, Mapping)
        value = getattr(value, key) if is_attribute else value[key]
    return value


def replaced(value: Any, path: list, tensor: Tensor) -> Any:
    """A copy of the value with another tensor at the end of the path."""
    if not path:
        return tensor
    return _with(value, {path[0]: replaced(at_path(value, path[:1]), path[1:], tensor)})


def everywhere(value: Any, path: list) -> list[bool]:
    """For each tensor in the value whether it is the one at the end of the path: an argument may be passed twice."""
    wanted = at_path(value, path)
    return [tensor is wanted for tensor in tensors_in(value)]


def substituted(value: Any, places: Iterable[bool], tensor: Any) -> Any:
    """A copy of the value with another tensor in some places, as `everywhere` gives them."""
    remaining = iter(places)
    return mapped(value, lambda own: tensor if next(remaining) else own)


def contents(value: Any) -> str:
    """Describes a container in an error message."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {kind} of {first_names(map(repr, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        return f"a {kind} of {len(value)}"
    return f"a {kind}"


def first_names(names: Iterable[str]) -> str:
    """The first names of a list, and the number of names left out."""
    names = list(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
