"""Directories that runs and tables are kept in: whole files, and one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def write_file(path: Path, content: bytes) -> None:
    """Writes a file so that whoever reads it finds the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Makes the directory and keeps other processes out of it; a killed process loses its lock."""
    lock = FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(f"out: another process is at work in {path}") from None
    except OSError as error:
        raise OSError(f"out: cannot write to {path}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()
