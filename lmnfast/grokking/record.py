"""What a run at work keeps of its files: how it begins, continues from them, and adds to them."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import remove_parts
from ..runs.files import save_tensors, unreadable, write_json
from ..runs.tables import check_continues
from .config import Config
from .run import (
    ACTIVITIES,
    by_step,
    checkpoint_of,
    clear,
    metrics_of,
    read_config,
    read_metrics,
    read_state,
    write_rows,
)

MOST_UNWRITTEN = 4  # measured steps whose rows and state are not on disk yet


def begun(config: Config, path: Path, force: bool = False) -> Config:
    """The settled config of the run in a claimed directory, which is a new run or the stored one. Writes it.

    Raises:
        ValueError: as `train`.
    """
    stored = read_config(path) if (path / "config.json").exists() and not force else None
    if stored is None:
        clear(path)
    else:
        remove_parts(path / "state.pt")  # a finished run is not written again
        config = replace(
            config,
            device=stored.device if config.device == "auto" else config.device,
            threads=config.threads or stored.threads,
        )
    config = config.settled()
    if stored is not None:
        check_continues(
            path,
            "another run",
            asdict(stored),
            asdict(config),
            otherwise=", or --force to delete it",
            may_change=lambda name, old, new: (
                (name == "steps" and new > old) or (name == "until_accurate" and old)
            ),
        )
    write_json(path / "config.json", asdict(config))
    return config


class Record:
    """The rows and the state of a run, as they are on disk, and how they are added to.

    Attributes:
        step: the last measured step that state.pt and metrics.csv have; -1: none.
        rows: of metrics.csv.
        seconds: by activity, those of state.pt and since.
    """

    def __init__(self, config: Config, path: Path) -> None:
        self.config, self.path = config, path
        self.step = -1
        self.rows: list[dict] = []
        self.accurate = False  # whether the test accuracy has been 1 at a measured step
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self.clock = time.perf_counter()

    @property
    def finished(self) -> bool:
        return self.step == self.config.steps or (self.config.until_accurate and self.accurate)

    def read(self, load: Callable[[dict[str, Any]], None], device: str) -> None:
        """Continues from the files, if there are any.

        Args:
            load: takes what state.pt has of the training.
            device: of the tensors that `load` gets.

        Raises:
            ValueError: the files are damaged; the message says how to begin anew.
        """
        state_file, metrics = self.path / "state.pt", self.path / "metrics.csv"
        if not state_file.exists():
            return
        try:
            state = read_state(self.path, replace(self.config, device=device))
            self.step, self.seconds = state["step"], state["seconds"]
            try:
                load(state)
            except Exception as error:  # the file may contain anything
                raise unreadable(state_file, error) from None
            written = read_metrics(self.path, self.config) if metrics.exists() else []
            if not written or written[-1]["step"] < self.step:
                raise ValueError(f"{metrics} lacks rows that it had")
        except ValueError as error:
            raise ValueError(f"out: {error}; --force starts the run anew") from None
        self.rows = [row for row in written if row["step"] <= self.step]
        self.accurate = any(row["test_accuracy"] == 1 for row in self.rows)

    def check_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Raises FloatingPointError if one of them is NaN or infinite."""
        self.accurate = self.accurate or metrics["test_accuracy"] == 1
        for name, value in metrics.items():
            if not abs(value) < float("inf"):
                raise FloatingPointError(f"training diverged: {name} is {value} at step {step}")

    def keep_weights(self, step: int, weights: dict[str, Tensor]) -> None:
        """Writes the checkpoint of a measured step."""
        self.check_there()
        save_tensors(checkpoint_of(self.path, step), weights)

    def keep(self, history: Iterable[dict], state: dict[str, Any]) -> None:
        """Adds rows to metrics.csv, and then writes the state behind them.

        Args:
            history: rows as a probe has them; those up to `step` are left out.
            state: has the step, and what `load` of `read` takes.
        """
        beside = self.config.beside
        self.rows += by_step([row for row in history if row["step"] > self.step], observables=beside)
        self.check_there()
        # The table of a run that an earlier version began keeps the columns that it has.
        metrics = [name for name in metrics_of(self.config) if name in self.rows[0]]
        write_rows(self.path / "metrics.csv", self.rows, metrics, beside)
        self.step = state["step"]
        save_tensors(self.path / "state.pt", {**state, "seconds": self.seconds})

    def check_there(self) -> None:
        """Raises FileNotFoundError if the directory was deleted. Called before a write, which would make a directory without a
        config, and that is not a run."""
        if not (self.path / "config.json").exists():
            raise FileNotFoundError(f"out: {self.path} was deleted while the run was at work in it")

    def tick(self, activity: str) -> None:
        """Adds the time since the last tick to that of `activity`."""
        now = time.perf_counter()
        self.seconds[activity] += now - self.clock
        self.clock = now
