"""Writers that receive a probe's rows during training: a CSV file, TensorBoard, Weights & Biases.

    with Probe(model, inputs, "hidden.*", writers=[CSVWriter("lmn.csv"), TensorBoardWriter("runs")]) as probe:
        ...

A writer has write(row) and close(), which a probe calls. Writers that log values use the key lmn/<layer>. The rows of an
earlier run are never mixed with those of a new run by accident. A writer continues an earlier run only with resume=True or
after a call of its resume(), which a probe makes when it loads a state.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from .._extras import required
from .._files import csv_entries, csv_line, write_file
from .common import key, numbers


class CSVWriter:
    """Appends each row to a CSV file, in one write.

    The columns are the row's columns, in its order. If a row has a new column, the file is rewritten with that column empty in
    the earlier rows. Every row is written, also if the step numbers begin again at 0.

    The writer appends to the rows of an earlier run only with `resume`. It then cuts off an unfinished last line, which a
    killed run may leave. It does not write a row that is in the file already, equal in every column. If a step is measured
    again with another result, the file has both rows, the later result last. Rows of a version without the column stabiliser
    get stabiliser 0.

    Args:
        path: the file. Missing folders are made at the first row.
        resume: continue after the rows in the file.

    Raises:
        ValueError: the file lacks the columns step and layer; at the first row: the file has rows, and `resume` is False.

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
        self._columns: list[str] | None = None  # None: no row written yet
        # Lines of the earlier run that were not measured again yet.
        self._there: Counter[tuple[str, ...]] = Counter()
        self._read()

    def resume(self) -> None:
        """Continues after the rows in the file."""
        self._resume = True

    def write(self, row: dict[str, Any]) -> None:
        """Takes one finished row.

        Args:
            row: as in `Probe.history`.
        """
        # The file is prepared at the first row: several processes of a training may make a writer, but only one writes.
        if self._columns is None:
            self._columns = self._begin()
        if "stabiliser" in row and "negative" in self._columns and "stabiliser" not in self._columns:
            self._add_columns(["stabiliser"], 0.0)
        if self._there:
            (line,) = csv_entries(csv_line(row.get(name, "") for name in self._columns).decode())
            if set(row) <= set(self._columns) and self._there[tuple(line)] > 0:
                self._there[tuple(line)] -= 1
                return
        if new := [name for name in row if name not in self._columns]:
            self._add_columns(new)
        with open(self.path, "ab", buffering=0) as file:
            file.write(csv_line(row.get(name, "") for name in self._columns))

    def _read(self) -> tuple[list[str], list[list[str]], int | None]:
        """The columns, the rows, and None; if the last line is cut, the number of bytes in whole lines instead of None."""
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        try:
            columns, *rows = csv_entries(whole.decode()) or [[]]
        except ValueError:
            columns, rows = [], []
        if text and not {"step", "layer"} <= set(columns):
            raise ValueError(f"path: expected a CSV file with columns step and layer, got {self.path}")
        return columns, rows, len(whole) if len(whole) < len(text) else None

    def _begin(self) -> list[str]:
        """Prepares the file for the first row, and returns its columns."""
        columns, rows, whole = self._read()
        if (rows or whole is not None) and not self._resume:
            raise ValueError(
                f"path: expected a new file, got {self.path} with rows of an earlier run; resume=True continues it"
            )
        if whole is not None:
            os.truncate(self.path, whole)
        self._there = Counter(map(tuple, rows))
        return columns

    def _add_columns(self, new: list[str], value: str | float = "") -> None:
        assert self._columns is not None
        rows = self._read()[1]
        self._columns += new
        values = [str(value)] * len(new)
        lines = [self._columns, *(row + values for row in rows)]
        write_file(self.path, b"".join(map(csv_line, lines)))
        self._there = Counter({(*line, *values): count for line, count in self._there.items()})

    def close(self) -> None:
        """Ends the run. A later row begins a new run. No file is open between rows."""
        self._columns, self._resume = None, self._always


