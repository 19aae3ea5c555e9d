"""The cores, threads and locks of a measurement, and Ctrl-C while a model is measured."""

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
    _lock, _forked = threading.RLock(), True  # whichever thread held the lock is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def on_one_core() -> None:
    """Runs first in a thread beside a training, which then computes on one core.

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
    """As many as torch uses, but no more than this thread may run on, where they would wait for one another; 1 in a forked
    process. The threads of an OpenMP runtime are not copied by a fork, and the child that goes on with more than one thread
    waits for them for ever."""
    return 1 if _forked else min(torch.get_num_threads(), cores())


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
    """One thread of the process at a time is in here, as modes, hooks and attributes of a model are one for all threads;
    the same one again, too. In a forked process on one core."""
    with _lock:
        if not _forked:
            yield
            return
        with one_core_after_fork():
            yield


@contextmanager
def lapack_on_one_core() -> Iterator[None]:
    """Torch's LAPACK uses one thread when this thread calls it, so that its results have the same bits for any thread count.

    Other threads go on as they are. Of no effect where torch's LAPACK is neither MKL nor OpenBLAS.
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
    """Sets how many threads LAPACK uses for the calling thread, and returns how many it did; 0: as many as the process."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), os.RTLD_NOLOAD)
    except (AttributeError, OSError):  # on another system
        return None
    for name in ("MKL_Set_Num_Threads_Local", "openblas_set_num_threads_local"):
        if (function := getattr(torch_cpu, name, None)) is not None:
            return cast(Callable[[int], int], function)
    return None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: what changes the model, or torch, is done or put back as a whole."""
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
