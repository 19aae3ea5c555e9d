"""A run on disk.

A run is a directory. config.json has its settings. metrics.csv has one row per measured step; the row of step s is of the
network after s updates. checkpoints/ has the weights at those steps. state.pt is the state from which the training continues.
figures/ has the figures.

Every file is written under another name and then renamed. state.pt is only written when all rows up to its step are in
metrics.csv. So a run that is killed at any moment can continue, and its final metrics.csv is the same, byte for byte, as that
of a run that was never killed.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from .._choices import METHODS, RULES
from .._files import PART
from .._series import pearson
from ..runs.files import Unreadable, read_tensors, unreadable
from ..runs.tables import LacksColumns, joined, read_table, write_table
from ..spectrum import SETTINGS, SHARES
from .choices import TASKS
from .config import Config

METRICS = ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "l2_norm", "lost_gradients")
PENALTY = "penalty"  # a further one, of runs with a penalty
ACTIVITIES = ("training", "measuring")  # the run counts the seconds of each
LEFT_BEHIND = ("metrics.csv", "state.pt", "checkpoints", "figures")
CHECKPOINT = r"step_\d{8,}\.pt"


@dataclass(frozen=True)
class Run:
    """A run as read from disk.

    Source: arXiv 2310.05918, section 3, for the phases.

    Example:
        >>> from lmnfast.grokking import Config, train
        >>> run = train(Config("modular-addition", p=7, steps=20, every=10, device="cpu"), "run")
        >>> run.path.name, run.memorised, run.phase(run.rows[-1])
        ('run', None, 'memorising')
    """

    path: Path
    """The run's directory."""
    config: Config
    """The run's settings."""
    rows: list[dict]
    """The rows of metrics.csv, one per measured step. Each has the step; train_loss and test_loss in nats; train_accuracy and
    test_accuracy; l2_norm, of all parameters; lost_gradients, the number of training samples whose true-class gradient the
    round-off of the loss's dtype can turn into 0, because each of their other probabilities is at most half an ulp of the
    true one; with a penalty its value without its weight, on the samples of the last update that had one; lmn_LAYER of each
    layer, and what this number depends on."""
    seconds: dict[str, float]
    """The time of "training" and of "measuring"."""

    @property
    def memorised(self) -> int | None:
        """The first measured step with train accuracy 1; None if there is none."""
        return next((row["step"] for row in self.rows if row["train_accuracy"] == 1), None)

    @property
    def generalised(self) -> int | None:
        """The first measured step with test accuracy 1; None if there is none."""
        return next((row["step"] for row in self.rows if row["test_accuracy"] == 1), None)

    def phase(self, row: dict) -> str:
        """The phase of a row: "memorising", from train accuracy 1 on "generalising", from test accuracy 1 on "finalising"."""
        if self.generalised is not None and row["step"] >= self.generalised:
            return "finalising"
        return "memorising" if self.memorised is None or row["step"] < self.memorised else "generalising"

    def correlation(self, column: str) -> float:
        """Pearson's r of a column with the test loss, over the generalising phase.

        NaN if the phase has fewer than 3 rows, or if the run has not generalised, because the phase has then no end yet.
        """
        if self.generalised is None:
            return float("nan")
        rows = [row for row in self.rows if self.phase(row) == "generalising"]
        return pearson([(row["test_loss"], row[column]) for row in rows])


def read_run(path: str | os.PathLike) -> Run:
    """The run in a directory.

    Args:
        path: the run's directory.

    Returns:
        The run, with the rows that are written so far.

    Raises:
        ValueError: there is no run, or it is damaged; the message names the file.

    Example:
        >>> from lmnfast.grokking import Config, read_run, train
        >>> run = train(Config("modular-addition", p=7, steps=20, every=10, device="cpu"), "run")
        >>> read_run("run") == run
        True
    """
    path = Path(path)
    config = read_config(path)
    try:
        rows, state = read_metrics(path, config), read_state(path, replace(config, device="cpu"))
        if rows[-1]["step"] < state["step"]:
            raise ValueError(f"{path / 'metrics.csv'} lacks rows that it had")
    except FileNotFoundError as error:
        raise ValueError(f"run: {path} has no {Path(error.filename).name} yet") from None
    except ValueError as error:
        raise ValueError(f"run: {error}; lmnfast grok with --force starts the run anew") from None
    return Run(path, config, rows, state["seconds"])


