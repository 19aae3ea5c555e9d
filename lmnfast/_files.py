"""Files that are written whole, and lines of CSV files."""

import csv
import errno
import glob
import hashlib
import io
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

# What a file's name has behind it while the file is written: machine, process, thread.
PART = r"\.([0-9a-f]{8})-(\d+)-\d+\.part"
# Seconds without a write after which a part of another machine counts as left by a process that was killed. Whether that
# process lives cannot be asked from here. One that waits for a whole day within a write gets an error when it goes on.
ABANDONED = 24 * 3600


def write_file(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Writes a file so that a reader finds either the whole old file or the whole new file.

    The content is first written to a part beside it, which nothing else uses, and the part is then renamed. Processes of
    several machines that share the folder may write the same file at once: the last one's stays. If a process was killed within
    a write, the next write of the same file deletes the part that it left: of a process of this machine at once, of another
    machine when the part is a day old.

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
    part = path.with_name(part_name(path.name, os.getpid()))
    try:
        with part.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
        try:
            part.replace(path)
        except FileNotFoundError:
            said = f"its part {part.name} was deleted before it could be renamed"
            raise FileNotFoundError(errno.ENOENT, said, str(path)) from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    remove_parts(path)


def part_name(name: str, pid: int) -> str:
    """What a file is called while a process writes it."""
    return f"{name}.{machine()}-{pid}-{threading.get_native_id()}.part"


def machine() -> str:
    """A word for the processes that see one another's numbers: those of a machine since it began, or of a container in it."""
    known = [socket.gethostname()]
    with suppress(OSError):  # Linux alone has these; elsewhere the name has to do
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        known.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(repr(known).encode()).hexdigest()[:8]


def remove_parts(path: Path) -> None:
    """Deletes what processes have left that were killed while they wrote the file.

    These are the parts of processes of this machine that do not live, and those of other machines that nothing has written to
    for a day.
    """
    for part in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        if found := re.fullmatch(re.escape(path.name) + PART, part.name):
            with suppress(OSError):  # another process has deleted it, or only its owner may
                here = found[1] == machine()
                old = time.time() - part.stat().st_mtime > ABANDONED
                if (here and not _alive(int(found[2]))) or (not here and old):
                    part.unlink()


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
