"""The layers of a model by name and by pattern."""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from ._nested import first_names
from ._tracing import Forward, wrapped_as
from ._undisturbed import hooked

Result = TypeVar("Result")

MOST_NAMES = 20  # layers listed in an error message
INPUTS = ("", "inputs")  # in place of a layer's name: the model's inputs


def match_layers(model: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the model's layers that match, in the model's order for each pattern.

    Args:
        model: any module.
        patterns: names as in `cut`, or shell patterns (fnmatch) of whole names. * also matches dots. If a pattern matches a
            module and modules inside it, only the outermost counts: "blocks.*" is each block, without the parts of blocks, and
            "blocks.*.mlp" is the mlp of each block. A container without a forward (ModuleList) counts for no pattern, as it is
            never called.

    Returns:
        Each name once.

    Raises:
        TypeError: the model is no module, or a pattern is no string.
        ValueError: no layer matches a pattern. The message lists similar names.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 3))
        >>> lmnfast.match_layers(model, ["2", "[01]"])
        ('2', '0', '1')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    short, full = layers_of(model)
    found: dict[str, None] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layer: expected a name, got {type(pattern).__name__}")
        if not is_pattern(pattern):
            if means_inputs(model, pattern):
                pattern = INPUTS[1] if INPUTS[1] not in full else pattern
            else:
                find_layer(model, pattern)
            found[pattern] = None
            continue
        matching = _outermost(short, pattern) or _outermost(full, pattern)
        if not matching:
            raise ValueError(f"layer: nothing matches {pattern!r}; {names_near(pattern, list(short))}")
        found.update(dict.fromkeys(matching))
    return tuple(found)


def for_layers(
    model: nn.Module,
    patterns: str | Sequence[str],
    function: Callable[[str], Result],
    argument: str = "layers",
) -> dict[str, Result]:
    """A function's results for all layers that match, by name.

    A layer that only a pattern names is left out if the function raises ValueError or TypeError; one warning names all that are
    left out, and says why.

    Args:
        model, patterns: as in `match_layers`.
        function: takes a layer's name.
        argument: begins the messages.

    Raises:
        ValueError: all are left out.
        Exception: the function's errors for layers that are named without a pattern, and `match_layers`'s.
    """
    given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    exact = match_layers(model, [name for name in given if isinstance(name, str) and not is_pattern(name)])
    found: dict[str, Result] = {}
    left: dict[str, list[str]] = {}  # names by reason
    for name in match_layers(model, given):
        try:
            found[name] = function(name)
        except (ValueError, TypeError) as error:
            if name in exact:
                raise
            reason = str(error).partition("; expected")[0].replace(repr(name), "it")
            reason = reason.removeprefix("layer: ").removeprefix("block: ")
            left.setdefault(reason, []).append(repr(name))
    if left:
        asked = [repr(pattern) for pattern in given if is_pattern(pattern)]
        why = "; ".join(f"{first_names(names)} ({reason})" for reason, names in left.items())
        if any("by another way" in reason for reason in left):
            one = argument.removesuffix("s")  # `cut` and `explain` have block=, others blocks=
            blocks = argument.replace(one, "block")
            why += f"; {blocks}= measures parts alone, until= ends the maps earlier"
        if not found:
            raise ValueError(f"{argument}: nothing that matches {' or '.join(asked)} can be measured: {why}")
        verb = "match" if len(asked) > 1 else "matches"
        warnings.warn(
            f"{argument}: {' and '.join(asked)} also {verb} what cannot be measured: {why}", stacklevel=3
        )
    return found


def is_pattern(name: str) -> bool:
    return any(c in name for c in "*?[")


def _outermost(layers: Mapping[str, nn.Module], pattern: str) -> list[str]:
    """The names that match and lie in no module that matches. A module's name comes before those of its parts."""
    found: dict[str, None] = {}
    for name, part in layers.items():
        above = name.split(".")[:-1]
        inside = any(".".join(above[:n]) in found for n in range(1, len(above) + 1))
        is_called = type(part).forward is not nn.Module.forward and "parametrizations" not in name.split(".")
        if is_called and not inside and fnmatch.fnmatchcase(name, pattern):
            found[name] = None
    return list(found)


def names_near(wanted: str, names: list[str]) -> str:
    """Similar names, or the first names, as part of an error message."""
    if not names:
        return "the model has no layers"
    close = difflib.get_close_matches(wanted, names, 5, 0.5)
    if len(names) <= MOST_NAMES:
        return f"it has {', '.join(dict.fromkeys(close + names))}"
    close = close or names[:MOST_NAMES]
    return f"it has {', '.join(close)} and {len(names) - len(close)} more"


def called_model(model: nn.Module, forward: Forward) -> nn.Module:
    """The module to call in place of a wrapper. The wrapper would compile again at each hook, or talk to other processes.

    A wrapper with hooks stays. If the user's `forward` calls the model, only the wrapper of torch.compile is taken off, as the
    wrapped module has the same attributes.
    """
    while (name := wrapped_as(model)) and not hooked(model) and (forward is None or name == "_orig_mod"):
        model = getattr(model, name)
    return model


def layers_of(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The model's parts by their names without the parts of wrappers ("0" for "module.0"), and by their full names."""
    full = dict(model.named_modules(remove_duplicate=False))
    names: dict[str, str] = {}
    short: dict[str, nn.Module] = {}
    for name, part in full.items():
        above, _, last = name.rpartition(".")
        if name and wrapped_as(full[above]) == last:
            names[name] = names[above]
        else:
            names[name] = f"{names[above]}.{last}".removeprefix(".") if name else ""
        # A wrapper and its part have the same short name. It means the wrapper, which is the one that is called.
        short.setdefault(names[name], part)
    del short[""], full[""]
    return short, full


def find_layer(model: nn.Module, layer: str, argument: str = "layer") -> tuple[nn.Module, int | None]:
    """The module of that name, and the number of the call that is meant; None for the only call."""
    if not isinstance(layer, str):
        raise TypeError(f"{argument}: expected a name, got {type(layer).__name__}")
    short, full = layers_of(model)
    layers = {**short, **full}
    if layer in layers:
        return layers[layer], None
    name, _, call = layer.rpartition("@")
    if name in layers and call.isdecimal():
        return layers[name], int(call)
    raise ValueError(f"{argument}: {layer!r} is not in the model; {names_near(layer, list(short))}")


def means_inputs(model: nn.Module, layer: str) -> bool:
    """Whether a layer's name means the model's inputs."""
    return layer in INPUTS and layer not in layers_of(model)[1]
