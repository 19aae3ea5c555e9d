"""Measures checkpoints that others trained: loads them into the user's model, cuts, measures, keeps a table.

A table is a directory: lmn.csv, one row for every checkpoint measured; lmn.json, with what settings, and
which files they were; lmn.png, once drawn. Every file is written under another name and then renamed, lmn.csv
after each checkpoint: so what is stopped, by kill -9 too, goes on with the checkpoints that have no row yet.
"""

import hashlib
import importlib
import io
import json
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from glob import glob
from importlib.machinery import PathFinder
from importlib.util import find_spec
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .connectivity import METHODS, measured, warn_of_offsets
from .cutting import cut, match_layers
from .nested import contents, entries_of, few, mapped, tensors_in
from .network import Forward, Output
from .processes import cores
from .quadrature import path_nodes
from .runs.device import settled_device
from .runs.files import claimed, write_file, write_json
from .runs.pool import Pool
from .runs.progress import progress_bar
from .runs.tables import LacksColumns, check_continues, read_table, write_table
from .spectrum import SETTINGS, SHARES, check_negative, measurement
from .steps import steps_of

STATE_KEYS = ("state_dict", "model", "model_state_dict", "module")
# Names that torch.compile, DataParallel, Opacus, activation checkpointing and FSDP put into those of the weights.
WRAPPERS = ("_orig_mod", "module", "_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
FRONTS = (*WRAPPERS, "model")  # the last is where a LightningModule often has its network
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The first bytes of what is found in the place of weights.
IMPOSTORS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer; git lfs pull fetches the file itself",
    b"<!doctype html": "an HTML page; download the file itself",
    b"<html": "an HTML page; download the file itself",
    b"<?xml": "an XML text; download the file itself",
}
SAMPLED = 16, 4096  # places in a file, and bytes at each, by which it is recognised
STYLES = ("-", "--", ":", "-.")  # so that of equal curves both are seen
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def measure_checkpoints(
    factory: Callable[[], nn.Module] | str,
    checkpoints: str | os.PathLike | Sequence[str | os.PathLike],
    inputs: Any,
    layers: str | Sequence[str],
    *,
    forward: Forward | str = None,
    output: Output = None,
    key: str | None = None,
    method: str = "path",
    points: int = 21,
    rule: str = "uniform",
    negative: str = "absolute",
    device: str = "auto",
    jobs: int = 1,
    out: str | os.PathLike | None = None,
    force: bool = False,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Linear mapping number of a model at each of its checkpoints.

    ``measure(*cut(model, layer, inputs))`` for each layer and each checkpoint, its weights in the model.
    No code from a checkpoint is ever run: see `read_state`. Any number of processes gives the same numbers.

    Args:
        factory: called without arguments, returns the model; or where to import it, "package.module:factory".
        checkpoints: files, or patterns of them (glob, ** too), of torch.save or safetensors, whatever their
            suffix.
        inputs: as in `cut`, tensors in tuples, lists and dicts; or a file, see `load_inputs`. Floating-point
            inputs are converted to the model's dtype.
        layers: names or patterns as in `match_layers`.
        forward, output: as in `cut`; forward also as "package.module:function".
        key: where in a checkpoint the state dict is, "a.b" for ["a"]["b"]; None: see `read_state`.
        method, points, rule: as in `connectivity`. negative: as in `lmn`.
        device: "cpu", "cuda", or "auto": that of the table in `out`, else "cuda" if there is one, else "cpu".
        jobs: processes. Those of several are spawned, so a script that asks for them does it under
            ``if __name__ == "__main__"``, and gives what can be imported.
        out: a directory to keep the table in; the same call goes on with what is there. Rows of checkpoints
            that are gone stay. A file with another size, time of change or other bytes, at 16 places spread over
            it, is measured anew.
        force: begin a new table, whatever is in `out`.
        progress: show a bar (needs tqdm).

    Returns:
        One dict per checkpoint, by rising step: step, checkpoint, lmn_LAYER for each layer, samples, outputs, points,
        rule, method, precision, solver, negative, constant_share_LAYER and negative_share_LAYER for each layer, all as
        in `Measurement`. Numbers have seven digits, what float32 holds, as in lmn.csv. Steps
        are as in `steps_of`; where no name has a number, the checkpoints are counted from 0 by name.

    Raises:
        ValueError: an argument that is not what it should be; a checkpoint that cannot be read, does not fit
            the model, or cannot be measured (names it; the others begun are kept); the names do not tell the
            steps, see `steps_of`; `out` holds a damaged table or one with other settings (names them), or
            another process is at work there.
        OSError: `out` cannot be written; a process died.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    points = len(path_nodes(rule, points)[0])
    check_negative(negative)
    patterns = [checkpoints] if isinstance(checkpoints, (str, os.PathLike)) else list(checkpoints)
    paths = find_checkpoints(patterns)
    if isinstance(inputs, (str, os.PathLike)):
        inputs = load_inputs(inputs)
    model = _made(factory)
    call = imported(forward, "forward", "function") if isinstance(forward, str) else forward
    names = match_layers(model, layers)
    if not names:
        raise ValueError(f"layers: expected at least one, got {layers!r}")
    with nullcontext() if out is None else claimed(Path(out)):
        stored = None if out is None or force else _read_settings(Path(out))
        work = _Work(
            factory, forward, output, key, names, method, points, rule, negative,
            settled_device(device, stored["device"] if stored else None), torch.get_float32_matmul_precision(),
        )  # fmt: skip
        settings = work.settings() | {"checkpoints": [*map(str, patterns)], "inputs": _fingerprint(inputs)}
        table = _Table(None if out is None else Path(out), settings, stored, paths)
        waiting = [path for path in paths if not table.has(path)]
        if progress and table.rows:
            print(f"{out}: {len(table.rows)} checkpoints measured before, {len(waiting)} to go")
        workers = min(jobs, len(waiting))
        if workers > 1:
            measured = _in_processes(work, inputs, waiting, workers)
        else:
            measured = _in_this_process(work, model, call, inputs, waiting)
        with progress_bar(len(table.rows) + len(waiting), len(table.rows), progress) as bar:
            for row in measured:
                table.add(row)
                if bar:
                    bar.update()
    return table.rows


def imported(spec: str, argument: str, what: str) -> Callable:
    """The callable at "package.module:name", installed or in the current directory.

    The current directory goes on sys.path only where the module is in it, and then last: a folder of somebody's
    checkpoints may also hold a safetensors.py.

    Raises ValueError, by the argument's name, for a spec of another form, no such module or name, a module
    that is both installed and in the current directory or cannot be imported, or something not callable.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"{argument}: expected package.module:{what}, got {spec!r}")
    _find_here(module_name.partition(".")[0], argument)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{argument}: no module {error.name!r} in the current directory or installed, for {spec!r}"
            ) from None
        raise ValueError(f"{argument}: importing {module_name!r} failed: {_said(error)}") from error
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
    """Puts the current directory on sys.path, last, where a module is there and nowhere else."""
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
            "PYTHONPATH=. to take that in the current directory"
        )


# Files -----------------------------------------------------------------------------------------------------


def find_checkpoints(patterns: Sequence[str | os.PathLike]) -> list[str]:
    """The files of paths and glob patterns, each once, numbers in names by value: step_2 before step_10.

    Raises ValueError for a pattern without files, a directory, or a file that by its first bytes is none that
    `read_state` reads.
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
    return sorted(found.values(), key=_natural)


def _natural(name: str) -> list[str | int]:
    return [int(piece) if k % 2 else piece for k, piece in enumerate(re.split(r"([0-9]+)", name))]


def read_state(path: str | os.PathLike, key: str | None = None) -> dict[str, Any]:
    """The state dict in a checkpoint file, with its ``_metadata`` where it has that.

    Pickles are read by ``torch.load(weights_only=True)`` alone, which runs no code of theirs; what is of another
    class, such as a numpy scalar or an ``argparse.Namespace``, is not made. The state dict is the whole, or where
    STATE_KEYS lead, or the only one below another key. `key` says where else, "a.b" for ["a"]["b"]; its
    last parts can also be the front of the names in a state dict, and are then taken off.

    Raises:
        ValueError: not readable that way; no state dict there, or several; .safetensors without the safetensors
            package.
    """
    state = _read_tensors(Path(path), "checkpoint")
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
                         f"among {few(keys)}")  # fmt: skip
    if not found:
        for where, value in [("", state), *(_entries(state))]:
            if isinstance(value, _Unread) and value.is_module:
                inside = "".join(f"[{part!r}]" for part in key.split(".")) if key else ""
                raise ValueError(
                    _not_plain("checkpoint", path, type(value).__name__, f"{inside}{where}.state_dict()")
                )
        hint = "" if key else f"; looked for {', '.join(STATE_KEYS)}, --key names another"
        raise ValueError(
            f"{'key' if key else 'checkpoint'}: no state dict in {path}, {_holding(state)}{hint}"
        )
    for part in found[0]:
        state = state[part]
    for value in (*state.values(), getattr(state, "_metadata", None)):
        if (unread := next(_unread_in(value), None)) is not None:
            where = "".join(f"[{part!r}]" for part in (*(key.split(".") if key else ()), *found[0]))
            raise ValueError(_not_plain("checkpoint", path, type(unread).__name__, where))
    return state


