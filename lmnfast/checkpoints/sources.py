"""Reads checkpoints and inputs that other programs wrote. No code of a file is run, unless the user trusts the file."""

import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._nested import contents, entries_of, first_names, mapped, tensors_in

STATE_KEYS = ("state_dict", "model", "model_state_dict", "module")
# The first bytes of files that are sometimes found in place of weights.
IMPOSTORS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer; git lfs pull fetches the file itself",
    b"<!doctype html": "an HTML page; download the file itself",
    b"<html": "an HTML page; download the file itself",
    b"<?xml": "an XML text; download the file itself",
}


def find_checkpoints(patterns: Sequence[str | os.PathLike]) -> list[str]:
    """The files of paths and glob patterns, each once. They are sorted with numbers by value: step_2 before step_10.

    Args:
        patterns: paths of files, or patterns of them (glob, ** too).

    Returns:
        The paths, in the order of their names.

    Raises:
        ValueError: a pattern without files, a directory, or a file whose first bytes show that `read_state` cannot read
            it.

    Example:
        >>> from lmnfast.checkpoints import find_checkpoints
        >>> for step in (10, 2):
        ...     torch.save(nn.Linear(3, 4).state_dict(), f"step_{step}.pt")
        >>> find_checkpoints(["step_*.pt"])
        ['step_2.pt', 'step_10.pt']
    """
    found: dict[str, str] = {}
    for pattern in (os.fspath(given) for given in patterns):
        if os.path.isdir(pattern):
            raise ValueError(
                f"checkpoint: expected files, as {os.path.join(pattern, '*.pt')!r}, got a directory"
            )
        literal = os.path.exists(pattern) or not any(c in pattern for c in "*?[")
        files = [pattern] if literal else glob(pattern, recursive=True)
        files = [file for file in files if os.path.isfile(file)]
        if not files:
            raise ValueError(f"checkpoint: no file {'is' if literal else 'matches'} {pattern!r}")
        for file in files:
            _is_safetensors(file, "checkpoint")
            found.setdefault(os.path.abspath(file), str(Path(file)))
    if not found:
        raise ValueError("checkpoint: expected at least one file, got none")
    return sorted(found.values(), key=natural_order)


def natural_order(name: str) -> list[str | int]:
    """A key for sorting names, with the numbers in them by value."""
    return [int(piece) if k % 2 else piece for k, piece in enumerate(re.split(r"([0-9]+)", name))]


def read_state(path: str | os.PathLike, key: str | None = None, *, trust: bool = False) -> dict[str, Any]:
    """The state dict in a checkpoint file, with its ``_metadata`` if it has one.

    Pickles are only read by ``torch.load(weights_only=True)``, which runs no code from them. Objects of other classes, such as
    a numpy scalar or an ``argparse.Namespace``, are not created. The state dict is the whole file; or it is the value that
    STATE_KEYS lead to; or it is the only state dict below another key. A whole module in a trusted file has one.

    Args:
        path: the file.
        key: another place of the state dict, "a.b" for `["a"]["b"]`. The last parts may also be a prefix of names in a state
            dict. The result then has the entries with this prefix, without the prefix.
        trust: read a file that cannot be read that way by ``torch.load(weights_only=False)``. That runs whatever code the file
            has, so whoever made the file can do what you can do.

    Returns:
        The state dict, on the CPU.

    Raises:
        ValueError: the file cannot be read that way; it holds no state dict, or several; it is of safetensors, and the
            package is missing.

    Example:
        >>> from lmnfast.checkpoints import read_state
        >>> torch.save({"model": nn.Linear(3, 4).state_dict(), "step": 10}, "step_10.pt")
        >>> list(read_state("step_10.pt"))
        ['weight', 'bias']
    """
    try:
        return _state_in(_read_tensors(Path(path), "checkpoint"), path, key)
    except _NotPlain:
        if not trust:
            raise
    return _state_in(_read_trusted(path), path, key)


