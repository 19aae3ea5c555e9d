"""Files that are written whole, and lines of CSV files."""

import csv
import glob
import io
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO


def write_file(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Writes a file so that a reader finds either the whole old file or the whole new file.

    The content is first written to the file NAME.PID-THREAD.part, which nothing else uses, and that file is then renamed. If a
    process was killed in between, the next write of the same file deletes the part that it left.

    Args:
        path: the file; of a symbolic link what it leads to. Missing folders are made.
        content: the bytes, or a function that writes them into an open file.

    Raises:
        OSError: the file cannot be written, or the path is something else than a file.
    """
    path = path.resolve()
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, or none, got a directory")
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: expected a file to write, or none, got a device or a pipe")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with part.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    remove_parts(path)


def remove_parts(path: Path) -> None:
    """Deletes what processes have left that were killed while they wrote the file."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        pid = left.name[len(path.name) + 1 : -len(".part")].partition("-")[0]
        if pid.isdecimal() and not _alive(int(pid)):
            left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":  # on other systems signal 0 is not a harmless test
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        return True
    return True


def csv_line(values: Iterable[Any]) -> bytes:
    """One line of a CSV file. Entries with any end of a line in them are quoted."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(values)  # quotes what has one of these letters
    return text.getvalue().removesuffix("\r\n").encode() + b"\n"


def csv_entries(text: str, strict: bool = False) -> list[list[str]]:
    """The entries of each line of a CSV file. strict: raise ValueError for quotes that do not end."""
    try:
        return list(csv.reader(io.StringIO(text, newline=""), strict=strict))
    except csv.Error as error:
        raise ValueError(str(error)) from None
