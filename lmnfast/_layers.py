"""The layers of a model by name and by pattern."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn

from ._tracing import Forward, wrapped_as
from ._undisturbed import hooked

MOST_NAMES = 20  # layers listed in an error message


def match_layers(model: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the model's layers that match, in the model's order for each pattern.

    Args:
        model: any module.
        patterns: names as in `cut`, or shell patterns (fnmatch) of whole names. * also matches dots: "blocks.?" is each of ten
            blocks, "blocks.*" also matches the parts of each block.

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
        if not any(c in pattern for c in "*?["):
            find_layer(model, pattern)
            found[pattern] = None
            continue
        for names in (short, full):
            matching = [
                n for n in names if fnmatch.fnmatchcase(n, pattern) and "parametrizations" not in n.split(".")
            ]
            if matching:
                break
        else:
            raise ValueError(f"layer: nothing matches {pattern!r}; {names_near(pattern, list(short))}")
        found.update(dict.fromkeys(matching))
    return tuple(found)


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


def find_layer(model: nn.Module, layer: str) -> tuple[nn.Module, int | None]:
    """The module of that name, and the number of the call that is meant; None for the only call."""
    if not isinstance(layer, str):
        raise TypeError(f"layer: expected a name, got {type(layer).__name__}")
    short, full = layers_of(model)
    layers = {**short, **full}
    if layer in layers:
        return layers[layer], None
    name, _, call = layer.rpartition("@")
    if name in layers and call.isdecimal():
        return layers[name], int(call)
    raise ValueError(f"layer: {layer!r} is not in the model; {names_near(layer, list(short))}")