def _state_in(state: Any, path: str | os.PathLike, key: str | None) -> dict[str, Any]:
    """The state dict in the content of a file, as `read_state` finds it."""
    for part in key.split(".") if key else ():
        below = _below(state, part)
        if below is None:
            raise ValueError(f"key: no {part!r} of {key!r} in {path}, {_holding(state)}")
        state = below
    found = _states_in(state)
    if not found and isinstance(state, Mapping):
        others = [(name, value) for name, value in state.items() if isinstance(name, str)]
        found = [where for name, value in others for where in _states_in(value, (name,))]
    if len(found) > 1:
        keys = [".".join((*([key] if key else []), *where)) for where in found]
        raise ValueError(f"{'key' if key else 'checkpoint'}: {path} holds several state dicts; choose with --key "
                         f"among {first_names(keys)}")  # fmt: skip
    if not found:
        for where, value in [("", state), *(_entries(state))]:
            if isinstance(value, _Unread) and value.is_module:
                inside = "".join(f"[{part!r}]" for part in key.split(".")) if key else ""
                raise _not_plain("checkpoint", path, type(value).__name__, f"{inside}{where}.state_dict()")
        hint = "" if key else f"; looked for {', '.join(STATE_KEYS)}, --key names another"
        raise ValueError(
            f"{'key' if key else 'checkpoint'}: no state dict in {path}, {_holding(state)}{hint}"
        )
    for part in found[0]:
        state = state[part]
    for value in (*state.values(), getattr(state, "_metadata", None)):
        if (unread := next(_unread_in(value), None)) is not None:
            where = "".join(f"[{part!r}]" for part in (*(key.split(".") if key else ()), *found[0]))
            raise _not_plain("checkpoint", path, type(unread).__name__, where)
    return state


def _below(state: Any, part: str) -> Any:
    """The value at a key. If there is no such key: the entries whose names begin with the key, with the key cut off."""
    if not isinstance(state, Mapping):
        return None
    if part in state:
        return state[part]
    front = f"{part}."
    inside: Any = OrderedDict(
        (name.removeprefix(front), value)
        for name, value in state.items()
        if isinstance(name, str) and name.startswith(front)
    )
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        inside._metadata = OrderedDict(
            (name.removeprefix(part).removeprefix("."), value)
            for name, value in metadata.items()
            if f"{name}.".startswith(front)
        )
    return inside or None


