"""A folder with the tiles of a connectivity matrix, which any number of processes fill, and the matrix that is made of them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
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
from ._matrix_file import mapped, read_about, write_matrix
from ._nested import first_names
from ._plane import Plane

MANIFEST, MATRIX = "tiles.json", "connectivity.npy"
VERSION = 1
# Bytes of the rows that `assembled` keeps in memory at one time.
STRIP = 2**28


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
        try:
            path.mkdir(parents=True, exist_ok=True)
            with FileLock(path / ".lock"):
                if not (path / MANIFEST).exists():
                    write_file(path / MANIFEST, json.dumps(new._manifest(), indent=2).encode() + b"\n")
        except OSError as error:
            raise OSError(f"out: cannot write to {path}: {error.strerror or error}") from error
        there = cls.read(path)
        if differing := there.identity.differs(identity):
            said = " and ".join(PARTS[part] for part in differing)
            if "settings" in differing:
                said += f" ({there.identity.settings_said(identity, 'there', 'here')})"
            raise ValueError(f"out: {path} holds tiles of {said}; expected a folder for each measurement")
        return there

    @classmethod
    def read(cls, path: Path) -> Folder:
        """The folder that is there. Raises ValueError if it is none, or its manifest is damaged."""
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            if manifest["version"] != VERSION:
                raise ValueError(
                    f"its format is {manifest['version']!r}, this version of lmnfast knows {VERSION}"
                )
            identity = Identity(**manifest["identity"])
            dtype, command, mark = (str(manifest[name]) for name in ("dtype", "command", "mark"))
            return cls(path, identity, str(np.dtype(dtype)), command, mark)
        except FileNotFoundError:
            raise ValueError(f"out: expected a folder of lmnfast tiles, {path} has no {MANIFEST}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"out: cannot read {path / MANIFEST}: {type(error).__name__}: {reason}"
            ) from None

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
        return Plane(int(self.identity.settings["samples"]))

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
        try:
            about = read_about(self.file(number))
        except FileNotFoundError:
            return "missing"
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())
        return self._checked(about, number)

    def _checked(self, about: Mapping[str, Any], number: int) -> Tile | str:
        if about.get("hash") != self.hash:
            return "it is of another network, other samples or settings"
        if about.get("tile") != number:
            return f"it is tile {about.get('tile')}"
        return Tile(**{field.name: about[field.name] for field in fields(Tile)})

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
        path = self.path / MATRIX
        try:
            intact = read_about(path).get("hash") == self.hash
        except (OSError, ValueError):
            intact = False
        if not intact:
            n = self.plane.samples
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
