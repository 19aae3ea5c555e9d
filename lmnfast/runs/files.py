"""Directories of runs and tables: files are written whole, and one process works in a directory at a time."""

import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .._files import write_file

CHECKSUM_LENGTH = 22  # also the length of the record at the end of a zip archive without a comment


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`write_file` of plain values as JSON."""
    write_file(path, json.dumps(content, indent=2).encode() + b"\n")


@contextmanager
def claimed(path: Path, name: str = "out") -> Iterator[None]:
    """Makes the directory and locks it against other processes. The lock of a killed process ends with the process.

    Args:
        path: the directory.
        name: the name of the argument that gave the directory, for errors.

    Raises:
        ValueError: another process is at work in the directory.
        OSError: the directory cannot be written.
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
    """A file cannot be read; the message names the file."""


def unreadable(file: Path, error: Exception) -> Unreadable:
    """The error for an unreadable file, with the reason in one line."""
    return Unreadable(f"cannot read {file}, {type(error).__name__}: {' '.join(str(error).split())}")


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """torch.save of tensors and plain values, with a checksum of the whole file. torch.load can read it with weights_only=True.

    The checksum is the comment at the end of the zip archive, which torch.load ignores.
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
    """Reads a file of `save_tensors`.

    Raises:
        Unreadable: the file is damaged; a single changed byte counts.
        FileNotFoundError: there is no file.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        archive, comment = content.getvalue()[:-CHECKSUM_LENGTH], content.getvalue()[-CHECKSUM_LENGTH:]
        if comment.startswith(b"PK\5\6"):
            # The archive has no comment, as in a file of torch.save itself. Then only the members have checksums.
            with zipfile.ZipFile(content) as members:
                if damaged := members.testzip():
                    raise ValueError(f"the checksum of {damaged} is wrong")
            content.seek(0)
        elif comment != _checksum(archive):
            raise ValueError("its checksum is wrong")
        return torch.load(content, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can raise any error
        raise unreadable(path, error) from None