def _states_in(value: Any, where: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The places of state dicts, as tuples of keys of STATE_KEYS; () is the place of the value itself."""
    if _is_state(value):
        return [where]
    if not isinstance(value, Mapping) or len(where) > len(STATE_KEYS):  # a pickle may contain itself
        return []
    return [
        found for name in STATE_KEYS if name in value for found in _states_in(value[name], (*where, name))
    ]


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()) and all(
        isinstance(name, str) and (isinstance(v, Tensor) or name.endswith("_extra_state"))
        for name, v in value.items()
    )  # fmt: skip


def _entries(value: Any) -> list[tuple[str, Any]]:
    """The keys of a mapping as they are written in Python code, "['a']", with their values."""
    return [(f"[{name!r}]", entry) for name, entry in value.items()] if isinstance(value, Mapping) else []


def _holding(value: Any) -> str:
    unread = next(
        (f", {where} a {type(v).__name__}" for where, v in _entries(value) if isinstance(v, _Unread)), ""
    )
    return f"which holds {contents(value)}{unread}"


def load_inputs(path: str | os.PathLike) -> Any:
    """Inputs of a model from a file: a tensor, or a tuple or dict of tensors, which are passed as arguments.

    A .npy file gives its array. A .npz or .safetensors file with one array gives this array; with several arrays it gives a
    dict by name, or a tuple if np.savez was called without names. A .pt file gives its content, read by
    ``torch.load(weights_only=True)``.

    Args:
        path: the file.

    Returns:
        The tensor, or the tuple or dict of tensors, on the CPU.

    Raises:
        ValueError: no such file, of another kind, not readable that way, or holds something else.

    Example:
        >>> from lmnfast.checkpoints import load_inputs
        >>> torch.save({"ids": torch.zeros(20, 5), "mask": torch.ones(20, 5)}, "inputs.pt")
        >>> {name: tuple(tensor.shape) for name, tensor in load_inputs("inputs.pt").items()}
        {'ids': (20, 5), 'mask': (20, 5)}
    """
    path = Path(path)
    if path.suffix not in (".npy", ".npz", ".pt", ".safetensors"):
        raise ValueError(f"inputs: expected a file .npy, .npz, .pt or .safetensors, got '{path}'")
    if not path.is_file():
        raise ValueError(f"inputs: no file is '{path}'")
    _head(path, "inputs")
    if path.suffix not in (".npy", ".npz"):
        loaded = _read_tensors(path, "inputs")
    else:
        try:
            arrays = np.load(path, allow_pickle=False)
            if path.suffix == ".npy":
                return torch.from_numpy(arrays)
            with arrays:
                loaded = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except Exception as error:  # numpy does not document which errors it raises
            raise ValueError(f"inputs: cannot read {path}: {in_one_line(error)}") from error
        if len(loaded) > 1 and set(loaded) == {f"arr_{n}" for n in range(len(loaded))}:
            loaded = tuple(loaded[f"arr_{n}"] for n in range(len(loaded)))
    if path.suffix != ".pt" and isinstance(loaded, dict) and len(loaded) == 1:
        (loaded,) = loaded.values()
    entries = [loaded] if isinstance(loaded, Tensor) else loaded
    entries = list(entries.values()) if isinstance(entries, Mapping) else entries
    if (
        not isinstance(entries, (tuple, list))
        or not entries
        or not all(isinstance(e, Tensor) for e in entries)
    ):
        raise ValueError(
            f"inputs: expected a tensor, or a tuple or a dict of tensors, in {path}, {_holding(loaded)}"
        )
    return loaded


def first_samples(inputs: Any, count: int, batch_dim: int | None = None) -> Any:
    """The inputs with only their first samples. A tensor is cut if it has as many rows as the first tensor.

    Args:
        inputs: a tensor, or tensors in tuples, lists and dicts.
        count: the number of samples.
        batch_dim: the dimension of the samples in the first tensor, and in those that are as long there; None: the first. Where
            they are not, the first dimension, if it has that length.

    Returns:
        The same containers. Other tensors are in them as they are.

    Raises:
        ValueError: there are fewer samples than `count`; the first tensor has no dimension `batch_dim`.

    Example:
        >>> from lmnfast.checkpoints import first_samples
        >>> x, scale = first_samples((torch.zeros(20, 5), torch.tensor(2.0)), 8)
        >>> x.shape, scale
        (torch.Size([8, 5]), tensor(2.))
    """
    tensors = list(tensors_in(inputs))
    along = batch_dim or 0
    if along and not 0 <= along < tensors[0].ndim:
        raise ValueError(
            f"batch_dim: expected a dimension, counted from 0 on, of the first of the inputs, which has {tensors[0].ndim}, "
            f"got {along}"
        )
    rows = tensors[0].shape[along] if tensors[0].ndim > along else 0
    if not 1 <= count <= rows:
        raise ValueError(f"samples: expected 1 to {rows}, what the inputs have, got {count}")

    def first(tensor: Tensor) -> Tensor:
        for dimension in (along, 0):
            if tensor.ndim > dimension and tensor.shape[dimension] == rows:
                return tensor.narrow(dimension, 0, count)
        return tensor

    return mapped(inputs, first)


def _head(path: str | os.PathLike, argument: str) -> bytes:
    """The first bytes of a file. Raises ValueError, with the argument's name, if the file is empty or one of IMPOSTORS."""
    with open(path, "rb") as file:
        head = file.read(512)
    beginning = head.lstrip().lower()
    said = next((what for first, what in IMPOSTORS.items() if beginning.startswith(first)), None)
    if said or not head:
        raise ValueError(f"{argument}: {path} is {said or 'empty'}")
    return head


def _is_safetensors(path: str | os.PathLike, argument: str) -> bool:
    """True for a file of safetensors, False for a file of torch.save, by the first bytes.

    Raises:
        ValueError: any other file; the safetensors package is not installed. The message begins with the argument's name.
    """
    head = _head(path, argument)
    if head.startswith(b"PK\3\4") or re.match(b"\x80[\2-\5]", head):
        return False  # a zip archive, or from torch before 1.6 a sequence of pickles
    # A safetensors file begins with the length of its JSON header in 8 bytes, and then the header.
    if head[4:9] != b"\0\0\0\0{":
        raise ValueError(
            f"{argument}: expected a file of torch.save or safetensors, {path} begins with {head[:16]!r}"
        )
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{argument}: {path} needs the safetensors package: pip install 'lmnfast[safetensors]'"
        ) from None
    return True