def _below(state: Any, part: str) -> Any:
    """What a key leads to; in a state dict also the names that begin with it, without it."""
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
    """The keys among STATE_KEYS that lead to a state dict; () for what is one."""
    if _is_state(value):
        return [where]
    if not isinstance(value, Mapping) or len(where) > len(STATE_KEYS):  # a pickle may hold itself
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
    """A mapping's values behind their keys as Python writes them."""
    return [(f"[{name!r}]", entry) for name, entry in value.items()] if isinstance(value, Mapping) else []


def _holding(value: Any) -> str:
    unread = next(
        (f", {where} a {type(v).__name__}" for where, v in _entries(value) if isinstance(v, _Unread)), ""
    )
    return f"which holds {contents(value)}{unread}"


def load_inputs(path: str | os.PathLike) -> Any:
    """Inputs of a model from a file: a tensor, or a tuple or dict of tensors, passed as arguments.

    .npy: the array. .npz and .safetensors: one array is passed alone, several by their names, or in their
    order where np.savez was given no names. .pt: as it is, by ``torch.load(weights_only=True)``.

    Raises:
        ValueError: no such file, of another kind, not readable that way, or holds something else.
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
        except Exception as error:  # numpy names no others
            raise ValueError(f"inputs: cannot read {path}: {_said(error)}") from error
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


def first_samples(inputs: Any, count: int) -> Any:
    """The first `count` samples of `load_inputs`: of each tensor with as many rows as the first one has.

    Raises ValueError where there are not as many.
    """
    tensors = list(tensors_in(inputs))
    rows = len(tensors[0]) if tensors[0].ndim else 0
    if not 1 <= count <= rows:
        raise ValueError(f"samples: expected 1 to {rows}, what the inputs have, got {count}")
    return mapped(inputs, lambda tensor: tensor[:count] if tensor.ndim and len(tensor) == rows else tensor)


def _head(path: str | os.PathLike, argument: str) -> bytes:
    """A file's first bytes. Raises ValueError, by the argument's name, for none, and for those of IMPOSTORS."""
    with open(path, "rb") as file:
        head = file.read(512)
    beginning = head.lstrip().lower()
    said = next((what for first, what in IMPOSTORS.items() if beginning.startswith(first)), None)
    if said or not head:
        raise ValueError(f"{argument}: {path} is {said or 'empty'}")
    return head


def _is_safetensors(path: str | os.PathLike, argument: str) -> bool:
    """Whether a file is of safetensors, or else of torch.save, by its first bytes.

    Raises ValueError, by the argument's name, for any other file, and where the safetensors package is missing.
    """
    head = _head(path, argument)
    if head.startswith(b"PK\3\4") or re.match(b"\x80[\2-\5]", head):
        return False  # a zip archive; before torch 1.6 pickles one after another
    if head[4:9] != b"\0\0\0\0{":  # the end of the length of a JSON header, and its beginning
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
    """What a file of safetensors, or a pickle, holds; on the CPU, an `_Unread` for each value of another class."""
    safe, zipped = _is_safetensors(path, argument), _head(path, argument).startswith(b"PK")
    unread: list[str] = []
    try:
        if safe:
            from safetensors.torch import load_file

            return load_file(path)
        if zipped:
            _check_sums(path)
            unread = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        # As a file: torch.load goes by the suffix of a path called .safetensors.
        with (
            open(path, "rb") as file,
            torch.serialization.safe_globals([(_unread(name), name) for name in unread]),
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            unread = [code[1]]
        if not unread:
            raise ValueError(f"{argument}: cannot read {path}: {_said(error)}") from error
        raise ValueError(
            _not_plain(argument, path, few(unread), "['state_dict']")
            + ", with the key that is there for 'state_dict'"
        ) from None


class _Unread:
    """What stands in a checkpoint for a value whose class is not one of tensors and plain values."""

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
    """Raises BadZipFile where a record has another checksum than the archive says; torch.load looks at none."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.CRC:  # 0: saved without, see torch.serialization.set_crc32_options
                with archive.open(record) as content:
                    while content.read(1 << 20):
                        pass