def read_state(path: Path, config: Config) -> dict:
    """The content of state.pt, on the config's device.

    Raises:
        ValueError: the file is damaged.
        FileNotFoundError: there is no file.
    """
    file = path / "state.pt"
    state = read_tensors(file, config.device)
    try:
        step, seconds = state["step"], state["seconds"]
        if type(step) is not int or step % config.every or not 0 <= step <= config.steps:
            raise ValueError(
                f"expected a multiple of {config.every} up to {config.steps} as step, got {step!r}"
            )
        if set(seconds) != set(ACTIVITIES) or not all(isinstance(value, float) for value in seconds.values()):
            raise ValueError(f"expected seconds of {' and '.join(ACTIVITIES)}, got {seconds!r}")
    except (TypeError, KeyError, ValueError) as error:
        raise unreadable(file, error) from None
    return state


def read_metrics(path: Path, config: Config) -> list[dict]:
    """The rows of metrics.csv, beginning at step 0.

    Raises:
        ValueError: the file is damaged, or belongs to another run.
        FileNotFoundError: there is no file.
    """
    file = path / "metrics.csv"
    rows = _rows_of(file, config)
    expected = {"samples": config.samples or config.trained_on} | {
        name: getattr(config, name) for name in ("points", "rule", "method", "negative", "stabiliser")
    }
    for number, row in enumerate(rows):
        if row["step"] != number * config.every or any(row[name] != expected[name] for name in expected):
            raise ValueError(f"cannot read {file}: row {number + 1} is not one of this run")
    return rows


def _rows_of(file: Path, config: Config) -> list[dict]:
    numbers, metrics = [f"lmn_{layer}" for layer in config.layers], metrics_of(config)
    try:
        return read_rows(file, _columns(metrics, numbers, config.beside))
    except ValueError:
        if (
            config.loss_dtype == "float32"
        ):  # maybe of a version without lost_gradients, whose runs are float32
            with suppress(ValueError):
                return read_rows(file, _columns(METRICS[:-1], numbers, config.beside))
        raise


def metrics_of(config: Config) -> tuple[str, ...]:
    """The metrics in the rows of a run with this config."""
    return METRICS if config.penalty is None else (*METRICS, PENALTY)


def read_config(path: Path) -> Config:
    """The config of the run in a directory.

    Raises:
        ValueError: there is no run.
    """
    try:
        stored = json.loads((path / "config.json").read_text())
        return Config(**{"loss_dtype": "float32", **stored})  # a run of a version without this setting
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"run: {path} is not a run, it holds no config.json") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"run: cannot read {path / 'config.json'}: {error}") from None


def checkpoint_of(run: Path, step: int) -> Path:
    """The path of the file with the weights at a step."""
    return run / "checkpoints" / f"step_{step:08}.pt"


def load_checkpoint(model: nn.Module, run: Path, step: int) -> None:
    """Loads the weights of a run at a step into the model.

    Raises:
        ValueError: the file is missing or damaged.
    """
    file, device = checkpoint_of(run, step), next(model.parameters()).device
    try:
        weights = read_tensors(file, device)
        try:
            model.load_state_dict(weights)
        except Exception as error:  # the file may contain anything
            raise unreadable(file, error) from None
    except FileNotFoundError as error:
        raise ValueError(f"run: {unreadable(file, error)}; delete {run} to run it anew") from None
    except ValueError as error:
        raise ValueError(f"run: {error}; delete {run} to run it anew") from None


def steps_of(run: Path) -> list[int]:
    """The steps of a run's checkpoints, in order.

    Raises:
        ValueError: a file beside them has a name of another form.
    """
    files = sorted(run.glob("checkpoints/step_*.pt"))
    for file in files:
        if not re.fullmatch(CHECKPOINT, file.name):
            raise ValueError(f"run: expected checkpoints named step_ and a number, got {file}")
    return sorted(int(file.stem[5:]) for file in files)


def by_step(history: Iterable[dict], suffix: str = "", observables: Sequence[str] = ()) -> list[dict]:
    """Merges the rows of a probe, one per step and layer, into one row per step.

    Args:
        history: as `Probe.history`.
        suffix: the end of the names of the columns that each layer has.
        observables: the names of those in the rows.
    """
    steps: dict[int, dict] = {}
    for row in history:
        one = steps.setdefault(row["step"], dict(row))
        one |= {f"{name}_{row['layer']}{suffix}": row[name] for name in ("lmn", *SHARES, *observables)}
        one |= {name: joined(one[name], row[name]) for name in ("precision", "solver")}
    return list(steps.values())


