"""Where a probe's rows go while it trains: a CSV file, TensorBoard, Weights & Biases.

    with Probe(model, inputs, "hidden.*", writers=[CSVWriter("lmn.csv"), TensorBoardWriter("runs")]) as probe:
        ...

A writer has write(row) and close(); a probe calls both. Where it logs values, the key is lmn/<layer>.
The rows of an earlier run are never mixed with those of a new one: a writer goes on with them only when told to, by
resume=True, or by a call of its resume(), which a probe makes when it loads a state.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ..runs.files import write_file
from ..runs.tables import csv_line
from .common import key, required


class CSVWriter:
    """Appends each row to a CSV file, in one write.

    Columns are the row's own, in its order; a row with a new one has the file written anew, with that column
    empty before. Every row is written, those of steps that begin anew, too.

    The writer appends to the rows of an earlier run only where `resume` says so. It then cuts off an unfinished last
    line, left by a run that was killed, and does not write a row that is in the file already, equal in every column. A
    step measured again with another result has both rows, the later one last.

    Args:
        path: the file; folders on the way are made at the first row.
        resume: go on with the rows that are there.

    Raises:
        ValueError: the file lacks the columns step and layer; at the first row: it has rows already, without `resume`.

    Example:
        >>> from pathlib import Path
        >>> from lmnfast.integrations import CSVWriter
        >>> model, inputs = nn.Sequential(nn.Linear(4, 8), nn.SiLU()), torch.randn(20, 4)
        >>> writers = [CSVWriter("lmn.csv")]
        >>> with lmnfast.Probe(model, inputs, "0", every=10, writers=writers) as probe:
        ...     measured = [probe(step) for step in range(11)]
        >>> [line.split(",")[:2] for line in Path("lmn.csv").read_text().splitlines()]
        [['step', 'layer'], ['0', '0'], ['10', '0']]
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        self.path = Path(path)
        self._always = self._resume = resume
        self._columns: list[str] | None = None  # None: not begun
        # Lines of the run before that have not come again yet.
        self._there: Counter[tuple[str, ...]] = Counter()
        self._read()

    def resume(self) -> None:
        """Go on with the rows that are there."""
        self._resume = True

    def write(self, row: dict[str, Any]) -> None:
        """row: as in `Probe.history`."""
        # Begun at the first row: other processes of the same training may open the file, and only one writes.
        if self._columns is None:
            self._columns = self._begin()
        if self._there:
            (line,) = csv.reader(io.StringIO(csv_line(row.get(name, "") for name in self._columns).decode()))
            if set(row) <= set(self._columns) and self._there[tuple(line)] > 0:
                self._there[tuple(line)] -= 1
                return
        if new := [name for name in row if name not in self._columns]:
            self._add_columns(new)
        with open(self.path, "ab", buffering=0) as file:
            file.write(csv_line(row.get(name, "") for name in self._columns))

    def _read(self) -> tuple[list[str], list[list[str]], int | None]:
        """The columns, the rows, and the number of bytes in whole lines where the last line is cut; else None."""
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        try:
            columns, *rows = list(csv.reader(io.StringIO(whole.decode()))) or [[]]
        except (UnicodeDecodeError, csv.Error):
            columns, rows = [], []
        if text and not {"step", "layer"} <= set(columns):
            raise ValueError(f"path: expected a CSV file with columns step and layer, got {self.path}")
        return columns, rows, len(whole) if len(whole) < len(text) else None

    def _begin(self) -> list[str]:
        """The columns that are there."""
        columns, rows, whole = self._read()
        if (rows or whole is not None) and not self._resume:
            raise ValueError(
                f"path: expected a new file, got {self.path} with rows of an earlier run; resume=True goes on with it"
            )
        if whole is not None:
            os.truncate(self.path, whole)
        self._there = Counter(map(tuple, rows))
        return columns

    def _add_columns(self, new: list[str]) -> None:
        assert self._columns is not None
        rows = self._read()[1]
        self._columns += new
        lines = [self._columns, *(row + [""] * len(new) for row in rows)]
        write_file(self.path, b"".join(map(csv_line, lines)))
        self._there = Counter({(*line, *[""] * len(new)): count for line, count in self._there.items()})

    def close(self) -> None:
        """Ends the run: a row that comes after this is one of a new run. No file is open between rows."""
        self._columns, self._resume = None, self._always


