"""The paper's training (arXiv 2310.05918, section 3), its linear mapping number, and the run it leaves.

A run is a directory: config.json; metrics.csv, one row for every measured step, where row s is the network
after s updates; checkpoints/, the weights at those steps; state.pt, from where to go on; figures/. Every file
is written under another name and then renamed, and state.pt only once all rows up to it are in metrics.csv:
so a run killed at any moment continues, and ends in the same metrics.csv, byte for byte, as one never killed.
"""

import csv
import io
import json
import math
import operator
import os
import re
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .._connectivity import connectivity
from .._nested import mapped, tensors_in
from .._settings import METHODS
from ..cutting import cut
from ..files import claimed, write_file
from ..probe import Probe
from ..quadrature import RULES, path_nodes
from ..spectrum import SETTINGS, SHARES, check_negative, linear_mapping_number
from .gradients import Gradients
from .model import ACTIVATIONS, INITS, LAYERS, make_model
from .tasks import TASKS, Task, make_task, task_sizes, training_samples

METRICS = ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "l2_norm")
INTEGERS = ("step", "samples", "outputs", "points")
WORDS = tuple(name for name in SETTINGS if name not in INTEGERS)  # the other columns hold floats
LEFT_BEHIND = ("metrics.csv", "state.pt", "checkpoints", "figures")
ACTIVITIES = ("training", "measuring")  # that seconds are counted for
CHECKPOINT = r"step_\d{8,}\.pt"
CHECKSUM_LENGTH = 22  # also that of the record that ends a zip archive without a comment
TRIAL = 1024  # samples; how long more of them take is found out before it is waited for
LONG = 10.0  # seconds of a measurement from which on it is said


@dataclass(frozen=True)
class Config:
    """What determines a run; the defaults are the paper's. ValueError for anything that no run can have."""

    task: str
    p: int | None = None
    bits: int | None = None
    steps: int = 20_000
    every: int = 100
    seed: int = 0
    layers: tuple[str, ...] = ("hidden_1",)
    points: int = 21
    rule: str = "uniform"
    method: str = "path"
    samples: int | None = None
    """How many of the training samples are measured, the first of their random order; None is all of them. The LMN of
    fewer is no estimate of the LMN of all."""
    negative: str = "absolute"
    init: str = "default"
    activation: str = "silu"
    device: str = "auto"
    """"auto" is the device the run was started on; for a new run "cuda" if there is one, else "cpu"."""
    threads: int | None = None
    """None is the number the run was started with; for a new run torch's. Sums differ in their last bits."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.2

    def __post_init__(self) -> None:
        for name in ("p", "bits", "steps", "every", "seed", "points", "samples", "threads"):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, None if value is None else operator.index(value))
            except TypeError:
                raise ValueError(f"{name}: expected an integer, got {value!r}") from None
        for name in ("learning_rate", "weight_decay"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name}: expected a number, got {getattr(self, name)!r}")
        sizes = task_sizes(self.task, p=self.p, bits=self.bits)
        object.__setattr__(self, "p", sizes.get("p"))
        object.__setattr__(self, "bits", sizes.get("bits"))
        object.__setattr__(self, "layers", tuple(self.layers))
        for name, smallest in (("steps", 0), ("every", 1), ("seed", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {value}")
        there = training_samples(self.task, **sizes)
        if self.samples is not None and not 2 <= self.samples <= there:
            raise ValueError(f"samples: expected 2 to {there}, all that are trained on, got {self.samples}")
        if self.steps % self.every:
            raise ValueError(f"steps: expected a multiple of every ({self.every}), got {self.steps}")
        unknown = [layer for layer in self.layers if layer not in LAYERS]
        if unknown or not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"layers: expected some of {', '.join(LAYERS)}, each once, got {', '.join(self.layers)}"
            )
        object.__setattr__(self, "points", len(path_nodes(self.rule, self.points)[0]))
        check_negative(self.negative)
        for name, known in (("method", METHODS), ("init", INITS), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device: expected auto, cpu or cuda, got {self.device!r}")

    def settled(self) -> "Config":
        """This machine's device and threads where they are left open; ValueError for a missing device."""
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise ValueError("device: cuda is not available")
        device = ("cuda" if cuda else "cpu") if self.device == "auto" else self.device
        return replace(self, device=device, threads=self.threads or torch.get_num_threads())


