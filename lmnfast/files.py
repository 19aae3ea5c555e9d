"""Directories that runs and tables are kept in: whole files, and one process at a time."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


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

    name: of the argument that the directory came from, for errors.
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
