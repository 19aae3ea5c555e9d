"""Worker processes, with one rule for failures.

A job that fails does not stop other jobs: its `Outcome` holds its error. The caller then continues, or drops the jobs that have
not begun. An error of the caller ends all processes at once. This is safe, because the files that a job writes are whole at any
moment, and the same command later continues with them. A process that dies is replaced, and the jobs without an outcome begin
again, at most DEATHS times.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

DEATHS = 3  # more deaths of processes are not an accident
INTERVAL = 1.0  # seconds between two calls of `meanwhile`


@dataclass(frozen=True)
class Outcome:
    """The result of a job, or its error."""

    job: tuple[Any, ...]
    result: Any = None
    error: BaseException | None = None


class Pool:
    """Spawned processes. They share no memory with this process, and end when it ends.

    Args:
        processes: number of processes.
        begin: a function that is called in each process before its first job.
        arguments: the arguments of `begin`.
    """

    def __init__(
        self, processes: int, begin: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
    ) -> None:
        self._processes = processes
        self._preparation = begin, arguments
        self._others = multiprocessing.active_children()
        self._executor: ProcessPoolExecutor | None = None
        self._leaving = False

    def outcomes(
        self,
        function: Callable[..., Any],
        jobs: Iterable[tuple[Any, ...]],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Iterator[Outcome]:
        """Calls the function once per job; yields the outcomes in the order in which the jobs end.

        Args:
            function: a function that the processes can import.
            jobs: the arguments of each call. Jobs begin in this order.
            meanwhile: a function that is called about once in INTERVAL.

        Raises:
            OSError: processes died again and again.
        """
        left = list(jobs)
        for death in range(DEATHS + 1):
            try:
                yield from self._outcomes(function, left, meanwhile)
                return
            except BrokenProcessPool:
                if self._leaving:
                    return
                if death == DEATHS:
                    raise OSError(
                        "jobs: a process died again and again, perhaps because there was not enough memory; try fewer jobs; "
                        "the same command continues the work"
                    ) from None
                print("\nlmnfast: a process died; going on with what it left", file=sys.stderr)

    def _outcomes(
        self, function: Callable[..., Any], left: list[tuple[Any, ...]], meanwhile: Callable[[], None]
    ) -> Iterator[Outcome]:
        """As `outcomes`. Removes a job from `left` when it has an outcome. Raises BrokenProcessPool if a process died.

        The executor has one job for each process, and one more. No job is ever cancelled: in some versions of Python an
        executor with a cancelled job that loses a process waits for ever.
        """
        self._end()
        executor = ProcessPoolExecutor(
            self._processes, multiprocessing.get_context("spawn"), _begin_worker, self._preparation
        )
        self._executor = executor
        jobs = iter(list(left))
        waiting: dict[Future[Any], tuple[Any, ...]] = {}

        def fill() -> None:
            if not self._leaving:
                more = islice(jobs, self._processes + 1 - len(waiting))
                waiting.update({executor.submit(function, *job): job for job in more})

        fill()
        while waiting:
            done, _ = wait(waiting, timeout=INTERVAL, return_when=FIRST_COMPLETED)
            broken = None
            for future in done:
                job, error = waiting.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):
                    broken = error
                    continue
                left.remove(job)
                yield Outcome(job, future.result() if error is None else None, error)
            meanwhile()
            if broken is not None:
                raise broken
            fill()

    def leave_waiting(self) -> None:
        """Drops the jobs that have not begun. The outcomes of the others still come."""
        self._leaving = True

    def _end(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            for process in multiprocessing.active_children():
                if process not in self._others:
                    process.terminate()
        self._end()


def _begin_worker(begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Prepares a process: it ends when its parent ends, in whatever way, and it ends silently at Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