@dataclass(frozen=True)
class Run:
    """A run as read back: the rows of metrics.csv, and the seconds spent in "training" and "measuring"."""

    path: Path
    config: Config
    rows: list[dict]
    seconds: dict[str, float]

    @property
    def memorised(self) -> int | None:
        """First measured step with train accuracy 1."""
        return next((row["step"] for row in self.rows if row["train_accuracy"] == 1), None)

    @property
    def generalised(self) -> int | None:
        """First measured step with test accuracy 1."""
        return next((row["step"] for row in self.rows if row["test_accuracy"] == 1), None)

    def phase(self, row: dict) -> str:
        """memorising until train accuracy is 1, generalising until test accuracy is 1, then finalising."""
        if self.generalised is not None and row["step"] >= self.generalised:
            return "finalising"
        return "memorising" if self.memorised is None or row["step"] < self.memorised else "generalising"

    def correlation(self, column: str) -> float:
        """Pearson's r of a column with the test loss while generalising; NaN for less than 3 rows, and for a run that has
        not generalised, whose phase has no end yet."""
        if self.generalised is None:
            return float("nan")
        rows = [row for row in self.rows if self.phase(row) == "generalising"]
        return pearson([(row["test_loss"], row[column]) for row in rows])


def pearson(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson's r; NaN for less than 3 pairs, or where one of the two is constant."""
    if len(pairs) < 3 or min(len(set(series)) for series in zip(*pairs)) == 1:
        return float("nan")
    return torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1].item()


def train(config: Config, out: str | os.PathLike, *, force: bool = False, progress: bool = False) -> Run:
    """Trains and measures, or continues the run in `out` where it stopped, or finds it finished.

    A run with fewer steps than asked for is continued. On the CPU the same config, machine and versions give
    the same metrics.csv, byte for byte, however often the run was stopped.

    Args:
        config: of the run.
        out: its directory; made if it does not exist.
        force: delete the run that is there, whatever its config, and start anew. Deletes only files that a run writes,
            and follows no symbolic link below `out`.
        progress: show a bar (needs tqdm), and say at the beginning how long a measurement of many samples takes.

    Raises:
        ValueError: no such device; another process is at work in `out`; `out` holds a run with another config
            (the message names the differences), an incomplete or a damaged one, or no run but files named like a
            run's.
        OSError: `out` cannot be written, or was deleted meanwhile.
        FloatingPointError: a loss is NaN or infinite.
    """
    path = Path(out)
    with claimed(path):
        stored = read_config(path) if (path / "config.json").exists() and not force else None
        if stored is None:
            _clear(path)
        else:
            config = replace(
                config,
                device=stored.device if config.device == "auto" else config.device,
                threads=config.threads or stored.threads,
            )
        config = config.settled()
        if stored is not None:
            _check_continues(config, stored, path)
        write_file(path / "config.json", json.dumps(asdict(config), indent=2).encode() + b"\n")
        with torch_threads(config.threads):
            _Training(config, path).run(progress)
    return read_run(path)


