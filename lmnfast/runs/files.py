"""Directories that runs and tables are kept in: whole files, and one process at a time."""

import glob
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

CHECKSUM_LENGTH = 22  # also that of the record that ends a zip archive without a comment


def write_file(path: Path, content: bytes) -> None:
    """Writes a file so that whoever reads it finds the old one or the new one, whole.

    The content is first written to NAME.PID.part, so that two processes never share one. A part that a killed process
    left is deleted by the next write of the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        pid = left.name[len(path.name) + 1 : -len(".part")]
        if pid.isdecimal() and not _alive(int(pid)):
            left.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`write_file` of plain values as JSON."""
    write_file(path, json.dumps(content, indent=2).encode() + b"\n")


def _alive(pid: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is no question
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


@contextmanager
def claimed(path: Path, name: str = "out") -> Iterator[None]:
    """Makes the directory and keeps other processes out of it; a killed process loses its lock.

    Args:
        path: the directory.
        name: of the argument that the directory came from, for errors.

    Raises:
        ValueError: another process is at work there.
        OSError: it cannot be written.
    """
    lock = FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(f"{name}: another process is at work in {path}") from None
    except OSError as error:
        raise OSError(f"{name}: cannot write to {path}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


class Unreadable(ValueError):
    """A file cannot be read; the message names it."""


def unreadable(file: Path, error: Exception) -> Unreadable:
    """The error of a file, with its reason in one line."""
    return Unreadable(f"cannot read {file}, {type(error).__name__}: {' '.join(str(error).split())}")


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """torch.save of tensors and plain values, loadable with weights_only=True, with a checksum of the whole file.

    The checksum is the comment that may end a zip archive. torch.load does not look at it.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getvalue()
    if not archive.endswith(b"\0\0"):  # the length of the comment
        raise ValueError(f"torch.save: expected a zip archive without a comment for {path}")
    archive = archive[:-2] + CHECKSUM_LENGTH.to_bytes(2, "little")
    write_file(path, archive + _checksum(archive))


def _checksum(archive: bytes) -> bytes:
    return b"lmnfast crc32 %08x" % zlib.crc32(archive)


def read_tensors(path: Path, device: str | torch.device = "cpu") -> Any:
    """What `save_tensors` wrote.

    Raises:
        Unreadable: a damaged file, also one with a single changed byte.
        FileNotFoundError: there is no file.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        archive, comment = content.getvalue()[:-CHECKSUM_LENGTH], content.getvalue()[-CHECKSUM_LENGTH:]
        if comment.startswith(b"PK\5\6"):
            # There is no comment, as in what torch.save alone writes: only the members have checksums.
            with zipfile.ZipFile(content) as members:
                if damaged := members.testzip():
                    raise ValueError(f"the checksum of {damaged} is wrong")
            content.seek(0)
        elif comment != _checksum(archive):
            raise ValueError("its checksum is wrong")
        return torch.load(content, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file raises anything
        raise unreadable(path, error) from None