def _not_plain(argument: str, path: str | os.PathLike, named: str, where: str) -> str:
    return (
        f"{argument}: {path} holds more than tensors and plain values ({named}), and no code of a file is run here; "
        "where you trust it, save its state dict alone: "
        f"torch.save(torch.load({str(path)!r}, weights_only=False){where}, 'plain.pt')"
    )


# Measuring -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What a process needs to know to measure a checkpoint, beside the inputs."""

    factory: Callable[[], nn.Module] | str
    forward: Forward | str
    output: Output
    key: str | None
    layers: tuple[str, ...]
    method: str
    points: int
    rule: str
    negative: str
    device: str
    precision: str

    def settings(self) -> dict[str, Any]:
        """All that decides on numbers, as JSON has it."""
        named = {"factory": "model"}
        return {named.get(name, name): _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if callable(value):
        return (
            f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', type(value).__qualname__)}"
        )
    return list(value) if isinstance(value, tuple) else value


def _made(factory: Callable[[], nn.Module] | str) -> nn.Module:
    """The model; the same random numbers in every process, for what no checkpoint has."""
    make = imported(factory, "model", "factory") if isinstance(factory, str) else factory
    said = repr(factory) if isinstance(factory, str) else repr(_plain(factory))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            model = make()
        except Exception as error:  # the factory is the user's
            raise ValueError(f"model: {said}, called without arguments, failed: {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected {said} to return an nn.Module, got a {type(model).__name__}")
    return getattr(model, "_orig_mod", model)  # what torch.compile wraps


def _load_state(model: nn.Module, state: Mapping[str, Any], path: str) -> None:
    """Gives the model the weights of a checkpoint, all of them; ValueError where they do not fit."""
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
        reason = lines[1].strip() if len(lines) > 1 else _said(error)  # torch heads its list of reasons
        raise ValueError(f"checkpoint: {path} does not fit the model: {reason}") from error
    if missing:  # of tied weights safetensors keep one
        there = {_place(value) for name, value in own.items() if name in state and isinstance(value, Tensor)}
        missing = [n for n in missing if not isinstance(own.get(n), Tensor) or _place(own[n]) not in there]
    if missing or unexpected:
        problems = [("lacks", missing), ("has, unexpected,", unexpected)]
        said = "; it ".join(f"{verb} {few(names)}" for verb, names in problems if names)
        raise ValueError(f"checkpoint: {path} does not fit the model: it {said}")


def _is_kept(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether the model's dtype has the value, but for the rounding between FLOATS.

    Integers in the place of FLOATS are quantised weights, whose scales are elsewhere.
    """
    if value.dtype == dtype or (value.dtype in FLOATS and dtype in FLOATS):
        return True
    if dtype.is_floating_point or dtype.is_complex or value.is_complex() or value.is_quantized:
        return False
    return torch.equal(value.to(dtype).to(value.dtype), value)


def _brief_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _renamed(state: Mapping[str, Any], own: Collection[str], path: str) -> OrderedDict[str, Any]:
    """The state dict under the model's own names, and its metadata, which modules read their version from.

    The parts of WRAPPERS in a name are left out, or put in, where the name then is one of the model's. ValueError
    where two names are then the same.
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
        for given in sorted(
            metadata, key=len
        ):  # of a wrapper and what is in it the latter, with the longer name
            known = given
            while known not in folders:
                known = known.rpartition(".")[0]
            rest = given.removeprefix(known).removeprefix(".")
            result._metadata[".".join(filter(None, (folders[known], rest)))] = metadata[given]
    return result


def _without_fronts(given: Sequence[str], own: Collection[str]) -> dict[str, str]:
    """The names, from each the parts in front that all of them have and none of the model's."""
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
    *modules, last = name.split(".")
    return ".".join([*(part for part in modules if part not in WRAPPERS), last])


def _parents(given: str, name: str) -> dict[str, str]:
    """The modules that lead to a weight, by their names in the checkpoint, and the names of the model's."""
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


def _measured(work: _Work, model: nn.Module, call: Forward, inputs: Any, path: str) -> dict[str, Any]:
    """The row of one checkpoint; its step takes knowing all of them."""
    _load_state(model, read_state(path, work.key), path)
    row: dict[str, Any] = {"step": None, "checkpoint": path}
    for layer in work.layers:
        try:
            tail, samples = cut(model, layer, inputs, forward=call, output=work.output)
            settings = {"method": work.method, "points": work.points, "rule": work.rule}
            (enqueued,) = measured(tail, samples, **settings)
            warn_of_offsets([enqueued], f"checkpoint: {path}, layer {layer!r}")
            m = measurement(enqueued, negative=work.negative, **settings)
        except Exception as error:  # the model is the user's
            raise ValueError(f"checkpoint: {path}, layer {layer!r}: {_said(error)}") from error
        row |= {f"{name}_{layer}": float(f"{getattr(m, name):.7g}") for name in ("lmn", *SHARES)}
        before = dict(row)
        row |= {name: getattr(m, name) for name in SETTINGS}
        for name in ("precision", "solver"):  # layers may differ in them
            row[name] = "+".join(sorted({*before.get(name, row[name]).split("+"), row[name]}))
    return row


def _in_this_process(
    work: _Work, model: nn.Module, call: Forward, inputs: Any, paths: Sequence[str]
) -> Iterator[dict[str, Any]]:
    model, inputs = _placed(model, inputs, work.device)
    for path in paths:
        yield _measured(work, model, call, inputs, path)


def _in_processes(work: _Work, inputs: Any, paths: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
    """As they come. Where one fails, those begun are measured still, those not begun are left."""
    try:
        pickle.dumps(work)
    except Exception as error:
        raise ValueError(
            f"jobs: {count} processes need a factory, forward and output that can be imported: {_said(error)}"
        ) from None
    threads = max(1, min(torch.get_num_threads(), cores() // count))
    content = io.BytesIO()  # as bytes: torch would move the tensors of the caller to shared memory
    torch.save(mapped(inputs, lambda tensor: tensor.detach().cpu()), content)
    failed: BaseException | None = None
    with Pool(count, _begin, (work, content.getvalue(), threads)) as pool:
        for outcome in pool.outcomes(_measure_here, [(path,) for path in paths]):
            if outcome.error is None:
                yield outcome.result
            elif failed is None:
                failed = outcome.error
                pool.leave_waiting()
    if failed is not None:
        raise failed


_given: tuple[_Work, bytes]  # a spawned process's own


def _begin(work: _Work, content: bytes, threads: int) -> None:
    global _given
    _given = work, content
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(work.precision)


@cache
def _own() -> tuple[nn.Module, Forward, Any]:
    """A spawned process's model, forward and inputs; not made in `_begin`, whose errors get lost."""
    work, content = _given
    call = imported(work.forward, "forward", "function") if isinstance(work.forward, str) else work.forward
    inputs = torch.load(io.BytesIO(content), weights_only=True)
    model, inputs = _placed(_made(work.factory), inputs, work.device)
    return model, call, inputs


def _measure_here(path: str) -> dict[str, Any]:
    try:
        model, call, inputs = _own()
    except Exception as error:
        raise ValueError(f"checkpoint: {path}: {_said(error)}") from error
    return _measured(_given[0], model, call, inputs, path)


def _placed(model: nn.Module, inputs: Any, device: str) -> tuple[nn.Module, Any]:
    """Both on the device, floating-point inputs in the model's dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return model.to(device), mapped(inputs, place)


def _fingerprint(inputs: Any) -> str:
    """Equal for equal inputs, and short."""
    structure = mapped(inputs, lambda tensor: (str(tensor.dtype), tuple(tensor.shape)))
    digest = hashlib.sha256(repr(structure).encode())
    for tensor in tensors_in(inputs):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256 {digest.hexdigest()[:16]}"


def _said(error: Exception) -> str:
    """An error in one line."""
    first = next(iter(str(error).strip().splitlines()), "").partition(". ")[0]
    ours = type(error) in (ValueError, TypeError)
    return first if ours and first else f"{type(error).__name__}: {first}".removesuffix(": ")


# The table -------------------------------------------------------------------------------------------------


class _Table:
    """The rows, and lmn.csv and lmn.json in `out`, where there is one."""

    def __init__(
        self, out: Path | None, settings: dict[str, Any], stored: dict[str, Any] | None, paths: Sequence[str]
    ) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = []
        files, now = {}, {os.path.abspath(path): _version(path) for path in paths}
        if out is not None and stored is not None:
            files = stored.pop("files")
            there = set(stored["checkpoints"])
            check_continues(
                out,
                "a table with other settings",
                stored,
                settings,
                otherwise=", or --force to begin anew",
                may_change=lambda name, old, new: name == "checkpoints" and there <= set(new),
            )
            changed = {path for path, version in now.items() if files.get(path) != version}
            written = _read_rows(out / "lmn.csv", settings)
            self.rows = [row for row in written if os.path.abspath(row["checkpoint"]) not in changed]
        written_as = [row["checkpoint"] for row in self.rows]
        names = sorted(written_as + [path for path in paths if not self.has(path)], key=_natural)
        steps: Sequence[int | float] = steps_of(names) or range(len(names))
        self.steps = dict(zip(names, steps, strict=True))
        self._write()  # before lmn.json says that the rows are of the files as they are now
        if out is not None:
            write_json(out / "lmn.json", settings | {"files": files | now})

    def has(self, path: str) -> bool:
        return os.path.abspath(path) in {os.path.abspath(row["checkpoint"]) for row in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        """Adds the row of a checkpoint, and writes them all."""
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        for row in self.rows:
            row["step"] = self.steps[row["checkpoint"]]
        self.rows.sort(key=lambda row: row["step"])
        if self.out is None:
            return
        if not self.rows:
            (self.out / "lmn.csv").unlink(missing_ok=True)
            return
        columns = _columns([n.removeprefix("lmn_") for n in self.rows[0] if n.startswith("lmn_")])
        write_table(self.out / "lmn.csv", columns, self.rows)


def _columns(layers: Sequence[str]) -> list[str]:
    of_layers = {kind: [f"{kind}_{layer}" for layer in layers] for kind in ("lmn", *SHARES)}
    return ["step", "checkpoint", *of_layers.pop("lmn"), *SETTINGS, *chain(*of_layers.values())]


def _read_rows(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of lmn.csv. Raises ValueError, by the file's name, where it is not as `_Table` leaves it."""
    try:
        rows = read_table(path, _columns(settings["layers"]), encoding="utf-8-sig")
        fixed = {name: settings[name] for name in ("points", "rule", "method", "negative")}
        if any(row | fixed != row for row in rows) or len({row["checkpoint"] for row in rows}) < len(rows):
            raise ValueError("a row is not of this table")
    except LacksColumns as error:
        raise ValueError(f"out: cannot read {path}: it {error}; --force begins anew") from None
    except ValueError as error:
        raise ValueError(f"out: cannot read {path}: {_said(error)}; --force begins anew") from None
    return rows


def _read_settings(out: Path) -> dict[str, Any] | None:
    """Of the table there; one without rows binds nobody."""
    if not (out / "lmn.csv").exists():
        return None
    path = out / "lmn.json"
    try:
        stored = json.loads(path.read_bytes().decode("utf-8-sig"))
        known = {"checkpoints": list, "files": dict, "device": str}
        if not isinstance(stored, dict) or not all(
            isinstance(stored.get(n), kind) for n, kind in known.items()
        ):
            raise ValueError(f"expected the settings of a table, got {contents(stored)}")
        if not all(isinstance(pattern, str) for pattern in stored["checkpoints"]):
            raise ValueError("checkpoints: expected patterns")
    except FileNotFoundError:
        raise ValueError(f"out: {out} holds lmn.csv but no lmn.json; --force deletes it") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"out: cannot read {path}: {_said(error)}; --force begins anew") from None
    return stored


def _version(path: str) -> list[int | str]:
    """Another one when the file was written anew, or replaced by one of the same size and time."""
    status = os.stat(path)
    places, length = SAMPLED
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for place in range(places):  # the last bytes of a zip archive are the checksums of all
            file.seek(max(0, status.st_size - length) * place // (places - 1))
            digest.update(file.read(length))
    return [status.st_size, status.st_mtime_ns, digest.hexdigest()[:16]]


def draw_checkpoints(out: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> Path:
    """Draws OUT/lmn.png, a line for each layer, from the rows of `measure_checkpoints`; returns its path.
    Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = [name for name in rows[0] if name.startswith("lmn_")]
    colours: Sequence[Any] = COLOURS
    if len(layers) > len(COLOURS):  # in the order of depth
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(layers))).tolist()
    with matplotlib.rc_context({"font.size": 13, "legend.frameon": False, "lines.linewidth": 2}):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes = figure.subplots()
        steps = [row["step"] for row in rows]
        marker = "." if len(rows) <= 50 else ""
        for name, colour, style in zip(layers, colours, cycle(STYLES), strict=False):
            look = {"color": colour, "linestyle": style, "marker": marker, "label": name.removeprefix("lmn_")}
            axes.plot(steps, [row[name] for row in rows], **look)
        counted = steps_of([row["checkpoint"] for row in rows]) is None
        method = rows[0]["method"]
        axes.set(
            xlabel="Checkpoint, by name" if counted else "Step",
            ylabel="LMN" if method == "path" else f"LMN ({method})",
            ylim=(0, None),
        )
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=all(isinstance(step, int) for step in steps)))
        widest = max(map(len, layers))
        columns = max(1, min(len(layers), 60 // (widest + 4)))
        if len(layers) > 12:
            figure.legend(loc="outside right upper", fontsize=9, ncols=-(-len(layers) // 25))
        else:
            figure.legend(loc="outside upper center", ncols=columns)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=200)
    path = Path(out) / "lmn.png"
    write_file(path, image.getvalue())
    return path
