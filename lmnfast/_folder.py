"""A folder with the tiles of a connectivity matrix, which any number of processes fill, and the matrix that is made of them."""

from __future__ import annotations

import json
import os
import re
import reprlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from ._files import write_file
from ._group import Tile
from ._identity import PARTS, Identity
from ._matrix_file import check_matrix, mapped, read_about, write_matrix
from ._nested import first_names
from ._plane import Plane
from ._settings import Settings

MANIFEST, MATRIX = "tiles.json", "connectivity.npy"
VERSION = 1
# The most samples of a folder: their matrix would have a petabyte. The number of tiles stays countable, also where the manifest
# is damaged.
MOST_SAMPLES = 2**24
# Bytes of the rows that `assembled` keeps in memory at one time.
STRIP = 2**28


def folder_of(out: Any) -> Path:
    """The path of a folder that is given by its name. Raises TypeError or ValueError for what can be none."""
    name = os.fspath(out) if isinstance(out, os.PathLike) else out
    if not isinstance(name, str):
        raise TypeError(f"out: expected a path, got {out!r}")
    if not name or "\0" in name:
        raise ValueError(f"out: expected the path of a folder, got {name!r}")
    path = Path(name)
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"out: expected a folder, {path} is {'a file' if path.is_file() else 'no folder'}")
    return path


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_size(value: Any) -> bool:
    """Also infinity."""
    return type(value) in (int, float) and value >= 0


def _is_share(value: Any) -> bool:
    return _is_size(value) and value <= 1


def _is_hash(value: Any) -> bool:
    return _is_text(value) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_object(value: Any) -> bool:
    return type(value) is dict


def _is_table(value: Any) -> bool:
    """Whether it is rows of numbers, equally many in each. They may be NaN or Inf, as a network's outputs may."""
    return (
        type(value) is list
        and bool(value)
        and all(type(row) is list and 0 < len(row) == len(value[0]) for row in value)
        and all(type(entry) is float for row in value for entry in row)
    )


# What the facts of a tile are, by their types, and the values of a manifest, by their names. A file may have been damaged by
# anything, so nothing of it is used that is not checked.
FACTS: dict[str, Callable[[Any], bool]] = {"int": _is_count, "str": _is_text, "float": _is_size}
VALUES: dict[str, Callable[[Any], bool]] = {
    "version": lambda value: type(value) is int and value == VERSION,
    "dtype": lambda value: value in ("float32", "float64"),
    "command": _is_text,
    "mark": lambda value: _is_text(value) and re.fullmatch("[0-9a-f]{32}", value) is not None,
    "identity": _is_object,
    "identity.network": lambda value: value == "" or _is_hash(value),
    "identity.samples": _is_hash,
    "identity.outputs": _is_table,
    "identity.tolerance": _is_share,
    "identity.rounding": _is_share,
    "identity.settings": _is_object,
    "identity.settings.samples": lambda value: type(value) is int and 2 <= value <= MOST_SAMPLES,
    "identity.settings.method": _is_text,
    "identity.settings.points": _is_count,
    "identity.settings.rule": _is_text,
    "identity.settings.stabiliser": _is_size,
    "identity.settings.pooled": lambda value: value is False,
    "identity.settings.float32_matmul_precision": _is_text,
    "identity.settings.outputs": _is_text,
    "identity.settings.autocast": lambda value: value is None or _is_text(value),
    "identity.settings.lmnfast": _is_text,
}


