"""The progress bar of the commands."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(total: int, initial: int, progress: bool, unit: str = "step") -> Iterator[Any]:
    """A tqdm bar, which also shows the time that is left, or None if `progress` is False."""
    if not progress:
        yield None
        return
    from tqdm.auto import tqdm  # a widget in a notebook, a line of text elsewhere

    interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file should get only a few lines
    with tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True, mininterval=interval) as bar:
        yield bar


def move(bar: Any, done: float) -> None:
    """Moves a bar, if there is one, to so many units, the last perhaps in part."""
    if bar is not None:
        bar.n = int(done) if done == int(done) else round(done, 2)
        bar.update(0)
