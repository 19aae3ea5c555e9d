"""Where a probe's rows go while it trains: a CSV file, TensorBoard, Weights & Biases.

    with Probe(model, inputs, "hidden.*", writers=[CSVWriter("lmn.csv"), TensorBoardWriter("runs")]) as probe:
        ...

A writer has write(row) and close(); a probe calls both. Where it logs values, the key is lmn/<layer>.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import write_file
from .common import key, required


class CSVWriter:
    """Appends each row to a CSV file, in one write.

    Columns are the row's own, in its order; a row with a new one has the file written anew, with that column
    empty before. Where the file exists it is gone on with: an unfinished last line, left by a run that was
    killed, is cut off, and rows whose step and layer are there are left as they are. So a new run needs a new
    file.

    path: the file; folders on the way are made at the first row.
    Raises ValueError for a file that has not the columns step and layer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        rows = csv.DictReader(io.StringIO(whole.decode()))
        self._columns = list(rows.fieldnames or ())
        if text and not {"step", "layer"} <= set(self._columns):
            raise ValueError(f"path: expected a CSV file with columns step and layer, got {self.path}")
        self._seen = {(row["step"], row["layer"]) for row in rows}
        # Not cut off here: other processes of the same training may open the file, and only one writes.
        self._cut = len(whole) if len(whole) < len(text) else None

    def write(self, row: dict[str, Any]) -> None:
        """row: as in `Probe.history`."""
        which = str(row["step"]), row["layer"]
        if which in self._seen:
            return
        if self._cut is not None:
            os.truncate(self.path, self._cut)
            self._cut = None
        if new := [name for name in row if name not in self._columns]:
            self._add_columns(new)
        with open(self.path, "ab", buffering=0) as file:
            file.write(_line(row.get(name, "") for name in self._columns))
        self._seen.add(which)

    def _add_columns(self, new: list[str]) -> None:
        text = self.path.read_text() if self.path.exists() else ""
        rows = list(csv.reader(io.StringIO(text)))[1:]
        self._columns += new
        lines = [self._columns, *(row + [""] * len(new) for row in rows)]
        write_file(self.path, b"".join(map(_line, lines)))

    def close(self) -> None:
        """Nothing is left to do: no row waits, and no file is open between rows."""


def _line(values: Iterable[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


class TensorBoardWriter:
    """Adds each row's LMN as a scalar lmn/<layer> at its step.

    to: a folder, or a SummaryWriter of yours, which `close` leaves open.
    Raises ImportError without tensorboard.
    """

    def __init__(self, to: str | os.PathLike[str] | Any) -> None:
        self._own = isinstance(to, (str, os.PathLike))
        self._writer = (
            required("torch.utils.tensorboard", "tensorboard").SummaryWriter(to) if self._own else to
        )

    def write(self, row: dict[str, Any]) -> None:
        """row: as in `Probe.history`."""
        self._writer.add_scalar(key(row), row["lmn"], row["step"])
        self._writer.flush()

    def close(self) -> None:
        if self._own:
            self._writer.close()


class WandbWriter:
    """Logs each row's LMN as lmn/<layer> to a Weights & Biases run, over an axis of its own, lmn_step.

    An LMN is there some time after its step, when the run has logged later ones, and W&B drops what is logged
    to an earlier step than the last. So these values are drawn over lmn_step (define_metric), and join
    whatever W&B step is current when they come. They never move that on, as else a step= of yours could be
    the one dropped: those of one lmn_step to a W&B step, and where nothing else is logged in between they
    wait for it, or for `close`.

    run: what wandb.init() returned, online or offline; `close` leaves it open, and is to come before its finish.
    commit: W&B's word: whether values move the W&B step on and so never wait. For runs that log nothing else
        with an explicit step=.
    Raises ImportError without wandb.
    """

    def __init__(self, run: Any, *, commit: bool = False) -> None:
        required("wandb", "wandb")
        self._run = run
        self._commit = commit
        self._waiting: dict[int, dict[str, float]] = {}  # by their step
        self._joined: tuple[int, int] | None = None  # the last W&B step that values joined, and their own
        run.define_metric("lmn_step", hidden=True)
        run.define_metric("lmn/*", step_metric="lmn_step")

    def write(self, row: dict[str, Any]) -> None:
        """row: as in `Probe.history`."""
        self._waiting.setdefault(row["step"], {})[key(row)] = row["lmn"]
        step, current = next(iter(self._waiting)), None if self._commit else self._run.step
        if self._commit or self._joined is None or current > self._joined[0] or step == self._joined[1]:
            self._run.log({**self._waiting.pop(step), "lmn_step": step}, commit=self._commit)
            self._joined = current, step

    def close(self) -> None:
        if self._waiting and self._joined is not None:
            self._run.log({}, commit=True)  # ends the W&B step that values joined
        for step, values in self._waiting.items():
            self._run.log({**values, "lmn_step": step}, commit=True)
        self._waiting.clear()