def _read_tensors(path: Path, argument: str) -> Any:
    """The content of a safetensors or torch.save file, on the CPU. An `_Unread` takes the place of a value of another class."""
    safe, zipped = _is_safetensors(path, argument), _head(path, argument).startswith(b"PK")
    unread: list[str] = []
    try:
        if safe:
            from safetensors.torch import load_file

            return load_file(path)
        if zipped:
            _check_sums(path)
            unread = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        # torch.load gets an open file, because with a path it decides by the suffix whether the file is of safetensors.
        with (
            open(path, "rb") as file,
            torch.serialization.safe_globals([(_unread(name), name) for name in unread]),
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can raise any error
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            unread = [code[1]]
        if not unread:
            raise ValueError(f"{argument}: cannot read {path}: {in_one_line(error)}") from error
        said = _not_plain(argument, path, first_names(unread), "['state_dict']")
        raise _NotPlain(f"{said}, with the key that is there for 'state_dict'") from None


def _read_trusted(path: str | os.PathLike) -> Any:
    """The content of a file of torch.save, with whatever objects it has; modules are turned into their state dicts."""
    try:
        with open(path, "rb") as file:
            return _without_modules(torch.load(file, map_location="cpu", weights_only=False))
    except Exception as error:  # the code of the file can raise any error
        raise ValueError(f"checkpoint: cannot read {path}, though trusted: {in_one_line(error)}") from error


def _without_modules(value: Any, depth: int = 0) -> Any:
    if isinstance(value, nn.Module):
        return value.state_dict()
    if not isinstance(value, Mapping) or _is_state(value) or depth > len(STATE_KEYS):
        return value
    return {name: _without_modules(entry, depth + 1) for name, entry in value.items()}


class _Unread:
    """Takes the place of a value in a checkpoint that is neither a tensor nor a plain value."""

    is_module = False

    def __new__(cls, *arguments: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.is_module = isinstance(state, dict) and "_parameters" in state


def _unread_in(value: Any) -> Iterator[_Unread]:
    if isinstance(value, _Unread):
        yield value
    for entry in value if isinstance(value, (set, frozenset)) else [entry for _, entry in entries_of(value)]:
        yield from _unread_in(entry)


def _unread(name: str) -> type[_Unread]:
    return type(name.rpartition(".")[2], (_Unread,), {})


def _check_sums(path: Path) -> None:
    """Raises BadZipFile if a record's checksum is not the one in the archive. torch.load does not check this."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.CRC:  # 0 means: saved without a checksum, see torch.serialization.set_crc32_options
                with archive.open(record) as content:
                    while content.read(1 << 20):
                        pass


class _NotPlain(ValueError):
    """A file needs code to be read."""


def _not_plain(argument: str, path: str | os.PathLike, named: str, where: str) -> _NotPlain:
    trust = "" if argument == "inputs" else "--trust (trust=True) runs it, or "
    return _NotPlain(
        f"{argument}: {path} holds more than tensors and plain values ({named}), and no code of a file is run here; "
        f"where you trust it, {trust}save its state dict alone: "
        f"torch.save(torch.load({str(path)!r}, weights_only=False){where}, 'plain.pt')"
    )


def in_one_line(error: Exception) -> str:
    """An error in one line."""
    first = next(iter(str(error).strip().splitlines()), "").partition(". ")[0]
    ours = type(error) in (ValueError, TypeError)
    return first if ours and first else f"{type(error).__name__}: {first}".removesuffix(": ")
