"""The table of a model's checkpoints. If the work is stopped, it can be continued later.

The table is a directory with three files. lmn.csv has one row per measured checkpoint, and is written after each checkpoint.
lmn.json has the settings, and facts that identify the checkpoint files. lmn.png is the figure. Each file is written under
another name and then renamed. Work that was stopped, also by kill -9, continues with the checkpoints that have no row yet.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from .._nested import contents
from ..runs.files import write_json
from ..runs.tables import LacksColumns, check_continues, read_table, write_table
from ..spectrum import SETTINGS, SHARES
from .sources import in_one_line, natural_order
from .steps import steps_of

SAMPLED = 16, 4096  # number of places in a file, and bytes at each place, that identify the file


class Table:
    """The rows of checkpoints. They are kept in lmn.csv and lmn.json of a directory, if there is a directory.

    Args:
        out: the directory; None: the table is not written.
        settings: the settings that determine the rows.
        stored: the settings of the table in `out`, as `read_settings` returns them.
        paths: the paths of the checkpoints.

    Raises:
        ValueError: the table in `out` is damaged or has other settings; the names do not determine the steps.
    """

    def __init__(
        self, out: Path | None, settings: dict[str, Any], stored: dict[str, Any] | None, paths: Sequence[str]
    ) -> None:
        self.out = out
        self.observables: Sequence[str] = settings["observables"] or ()
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
        names = sorted(written_as + [path for path in paths if not self.has(path)], key=natural_order)
        steps: Sequence[int | float] = steps_of(names) or range(len(names))
        self.steps = dict(zip(names, steps, strict=True))
        # lmn.csv is written first: lmn.json must not list the new versions of files while lmn.csv has rows of the old ones.
        self._write()
        if out is not None:
            write_json(out / "lmn.json", settings | {"files": files | now})

    def has(self, path: str) -> bool:
        """Whether the checkpoint has a row."""
        return os.path.abspath(path) in {os.path.abspath(row["checkpoint"]) for row in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        """Adds the row of a checkpoint, and writes all rows."""
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
        columns = _columns(
            [n.removeprefix("lmn_") for n in self.rows[0] if n.startswith("lmn_")], self.observables
        )
        write_table(self.out / "lmn.csv", columns, self.rows)


def _columns(layers: Sequence[str], observables: Sequence[str]) -> list[str]:
    kinds = dict.fromkeys(("lmn", *SHARES, *observables))
    of_layers = {kind: [f"{kind}_{layer}" for layer in layers] for kind in kinds}
    return ["step", "checkpoint", *of_layers.pop("lmn"), *SETTINGS, *chain(*of_layers.values())]


def _read_rows(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of lmn.csv. Raises ValueError, with the name of the file, if `Table` did not write the file."""
    try:
        columns = _columns(settings["layers"], settings["observables"] or ())
        rows = read_table(path, columns, encoding="utf-8-sig")
        fixed = {name: settings[name] for name in ("points", "rule", "method", "negative", "stabiliser")}
        if any(row | fixed != row for row in rows) or len({row["checkpoint"] for row in rows}) < len(rows):
            raise ValueError("a row is not of this table")
    except LacksColumns as error:
        raise ValueError(f"out: cannot read {path}: it {error}; --force begins anew") from None
    except ValueError as error:
        raise ValueError(f"out: cannot read {path}: {in_one_line(error)}; --force begins anew") from None
    return rows


def read_settings(out: Path) -> dict[str, Any] | None:
    """The settings of the table in a directory; None if it has no rows. Without a stabiliser, as earlier versions wrote them,
    they are read as with stabiliser 0.

    Raises:
        ValueError: lmn.json is missing or damaged.
    """
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
        raise ValueError(f"out: cannot read {path}: {in_one_line(error)}; --force begins anew") from None
    return {"stabiliser": 0.0, **stored}


def _version(path: str) -> list[int | str]:
    """Facts that change when a file is written again, or replaced by a file of the same size and time."""
    status = os.stat(path)
    places, length = SAMPLED
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        # The last place is the end of the file. In a zip archive it has the checksums of all members.
        for place in range(places):
            file.seek(max(0, status.st_size - length) * place // (places - 1))
            digest.update(file.read(length))
    return [status.st_size, status.st_mtime_ns, digest.hexdigest()[:16]]