@dataclass(frozen=True)
class Folder:
    """The manifest tiles.json, a file tile-NNNNN.npy for each tile, and connectivity.npy once it is made."""

    path: Path
    identity: Identity
    dtype: str
    command: str
    """What makes the tiles, for messages."""
    mark: str
    """Drawn when the manifest is written. Tiles of an earlier manifest are foreign: that of a function that is no module does
    not say which function it was."""

    @classmethod
    def begun(cls, path: Path, identity: Identity, dtype: str, command: str) -> Folder:
        """The folder, made if there is none. Several processes may do this at once.

        Raises:
            ValueError: there is a folder with the tiles of another measurement; the message names what differs.
            OSError: it cannot be written.
        """
        new = cls(path, identity, dtype, command, uuid.uuid4().hex)
        manifest = path / MANIFEST
        try:
            if not manifest.exists():  # in one that is whole already nothing is written
                path.mkdir(parents=True, exist_ok=True)
                with FileLock(path / ".lock"):
                    if not manifest.exists():
                        write_file(manifest, json.dumps(new._manifest(), indent=2).encode() + b"\n")
        except OSError as error:
            raise OSError(f"out: cannot write to {path}: {error.strerror or error}") from error
        there = cls.read(path)
        if differing := there.identity.differs(identity):
            said = " and ".join(PARTS[part] for part in differing)
            if "settings" in differing:
                said += f" ({there.identity.settings_said(identity, 'there', 'here')})"
            raise ValueError(f"out: {path} holds tiles of {said}; expected a folder for each measurement")
        if there.dtype != dtype:
            raise ValueError(f"out: cannot read {manifest}: dtype: expected {dtype}, got {there.dtype}")
        return there

    @classmethod
    def read(cls, path: Path) -> Folder:
        """The folder that is there. Raises ValueError if it is none, or its manifest is damaged."""
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            _check_manifest(manifest)
            identity = Identity(**manifest["identity"])
            folder = cls(path, identity, *(manifest[name] for name in ("dtype", "command", "mark")))
            _ = folder.settings
            return folder
        except FileNotFoundError:
            said = f"{path} has no {MANIFEST}" if path.is_dir() else f"there is no {path}"
            raise ValueError(f"out: expected a folder of lmnfast tiles, {said}") from None
        except Exception as error:  # the file may contain anything
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            reason = " ".join(str(error).split())
            raise ValueError(f"out: cannot read {path / MANIFEST}: {kind}{reason}") from None

    def check_writable(self) -> None:
        """Raises OSError if no file can be written, before the work that a file would be made of."""
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise OSError(f"out: cannot write to {self.path}, and tiles are missing there")

    def _manifest(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "identity": self.identity.to_dict(),
            "dtype": self.dtype,
            "command": self.command,
            "mark": self.mark,
        }

    @property
    def hash(self) -> str:
        """What each file of this measurement carries."""
        return f"{self.identity.hash}-{self.mark}"

    @property
    def plane(self) -> Plane:
        return Plane(self.identity.settings["samples"])

    @property
    def settings(self) -> Settings:
        """Those that a measurement names."""
        names = ("method", "points", "rule", "stabiliser")
        return Settings(**{name: self.identity.settings[name] for name in names})

    def file(self, tile: int) -> Path:
        return self.path / f"tile-{tile:05d}.npy"

    def write(self, number: int, tile: Tile, entries: Tensor) -> Path:
        """Writes a tile. Raises OSError."""
        path, n = self.file(number), len(entries)
        about = {"hash": self.hash, "tile": number, **asdict(tile)}
        write_matrix(path, [entries.cpu().numpy()], (n, n), self.dtype, about)
        return path

    def tile(self, number: int) -> Tile | str:
        """What is known of an intact tile; or why there is none: "missing", or what is wrong with its file."""
        path, n = self.file(number), sum(map(len, self.plane.blocks(number)))
        try:
            tile = self._checked(read_about(path), number)
            check_matrix(path, (n, n), self.dtype)
        except FileNotFoundError:
            return "missing"
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())
        return tile

    def _checked(self, about: Mapping[str, Any], number: int) -> Tile:
        """The tile that a file's facts say. Raises ValueError, with the reason, for others than those of this tile."""
        if about.get("hash") != self.hash:
            raise ValueError("it is of another network, other samples or settings")
        if about.get("tile") != number:
            raise ValueError(f"it is tile {about.get('tile')}")
        own: dict[str, Any] = {field.name: about.get(field.name) for field in fields(Tile)}
        for field in fields(Tile):
            if not FACTS[str(field.type)](own[field.name]) or (field.name, own[field.name]) == ("outputs", 0):
                raise ValueError(f"its {field.name} is {reprlib.repr(own[field.name])}")
        return Tile(**own)

    def tiles(self) -> list[Tile]:
        """All tiles. Raises ValueError if some are missing or damaged; the message names them and what makes them."""
        found = {number: self.tile(number) for number in self.plane.each()}
        wrong = {number: tile for number, tile in found.items() if isinstance(tile, str)}
        if wrong:
            missing = [self.file(number).name for number, why in wrong.items() if why == "missing"]
            damaged = [
                f"{self.file(number).name} ({why})" for number, why in wrong.items() if why != "missing"
            ]
            kinds = {"missing": missing, "damaged": damaged}
            said = " and ".join(
                f"{len(names)} {kind}: {first_names(names)}" for kind, names in kinds.items() if names
            )
            raise ValueError(
                f"out: of {len(found)} tiles in {self.path} there are {said}; to make them: {self.command}"
            )
        return [tile for tile in found.values() if isinstance(tile, Tile)]

    def assembled(self) -> Tensor:
        """The matrix (N, N) in connectivity.npy, mapped into memory. It is made of the tiles if it is not there."""
        path, n = self.path / MATRIX, self.plane.samples
        try:
            intact = read_about(path).get("hash") == self.hash
            check_matrix(path, (n, n), self.dtype)
        except (OSError, ValueError):
            intact = False
        if not intact:
            write_matrix(path, self._strips(), (n, n), self.dtype, {"hash": self.hash})
        return torch.from_numpy(mapped(path))

    def _strips(self) -> Iterator[np.ndarray]:
        """The rows of the matrix, some at a time. Of a tile only the rows that are needed are read."""
        plane, n = self.plane, self.plane.samples
        rows = max(1, STRIP // (n * np.dtype(self.dtype).itemsize))
        members = {number: plane.members(number).numpy() for number in plane.each()}
        buffer = np.empty((min(rows, n), n), dtype=self.dtype)
        for start in range(0, n, rows):
            strip = buffer[: n - start]
            strip[np.arange(len(strip)), np.arange(start, start + len(strip))] = 1.0
            for number, samples in members.items():
                first, last = np.searchsorted(samples, (start, start + len(strip)))
                if first < last:
                    part = mapped(self.file(number))[first:last]
                    for row, entries in zip(samples[first:last] - start, part):
                        strip[row, samples] = entries
            yield strip


def _check_manifest(manifest: Any) -> None:
    """Raises ValueError for what no `Folder.begun` writes."""
    if not _is_object(manifest):
        raise ValueError(f"it is {reprlib.repr(manifest)}")
    for name, good in VALUES.items():
        value = manifest
        for part in name.split("."):  # those before the last are objects, which were checked before
            if part not in value:
                raise ValueError(f"{name} is missing")
            value = value[part]
        if not good(value):
            known = f"; this version of lmnfast knows {VERSION}" if name == "version" else ""
            raise ValueError(f"{name} is {reprlib.repr(value)}{known}")