class _Training:
    """A run at work. What `measure` starts, `write` writes once the probe's thread has solved it."""

    def __init__(self, config: Config, path: Path) -> None:
        self.config, self.path = config, path
        self.task, self.model = start(config)
        self.samples = self.task.train_inputs[: config.samples]
        self.gradients = Gradients(self.model, self.task.train_inputs, self.task.train_labels)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.step = -1  # the last one measured
        self.rows: list[dict] = []
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        if (path / "state.pt").exists():
            self._resume()
        self.unwritten = 0
        self.taken: tuple[int, HostCopy] | None = None  # of the last measurement, until it is settled
        self.settles_late = config.device == "cuda"
        self.clock = time.perf_counter()

    def _resume(self) -> None:
        metrics = self.path / "metrics.csv"
        try:
            state = _read_state(self.path, self.config)
            self.step, self.seconds = state["step"], state["seconds"]
            try:
                self.model.load_state_dict(state["model"])
                self.optimiser.load_state_dict(state["optimiser"])
            except Exception as error:  # what is in the file may be anything
                raise _unreadable(self.path / "state.pt", error) from None
            written = _read_metrics(self.path, self.config) if metrics.exists() else []
            if not written or written[-1]["step"] < self.step:
                raise ValueError(f"{metrics} lacks rows that it had")
        except ValueError as error:
            raise ValueError(f"out: {error}; --force starts the run anew") from None
        self.rows = [row for row in written if row["step"] <= self.step]

    def _update(self) -> None:
        self.gradients()
        self.optimiser.step()

    def _captured(self) -> Callable[[], None]:
        """The update as one CUDA graph, launched as a whole."""

        def set_capturable(value: bool) -> None:  # true only for the capture: a step outside of one warns
            for group in self.optimiser.param_groups:
                group["capturable"] = value

        set_capturable(False)
        stream = torch.cuda.Stream()  # one for both, as autograd remembers where it accumulates gradients
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _warm_up(self._update, self.model, self.optimiser)
        torch.cuda.current_stream().wait_stream(stream)
        set_capturable(True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._update()
        return graph.replay

    def run(self, progress: bool) -> None:
        config = self.config
        if progress and self.step >= 0:
            how = "finished at" if self.step == config.steps else "continues after"
            print(f"{self.path}: {how} step {self.step}")
        if self.step == config.steps:
            return
        if progress:
            done = self.step if self.step >= 0 else -config.every
            count = (config.steps - done) // config.every
            _say_how_long(self.path, self.model, self.samples, (config,), count)
        # Before the probe's thread is there: a capture does not stand other threads' calls of CUDA.
        update = self._captured() if config.device == "cuda" else self._update
        with (
            _probe(self.model, self.samples, config, config.every) as self.probe,
            progress_bar(config.steps, max(self.step, 0), progress) as self.bar,
        ):
            if self.step < 0:
                self.measure(0)
            for step in range(max(self.step, 0) + 1, config.steps + 1):
                update()
                if self.bar:
                    self.bar.update()
                if step % config.every == 0:
                    self.measure(step)
                elif self.unwritten and not self.probe.pending:
                    self.write()
            self.write()

    def measure(self, step: int) -> None:
        self.settle()
        metrics = _evaluate(self.model, self.task)
        states = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        self.taken = step, HostCopy({"metrics": metrics, **states})
        if not self.settles_late:
            self.check_metrics()
        self.tick("training")
        self.probe(step, **metrics)
        self.tick("measuring")
        if not self.settles_late:
            self.settle()
        self.unwritten += 1
        if self.unwritten > 4:  # solving is slower than training from one to the next: bound what waits
            self.write()

    def settle(self) -> None:
        """Checks and saves what the last measurement took. On a card that is left to the next one, which need not wait for it:
        the training goes on meanwhile."""
        if self.taken is None:
            return
        self.check_metrics()
        step, copy = self.taken
        self.taken = None
        self.check_there()
        save_tensors(checkpoint_of(self.path, step), copy.read()["model"])
        self.state = {"step": step, "model": copy.read()["model"], "optimiser": copy.read()["optimiser"]}

    def check_metrics(self) -> None:
        step, copy = self.taken
        for name, value in copy.read()["metrics"].items():
            if not abs(value.item()) < float("inf"):
                raise FloatingPointError(f"training diverged: {name} is {value.item()} at step {step}")

    def write(self) -> None:
        self.settle()
        self.tick("training")
        history = self.probe.history  # waits for what is pending
        self.tick("measuring")
        self.rows += _by_step(row for row in history if row["step"] > self.step)
        self.check_there()
        _write_csv(self.path / "metrics.csv", self.rows, METRICS)
        self.step, self.unwritten = self.state["step"], 0
        save_tensors(self.path / "state.pt", {**self.state, "seconds": self.seconds})
        if self.bar:
            row = self.rows[-1]
            shown = {
                "loss": f"{row['train_loss']:.1e}/{row['test_loss']:.1e}",
                "accuracy": f"{row['train_accuracy']:.2f}/{row['test_accuracy']:.2f}",
                "LMN": "/".join(f"{row[f'lmn_{layer}']:.1f}" for layer in self.config.layers),
            }
            self.bar.set_postfix(shown, refresh=False)

    def check_there(self) -> None:
        """Before a write: a directory that was deleted is not made again, as without its config it would be no run."""
        if not (self.path / "config.json").exists():
            raise FileNotFoundError(f"out: {self.path} was deleted while the run was at work in it")

    def tick(self, activity: str) -> None:
        """Counts the time since the last tick for `activity`."""
        now = time.perf_counter()
        self.seconds[activity] += now - self.clock
        self.clock = now


class HostCopy:
    """Dicts and lists of tensors and plain values as they are now, on the CPU. Tensors of a card come there in one copy, which
    nobody waits for before `read`."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._tensors = [tensor for tensor in tensors_in(content) if tensor.is_cuda]
        self._content = content if self._tensors else deepcopy(content)
        if self._tensors:
            there = packed(self._tensors)
            self._bytes = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
            self._bytes.copy_(there, non_blocking=True)
            self._done = torch.cuda.Event(blocking=True)
            self._done.record()

    def read(self) -> dict[str, Any]:
        if self._tensors:
            self._done.synchronize()
            values = iter(unpacked(self._bytes, self._tensors))
            copied = mapped(self._content, lambda t: next(values) if t.is_cuda else t.clone())
            self._content, self._tensors = copied, []
        return self._content


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of some tensors one after the other, (bytes,) uint8."""
    return torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors])