class TensorBoardWriter:
    """Adds each row's LMN as a scalar lmn/<layer> at its step.

    A folder that holds what this writer wrote in an earlier run is added to only where `resume` says so: TensorBoard
    would draw both runs as one curve.

    Args:
        to: a folder; or a SummaryWriter of yours, which `close` leaves open, and to which rows are added whatever its
            folder holds.
        resume: go on with the curves in the folder.

    Raises:
        ImportError: tensorboard is not installed.
        ValueError: at the first row: the folder has curves of an earlier run, without `resume`.

    Example:
        >>> from lmnfast.integrations import TensorBoardWriter
        >>> model, inputs = nn.Sequential(nn.Linear(4, 8), nn.SiLU()), torch.randn(20, 4)
        >>> writers = [TensorBoardWriter("runs")]
        >>> with lmnfast.Probe(model, inputs, "0", writers=writers) as probe:
        ...     measured = probe(0)  # the scalar lmn/0 at step 0
    """

    SUFFIX = ".lmn"  # ends the names of its files

    def __init__(self, to: str | os.PathLike[str] | Any, *, resume: bool = False) -> None:
        own = isinstance(to, (str, os.PathLike))
        self._module: Any = required("torch.utils.tensorboard", "tensorboard") if own else None
        self._folder = Path(to) if own else None
        self._always = self._resume = resume
        self._writer: Any = None if own else to

    def resume(self) -> None:
        """Go on with the curves that are there."""
        self._resume = True

    def write(self, row: dict[str, Any]) -> None:
        """row: as in `Probe.history`."""
        # Opened at the first row: other processes of the same training may make a writer, and only one writes.
        if self._writer is None:
            assert self._folder is not None
            if not self._resume and any(self._folder.glob(f"events.out.tfevents.*{self.SUFFIX}")):
                raise ValueError(
                    f"to: expected a folder without LMN curves, got {self._folder} with those of an earlier run; "
                    "resume=True goes on with them"
                )
            self._writer = self._module.SummaryWriter(self._folder, filename_suffix=self.SUFFIX)
        self._writer.add_scalar(key(row["layer"]), row["lmn"], row["step"])
        self._writer.flush()

    def close(self) -> None:
        if self._folder is not None and self._writer is not None:
            self._writer.close()
            self._writer = None
        self._resume = self._always


class WandbWriter:
    """Logs each row's LMN as lmn/<layer> to a Weights & Biases run, over an axis of its own, lmn_step.

    An LMN is there some time after its step, when the run has logged later ones, and W&B drops what is logged
    to an earlier step than the last. So these values are drawn over lmn_step (define_metric), and join
    whatever W&B step is current when they come. They never start a new W&B step: W&B would drop a step= of yours
    that is not later. A W&B step takes the values of one lmn_step; the others wait until something else is logged, or
    for `close`. An earlier run of W&B goes on only by wandb.init(resume=...).

    Args:
        run: what wandb.init() returned, online or offline; `close` leaves it open, and is to come before its finish.
        commit: W&B's word: whether values move the W&B step on and so never wait. For runs that log nothing else
            with an explicit step=.

    Raises:
        ImportError: wandb is not installed.

    Example:
        >>> import wandb
        >>> from lmnfast.integrations import WandbWriter
        >>> model, inputs = nn.Sequential(nn.Linear(4, 8), nn.SiLU()), torch.randn(20, 4)
        >>> with wandb.init(mode="disabled") as run:  # "online" or "offline"
        ...     writers = [WandbWriter(run)]
        ...     with lmnfast.Probe(model, inputs, "0", writers=writers) as probe:
        ...         measured = probe(0)
    """

    def __init__(self, run: Any, *, commit: bool = False) -> None:
        required("wandb", "wandb")
        self._run = run
        self._commit = commit
        self._waiting: list[tuple[int, dict[str, float]]] = []  # values by their step, as they came
        # The last W&B step that values joined, their own step, their keys.
        self._joined: tuple[int, int, set[str]] | None = None
        run.define_metric("lmn_step", hidden=True)
        run.define_metric("lmn/*", step_metric="lmn_step")

    def write(self, row: dict[str, Any]) -> None:
        """row: as in `Probe.history`."""
        # A key that comes twice for a step, as where steps begin anew, is another entry: one would replace the other.
        name = key(row["layer"])
        if not self._waiting or self._waiting[-1][0] != row["step"] or name in self._waiting[-1][1]:
            self._waiting.append((row["step"], {}))
        self._waiting[-1][1][name] = row["lmn"]
        step, values = self._waiting[0]
        current: int = 0 if self._commit else self._run.step
        last, joined_step, joined = self._joined or (-1, None, set())  # -1: before any W&B step
        joins = step == joined_step and not values.keys() & joined
        if self._commit or current > last or joins:
            self._waiting.pop(0)
            self._run.log({**values, "lmn_step": step}, commit=self._commit)
            self._joined = current, step, values.keys() | (joined if joins and current == last else set())

    def close(self) -> None:
        if self._waiting and self._joined is not None:
            self._run.log({}, commit=True)  # ends the W&B step that values joined
        for step, values in self._waiting:
            self._run.log({**values, "lmn_step": step}, commit=True)
        self._waiting.clear()