class TensorBoardWriter:
    """Adds each row's LMN as a scalar lmn/<layer> at its step, and each observable of the probe as <observable>/<layer>.

    The writer adds to a folder with its curves of an earlier run only with `resume`: TensorBoard would draw both runs as one
    curve.

    Args:
        to: a folder; or your own SummaryWriter, which `close` leaves open. Its folder is not checked for earlier curves.
        resume: continue the curves in the folder.

    Raises:
        ImportError: tensorboard is not installed.
        ValueError: at the first row: the folder has curves of an earlier run, and `resume` is False.

    Example:
        >>> from lmnfast.integrations import TensorBoardWriter
        >>> model, inputs = nn.Sequential(nn.Linear(4, 8), nn.SiLU()), torch.randn(20, 4)
        >>> writers = [TensorBoardWriter("runs")]
        >>> with lmnfast.Probe(model, inputs, "0", writers=writers) as probe:
        ...     measured = probe(0)  # the scalar lmn/0 at step 0
    """

    SUFFIX = ".lmn"  # the end of the names of this writer's files

    def __init__(self, to: str | os.PathLike[str] | Any, *, resume: bool = False) -> None:
        own = isinstance(to, (str, os.PathLike))
        self._module: Any = required("torch.utils.tensorboard", "tensorboard") if own else None
        self._folder = Path(to) if own else None
        self._always = self._resume = resume
        self._observables: tuple[str, ...] = ()
        self._writer: Any = None if own else to

    def resume(self) -> None:
        """Continues the curves in the folder."""
        self._resume = True

    def expect(self, observables: tuple[str, ...]) -> None:
        """A probe calls this when it is made.

        Args:
            observables: their names.
        """
        self._observables = observables

    def write(self, row: dict[str, Any]) -> None:
        """Takes one finished row.

        Args:
            row: as in `Probe.history`.
        """
        # The folder is opened at the first row: several processes of a training may make a writer, but only one writes.
        if self._writer is None:
            assert self._folder is not None
            if not self._resume and any(self._folder.glob(f"events.out.tfevents.*{self.SUFFIX}")):
                raise ValueError(
                    f"to: expected a folder without LMN curves, got {self._folder} with those of an earlier run; "
                    "resume=True continues them"
                )
            self._writer = self._module.SummaryWriter(self._folder, filename_suffix=self.SUFFIX)
        for name, value in numbers(row, self._observables).items():
            self._writer.add_scalar(key(row["layer"], name=name), value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the file of curves, if the writer opened it. A later row opens a new one, as a new run."""
        if self._folder is not None and self._writer is not None:
            self._writer.close()
            self._writer = None
        self._resume = self._always


class WandbWriter:
    """Logs each row's LMN as lmn/<layer>, and each observable as <observable>/<layer>, to a Weights & Biases run.

    Their axis is lmn_step.

    An LMN is ready some time after its step, when the run has logged later steps. W&B drops values for a step before the last
    logged step. These values are therefore drawn over lmn_step (define_metric), and are added to the W&B step that is current
    when they arrive. They never start a new W&B step, as W&B would then drop a later log of yours with a step= that is not
    larger. One W&B step takes the values of one lmn_step. Values of other steps wait until something else is logged, or until
    `close`. Only wandb.init(resume=...) continues an earlier run of W&B.

    Args:
        run: the result of wandb.init(), online or offline. `close` leaves it open. Call `close` before the run's finish().
        commit: as in W&B: the values advance the W&B step, and so never wait. For runs that log nothing else with an explicit
            step=.

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
        self._waiting: list[tuple[int, dict[str, float]]] = []  # (step, values), in order of arrival
        # The last W&B step with values of this writer, the values' own step, and their keys.
        self._joined: tuple[int, int, set[str]] | None = None
        run.define_metric("lmn_step", hidden=True)
        run.define_metric("lmn/*", step_metric="lmn_step")
        self._observables: tuple[str, ...] = ()

    def expect(self, observables: tuple[str, ...]) -> None:
        """A probe calls this when it is made.

        Args:
            observables: their names.
        """
        self._observables = observables
        for name in observables:
            self._run.define_metric(f"{name}/*", step_metric="lmn_step")

    def write(self, row: dict[str, Any]) -> None:
        """Takes one finished row.

        Args:
            row: as in `Probe.history`.
        """
        # A key that comes twice for one step (step numbers may begin again) makes a new entry, so that no value is replaced.
        new = {key(row["layer"], name=n): value for n, value in numbers(row, self._observables).items()}
        if not new:
            return
        if (
            not self._waiting
            or self._waiting[-1][0] != row["step"]
            or new.keys() & self._waiting[-1][1].keys()
        ):
            self._waiting.append((row["step"], {}))
        self._waiting[-1][1].update(new)
        step, values = self._waiting[0]
        current: int = 0 if self._commit else self._run.step
        last, joined_step, joined = self._joined or (-1, None, set())  # -1: before any W&B step
        joins = step == joined_step and not values.keys() & joined
        if self._commit or current > last or joins:
            self._waiting.pop(0)
            self._run.log({**values, "lmn_step": step}, commit=self._commit)
            self._joined = current, step, values.keys() | (joined if joins and current == last else set())

    def close(self) -> None:
        """Logs the values that wait, each step's as a W&B step of its own. The run stays open."""
        if self._waiting and self._joined is not None:
            self._run.log({}, commit=True)  # ends the W&B step that has the last values
        for step, values in self._waiting:
            self._run.log({**values, "lmn_step": step}, commit=True)
        self._waiting.clear()
