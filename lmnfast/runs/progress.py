"""The progress bar of the commands."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(total: int, initial: int, progress: bool) -> Iterator[Any]:
    """A tqdm bar, or None if `progress` is False."""
    if not progress:
        yield None
        return
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file should get only a few lines
    with tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, mininterval=interval) as bar:
        yield bar
