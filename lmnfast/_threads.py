"""Cores, threads and locks of a measurement, and the handling of Ctrl-C meanwhile."""

from __future__ import annotations

import _signal
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

_lock = threading.RLock()
_forked = False


def _after_fork() -> None:
    global _lock, _forked
    _lock, _forked = threading.RLock(), True  # the thread that held the lock does not exist in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def on_one_core() -> None:
    """Limits this thread to one core. To be called first in a thread that runs beside a training.

    With its own OpenMP pool there would be more threads than cores, and the runtime would put the training's threads to
    sleep between operations: measured on 2 cores, a training step of 1.5 ms takes 3.6 ms, for as long as the process
    lives.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    # That also changes the number for new threads. A new thread sets it back.
    restore = threading.Thread(target=torch.set_num_threads, args=(count,))
    restore.start()
    restore.join()


def cores_to_use() -> int:
    """The number of cores for a kernel: torch's number, but at most the cores that this thread may run on; 1 after a fork.

    With more threads than cores, threads would wait for one another. A fork does not copy the threads of an OpenMP runtime: a
    child that continues with more than one thread waits for them for ever.
    """
    threads = 1 if _forked else torch.get_num_threads()
    return threads if threads == 1 else min(threads, cores())


@contextmanager
def one_core_after_fork() -> Iterator[None]:
    """In a forked process torch's operations run on one core, for as long as the context lasts; see `cores_to_use`."""
    threads = torch.get_num_threads()
    if not _forked or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def alone() -> Iterator[None]:
    """Admits one thread of the process at a time, as all threads share the modes, hooks and attributes of a model.

    The same thread may enter again. In a forked process the block runs on one core.
    """
    with _lock:
        if not _forked:
            yield
            return
        with one_core_after_fork():
            yield


@contextmanager
def lapack_on_one_core() -> Iterator[None]:
    """Makes torch's LAPACK use one thread in calls from this thread: the results then have the same bits for any thread count.

    Other threads are not affected. Without effect if torch's LAPACK is neither MKL nor OpenBLAS.
    """
    set_threads = _lapack_threads()
    if set_threads is None:
        yield
        return
    before = set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


@cache
def _lapack_threads() -> Callable[[int], int] | None:
    """LAPACK's function that sets its number of threads for the calling thread and returns the old number; 0: the process's."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), os.RTLD_NOLOAD)
    except (AttributeError, OSError):  # systems other than Linux
        return None
    for name in ("MKL_Set_Num_Threads_Local", "openblas_set_num_threads_local"):
        if (function := getattr(torch_cpu, name, None)) is not None:
            return cast(Callable[[int], int], function)
    return None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C until the end of the block, so that changes of the model or of torch are made or undone as a whole."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs the handlers of signals on the main thread alone
        return
    handler = _signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    came: list[tuple[int, Any]] = []
    _signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        _signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
