"""CSV tables with known columns, and a check of the settings with which a table was made.

The name of a column determines the type of its values: INTEGERS, WORDS, or else floats. Floats are written with seven digits,
as many as float32 holds. A float that is read from a table and written again does not change. EXACT floats are written in full:
a step, which may be an integer or a fraction, and settings.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import csv_entries, csv_line, write_file
from .._history import WORDS
from .._nested import first_names
from .._observables import observables
from .._settings import completed
from ..spectrum import SETTINGS, SHARES

INTEGERS = ("samples", "outputs", "points", "seed", "lost_gradients")
EXACT = ("step", "stabiliser")


def joined(values: str, value: str) -> str:
    """Joins words of rows that become one row. Each word appears once: "cpu", "cpu+cuda"."""
    return "+".join(sorted({*values.split("+"), value}))


class LacksColumns(ValueError):
    """The table lacks columns. The message is written to follow the name of the file."""


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a table with these columns of the rows. The file is written whole or not at all."""
    lines = [csv_line(columns), *(csv_line(_written(c, row[c]) for c in columns) for row in rows)]
    write_file(path, b"".join(lines))


def _written(column: str, value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) and column not in EXACT else value


def read_table(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    optional: Collection[str] = (),
    encoding: str = "utf-8",
) -> list[dict[str, Any]]:
    """The rows of a table that `write_table` wrote. A table of measurements without the column stabiliser, as earlier versions
    wrote them, is read as with stabiliser 0.

    Args:
        path: the file.
        columns: the columns that the table must have, in this order. None: any columns, if "step" is one of them.
        optional: columns whose values may be empty. An empty value is read as "".
        encoding: "utf-8-sig" also reads a file that a spreadsheet has saved, with a byte order mark.

    Raises:
        ValueError: the file is not such a table. The message is the reason, without the name of the file.
        OSError: there is no file, or it cannot be read.
    """
    text = path.read_bytes().decode(encoding)
    if not text.endswith("\n"):
        raise ValueError("its last line has no end")
    head, *lines = csv_entries(text, strict=True)
    lacks = "negative" in head and "stabiliser" not in head and "stabiliser" in (columns or SETTINGS)
    _check_head(head, [name for name in columns if name != "stabiliser"] if columns and lacks else columns)
    for number, line in enumerate(lines, 2):
        if len(line) != len(head):
            raise ValueError(f"expected {len(head)} entries in line {number}, got {len(line)}")
    rows = [{name: _typed(name, entry, optional) for name, entry in zip(head, line)} for line in lines]
    return [completed(row) for row in rows] if lacks else rows


def _check_head(head: Sequence[str], columns: Sequence[str] | None) -> None:
    if lacking := [name for name in columns or ["step"] if name not in head]:
        raise LacksColumns(
            f"lacks the columns {', '.join(lacking)}, another version of lmnfast wrote it, or it is damaged"
        )
    if columns is not None and list(head) != list(columns):
        raise ValueError(f"expected the columns {first_names(columns)}, got {first_names(head)}")


def _typed(name: str, text: str, optional: Collection[str]) -> int | float | str:
    if name in WORDS or (text == "" and name in optional):
        return text
    if name in INTEGERS or (name == "step" and text.isdecimal()):
        return int(text)
    number = float(text)
    if not math.isfinite(number) and not _may_be_nan(name):
        raise ValueError(f"{name} is {text}")
    return number


def _may_be_nan(column: str) -> bool:
    """Whether a column may lack values: shares of matrices of earlier versions, and observables that do not apply."""
    names = [each.name for each in observables() if each.name != "lmn"]
    return column.startswith((*SHARES, *(f"{name}_" for name in names)))


def check_continues(
    path: Path,
    what: str,
    stored: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    otherwise: str = "",
    may_change: Callable[[str, Any, Any], bool] = lambda name, old, new: False,
    most: int | None = None,
) -> None:
    """Checks that the stored work in a directory can be continued with the given settings.

    Args:
        path: the directory.
        what: the name of the stored work if its settings differ, for the message: "another run".
        stored: the settings of the stored work.
        given: the settings of the present work.
        otherwise: what the user can do instead of choosing another directory, for the message.
        may_change: a function of a setting's name, its stored and its given value; whether this change is allowed.
        most: the largest number of differences in the message; None: all.

    Raises:
        ValueError: the settings differ; the message names the differences.
    """
    differences = [
        f"{name} is {_brief(stored.get(name))} there, {_brief(value)} here"
        for name, value in given.items()
        if stored.get(name) != value and not may_change(name, stored.get(name), value)
    ]
    if differences:
        raise ValueError(
            f"out: {path} holds {what}: {'; '.join(differences[:most])}; choose another --out{otherwise}"
        )


def _brief(value: Any) -> str:
    return first_names(map(str, value)) if isinstance(value, list) else str(value)