def unpacked(values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the dtypes and shapes of those that were packed, each in memory of its own."""
    parts = values.split([tensor.nbytes for tensor in like])
    return [part.clone().view(t.dtype).reshape(t.shape) for part, t in zip(parts, like, strict=True)]


def _warm_up(update: Callable[[], None], model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Runs the update a few times, so that all that it sets up at first is there, and undoes it in place: the
    optimiser's state exists afterwards, and counts as none if there was none."""
    parameters = list(model.parameters())
    before = [
        (p.detach().clone(), {name: value.clone() for name, value in optimiser.state.get(p, {}).items()})
        for p in parameters
    ]
    for _ in range(3):
        update()
    with torch.no_grad():
        for p, (weights, moments) in zip(parameters, before, strict=True):
            p.copy_(weights)
            for name, value in optimiser.state[p].items():
                value.copy_(moments[name] if moments else torch.zeros_like(value))


def measure(
    run: str | os.PathLike,
    *,
    layers: Sequence[str] | None = None,
    points: int | None = None,
    rule: str | None = None,
    method: str | Sequence[str] | None = None,
    samples: int | None = None,
    negative: str | None = None,
    device: str = "auto",
    every: int = 1,
    force: bool = False,
    progress: bool = False,
) -> tuple[Path, list[dict]]:
    """Measures a run's checkpoints again; what is None stays as it was in the run.

    Args:
        run: the run's directory.
        layers, points, rule, method, samples, negative, device: as in Config; several methods stand side by side.
        every: only steps that are multiples of it.
        force: replace a table that has steps which this one will not have.
        progress: show a bar (needs tqdm), and say at the beginning how long a measurement of many samples takes.

    Returns:
        RUN/measure-LAYERS-METHODS-RULEPOINTS.csv, written, and its rows: the numbers are lmn_LAYER, or with several
        methods lmn_LAYER_METHOD. Where not all training samples are measured, the name ends in -NUMBERsamples, and in
        -clip where negative eigenvalues count 0.

    Raises:
        ValueError: not a run, a damaged one, no checkpoint, a table that has more, or as Config; another process is at
            work in the run.
    """
    path = Path(run)
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    stored = read_config(path)
    methods = (stored.method,) if method is None else (method,) if isinstance(method, str) else tuple(method)
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(
            f"method: expected some of {', '.join(METHODS)}, each once, got {', '.join(methods)}"
        )
    given = {"layers": layers, "points": points, "rule": rule, "samples": samples, "negative": negative}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    configs = [replace(stored, device=device, method=name, **changes).settled() for name in methods]
    config, together = configs[0], "+".join(methods)
    name = f"measure-{'+'.join(config.layers)}-{together}-{config.rule}{config.points}"
    name += "" if config.samples is None else f"-{config.samples}samples"
    name += "" if config.negative == "absolute" else f"-{config.negative}"
    table = path / f"{name}.csv"
    with claimed(path, "run"), torch_threads(config.threads):
        steps = [step for step in _steps_of(path) if step % every == 0]
        if not steps:
            raise ValueError(f"run: no checkpoints of such steps in {path}")
        if not force and (more := _steps_in(table) - set(steps)):
            raise ValueError(
                f"run: {table} has {len(more)} more steps than this would have, {min(more)} for one; move it away, or "
                "--force to replace it"
            )
        task, model = start(config)
        inputs = task.train_inputs[: config.samples]
        if progress:
            _say_how_long(path, model, inputs, configs, len(steps))
        rows: list[dict] = [{} for _ in steps]
        with progress_bar(len(steps) * len(methods), 0, progress) as bar:
            for each in configs:
                with _probe(model, inputs, each, 1) as probe:
                    for step in steps:
                        load_checkpoint(model, path, step)
                        probe(step)
                        if bar:
                            bar.update()
                    measured = _by_step(probe.history, f"_{each.method}" if len(methods) > 1 else "")
                for row, more in zip(rows, measured, strict=True):
                    row.update(more, method=together)
        _write_csv(table, rows, ())
    return table, rows


def _steps_of(run: Path) -> list[int]:
    """Of its checkpoints, in order."""
    files = sorted(run.glob("checkpoints/step_*.pt"))
    for file in files:
        if not re.fullmatch(CHECKPOINT, file.name):
            raise ValueError(f"run: expected checkpoints named step_ and a number, got {file}")
    return sorted(int(file.stem[5:]) for file in files)


def _steps_in(table: Path) -> set[int]:
    """That a table of `measure` has; none where it does not exist."""
    if not table.exists():
        return set()
    try:
        return {row["step"] for row in _read_csv(table)}
    except ValueError as error:
        raise ValueError(f"run: {error}; move it away, or --force to replace it") from None


def _say_how_long(
    path: Path, model: nn.Module, inputs: Tensor, configs: Sequence[Config], count: int
) -> None:
    """Prints how long a measurement by each of the configs takes, and `count` of them, where that is LONG."""
    if len(inputs) <= TRIAL:
        return
    seconds = sum(expected_seconds(model, inputs, config) for config in configs)
    if seconds > LONG:
        print(
            f"{path}: a measurement of {len(inputs)} samples will take about {_duration(seconds)}, "
            f"{count} of them about {_duration(count * seconds)}; --samples takes fewer samples",
            flush=True,
        )


def expected_seconds(model: nn.Module, inputs: Tensor, config: Config) -> float:
    """How long a measurement of the inputs takes on this machine, from trials with TRIAL / 2 and a few of them.

    The connectivity grows with the square of their number, the eigenproblem, on one core as the probe's, with the cube.
    """
    settings: dict[str, Any] = {"method": config.method, "points": config.points, "rule": config.rule}
    total = 0.0
    for layer in config.layers:
        for few in (16, TRIAL // 2):  # the first loads what a first call loads
            ratio = len(inputs) / few
            f, x = cut(model, layer, inputs[:few])
            begin = time.perf_counter()
            L = connectivity(f, x, **settings)
            if L.is_cuda:
                torch.cuda.synchronize(L.device)
            between = time.perf_counter()
            with torch_threads(1):
                linear_mapping_number(L).item()
            seconds = (between - begin) * ratio**2 + (time.perf_counter() - between) * ratio**3
        total += seconds
    return total


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def read_run(path: str | os.PathLike) -> Run:
    """The run in a directory. Raises ValueError if there is none."""
    path = Path(path)
    config = read_config(path)
    try:
        rows, state = _read_metrics(path, config), _read_state(path, replace(config, device="cpu"))
        if rows[-1]["step"] < state["step"]:
            raise ValueError(f"{path / 'metrics.csv'} lacks rows that it had")
    except FileNotFoundError as error:
        raise ValueError(f"run: {path} has no {Path(error.filename).name} yet") from None
    except ValueError as error:
        raise ValueError(f"run: {error}; lmnfast grok with --force starts the run anew") from None
    return Run(path, config, rows, state["seconds"])


class _Unreadable(ValueError):
    """Of a file that the message names."""


def _unreadable(file: Path, error: Exception) -> _Unreadable:
    return _Unreadable(f"cannot read {file}, {type(error).__name__}: {' '.join(str(error).split())}")


def _read_state(path: Path, config: Config) -> dict:
    """What state.pt holds; ValueError, FileNotFoundError."""
    file = path / "state.pt"
    state = read_tensors(file, config.device)
    try:
        step, seconds = state["step"], state["seconds"]
        if type(step) is not int or step % config.every or not 0 <= step <= config.steps:
            raise ValueError(f"expected a step that is measured, got {step!r}")
        if set(seconds) != set(ACTIVITIES) or not all(isinstance(value, float) for value in seconds.values()):
            raise ValueError(f"expected seconds of {' and '.join(ACTIVITIES)}, got {seconds!r}")
    except (TypeError, KeyError, ValueError) as error:
        raise _unreadable(file, error) from None
    return state


def _read_metrics(path: Path, config: Config) -> list[dict]:
    """The rows of metrics.csv, from step 0 on; ValueError, FileNotFoundError."""
    file = path / "metrics.csv"
    columns = _columns(METRICS, [f"lmn_{layer}" for layer in config.layers])
    rows = _read_csv(file, columns)
    count = training_samples(config.task, p=config.p, bits=config.bits)
    expected = {"samples": config.samples or count} | {
        name: getattr(config, name) for name in ("points", "rule", "method", "negative")
    }
    for number, row in enumerate(rows):
        if row["step"] != number * config.every or any(row[name] != expected[name] for name in expected):
            raise ValueError(f"cannot read {file}: row {number + 1} is not one of this run")
    return rows


def read_config(path: Path) -> Config:
    """The config of the run in a directory. Raises ValueError if there is none."""
    try:
        return Config(**json.loads((path / "config.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"run: {path} is not a run, it holds no config.json") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"run: cannot read {path / 'config.json'}: {error}") from None


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08}.pt"


def load_checkpoint(model: nn.Module, run: Path, step: int) -> None:
    """Gives the model the weights that a run had at a step. Raises ValueError for a file that is missing or damaged."""
    file, device = checkpoint_of(run, step), next(model.parameters()).device
    try:
        weights = read_tensors(file, device)
        try:
            model.load_state_dict(weights)
        except Exception as error:  # what is in the file may be anything
            raise _unreadable(file, error) from None
    except FileNotFoundError as error:
        raise ValueError(f"run: {_unreadable(file, error)}; delete {run} to run it anew") from None
    except ValueError as error:
        raise ValueError(f"run: {error}; delete {run} to run it anew") from None


def save_tensors(path: Path, content: dict) -> None:
    """torch.save of tensors and plain values, loadable with weights_only=True, with a checksum of the whole file.

    The checksum is the comment that may end a zip archive, which torch.load passes over.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getvalue()
    if not archive.endswith(b"\0\0"):  # how long the comment is
        raise ValueError(f"torch.save: expected a zip archive without a comment for {path}")
    archive = archive[:-2] + CHECKSUM_LENGTH.to_bytes(2, "little")
    write_file(path, archive + _checksum(archive))


def _checksum(archive: bytes) -> bytes:
    return b"lmnfast crc32 %08x" % zlib.crc32(archive)


def read_tensors(path: Path, device: str | torch.device = "cpu") -> Any:
    """What save_tensors wrote; ValueError for a damaged file, also where a single byte was changed."""
    content = io.BytesIO(path.read_bytes())
    try:
        archive, comment = content.getvalue()[:-CHECKSUM_LENGTH], content.getvalue()[-CHECKSUM_LENGTH:]
        if comment.startswith(
            b"PK\5\6"
        ):  # no comment, as torch.save alone writes it: only the members have checksums
            with zipfile.ZipFile(content) as members:
                if damaged := members.testzip():
                    raise ValueError(f"the checksum of {damaged} is wrong")
            content.seek(0)
        elif comment != _checksum(archive):
            raise ValueError("its checksum is wrong")
        return torch.load(content, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file raises anything
        raise _unreadable(path, error) from None


def _clear(path: Path) -> None:
    """Removes what a run writes, its config last, and nothing else. Raises ValueError, before, for what is no run."""
    if not (path / "config.json").exists():
        if there := [name for name in LEFT_BEHIND if os.path.lexists(path / name)]:
            raise ValueError(
                f"out: {path} holds {there[0]} but no config.json, so it is no run; choose another --out"
            )
        return
    try:
        found = json.loads((path / "config.json").read_text())
        is_run = found["task"] in TASKS and {"steps", "every", "seed"} <= set(found)
    except (ValueError, TypeError, KeyError, RecursionError):
        is_run = False
    if not is_run:
        raise ValueError(
            f"out: {path} holds a config.json that is no run's, and --force deletes runs alone; choose another --out"
        )
    folders = [path / "checkpoints", path / "figures"]
    if links := [folder for folder in folders if folder.is_symlink()]:
        raise ValueError(
            f"out: {links[0]} is a symbolic link, which --force does not follow; remove it first"
        )
    for folder in (path, *folders):
        for item in folder.iterdir() if folder.is_dir() else ():
            if OWN[folder.name if folder in folders else ""].fullmatch(item.name) and (
                item.is_symlink() or item.is_file()
            ):
                item.unlink()
    for folder in folders:
        with suppress(OSError):  # what else is in there stays
            folder.rmdir()
    (path / "config.json").unlink()


def _some_of(names: Iterable[str]) -> str:
    one = f"(?:{'|'.join(map(re.escape, names))})"
    return rf"{one}(?:\+{one})*"


_MEASURED = rf"-{_some_of(LAYERS)}-{_some_of(METHODS)}-{_some_of(RULES)}\d+(?:-\d+samples)?(?:-clip)?"
# The names of the files that a run writes beside its config, by their folder, and of what a killed write leaves.
OWN = {
    folder: re.compile(rf"(?:{names})(?:\.\d+\.part)?")
    for folder, names in {
        "": rf"metrics\.csv|state\.pt|config\.json\.\d+\.part|measure{_MEASURED}\.csv",
        "checkpoints": CHECKPOINT,
        "figures": rf"figure2-{_some_of(LAYERS)}\.png|methods{_MEASURED}\.png",
    }.items()
}


def _check_continues(config: Config, stored: Config, path: Path) -> None:
    old, new = asdict(stored), asdict(config)
    differences = [
        f"{name} is {old[name]} there, {new[name]} here"
        for name in new
        if old[name] != new[name] and not (name == "steps" and new[name] > old[name])
    ]
    if differences:
        raise ValueError(
            f"out: {path} holds another run: {'; '.join(differences)}; "
            "choose another --out, or --force to delete it"
        )


def start(config: Config) -> tuple[Task, nn.Module]:
    """The task and the untrained model, on the device. One generator draws the split, then the weights."""
    generator = torch.Generator().manual_seed(config.seed)
    task = make_task(config.task, generator, p=config.p, bits=config.bits)
    model = make_model(task.vocabulary, generator, init=config.init, activation=config.activation)
    tensors = {
        f.name: getattr(task, f.name).to(config.device) for f in fields(Task) if f.name != "vocabulary"
    }
    return replace(task, **tensors), model.to(config.device)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _probe(model: nn.Module, inputs: Tensor, config: Config, every: int) -> Probe:
    return Probe(
        model,
        inputs,
        config.layers,
        every=every,
        method=config.method,
        points=config.points,
        rule=config.rule,
        negative=config.negative,
    )


@contextmanager
def progress_bar(total: int, initial: int, progress: bool) -> Iterator:
    """A tqdm bar, or None."""
    if not progress:
        yield None
        return
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file gets a few lines
    with tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, mininterval=interval) as bar:
        yield bar


@torch.no_grad()
def _evaluate(model: nn.Module, task: Task) -> dict[str, Tensor]:
    """METRICS of the model, 0-dim float64 on its device, not waited for."""
    train, test = model(task.train_inputs), model(task.test_inputs)
    return {
        "train_loss": cross_entropy(train, task.train_labels).double(),
        "test_loss": cross_entropy(test, task.test_labels).double(),
        "train_accuracy": (train.argmax(1) == task.train_labels).double().mean(),
        "test_accuracy": (test.argmax(1) == task.test_labels).double().mean(),
        "l2_norm": nn.utils.parameters_to_vector(model.parameters()).double().norm(),
    }


def _by_step(history: Iterable[dict], suffix: str = "") -> list[dict]:
    """The probe's rows, one per step and layer, as one per step; the suffix ends the names of what layers differ in."""
    steps: dict[int, dict] = {}
    for row in history:
        one = steps.setdefault(row["step"], dict(row))
        one |= {f"{name}_{row['layer']}{suffix}": row[name] for name in ("lmn", *SHARES)}
        one |= {
            name: "+".join(sorted({*one[name].split("+"), row[name]})) for name in ("precision", "solver")
        }
    return list(steps.values())


def _write_csv(path: Path, rows: list[dict], metrics: Sequence[str]) -> None:
    columns = _columns(metrics, [name for name in rows[0] if name.startswith("lmn_")])
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    # Seven digits: what float32 holds, and the same again when read back and written.
    table.writerows(
        [f"{row[c]:.7g}" if isinstance(row[c], float) else row[c] for c in columns] for row in rows
    )
    write_file(path, text.getvalue().encode())


def _columns(metrics: Sequence[str], numbers: Sequence[str]) -> list[str]:
    """Of a table with these numbers, each lmn_ and a name."""
    shares = [kind + name.removeprefix("lmn") for kind in SHARES for name in numbers]
    return ["step", *metrics, *numbers, *SETTINGS, *shares]


def _read_csv(path: Path, columns: list[str] | None = None) -> list[dict]:
    """The rows of a table that _write_csv wrote, of these columns if any are given; ValueError for one that is damaged."""

    def typed(name: str, text: str) -> int | str | float:
        value = int(text) if name in INTEGERS else text if name in WORDS else float(text)
        if isinstance(value, float) and not math.isfinite(value) and not name.startswith(SHARES):
            raise ValueError(f"{name} is {text}")
        return value

    content = path.read_bytes()
    try:
        if not content.endswith(b"\n"):
            raise ValueError("its last line has no end")
        head, *lines = csv.reader(io.StringIO(content.decode()))
        if lacking := [name for name in columns or ["step"] if name not in head]:
            why = "another version of lmnfast wrote it, or it is damaged"
            raise _Unreadable(f"{path} lacks the columns {', '.join(lacking)}, {why}")
        if columns and head != columns:
            raise ValueError(f"expected the columns {', '.join(columns)}, got {', '.join(head)}")
        if not lines:
            raise ValueError("it has no rows")
        return [{name: typed(name, text) for name, text in zip(head, line, strict=True)} for line in lines]
    except _Unreadable:
        raise
    except (ValueError, csv.Error) as error:
        raise _unreadable(path, error) from None