def write_rows(
    path: Path, rows: Sequence[dict], metrics: Sequence[str], observables: Sequence[str] = ()
) -> None:
    """Writes a table with columns for these metrics, for the LMN in the rows, and for these observables."""
    columns = _columns(metrics, [name for name in rows[0] if name.startswith("lmn_")], observables)
    write_table(path, columns, rows)


def _columns(metrics: Sequence[str], numbers: Sequence[str], observables: Sequence[str]) -> list[str]:
    """The columns of a table with these metrics and numbers. The name of a number begins with lmn_."""
    kinds = [kind for kind in dict.fromkeys((*SHARES, *observables)) if kind != "lmn"]
    shares = [kind + name.removeprefix("lmn") for kind in kinds for name in numbers]
    return ["step", *metrics, *numbers, *SETTINGS, *shares]


def read_rows(path: Path, columns: list[str] | None = None) -> list[dict]:
    """The rows of a table that `write_rows` wrote.

    Args:
        path: the file.
        columns: the columns that the table must have; None: any.

    Raises:
        ValueError: the table is damaged, or has no rows.
        FileNotFoundError: there is no file.
    """
    try:
        rows = read_table(path, columns)
        if not rows:
            raise ValueError("it has no rows")
    except LacksColumns as error:
        raise Unreadable(f"{path} {error}") from None
    except ValueError as error:
        raise unreadable(path, error) from None
    return rows


def clear(path: Path) -> None:
    """Removes the files that a run writes, its config last, and nothing else.

    Raises:
        ValueError: the content of the directory is not a run. Nothing is removed then.
    """
    config = path / "config.json"
    if not config.exists():
        if there := [name for name in LEFT_BEHIND if os.path.lexists(path / name)]:
            raise ValueError(
                f"out: {path} holds {there[0]} but no config.json, so it is no run; choose another --out"
            )
        return
    if not _is_config(config):
        raise ValueError(
            f"out: {path} holds a config.json that is no run's, and --force deletes runs alone; choose another --out"
        )
    folders = [path / "checkpoints", path / "figures"]
    if links := [folder for folder in folders if folder.is_symlink()]:
        raise ValueError(
            f"out: {links[0]} is a symbolic link, which --force does not follow; remove it first"
        )
    _remove(path, OWN[""])
    for folder in folders:
        _remove(folder, OWN[folder.name])
        with suppress(OSError):  # a folder with other files stays
            folder.rmdir()
    config.unlink()


def _is_config(file: Path) -> bool:
    try:
        found = json.loads(file.read_text())
        return found["task"] in TASKS and {"steps", "every", "seed"} <= set(found)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _remove(folder: Path, names: re.Pattern[str]) -> None:
    """Removes the files and links in a folder whose names match."""
    for item in folder.iterdir() if folder.is_dir() else ():
        if names.fullmatch(item.name) and (item.is_symlink() or item.is_file()):
            item.unlink()


def _some_of(names: Iterable[str]) -> str:
    one = f"(?:{'|'.join(map(re.escape, names))})"
    return rf"{one}(?:\+{one})*"


_LAYERS = r"(?:embedding|hidden_\d+(?:_pre)?)"
_SOME_LAYERS = rf"{_LAYERS}(?:\+{_LAYERS})*"
_MEASURED = (
    rf"-{_SOME_LAYERS}-{_some_of(METHODS)}-{_some_of(RULES)}\d+"
    r"(?:-\d+samples)?(?:-clip)?(?:-stabiliser[\d.e+-]+)?(?:-and-\w+(?:\+\w+)*)?"
)
# By folder, the names of the files that a run writes in addition to its config, and of the parts that a killed write leaves.
OWN = {
    folder: re.compile(rf"(?:{names})(?:{PART})?")
    for folder, names in {
        "": rf"metrics\.csv|state\.pt|config\.json{PART}|measure{_MEASURED}\.csv",
        "checkpoints": CHECKPOINT,
        "figures": rf"figure2-{_SOME_LAYERS}\.png|methods{_MEASURED}\.png",
    }.items()
}
