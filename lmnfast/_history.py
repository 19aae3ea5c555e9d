"""Reads tables of measurements back."""

from __future__ import annotations

import gzip
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._files import csv_entries
from ._observables import observables
from ._settings import completed
from .spectrum import SETTINGS, SHARES

TABLES = ("metrics.csv", "lmn.csv", "results.csv")  # of a run, of checkpoints or a CSVWriter, of a study
NUMBERS = ("samples", "outputs", "points", "stabiliser")  # among SETTINGS; the others are words
# Columns whose entries are words, also if they look like numbers: a layer may be called "0".
WORDS = (
    *("run", "task", "activation", "layer", "checkpoint", "question", "variant", "phase"),
    *(name for name in SETTINGS if name not in NUMBERS),
)
SHORTEST = ("step", "samples")  # a table of ours has one of these


def history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the rows of a CSV file that lmnfast wrote.

    These are the files of `CSVWriter` (rows as in `Probe.history`), a run's metrics.csv and measure-*.csv, the lmn.csv of
    `measure_checkpoints`, and a study's results.csv, also as .csv.gz.

    Args:
        path: the file; or a directory with one of metrics.csv, lmn.csv, results.csv in it, as a run's.

    Returns:
        One dict for each row. Numbers are int or float as they are written; a measured number, such as LMN, is a float. An
        empty entry is None. Rows of versions without the column stabiliser get stabiliser 0.

    Raises:
        ValueError: no such file of ours, or a damaged one; a directory with none of these files, or with several.
        OSError: there is no file, or it cannot be read.

    Warns:
        UserWarning: the last line has no end, as in a file that is being written. It is left out.

    Example:
        >>> from lmnfast.integrations import CSVWriter
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.SiLU())
        >>> with lmnfast.Probe(model, torch.randn(20, 4), "0", every=10, writers=[CSVWriter("lmn.csv")]) as probe:
        ...     measured = [probe(step, loss=0.5) for step in range(11)]
        >>> lmnfast.history("lmn.csv") == probe.history
        True
    """
    file = _file_of(Path(path))
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            if text:
                warnings.warn(f"path: the last line of {file} has no end and is left out", stacklevel=2)
        head, *lines = csv_entries(text, strict=True) or [[]]
        if not set(SHORTEST) & set(head) or len(set(head)) < len(head):
            raise ValueError(f"its first line names no column {' or '.join(SHORTEST)}, or one twice")
        for number, line in enumerate(lines, 2):
            if len(line) != len(head):
                raise ValueError(f"expected {len(head)} entries in line {number}, got {len(line)}")
        columns = {name: _typed(name, [line[k] for line in lines]) for k, name in enumerate(head)}
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"path: expected a table of lmnfast, got {file}: {error}") from None
    return [completed(dict(zip(columns, entries))) for entries in zip(*columns.values())]


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [name for name in TABLES if (path / name).is_file()]
    if len(found) != 1:
        there = " and ".join(found) or "none of them"
        raise ValueError(
            f"path: expected a directory with one of {', '.join(TABLES)}, got {path} with {there}"
        )
    return path / found[0]


def _typed(name: str, entries: Sequence[str]) -> list[Any]:
    """The entries of a column: words, or numbers if all that are not empty are numbers."""
    if name in WORDS:
        return [entry or None for entry in entries]
    for kind in (float,) if _is_measured(name) else (int, _truth, float):
        try:
            return [kind(entry) if entry else None for entry in entries]
        except ValueError:
            continue
    if name in ("lmn", "complexity_bits", "stabiliser"):  # columns that only lmnfast writes
        raise ValueError(f"expected numbers in column {name}")
    return [entry or None for entry in entries]


def _truth(entry: str) -> bool:
    if entry not in ("True", "False"):
        raise ValueError
    return entry == "True"


def _is_measured(name: str) -> bool:
    kinds = ("lmn", "complexity_bits", *SHARES, *(each.name for each in observables()))
    return name == "stabiliser" or any(name == kind or name.startswith(f"{kind}_") for kind in kinds)
