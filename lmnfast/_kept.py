"""Values and arrays in one .npz file that numpy reads without running code, and as a small table for notebooks."""

import json
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ._files import write_file

VERSION = 1  # of the format; a reader takes this and earlier ones
ABOUT = "lmnfast"  # the member that has all but the arrays, as JSON


def write_values(
    path: str | os.PathLike[str], kind: str, plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes plain values and arrays. The file is written whole or not at all.

    Args:
        path: the file.
        kind: what the values are, for the reader.
        plain: what JSON can hold; also NaN.
        arrays: of numbers.
    """
    about = np.array(json.dumps({"kind": kind, "version": VERSION, "values": dict(plain)}))
    write_file(Path(path), lambda file: np.savez(file, allow_pickle=False, **{ABOUT: about}, **arrays))


def read_values(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads a file of `write_values`, and runs no code that it may contain.

    Raises:
        ValueError: another file, a damaged one, or one of a later format. The message is the reason, without the file's name.
        OSError: there is no file, or it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as members:
                arrays = {name: members[name] for name in members}
            about = json.loads(arrays.pop(ABOUT).item())
            found, version, values = about["kind"], about["version"], about["values"]
        except Exception as error:  # a damaged file can raise any error
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{type(error).__name__}: {reason}" if reason else type(error).__name__
            ) from None
    if found != kind:
        raise ValueError(f"it is a {found}")
    if version not in range(1, VERSION + 1):
        raise ValueError(f"its format is {version!r}; this version of lmnfast knows 1 to {VERSION}")
    return values, arrays


def html_table(title: str, values: Mapping[str, Any]) -> str:
    """Names and values as a table. It has no colours of its own, so that light and dark pages can show it."""
    rows = "".join(
        f'<tr><th style="text-align: left">{escape(name)}</th>'
        f'<td style="text-align: left">{escape(formatted(value).strip(chr(39)))}</td></tr>'
        for name, value in values.items()
    )
    head = f'<thead><tr><th colspan="2" style="text-align: left">{escape(title)}</th></tr></thead>'
    return f"<table>{head}<tbody>{rows}</tbody></table>"


def formatted(value: Any) -> str:
    """A value in a line of text: floats by six digits."""
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
