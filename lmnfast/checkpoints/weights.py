"""The user's model: a factory that is imported makes it, and a checkpoint gives its weights."""

import importlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .._nested import first_names
from .sources import in_one_line

# Names that torch.compile, DataParallel, Opacus, activation checkpointing and FSDP insert into the names of the weights.
WRAPPERS = ("_orig_mod", "module", "_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
FRONTS = (*WRAPPERS, "model")  # a LightningModule often has its network as "model"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def imported(spec: str, argument: str, what: str) -> Callable:
    """The callable at "package.module:name", installed or in the current directory.

    The current directory is added to sys.path only if the module is in it, and then as the last entry. A folder with
    somebody's checkpoints may also contain a file such as safetensors.py, which must not be imported.

    Args:
        spec: "package.module:name".
        argument: the name of the argument that gave `spec`, for errors.
        what: the kind of callable that is expected, for errors: "factory".

    Raises:
        ValueError: `spec` has another form; there is no such module or name; the module is both installed and in the current
            directory, or cannot be imported; or the object is not callable.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"{argument}: expected package.module:{what}, got {spec!r}")
    _find_here(module_name.partition(".")[0], argument)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module can raise any error
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{argument}: no module {error.name!r} in the current directory or installed, for {spec!r}"
            ) from None
        raise ValueError(f"{argument}: importing {module_name!r} failed: {in_one_line(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(
                f"{argument}: no {part!r} in {getattr(found, '__name__', found)!r}, for {spec!r}"
            )
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise ValueError(f"{argument}: expected a {what}, {spec!r} is a {type(found).__name__}")
    return found


def _find_here(name: str, argument: str) -> None:
    """Puts the current directory at the end of sys.path, if the module is there and is not installed."""
    here = os.getcwd()
    if name in sys.modules or "" in sys.path or here in sys.path:
        return
    importlib.invalidate_caches()
    local, installed = PathFinder.find_spec(name, [here]), find_spec(name)
    if local is not None and installed is None:
        sys.path.append(here)
    elif local is not None and local.origin and installed is not None and local.origin != installed.origin:
        raise ValueError(
            f"{argument}: {name!r} is in the current directory and also {installed.origin}; rename it, or set "
            "PYTHONPATH=. to use the one in the current directory"
        )


def plain(value: Any) -> Any:
    """The value in a form that JSON can hold. A function becomes its name."""
    if callable(value):
        return (
            f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', type(value).__qualname__)}"
        )
    return list(value) if isinstance(value, tuple) else value


def made(factory: Callable[[], nn.Module] | str) -> nn.Module:
    """The model of a factory.

    The random seed is fixed, so that weights that no checkpoint contains are the same in every process.

    Raises:
        ValueError: the factory cannot be imported, fails, or does not return a module.
    """
    make = imported(factory, "model", "factory") if isinstance(factory, str) else factory
    said = repr(factory) if isinstance(factory, str) else repr(plain(factory))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            model = make()
        except Exception as error:  # the user's factory can raise any error
            raise ValueError(
                f"model: {said}, called without arguments, failed: {in_one_line(error)}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected {said} to return an nn.Module, got a {type(model).__name__}")
    return getattr(model, "_orig_mod", model)  # without the wrapper of torch.compile


def load_state(model: nn.Module, state: Mapping[str, Any], path: str) -> None:
    """Loads all weights of a checkpoint into the model.

    Raises:
        ValueError: the weights do not fit the model; the message names the checkpoint.
    """
    own = model.state_dict()
    state = _renamed(state, own, path)
    for name, value in state.items():
        mine = own.get(name)
        if isinstance(mine, Tensor) and isinstance(value, Tensor) and not _is_kept(value, mine.dtype):
            raise ValueError(
                f"checkpoint: {path} does not fit the model: {name} is {_brief_dtype(value.dtype)} in the file, "
                f"{_brief_dtype(mine.dtype)} in the model"
            )
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[1].strip() if len(lines) > 1 else in_one_line(error)  # torch's first line is a heading
        raise ValueError(f"checkpoint: {path} does not fit the model: {reason}") from error
    if missing:  # a safetensors file has only one of several tied weights
        there = {_place(value) for name, value in own.items() if name in state and isinstance(value, Tensor)}
        missing = [n for n in missing if not isinstance(own.get(n), Tensor) or _place(own[n]) not in there]
    if missing or unexpected:
        problems = [("lacks", missing), ("has, unexpected,", unexpected)]
        said = "; it ".join(f"{verb} {first_names(names)}" for verb, names in problems if names)
        raise ValueError(f"checkpoint: {path} does not fit the model: it {said}")


def _is_kept(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether the value can be converted to the model's dtype without a change, except for rounding between FLOATS.

    False for integers in the place of FLOATS: they are quantised weights, and their scales are stored under other names.
    """
    if value.dtype == dtype or (value.dtype in FLOATS and dtype in FLOATS):
        return True
    if dtype.is_floating_point or dtype.is_complex or value.is_complex() or value.is_quantized:
        return False
    return torch.equal(value.to(dtype).to(value.dtype), value)


def _brief_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """A value that is equal for tied weights."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _renamed(state: Mapping[str, Any], own: Collection[str], path: str) -> OrderedDict[str, Any]:
    """The state dict with the model's own names, and with its metadata, from which modules read their version.

    Parts of a name that are in WRAPPERS are removed or inserted, if the result is a name in the model. Raises ValueError if two
    names become the same.
    """
    names = _without_fronts(list(state), own)
    fitting: dict[str, list[str]] = {}
    for name in own:
        fitting.setdefault(_bare(name), []).append(name)
    for given, name in names.items():
        found = fitting.get(_bare(name)) or fitting.get(_bare(name.removeprefix("model.")), [])
        if name not in own and len(found) == 1:
            names[given] = found[0]
    first: dict[str, str] = {}
    for given, name in names.items():
        if name in first:
            shorter, longer = sorted((first[name], given), key=len)
            front = longer.removesuffix(f".{shorter}")
            raise ValueError(
                f"checkpoint: {path} holds {name} of the model twice, as {shorter} and as {longer}; choose with "
                f"--key, which takes names by what they begin with, as --key {front}"
            )
        first[name] = given
    result: Any = OrderedDict((names[given], value) for given, value in state.items())
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        folders = {"": ""}
        for given, name in names.items():
            folders |= _parents(given, name)
        result._metadata = OrderedDict()
        # A wrapper and the module in it get the same name. The module's name in the checkpoint is longer, so it comes last
        # here, and its metadata replaces that of the wrapper.
        for given in sorted(metadata, key=len):
            known = given
            while known not in folders:
                known = known.rpartition(".")[0]
            rest = given.removeprefix(known).removeprefix(".")
            result._metadata[".".join(filter(None, (folders[known], rest)))] = metadata[given]
    return result


def _without_fronts(given: Sequence[str], own: Collection[str]) -> dict[str, str]:
    """A dict from each name to the name without its first parts, as far as all names, but no name in the model, begin with
    them."""
    names = dict(zip(given, given, strict=True))
    while names and not set(names.values()) <= set(own):
        front = next(iter(names.values())).partition(".")[0] + "."
        if front[:-1] not in FRONTS or not all(name.startswith(front) for name in names.values()):
            break
        rest = {given: name.removeprefix(front) for given, name in names.items()}
        if any(name.startswith(front) for name in own) and not set(rest.values()) <= set(own):
            break
        names = rest
    return names


def _bare(name: str) -> str:
    """The name without the parts of WRAPPERS."""
    *modules, last = name.split(".")
    return ".".join([*(part for part in modules if part not in WRAPPERS), last])


def _parents(given: str, name: str) -> dict[str, str]:
    """For each module on the way to a weight: from its name in the checkpoint to its name in the model."""
    left, right = given.split("."), name.split(".")
    found = {}
    while left and right and left[-1] == right[-1]:
        left, right = left[:-1], right[:-1]
        found[".".join(left)] = ".".join(right)
        while left and (not right or left[-1] != right[-1]) and left[-1] in FRONTS:
            left = left[:-1]
            found[".".join(left)] = ".".join(right)
        while right and (not left or left[-1] != right[-1]) and right[-1] in WRAPPERS:
            right = right[:-1]
    return found
